"""What becomes of one call of a tool, whatever it does: under threads here, and once more under gevent."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime as dt
import enum
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Annotated, Any

import flask
import gevent
import pytest
import sqlalchemy as sa
from gevent import monkey
from pydantic import AfterValidator, BaseModel

from assistream_flask import Assistant, ToolArgumentsError, ToolContext, create_blueprint, current_assistream, tool
from assistream_flask.events import Json
from assistream_flask.platform.async_loop import beside
from assistream_flask.platform.log_throttle import LogThrottle
from assistream_flask.runs.tool_execution import (
    BUSY,
    FAILED,
    INTERRUPTED,
    MOST_OUTPUT,
    Execution,
    Outcome,
    ToolExecutions,
)
from tests.conftest import wait_until
from tests.programs import passes_under_gevent

PATCHED = monkey.is_module_patched("threading")
CONTEXT = ToolContext("thread_1", "run_1", "clerk", "ann", "call_1")
SECONDS = 20.0
"""So long a test waits for what comes at once."""


@pytest.fixture
def executions() -> Iterator[ToolExecutions]:
    made = ToolExecutions(LogThrottle(), most_abandoned=2)
    yield made
    made.close()


def started(
    executions: ToolExecutions,
    function: Callable[..., Any],
    arguments: Json | None = None,
    *,
    within: Callable[[], AbstractContextManager[object]] = nullcontext,
    most_seconds: float | None = None,
    **options: Any,
) -> Execution:
    made = tool(**{"description": "A tool.", **options})(function)
    return executions.start(made, arguments or {}, CONTEXT, within, most_seconds)


def outcome(executions: ToolExecutions, function: Callable[..., Any], *given: Json, **options: Any) -> Outcome:
    execution = started(executions, function, *given, **options)
    assert execution.wait(SECONDS)
    return execution.outcome


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def plain(count: int, context: ToolContext) -> str:
    return f"{count + 1} {context.owner} {flask.current_app.name}"


async def coroutine(count: int, context: ToolContext) -> str:
    await asyncio.sleep(0)
    return plain(count, context)


WAYS = pytest.mark.parametrize(("function", "thread"), [(plain, False), (plain, True), (coroutine, False)])


@WAYS
def test_a_tool_is_called_with_what_its_arguments_say_within_the_apps_context(
    executions: ToolExecutions, function: Callable[..., str], thread: bool
) -> None:
    app = flask.Flask("shop")
    done = outcome(executions, function, {"count": "1"}, within=app.app_context, thread=thread)
    assert done == ("completed", "2 ann shop", None)


@pytest.mark.parametrize("way", ["plain", "thread", "async"])
def test_a_tool_reads_the_apps_database_and_threads(executions: ToolExecutions, way: str, tmp_path: Any) -> None:
    app = flask.Flask("shop")
    app.config.update(SECRET_KEY="x", ASSISTREAM_DATABASE_URL=f"sqlite:///{tmp_path}/threads.sqlite")
    app.register_blueprint(create_blueprint([Assistant("tutor", model="m")], owner=lambda: "ann"))
    engine = sa.create_engine(f"sqlite:///{tmp_path}/app.sqlite")
    with app.app_context():
        thread_id = current_assistream.create_thread(owner="ann")["id"]
        current_assistream.add_message(thread_id, "Hello", owner="ann")

    def look(context: ToolContext) -> dict[str, Any]:
        (entry,) = current_assistream.messages(thread_id, owner=context.owner)
        with engine.connect() as connection:
            return {"two": connection.scalar(sa.text("SELECT 1 + 1")), "by": entry["message"]["role"]}

    async def look_async(context: ToolContext) -> dict[str, Any]:
        return look(context)

    try:
        function = look_async if way == "async" else look
        done = outcome(executions, function, within=app.app_context, thread=way == "thread")
        assert done == ("completed", '{"two":2,"by":"user"}', None)
    finally:
        app.extensions["assistream"].close()
        engine.dispose()


class Item(BaseModel):
    sku: str
    when: dt.date


@dataclasses.dataclass
class Size:
    width: int


class Colour(enum.StrEnum):
    RED = "red"


@pytest.mark.parametrize(
    ("given", "output"),
    [
        ("as it is", "as it is"),
        ("", ""),
        (None, "null"),
        (True, "true"),
        ({"a": [1, 2.5, None]}, '{"a":[1,2.5,null]}'),
        (Item(sku="s", when=dt.date(2026, 1, 2)), '{"sku":"s","when":"2026-01-02"}'),
        ([Size(3)], '[{"width":3}]'),
        (Colour.RED, "red"),
        ({"é": float("nan")}, '{"é":"NaN"}'),
        ("a\0b\ud800", "a\ufffdb\ufffd"),
        (["\ud800"], '["\ufffd"]'),
    ],
)
def test_what_a_tool_gives_is_told_as_text_that_every_database_stores(
    executions: ToolExecutions, given: object, output: str
) -> None:
    assert outcome(executions, lambda: given, name="give") == ("completed", output, None)


def test_a_long_output_is_cut_and_says_so(executions: ToolExecutions) -> None:
    done = outcome(executions, lambda: "x" * 1_234_567, name="give")
    assert done.output == "x" * MOST_OUTPUT + "\n[Cut: these are 100,000 of 1,234,567 characters.]"


WHAT = [
    ValueError("the key sk-abcdefghijkl"),
    SystemExit(3),
    KeyboardInterrupt(),
    gevent.Timeout(),
    gevent.GreenletExit(),
    asyncio.CancelledError(),
]


@pytest.mark.parametrize("raised", WHAT, ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("way", ["plain", "thread", "async"])
def test_what_a_tool_raises_is_a_sentence_for_the_model_and_a_traceback_for_the_log_and_ends_nothing(
    executions: ToolExecutions, caplog: pytest.LogCaptureFixture, raised: BaseException, way: str
) -> None:
    def fail() -> None:
        raise raised

    async def fail_async() -> None:
        raise raised

    function: Callable[[], object] = fail_async if way == "async" else fail
    assert outcome(executions, function, thread=way == "thread") == ("failed", FAILED, "failed")
    (record,) = caplog.records
    assert record.getMessage() == f"tool {function.__name__} failed"
    assert f"in {function.__name__}" in str(record.exc_text)
    assert "sk-abc" not in str(record.exc_text)
    assert outcome(executions, plain, {"count": 1}, within=flask.Flask("shop").app_context).status == "completed"


def test_what_no_json_can_be_made_of_is_an_error_that_the_log_tells(
    executions: ToolExecutions, caplog: pytest.LogCaptureFixture
) -> None:
    assert outcome(executions, lambda: object(), name="give") == ("failed", FAILED, "failed")
    assert "Unable to serialize unknown type" in str(caplog.records[0].exc_text)


def test_an_output_stands_though_the_apps_context_cannot_be_left(
    executions: ToolExecutions, caplog: pytest.LogCaptureFixture
) -> None:
    app = flask.Flask("shop")

    @app.teardown_appcontext
    def fail(_: object) -> None:
        raise OSError("no connection")

    done = outcome(executions, plain, {"count": 1}, within=app.app_context)
    assert done == ("completed", "2 ann shop", None)
    assert caplog.messages == ["after tool plain what it was executed in could not be left"]


def test_an_output_is_made_within_the_apps_context(executions: ToolExecutions) -> None:
    app = flask.Flask("shop")

    def give() -> Iterator[str]:
        return (flask.current_app.name for _ in range(2))

    assert outcome(executions, give, within=app.app_context) == ("completed", '["shop","shop"]', None)


def test_arguments_that_do_not_fit_are_told_to_the_model_and_the_tool_is_not_called(
    executions: ToolExecutions,
) -> None:
    done = outcome(executions, plain, {"count": "many", "more": 1})
    assert (done.status, done.error) == ("failed", "bad arguments")
    assert "count: Input should be a valid integer" in done.output
    assert "more: is not known" in done.output


def test_a_tool_can_say_itself_what_is_wrong_with_its_arguments(
    executions: ToolExecutions, caplog: pytest.LogCaptureFixture
) -> None:
    def refund(order: str) -> None:
        raise ToolArgumentsError(f"There is no order {order}.")

    assert outcome(executions, refund, {"order": "7"}) == ("failed", "There is no order 7.", "bad arguments")
    assert caplog.records == []


def breaks(value: int) -> int:
    return {1: 2}[value]


def test_a_validator_of_the_apps_that_breaks_is_told_to_the_log(
    executions: ToolExecutions, caplog: pytest.LogCaptureFixture
) -> None:
    def pick(value: Annotated[int, AfterValidator(breaks)]) -> None:
        pass

    assert outcome(executions, pick, {"value": 5}) == ("failed", "The arguments are not valid.", "bad arguments")
    assert caplog.messages == ["the arguments of tool pick could not be checked"]
    assert "KeyError" in str(caplog.records[0].exc_text)


# Time


def test_a_tool_that_takes_too_long_is_over_and_its_late_output_is_dropped(executions: ToolExecutions) -> None:
    begun, go, ended = threading.Event(), threading.Event(), threading.Event()

    def slow() -> str:
        begun.set()
        try:
            go.wait(SECONDS)
        finally:
            ended.set()
        return "late"

    execution = started(executions, slow, timeout=1)
    assert begun.wait(SECONDS)
    assert not execution.wait(0.01)
    assert execution.wait()
    assert execution.outcome == Outcome("failed", "Timed out after 1 seconds.", "timed out")
    assert executions.abandoned == (0 if PATCHED else 1)
    if not PATCHED:
        go.set()
    # A greenlet is interrupted in whatever it waits for.
    assert ended.wait(SECONDS)
    until(lambda: executions.abandoned == 0)
    assert execution.outcome.error == "timed out"


def test_a_coroutine_that_takes_too_long_is_cancelled(executions: ToolExecutions) -> None:
    told: list[str] = []

    async def slow() -> None:
        told.append("begun")
        try:
            await asyncio.sleep(SECONDS)
        except asyncio.CancelledError:
            told.append("cancelled")
            raise

    execution = started(executions, slow, timeout=1)
    until(lambda: told == ["begun"])
    assert execution.wait()
    assert execution.outcome.output == "Timed out after 1 seconds."
    until(lambda: told == ["begun", "cancelled"])
    assert executions.abandoned == 0


def test_a_run_may_leave_a_tool_less_time_than_its_own(executions: ToolExecutions) -> None:
    async def slow() -> None:
        await asyncio.sleep(SECONDS)

    assert outcome(executions, slow, most_seconds=0.05).output == "Timed out after 0.05 seconds."
    assert outcome(executions, slow, timeout=0.05, most_seconds=9).output == "Timed out after 0.05 seconds."


@pytest.mark.parametrize("way", ["plain", "thread", "async"])
def test_one_that_is_abandoned_is_over_at_once_and_stays_so(executions: ToolExecutions, way: str) -> None:
    go = threading.Event()

    def slow() -> str:
        go.wait(SECONDS)
        return "late"

    async def slow_async() -> str:
        await asyncio.sleep(SECONDS)
        return "late"

    execution = started(executions, slow_async if way == "async" else slow, thread=way == "thread")
    assert not execution.wait(0.05)
    execution.abandon()
    execution.abandon()
    assert execution.wait(0)
    assert execution.outcome == Outcome("failed", INTERRUPTED, "interrupted")
    go.set()
    until(lambda: executions.abandoned == 0)
    assert execution.outcome.error == "interrupted"


def test_one_that_is_abandoned_before_it_began_is_never_called(executions: ToolExecutions) -> None:
    called: list[int] = []
    for _ in range(200):
        for thread in (False, True):
            execution = started(executions, lambda: called.append(1), name="call", thread=thread)
            execution.abandon()
            if execution.outcome.status == "completed":
                called.pop()
            assert execution.wait(0)
    until(lambda: executions.abandoned == 0)
    if PATCHED:
        assert called == []


def test_threads_that_compute_on_are_counted_and_over_the_cap_none_is_begun(
    executions: ToolExecutions, caplog: pytest.LogCaptureFixture
) -> None:
    go, begun, called = list[int](), list[int](), list[int]()

    def compute() -> None:
        begun.append(1)
        while not go:
            sum(range(1000))

    async def other() -> str:
        return "fine"

    computing = [started(executions, compute, thread=True) for _ in range(2)]
    until(lambda: begun == [1, 1])
    for one in computing:
        one.abandon()
    assert executions.abandoned == 2
    assert outcome(executions, lambda: called.append(1), name="call", thread=True) == ("failed", BUSY, "busy")
    assert (called, caplog.messages) == ([], ["tool call is refused: 2 threads compute for nobody"])
    # What needs no thread goes on.
    assert outcome(executions, other).output == "fine"
    assert outcome(executions, lambda: "x", name="x").output == ("x" if PATCHED else BUSY)
    go.append(1)
    until(lambda: executions.abandoned == 0)
    assert outcome(executions, lambda: called.append(1), name="call", thread=True).status == "completed"


# Many at once


class Crowd:
    """Counts how many are there at the same time."""

    def __init__(self, size: int) -> None:
        self.size, self.here, self.most = size, 0, 0

    def enter(self) -> None:
        self.here += 1
        self.most = max(self.most, self.here)

    @contextmanager
    def wait(self) -> Iterator[None]:
        self.enter()
        yield
        self.here -= 1


def test_a_hundred_coroutines_go_on_at_once(executions: ToolExecutions) -> None:
    crowd = Crowd(100)

    async def join() -> None:
        with crowd.wait():
            while crowd.most < crowd.size:
                await asyncio.sleep(0.01)

    found = [started(executions, join) for _ in range(100)]
    assert [one.wait(SECONDS) for one in found] == [True] * 100
    assert {one.outcome for one in found} == {("completed", "null", None)}
    assert crowd.most == 100


def test_twenty_plain_tools_go_on_at_once(executions: ToolExecutions) -> None:
    crowd = Crowd(20)

    def join() -> None:
        with crowd.wait():
            until(lambda: crowd.most == crowd.size)

    found = [started(executions, join) for _ in range(20)]
    assert [one.wait(SECONDS) for one in found] == [True] * 20
    assert crowd.most == 20


def test_more_threads_than_there_may_be_wait_for_one_and_all_are_done(executions: ToolExecutions) -> None:
    done: list[int] = []

    def work() -> None:
        time.sleep(0.02)
        done.append(1)

    found = [started(executions, work, thread=True) for _ in range(40)]
    assert [one.wait(SECONDS) for one in found] == [True] * 40
    assert len(done) == 40
    assert {one.outcome.status for one in found} == {"completed"}


def test_a_tool_in_a_thread_that_computes_holds_up_nobody(executions: ToolExecutions) -> None:
    ticks, is_over = 0, threading.Event()

    def compute() -> int:
        # Until others were seen to go on.
        end = time.monotonic() + SECONDS
        while ticks < 5 and time.monotonic() < end:
            sum(range(1000))
        return ticks

    def tick() -> None:
        nonlocal ticks
        while not is_over.is_set():
            ticks += 1
            time.sleep(0.01)

    other = threading.Thread(target=tick)
    execution = started(executions, compute, thread=True)
    other.start()
    assert execution.wait(SECONDS)
    is_over.set()
    other.join()
    assert int(execution.outcome.output) >= 5


# The loop of coroutines


def test_coroutines_can_ask_the_network_and_threads(executions: ToolExecutions) -> None:
    async def ask() -> str:
        loop = asyncio.get_running_loop()
        server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        reader, writer = await asyncio.open_connection("localhost", port)
        got = await reader.read()
        writer.close()
        server.close()
        found = await asyncio.to_thread(lambda: "thread")
        return f"{got!r} {found} {len(await loop.getaddrinfo('localhost', port)) > 0}"

    assert outcome(executions, ask) == ("completed", "b'' thread True", None)


def test_loops_elsewhere_go_on_beside_it_with_generators_of_their_own(executions: ToolExecutions) -> None:
    is_over = threading.Event()

    async def count(pause: float) -> AsyncIterator[int]:
        for number in range(5):
            await asyncio.sleep(pause)
            yield number

    async def tool_of_ours() -> list[int]:
        found = []
        while not is_over.is_set():
            found = [number async for number in count(0.001)]
        return found

    async def elsewhere() -> list[int]:
        return [number async for number in count(0.002)]

    execution = started(executions, tool_of_ours)
    for _ in range(50):
        assert asyncio.run(elsewhere()) == [0, 1, 2, 3, 4]
        with pytest.raises(RuntimeError):
            asyncio.get_running_loop()
    is_over.set()
    assert execution.wait(SECONDS)
    assert execution.outcome == Outcome("completed", "[0,1,2,3,4]")


def test_loops_that_others_go_on_beside_in_the_midst_of_a_callback_find_themselves_running_again(
    executions: ToolExecutions,
) -> None:
    others = ToolExecutions(LogThrottle())

    async def work() -> str:
        loop = asyncio.get_running_loop()
        for _ in range(10):
            # Each has others go on under gevent, in the midst of a callback.
            time.sleep(0.001)
            await asyncio.to_thread(time.sleep, 0.001)
            await loop.getaddrinfo("localhost", 80)
            async with asyncio.timeout(SECONDS):
                await asyncio.sleep(0.001)
            assert asyncio.get_running_loop() is loop
            assert asyncio.current_task() is not None
        return "done"

    async def elsewhere() -> str:
        await asyncio.sleep(0.001)
        return "elsewhere"

    under_way = [started(one, work) for one in (executions, others) for _ in range(10)]
    for _ in range(20):
        assert asyncio.run(elsewhere()) == "elsewhere"
        time.sleep(0.001)
    for execution in under_way:
        assert execution.wait(SECONDS)
        assert execution.outcome == Outcome("completed", "done")
    others.close()


def test_what_waits_beside_coroutines_gives_what_it_gives_within_their_context(executions: ToolExecutions) -> None:
    app = flask.Flask("shop")

    def wait() -> str:
        time.sleep(0.01)
        return flask.current_app.name

    def leave() -> str:
        raise SystemExit(3)

    async def ask() -> list[str]:
        found = [await beside("assistream-test", wait)]
        for bad in (lambda: found[1], leave, lambda: next(iter(()))):
            try:
                await beside("assistream-test", bad)
            except Exception as error:
                found.append(type(error).__name__)
        return found

    told = outcome(executions, ask, within=app.app_context).output
    assert told == '["shop","IndexError","RuntimeError","RuntimeError"]'


def test_coroutines_that_never_wait_let_others_go_on(executions: ToolExecutions) -> None:
    is_over: list[bool] = []

    async def spin() -> str:
        while not is_over:
            await asyncio.sleep(0)
        return "over"

    execution = started(executions, spin)
    assert not execution.wait(0.05)
    is_over.append(True)
    assert execution.wait(SECONDS)
    assert execution.outcome.output == "over"


def test_the_end_cancels_coroutines_and_whoever_waits_is_told(executions: ToolExecutions) -> None:
    ended: list[str] = []

    async def slow() -> None:
        try:
            await asyncio.sleep(SECONDS)
        finally:
            ended.append("ended")

    execution = started(executions, slow)
    assert not execution.wait(0.1)
    executions.close()
    assert execution.wait(SECONDS)
    assert execution.outcome == Outcome("failed", INTERRUPTED, "interrupted")
    assert ended == ["ended"]
    executions.close()


def test_the_end_cancels_no_task_before_it_began(executions: ToolExecutions) -> None:
    told: list[str] = []

    async def inner() -> None:
        told.append("begun")
        try:
            await asyncio.sleep(SECONDS)
        finally:
            told.append("ended")

    async def outer(coroutine: Coroutine[Any, Any, None]) -> None:
        await coroutine

    async def begin() -> None:
        loop, tasks = asyncio.get_running_loop(), list[asyncio.Task[None]]()
        closing = threading.Thread(target=executions.close)
        closing.start()
        # By then the loop ends after its next turn, which has another task made in that of the end.
        time.sleep(0.1)
        loop.call_soon(loop.call_soon, lambda: tasks.append(loop.create_task(outer(inner()))))
        await asyncio.sleep(SECONDS)

    execution = started(executions, begin)
    assert execution.wait(SECONDS)
    executions.close()
    wait_until(lambda: told == ["begun", "ended"], 5)


def test_a_task_that_breaks_off_the_loop_takes_no_other_with_it(
    executions: ToolExecutions, caplog: pytest.LogCaptureFixture
) -> None:
    async def bad() -> None:
        raise SystemExit(3)

    async def begin() -> str:
        task = asyncio.get_running_loop().create_task(bad())
        await asyncio.sleep(0.05)
        return repr(task.exception())

    assert outcome(executions, begin).output == "SystemExit(3)"
    assert "a task broke off the loop of coroutines; it goes on" in caplog.messages


ENDS = """
import os, sys, time
if sys.argv[1] == "gevent":
    from gevent import monkey; monkey.patch_all()
