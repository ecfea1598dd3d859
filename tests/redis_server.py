"""A real redis-server in a subprocess, on a free port."""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis

from tests.programs import free_port, program


def _documented() -> str:
    text = (Path(__file__).resolve().parent.parent / "docs/guides/deploy.md").read_text()
    found = re.search(
        r"^ *redis-cli ACL SETUSER assistream on '>password' (.*?)\n *```", text, re.DOTALL | re.MULTILINE
    )
    assert found is not None
    return " ".join(shlex.split(found[1]))


DOCUMENTED = _documented()
"""What docs/guides/deploy.md has a Redis user be allowed."""


class RedisServer:
    """One server that keeps nothing, until :meth:`stop`; ``more`` are options of its command."""

    def __init__(self, folder: Path, *more: str) -> None:
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._empty = iter(range(1, 16_000))
        self._folder, self._more = folder, more
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, where it does not run, and wait until it answers. Fails, and never skips, when ``CI`` is set."""
        if self._process is not None and self._process.poll() is None:
            return
        redis_server = program("redis-server")
        options = ["--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        options += ["--databases", "16000", *self._more]
        self._process = subprocess.Popen(
            [redis_server, *options, "--dir", str(self._folder)], stdout=subprocess.DEVNULL
        )
        end = time.monotonic() + 20
        while True:
            try:
                self.ask("PING")
                return
            except redis.ConnectionError:
                assert time.monotonic() < end
                time.sleep(0.02)

    def empty_url(self) -> str:
        """Give the URL of a database of its own."""
        return self.url.removesuffix("0") + str(next(self._empty))

    def url_of(self, rule: str, database: int = 0) -> str:
        """Give the URL of a user of its own, with the rights in ``rule``, as ACL SETUSER takes them."""
        self.ask("ACL", "SETUSER", f"user{database}", "reset", "on", ">pa55", *rule.split())
        return f"redis://user{database}:pa55@127.0.0.1:{self.port}/{database}"

    def ask(self, *command: str) -> object:
        """Give Redis's answer to a command."""
        with redis.Redis.from_url(self.url) as client:
            return client.execute_command(*command)

    def stop(self) -> None:
        """End it, and what it held is gone."""
        self.signal(signal.SIGKILL)
        if self._process is not None:
            self._process.wait(20)

    def signal(self, how: signal.Signals) -> None:
        """SIGSTOP makes it silent, SIGCONT lets it go on."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(how)


@contextmanager
def running_redis(folder: Path, *more: str) -> Iterator[RedisServer]:
    """Give a started server, ended whatever happens."""
    server = RedisServer(folder, *more)
    try:
        server.start()
        yield server
    finally:
        server.signal(signal.SIGCONT)
        server.stop()


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisServer]:
    """Give a server that the test may do anything to."""
    with running_redis(tmp_path) as server:
        yield server


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """Give a server for all tests of a file."""
    with running_redis(tmp_path_factory.mktemp("redis")) as server:
        yield server
