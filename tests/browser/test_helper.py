"""The browser helper: its own tests under Node, and what is made from it: its types and the minified copy."""

from __future__ import annotations

import gzip
import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.programs import missing, node

ROOT = Path(__file__).resolve().parents[2]
TESTS = Path(__file__).with_name("js")
HELPER = ROOT / "assistream_flask" / "static" / "assistream.js"
MINIFIED = HELPER.with_suffix(".min.js")
TYPES = HELPER.with_suffix(".d.ts")
BANNER = "/* assistream.js, minified: change that one */"
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


def tsc() -> str:
    named = os.environ.get("ASSISTREAM_TSC")
    for path in [*([Path(named)] if named else []), ROOT / "node_modules" / "typescript" / "bin" / "tsc"]:
        if path.exists():
            return str(path)
    for folder in ("/usr/lib/node_modules", "/usr/local/lib/node_modules", "/usr/share/nodejs"):
        if (path := Path(folder) / "typescript" / "bin" / "tsc").exists():
            return str(path)
    return missing("TypeScript is not installed: npm install --no-save typescript")


def esbuild() -> str:
    if not (path := ROOT / "node_modules" / ".bin" / "esbuild").exists():
        missing("esbuild is not installed: npm install --no-save esbuild")
    return str(path)


def run(*command: str, **env: str) -> str:
    env = {**os.environ, **env}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=600, env=env)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-8000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def check_made(path: Path, made: str) -> None:
    """Check that the committed file is what is made from the helper now; write it first where it is asked for."""
    if os.environ.get("WRITE_STATIC"):
        path.write_text(made, encoding="utf-8")
    assert path.read_text(encoding="utf-8") == made, "write it anew: WRITE_STATIC=1 pytest tests/browser/test_helper.py"


@pytest.mark.parametrize("path", sorted(TESTS.glob("*.test.mjs")), ids=lambda path: path.name)
def test_the_helper_keeps_its_rules_under_node(path: Path) -> None:
    # More than Node's ten listeners on one signal are no leak here: each request in flight has one.
    run(node(), "--no-warnings", "--test", str(path))


def test_the_helper_type_checks_and_its_declarations_are_generated_from_it(tmp_path: Path) -> None:
    run(node(), tsc(), *OPTIONS, "--declaration", "--emitDeclarationOnly", "--outDir", str(tmp_path), str(HELPER))
    check_made(TYPES, (tmp_path / TYPES.name).read_text(encoding="utf-8"))


def test_the_examples_of_the_guides_to_tools_are_modules(tmp_path: Path) -> None:
    for guide, count in (("approval", 1), ("page_tools", 2)):
        found = re.findall(
            r"^```js\n(.*?)^```", (ROOT / f"docs/guides/{guide}.md").read_text(), re.MULTILINE | re.DOTALL
        )
        assert len(found) == count
        for at, example in enumerate(found):
            path = tmp_path / f"{guide}{at}.mjs"
            path.write_text(example)
            run(node(), "--check", str(path))


def test_the_helper_has_no_dependencies() -> None:
    assert 'from "' not in HELPER.read_text()
    assert "import(" not in HELPER.read_text()


def test_the_minified_copy_is_made_from_the_helper() -> None:
    check_made(MINIFIED, run(esbuild(), "--minify", "--format=esm", f"--banner:js={BANNER}", str(HELPER)))


def test_the_minified_copy_keeps_the_rules_too() -> None:
    run(node(), "--no-warnings", "--test", str(TESTS / "helper.test.mjs"), HELPER=MINIFIED.as_uri())


def test_the_minified_copy_is_at_most_10_kib_gzipped() -> None:
    minified = MINIFIED.read_bytes()
    size = len(gzip.compress(minified, 9, mtime=0))
    assert b"addMessageAndRuns" in minified
    assert size <= MOST_BYTES, f"{size} bytes"