from contextlib import nullcontext
from assistream_flask import tool
from assistream_flask.platform.log_throttle import LogThrottle
from assistream_flask.runs.tool_execution import ToolExecutions
from tests.unit.test_tool_execution import CONTEXT

def compute():
    while True:
        sum(range(1000))

async def compute_async():
    compute()

executions = ToolExecutions(LogThrottle())
tools = [tool(thread=True, description="x")(compute)]
if sys.argv[1] == "threads":
    tools.append(tool(description="x")(compute_async))
for one in tools:
    execution = executions.start(one, {}, CONTEXT, nullcontext, 0.2)
    assert execution.wait() and execution.outcome.error == "timed out"
print(executions.abandoned)
executions.close()
"""


@pytest.mark.parametrize("kind", ["gevent", "threads"])
def test_a_process_ends_whatever_its_tools_do(kind: str) -> None:
    done = subprocess.run([sys.executable, "-c", ENDS, kind], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr
    assert ("does not end for it" in done.stderr) == (kind == "threads")


@pytest.mark.slow
def test_all_of_this_holds_under_gevent() -> None:
    passes_under_gevent(__file__, "not under_gevent and not process_ends")


PROFILED = """
from gevent import monkey; monkey.patch_all()
import asyncio, threading, time
import greenlet
from assistream_flask.platform.async_loop import AsyncLoop

