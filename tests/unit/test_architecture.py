"""The house: which room may import which, what an import may do, and the picture of it in the docs."""

from __future__ import annotations

import ast
import functools
import graphlib
import importlib
import os
import re
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import assistream_flask

HOUSE = Path(assistream_flask.__file__).parent
MODULES = sorted(HOUSE.rglob("*.py"))
PICTURE = HOUSE.parent / "docs/explanation/rooms.md"

# The rule: a module imports from its own room and from those before it in this list, and in no circle. A room is a
# folder; "words" are the modules beside the folders, which every room may know, and "face" is what apps import. What an
# app has is a room of one file, which joins the rooms below to Flask.
WORDS, APP, FACE = "words", "extension", "face"
ROOMS = (WORDS, "platform", "log", "fast", "upstream", "store", "runs", APP, "web", FACE)
# An app names a dialect where it makes an Assistant, so that is checked there; it stands where apps look for it. So do
# tools, which are what a dialect tells a model of, and the servers that have some.
BESIDE = {"assistants": "upstream", "mcp": "upstream", "tools": "upstream"}
# The offline server imports none of them, and none of them imports it.
ALONE = "testing"


def name_of(path: Path) -> str:
    parts = path.relative_to(HOUSE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(name: str) -> str:
    if not name:
        return FACE
    first = name.split(".")[0]
    if first in BESIDE:
        return BESIDE[first]
    return first if (HOUSE / first).is_dir() or first == APP else WORDS


NAMES = {name_of(path): path for path in MODULES}


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Give full names of imported modules, ours as ``assistream_flask...``, wherever in the file: within functions and
    for types only too."""
    package = ["assistream_flask", *path.relative_to(HOUSE).parts[:-1]]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{module}.{alias.name}"
                ours = full.removeprefix("assistream_flask.") in NAMES
                yield (full if ours else module), node.lineno


def ours(path: Path) -> Iterator[tuple[str, int]]:
    for module, line in imports(path):
        if module == "assistream_flask" or module.startswith("assistream_flask."):
            yield module.removeprefix("assistream_flask").removeprefix("."), line


def for_types(path: Path) -> set[int]:
    """Give the lines of imports that are for types only."""
    blocks = [node for node in tree(path).body if isinstance(node, ast.If)]
    return {inner.lineno for node in blocks if ast.unparse(node.test) == "TYPE_CHECKING" for inner in node.body}


GRAPH = {name: sorted({other for other, _ in ours(path)}) for name, path in NAMES.items()}


def docstring(name: str) -> str:
    return ast.get_docstring(tree(NAMES[name])) or ""


def sentences(text: str) -> list[str]:
    return re.findall(r"\S.*?[.!?](?=\s|$)", text, re.DOTALL)


def test_every_module_is_in_a_room() -> None:
    assert {room_of(name) for name in NAMES} == {*ROOMS, ALONE}


def test_a_room_imports_from_those_before_it_only() -> None:
    wrong = [
        f"{name}:{line} imports {other}"
        for name, path in NAMES.items()
        if room_of(name) != ALONE
        for other, line in ours(path)
        if ROOMS.index(room_of(other)) > ROOMS.index(room_of(name))
    ]
    assert wrong == []


def test_modules_import_each_other_in_no_circle() -> None:
    # The classes of the offline server name each other's types.
    alone = {name: path for name, path in NAMES.items() if room_of(name) == ALONE}
    there = {name: [one for one, line in ours(path) if line not in for_types(path)] for name, path in alone.items()}
    try:
        graphlib.TopologicalSorter({**GRAPH, **there}).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_every_folder_says_in_two_sentences_what_is_in_it() -> None:
    folders = {name for name, path in NAMES.items() if path.name == "__init__.py"}
    assert {path.parent for path in MODULES} == {NAMES[name].parent for name in folders}
    rooms = {room for room in ROOMS if room not in (WORDS, APP, FACE)}
    assert {name: len(sentences(docstring(name))) for name in rooms} == dict.fromkeys(rooms, 2)
    # A room has nothing else there: to import a module of it is to import no other.
    assert [name for name in rooms if len(tree(NAMES[name]).body) != 1] == []
    assert [name for name in folders - rooms if len(sentences(docstring(name))) < 2] == []


def test_imports_among_ourselves_stand_at_the_top_where_they_cannot_hide_a_circle() -> None:
    for path in MODULES:
        top = {node.lineno for node in tree(path).body} | for_types(path)
        # What needs an extra is imported when it is asked for.
        hidden = [other for other, line in ours(path) if line not in top]
        assert set(hidden) <= {"log.redis", "upstream.mcp_session"}, path


def test_the_offline_server_stands_alone_and_the_rest_does_not_know_it() -> None:
    for path in MODULES:
        inside = room_of(name_of(path)) == ALONE
        for other, line in ours(path):
            assert (room_of(other) == ALONE) == inside, f"{path}:{line}"


# The picture


def first_line(name: str) -> str:
    return sentences(docstring(name))[0].replace("\n", " ").rstrip(".")


def needs_of(room: str) -> set[str]:
    """Give the rooms that a room imports from."""
    return {room_of(other) for name, others in GRAPH.items() if room_of(name) == room for other in others} - {room}


def picture() -> str:
    """Give the page of the docs, made from the imports and the docstrings."""
    drawn = [room for room in ROOMS if room not in (WORDS, FACE)]
    arrows = [f"  {room} --> {other}" for room in reversed(drawn) for other in drawn if other in needs_of(room)]
    lines = [
        "# The rooms",
        "",
        "<!-- Made by tests/unit/test_architecture.py: ASSISTREAM_WRITE_ROOMS=1 has it write this file. -->",
        "",
        "`assistream_flask` is a handful of rooms, each a folder. A module imports from its own room and from those",
        "below it, never from one above, and no modules import each other in a circle.",
        "`tests/unit/test_architecture.py` has the order of the rooms, and holds every import to it, those within",
        "functions included. This page is made from the imports and the docstrings by the same test.",
        "",
        "```mermaid",
        "graph TD",
        *arrows,
        "```",
        "",
        "Every room may import the modules that stand beside the folders, too, but for those that are told here as a",
        f"room's. `{ALONE}` imports nothing of the rest, and nothing imports it.",
    ]
    for room in [*reversed(drawn), WORDS, ALONE]:
        names = sorted(name for name in NAMES if room_of(name) == room and (name != room or room == APP))
        title = {WORDS: "Beside the folders", APP: "extension.py"}.get(room, f"{room}/")
        lines += ["", f"## {title}", ""]
        if room not in (WORDS, APP):
            said = " ".join(" ".join(sentences(docstring(room))[:2]).split())
            lines += [*textwrap.wrap(said, 120), ""]
        lines.append("```")
        for name in names:
            label = f"{name} (beside the folders)" if name in BESIDE else name.removeprefix(room + ".")
            lines.append(f"{label}: {first_line(name)}")
            others = [other for other in GRAPH[name] if room_of(other) != WORDS or room == WORDS]
            if others:
                lines += textwrap.wrap(
                    "imports " + ", ".join(others), 110, initial_indent=" " * 4, subsequent_indent=" " * 8
                )
        lines.append("```")
    return "\n".join(lines) + "\n"


def test_the_docs_have_the_picture_of_the_rooms_as_they_are() -> None:
    if os.environ.get("ASSISTREAM_WRITE_ROOMS"):
        PICTURE.parent.mkdir(exist_ok=True)
        PICTURE.write_text(picture())
    assert PICTURE.read_text() == picture(), (
        "write it anew: ASSISTREAM_WRITE_ROOMS=1 pytest tests/unit/test_architecture.py"
    )


# What a module may do


def test_only_the_routes_and_the_extension_import_flask() -> None:
    found = {
        name_of(path)
        for path in MODULES
        for module, _ in imports(path)
        if module.split(".")[0] in ("flask", "werkzeug")
    }
    routes = {f"routes_{name}" for name in ("threads", "runs", "events", "tools")}
    others = {"answers", "auth", "blueprint", "idempotency"}
    assert found == {"extension", *(f"web.{name}" for name in routes | others)}


def test_neither_sse_nor_events_nor_errors_knows_openai() -> None:
    for path in MODULES:
        if name_of(path) in (
            "sse",
            "events",
            "errors",
            "log.protocol",
            "log.memory",
            "store.sql",
            "store.tables",
            "runs.message_accumulator",
        ):
            assert not [module for module, _ in imports(path) if module.split(".")[0] == "openai"], path


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_the_top_of_a_module_only_imports_and_defines(path: Path) -> None:
    if path.name in ("__main__.py", "env.py"):
        return
    for node in tree(path).body:
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        typing = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        functions = ast.FunctionDef | ast.AsyncFunctionDef
        kinds = ast.Import | ast.ImportFrom | ast.Assign | ast.AnnAssign | functions | ast.ClassDef
        definition = isinstance(node, kinds)
        assert docstring or typing or definition, f"{path}:{node.lineno}"


# Names with an underscore that a library documents: those of named tuples, and of SQLAlchemy's rows.
DOCUMENTED = {"_asdict", "_fields", "_mapping", "_replace"}


def names(tree: ast.AST) -> Iterator[tuple[str, int, bool]]:
    """Give the names in a module that are defined, or asked of an object, each with its line and which it is."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name, node.lineno, True
            case ast.Name(id=name, ctx=ast.Store()):
                yield name, node.lineno, True
            case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
                yield name, node.lineno, True
            case ast.Attribute(attr=name):
                yield name, node.lineno, False
            case ast.Call(func=ast.Name(id="getattr" | "hasattr"), args=[_, ast.Constant(value=str(name)), *_]):
                yield name, node.lineno, False


def test_private_names_of_other_libraries_are_for_two_rooms_only() -> None:
    found = [
        (path, *one) for path in MODULES for one in names(ast.parse(path.read_text())) if re.match("_[^_]", one[0])
    ]
    ours = {name for _, name, _, is_defined in found if is_defined} | DOCUMENTED
    others = {
        (room_of(name_of(path)), name) for path, name, _, is_defined in found if not is_defined and name not in ours
    }
    # What is looked for here is found.
    assert {("fast", "_mounts"), ("fast", "_network_backend"), ("platform", "_prepare_request")} <= others
    assert [one for one in others if one[0] not in ("fast", "platform")] == []


def test_every_library_that_is_imported_is_a_dependency() -> None:
    project = tomllib.loads((HOUSE.parent / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    optional = [one for name in ("mcp", "otel", "postgres", "redis") for one in extras[name]]
    declared = [*project["dependencies"], *optional]
    other_names = {"griffelib": "griffe", "opentelemetry-api": "opentelemetry"}
    known = {other_names.get(name := re.split(r"[\[<>=]", one)[0], name).replace("-", "_") for one in declared}
    imported = {module.split(".")[0] for path in MODULES for module, _ in imports(path)}
    assert {"click", "greenlet", "openai"} <= imported
    assert imported - known - sys.stdlib_module_names == {"assistream_flask"}


WATCH = """
import sys, threading
import flask, openai, httpx2, sqlalchemy, sqlalchemy.dialects.sqlite, gevent, gevent.monkey, werkzeug  # not ours
seen = []
def watch(event, args):
    if event.startswith(("socket.", "sqlite3.", "subprocess.", "os.system", "os.fork")) or "start_new_thread" in event:
        seen.append(event)
    if event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+") and ".pyc" not in str(args[0]):
        seen.append((event, args))
sys.addaudithook(watch)
import assistream_flask.testing
from assistream_flask import *
assert create_blueprint and "assistream_flask.runs.executor" in sys.modules
assert seen == [], seen
assert threading.enumerate() == [threading.main_thread()]
assert gevent._hub_local.get_hub_if_exists() is None
assert not gevent.monkey.is_module_patched("threading")
import signal
assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
"""


def test_importing_starts_no_thread_and_opens_no_socket_or_file() -> None:
    done = subprocess.run([sys.executable, "-W", "error", "-c", WATCH], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_imported_when_it_is_asked_for_and_type_checkers_see_the_same() -> None:
    (typed,) = (node for node in tree(HOUSE / "__init__.py").body if isinstance(node, ast.If))
    homes = {
        alias.name: f"assistream_flask.{node.module}"
        for node in typed.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert set(homes) == set(assistream_flask.__all__) <= set(dir(assistream_flask))
    for name, home in homes.items():
        assert getattr(assistream_flask, name) is getattr(importlib.import_module(home), name)
    with pytest.raises(AttributeError, match="no attribute 'create_blueprints'"):
        assistream_flask.create_blueprints  # type: ignore[attr-defined]  # noqa: B018


def test_the_offline_server_needs_nothing_but_the_standard_library() -> None:
    # -S leaves out what is installed.
    command = [sys.executable, "-S", "-m", "assistream_flask.testing", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HOUSE.parent, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "offline" in done.stdout
