"""The house: who may import whom, and what an import may do."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import assistream_flask

HOUSE = Path(assistream_flask.__file__).parent
MODULES = sorted(HOUSE.rglob("*.py"))

# A module may import those of its own folder's leaves and of lower floors. What stands on one floor
# does not know of its neighbours.
FLOORS: list[set[str]] = [
    {
        "platform",
        "fast",
        "upstream",
        "store",
        "log",
        "runs",
        "web",
        "errors",
        "version",
        "platform.interrupt",
        "platform.once",
        "fast.read_gate",
        "fast.event_template",
        "upstream.stale_connection",
    },
    {"platform.log_throttle"},
    {
        "sse",
        "events",
        "assistants",
        "settings",
        "store.tables",
        "store.migrations",
        "fast.batch_scheduler",
        "store.database",
        "fast.chunk_reader",
    },
    {"web.validation", "log.protocol", "store.sql", "upstream.errors", "upstream.deltas"},
    {"upstream.event_reader"},
    {"upstream.items"},
    {
        "platform.gunicorn",
        "fast.direct_send",
        "log.thread_buffer",
        "log.redis_requirements",
        "upstream.assistants_v2",
        "upstream.chat",
        "upstream.responses",
        "store.leases",
    },
    {"log.cursor"},
    {"log.memory", "log.redis", "upstream.background"},
    {"upstream.answer_stream", "runs.message_accumulator", "runs.snapshot", "runs.log_appender"},
    {"runs.active_run", "runs.shared_snapshots"},
    {"runs.delta_publisher", "runs.checkpointer", "runs.other_workers"},
    {"runs.executor", "web.event_response", "web.doctor", "runs.shutdown"},
    {"runs.runtime"},
    {"web.event_streams"},
    {"web.blueprint"},
    {""},
]


def name_of(path: Path) -> str:
    parts = path.relative_to(HOUSE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {name_of(path) for path in MODULES}


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Gives full names of imported modules, ours as ``assistream_flask...``, wherever in the file."""
    package = ["assistream_flask", *path.relative_to(HOUSE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
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


def floor(name: str) -> int:
    return next(at for at, names in enumerate(FLOORS) if name in names)


def test_every_module_has_its_floor() -> None:
    # Alembic runs the files in migrations by themselves.
    core = {name for name in NAMES if name.split(".")[0] != "testing" and not name.startswith("store.migrations.")}
    assert core == set().union(*FLOORS)


def test_imports_point_downward_only() -> None:
    wrong = [
        f"{name_of(path)}:{line} imports {other}"
        for path in MODULES
        if name_of(path).split(".")[0] != "testing"
        for other, line in ours(path)
        if floor(other) >= floor(name_of(path))
    ]
    assert wrong == []


def test_imports_among_ourselves_stand_at_the_top_where_they_cannot_hide_a_circle() -> None:
    for path in MODULES:
        top = {node.lineno for node in ast.parse(path.read_text()).body}
        guarded = {
            inner.lineno
            for node in ast.parse(path.read_text()).body
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            for inner in node.body
        }
        # What needs an extra is imported when it is asked for.
        hidden = [other for other, line in ours(path) if line not in top | guarded]
        assert set(hidden) <= {"log.redis"}, path


def test_the_offline_server_stands_alone_and_the_rest_does_not_know_it() -> None:
    for path in MODULES:
        inside = name_of(path).split(".")[0] == "testing"
        for other, line in ours(path):
            assert (other.split(".")[0] == "testing") == inside, f"{path}:{line}"


def test_only_the_blueprint_imports_flask() -> None:
    found = {
        name_of(path)
        for path in MODULES
        for module, _ in imports(path)
        if module.split(".")[0] in ("flask", "werkzeug")
    }
    assert found == {"web.blueprint"}


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
    for node in ast.parse(path.read_text()).body:
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        typing = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        kinds = ast.Import | ast.ImportFrom | ast.Assign | ast.AnnAssign | ast.FunctionDef | ast.ClassDef
        definition = isinstance(node, kinds)
        assert docstring or typing or definition, f"{path}:{node.lineno}"


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
import assistream_flask
import assistream_flask.testing
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