loop, seen = AsyncLoop(), []

def first(event, args):
    seen.append("first")

def profiler(event, args):
    seen.append("profiler")

def chained(event, args):
    before[0](event, args)

def done(coroutine):
    found, over = [], threading.Event()
    loop.submit(coroutine, lambda given: (found.append(given), over.set()))
    assert over.wait(20)
    return found[0]

async def begins():
    greenlet.settrace(profiler)
    return True

async def waits(begun):
    begun.set()
    time.sleep(0.05)
    return asyncio.get_running_loop() is not None

async def usual():
    await asyncio.sleep(0)
    time.sleep(0.001)
    return asyncio.get_running_loop() is not None

greenlet.settrace(first)
assert done(usual()) and greenlet.gettrace() is first
assert done(begins()) and done(usual()) and greenlet.gettrace() is profiler

# While a coroutine waits in the midst of a callback: one that calls what was there, and one that does not.
for one in (chained, profiler):
    greenlet.settrace(None)
    begun, over = threading.Event(), threading.Event()
    loop.submit(waits(begun), lambda given: over.set())
    assert begun.wait(20)
    before = [greenlet.gettrace()]
    greenlet.settrace(one)
    if one is chained:
        assert over.wait(20)
    time.sleep(0.2)
    for _ in range(3):
        assert done(usual()) and greenlet.gettrace() is one
    greenlet.settrace(None)
    assert done(usual()) and greenlet.gettrace() is None
loop.stop()
print("fine")
"""


def test_who_looks_at_switches_beside_a_loop_goes_on_looking_and_the_loop_goes_on() -> None:
    done = subprocess.run([sys.executable, "-c", PROFILED], capture_output=True, text=True, timeout=60)
    assert done.stdout == "fine\n", done.stderr
