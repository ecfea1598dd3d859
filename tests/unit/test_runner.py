"""A run's life, through the routes, with real threads and real HTTP."""

from __future__ import annotations

import contextlib
import gc
import socket
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from flask import current_app
from sqlalchemy.exc import OperationalError

from assistream_flask import Assistant, lean
from assistream_flask.events import Event
from assistream_flask.platform.interrupt import Interrupted
from assistream_flask.runs import executor, recovery, runner
from assistream_flask.runs.active_run import ActiveRun
from assistream_flask.runs.run_changes import RunChanges
from assistream_flask.runs.runtime import Runtime
from assistream_flask.store import leases
from assistream_flask.store.sql import ThreadStore
from assistream_flask.testing import OfflineServer, Reply, Request
from assistream_flask.upstream.items import marked
from tests.conftest import ASSISTANTS, KEY, OVER, Caller, MakeApp, text, wait_until

STALLED = Reply("one two three", fault="stall")
"""Says "one two", then nothing."""


def me() -> str:
    return "me"


class Held:
    """Replies that wait before their headers until they are let go; each says who speaks."""

    def __init__(self) -> None:
        self._free = threading.Event()

    def __call__(self, request: Request) -> str:
        assert self._free.wait(20)
        return f"I am {request.instructions.split()[-1]}"

    def let_go(self) -> None:
        self._free.set()


@pytest.fixture
def held(server: OfflineServer) -> Iterator[Held]:
    held = Held()
    server.replies = held
    yield held
    held.let_go()


@pytest.mark.parametrize("client", ["lean", "ordinary"])
@pytest.mark.parametrize(
    "fault", [None, "cut", "ends_early", "500", "malformed", "error_flat", "response_failed", "incomplete", "stall"]
)
def test_a_run_that_is_over_is_freed_without_the_garbage_collector(
    make_app: MakeApp, server: OfflineServer, monkeypatch: pytest.MonkeyPatch, fault: str | None, client: str
) -> None:
    ours = server.client(api_key=KEY) if client == "ordinary" else None
    caller = Caller(make_app(client=ours, stall_seconds=0.3 if fault == "stall" else 30))
    runs: list[weakref.ref[ActiveRun]] = []
    forget = executor.Executor.forget

    def noted(self: executor.Executor, active: ActiveRun) -> None:
        runs.append(weakref.ref(active))
        forget(self, active)

    monkeypatch.setattr(executor.Executor, "forget", noted)
    server.replies = Reply("one two three", fault=fault)
    gc.disable()
    try:
        caller.run("tutor")
        caller.wait()
        wait_until(lambda: bool(runs) and runs[0]() is None)
    finally:
        gc.enable()


def says(caller: Caller, run_id: str, words: str) -> None:
    wait_until(lambda: text(caller.entry(run_id)) == words)


def state(caller: Caller, run_id: str) -> tuple[str, str | None]:
    run = caller.entry(run_id)["run"]
    return run["status"], run["last_error"] and run["last_error"]["code"]


def ended(caller: Caller, run_id: str) -> tuple[str, str | None]:
    wait_until(lambda: state(caller, run_id)[0] in OVER, 20)
    return state(caller, run_id)


def shorten_leases(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    for module in (leases, recovery, runner):
        monkeypatch.setattr(module, "LEASE_SECONDS", seconds)
    # As often in a lease as ever: a worker that was not heard of for half of one takes nothing over.
    monkeypatch.setattr(leases, "_RENEW_SECONDS", seconds / 10)


def incomplete(caller: Caller, run_id: str) -> str | None:
    message = caller.entry(run_id)["message"]
    assert message["status"] == "incomplete"
    reason: str | None = message["incomplete_details"]["reason"]
    return reason


# Order and context


def test_no_parallel_run_sees_a_reply_of_its_own_group_however_quick_it_was(
    make_app: MakeApp, server: OfflineServer
) -> None:
    server.replies = "Quick."
    caller = Caller(make_app())
    for number in range(3):
        caller.run(*["tutor", "critic"] * 8, content=f"Question {number}")
        caller.wait(30)
        asked = [one for one in server.requests if one.messages[-1][1].endswith(f"Question {number}")]
        assert len(asked) == 16
        for one in asked:
            told = "\n\n".join(text for _, text in one.messages)
            assert [told.count("Quick."), told.count("Question")] == [16 * number, number + 1]


def test_nothing_unreadable_from_upstream_holds_up_the_thread(make_app: MakeApp, server: OfflineServer) -> None:
    server.replies = [Reply("Look.", annotations=({"score": float("nan")},)), "Fine."]
    caller = Caller(make_app())
    (first,) = caller.run("tutor")
    assert ended(caller, first) == ("failed", "upstream_malformed")
    (second,) = caller.run("tutor")
    assert ended(caller, second) == ("completed", None)


def test_a_viewer_hears_of_another_workers_run_that_ended_before_the_first_sweep(
    make_app: MakeApp, server: OfflineServer, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep, sweeps = runner.Runner.sweep, threading.Event()
    monkeypatch.setattr(runner.Runner, "sweep", lambda self: sweeps.is_set() and sweep(self))
    old, new = make_app(owner=me), make_app(owner=me)
    caller = Caller(old)
    (run_id,) = caller.run("tutor")
    events = new.test_client().get(f"{caller.url}/events", buffered=False).iter_encoded()
    assert b'"in_progress"' in next(events)
    held.let_go()
    assert ended(caller, run_id) == ("completed", None)
    sweeps.set()
    wait_until(lambda: b'"status":"in_progress"' not in next(events))


def test_a_client_is_made_in_the_apps_context(make_app: MakeApp, server: OfflineServer) -> None:
    from flask import current_app

    made: list[str] = []
    with server.client() as ours:

        def client() -> openai.OpenAI:
            made.append(current_app.name)
            return ours

        caller = Caller(make_app(client=client))
        (run_id,) = caller.run("tutor")
        assert ended(caller, run_id) == ("completed", None)
    assert made == ["app"]


def test_parallel_runs_start_at_once_and_see_the_thread_up_to_the_users_message(
    make_app: MakeApp, server: OfflineServer, held: Held
) -> None:
    caller = Caller(make_app())
    caller.run("tutor", "critic", "poet")
    server.wait_for(3)
    held.let_go()
    entries = caller.wait()
    assert [text(entry) for entry in entries] == ["Hi", "I am tutor.", "I am critic.", "I am poet."]
    assert [request.messages for request in server.requests] == [[("user", "Hi")]] * 3


def test_sequential_runs_see_the_replies_before_them(make_app: MakeApp, server: OfflineServer, held: Held) -> None:
    held.let_go()
    caller = Caller(make_app())
    caller.run("tutor", "critic", "tutor", mode="sequential")
    caller.wait()
    assert [request.messages for request in server.requests] == [
        [("user", "Hi")],
        [("user", "Hi\n\n" + marked("Tutor", "I am tutor."))],
        [("user", "Hi"), ("assistant", "I am tutor."), ("user", marked("Critic", "I am critic."))],
    ]


def test_the_same_assistant_may_be_asked_twice_at_once(make_app: MakeApp, held: Held) -> None:
    held.let_go()
    caller = Caller(make_app())
    caller.run("tutor", "tutor")
    assert [text(entry) for entry in caller.wait()] == ["Hi", "I am tutor.", "I am tutor."]


def test_a_busy_thread_queues_and_no_group_sees_half_an_answer(
    make_app: MakeApp, server: OfflineServer, held: Held
) -> None:
    caller = Caller(make_app())
    runs = caller.run("tutor", "critic", content="one")
    runs += caller.run("poet", content="two")
    runs += caller.run("tutor", content="three")
    order = [entry["message"]["id"] for entry in caller.entries()]
    server.wait_for(2)
    assert [state(caller, run)[0] for run in runs] == ["in_progress", "in_progress", "queued", "queued"]
    held.let_go()
    entries = caller.wait()
    assert len(server.requests) == 4
    tutor, critic, poet = (marked(name, f"I am {name.lower()}.") for name in ("Tutor", "Critic", "Poet"))
    assert server.requests[2].messages == [("user", "\n\n".join(["one", tutor, critic, "two"]))]
    assert server.requests[3].messages == [
        ("user", "one"),
        ("assistant", "I am tutor."),
        ("user", "\n\n".join([critic, "two", poet, "three"])),
    ]
    assert [entry["message"]["id"] for entry in entries] == order
    assert [text(entry) for entry in entries] == [
        "one",
        "I am tutor.",
        "I am critic.",
        "two",
        "I am poet.",
        "three",
        "I am tutor.",
    ]


def test_threads_do_not_wait_for_each_other(make_app: MakeApp, server: OfflineServer, held: Held) -> None:
    app = make_app()
    callers = [Caller(app) for _ in range(3)]
    for caller in callers:
        caller.run("tutor")
    server.wait_for(3)
    held.let_go()
    for caller in callers:
        caller.wait()


def test_many_posts_at_once_keep_one_order(make_app: MakeApp, server: OfflineServer, held: Held) -> None:
    held.let_go()
    app = make_app(owner=me)
    caller = Caller(app)

    def post(n: int) -> None:
        Caller(app, caller.thread_id).run("tutor", "critic", content=str(n))

    threads = [threading.Thread(target=post, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    entries = caller.wait(30)
    assert [entry["assistant_id"] for entry in entries] == [None, "tutor", "critic"] * 8
    assert {entry["run"]["status"] for entry in entries if entry["run"]} == {"completed"}
    for at in range(0, 24, 3):
        asked = [one for one in server.requests if one.messages[-1][1].split("\n\n")[-1] == text(entries[at])]
        for one in asked:
            told = "\n\n".join(text for _, text in one.messages)
            assert told.count("I am") == at // 3 * 2
        assert len(asked) == 2


def test_an_assistants_run_goes_through_the_same_life(make_app: MakeApp, server: OfflineServer) -> None:
    from assistream_flask import Assistant

    server.replies = ["Hello.", "Again."]
    caller = Caller(make_app([Assistant("asst_1", upstream="assistants"), Assistant("b", upstream="chat", model="m")]))
    caller.run("asst_1", "b", mode="sequential")
    assert [text(entry) for entry in caller.wait()] == ["Hi", "Hello.", "Again."]


# Cancel


def test_cancel_stops_a_run_and_its_upstream_and_keeps_the_text(make_app: MakeApp, server: OfflineServer) -> None:
    server.replies = STALLED
    caller = Caller(make_app())
    [run] = caller.run("tutor")
    says(caller, run, "one two")
    caller.cancel(run)
    assert server.requests[0].wait()
    assert server.requests[0].disconnected
    assert ended(caller, run) == ("cancelled", None)
    assert text(caller.entry(run)) == "one two"
    assert incomplete(caller, run) == "run_cancelled"


def test_cancel_ends_a_queued_run_that_then_asks_nobody(make_app: MakeApp, server: OfflineServer, held: Held) -> None:
    caller = Caller(make_app())
    [first], [second] = caller.run("tutor"), caller.run("critic", content="two")
    assert caller.cancel(second)["status"] == "cancelled"
    held.let_go()
    assert ended(caller, first) == ("completed", None)
    [third] = caller.run("poet", content="three")
    assert ended(caller, third) == ("completed", None)
    assert len(server.requests) == 2
    assert incomplete(caller, second) == "run_cancelled"


@pytest.mark.parametrize("fault", ["stall_headers", "stall"])
def test_cancel_ends_a_run_at_once_whatever_it_waits_for(make_app: MakeApp, server: OfflineServer, fault: str) -> None:
    server.replies = [Reply("one two three", fault=fault), "fine"]
    caller = Caller(make_app(stall_seconds=3))
    [run], [after] = caller.run("tutor"), caller.run("tutor", content="two")
    server.wait_for(1)
    caller.cancel(run)
    assert ended(caller, run) == ("cancelled", None)
    assert ended(caller, after) == ("completed", None)
    assert server.requests[0].wait(10)


def test_the_next_run_does_not_wait_for_a_connection_that_stays_open_behind_the_end(
    make_app: MakeApp, server: OfflineServer
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening, contextlib.ExitStack() as stack:

        def serve() -> None:
            while True:
                try:
                    peer = stack.enter_context(listening.accept()[0])
                except OSError:
                    return
                peer.recv(65_536)
                answer = b'data: {"choices": [{"delta": {"content": "fine"}}]}\n\ndata: [DONE]\n\n'
                head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
                peer.sendall(head + b"%x\r\n%b\r\n" % (len(answer), answer))

        threading.Thread(target=serve, daemon=True).start()
        http_client = lean(openai.DefaultHttpxClient(verify=False))
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        client = stack.enter_context(openai.OpenAI(api_key=KEY, base_url=url, http_client=http_client))
        app = make_app(client=client, stall_seconds=100)
        caller = Caller(app)
        runs = [*caller.run("poet"), *caller.run("poet", content="two"), *caller.run("poet", content="three")]
        assert [ended(caller, run) for run in runs] == [("completed", None)] * 3
        app.extensions["assistream"].close()
        listening.shutdown(socket.SHUT_RDWR)


def test_cancel_of_one_run_leaves_the_others_of_its_group(make_app: MakeApp, server: OfflineServer) -> None:
    server.replies = [STALLED, "fine", "fine"]
    caller = Caller(make_app())
    first, second, third = caller.run("tutor", "critic", "poet", mode="sequential")
    says(caller, first, "one two")
    caller.cancel(first)
    assert [ended(caller, run)[0] for run in (first, second, third)] == ["cancelled", "completed", "completed"]


def test_cancel_of_what_is_over_changes_nothing(make_app: MakeApp, server: OfflineServer) -> None:
    server.replies = "fine"
    caller = Caller(make_app())
    [run] = caller.run("tutor")
    before = caller.wait()
    assert caller.cancel(run) == caller.cancel(run) == before[-1]["run"]
    assert caller.entries() == before


@pytest.mark.slow
def test_many_cancels_at_any_moment_leave_a_thread_that_works(make_app: MakeApp, server: OfflineServer) -> None:
    server.replies = lambda request: Reply("one two three four", delay=0.005)
    caller = Caller(make_app())
    for n in range(20):
        runs = caller.run("tutor", "critic")
        time.sleep(n * 0.003)
        for run in runs:
            caller.cancel(run)
            caller.cancel(run)
    entries = caller.wait(30)
    assert {entry["run"]["status"] for entry in entries if entry["run"]} <= {"cancelled", "completed"}
    for entry in entries:
        if entry["run"]:
            whole = entry["run"]["status"] == "completed"
            assert "one two three four".startswith(text(entry))
            assert (text(entry) == "one two three four") or not whole
            assert entry["message"]["status"] == ("completed" if whole else "incomplete")
    [run] = caller.run("tutor")
    assert ended(caller, run) == ("completed", None)


def test_deleting_a_thread_stops_its_upstream(make_app: MakeApp, server: OfflineServer) -> None:
    server.replies = STALLED
    caller = Caller(make_app())
    [run] = caller.run("tutor")
    says(caller, run, "one two")
    assert caller.client.delete(caller.url).status_code == 204
    assert server.requests[0].wait()
    assert server.requests[0].disconnected


# Limits and failures


def test_a_silent_model_server_ends_the_run_and_keeps_the_text(make_app: MakeApp, server: OfflineServer) -> None:
    server.replies = STALLED
    caller = Caller(make_app(stall_seconds=1))
    [run] = caller.run("tutor")
    assert ended(caller, run) == ("failed", "upstream_stalled")
    assert text(caller.entry(run)) == "one two"
    assert incomplete(caller, run) == "run_failed"
    assert server.requests[0].wait()


def test_a_run_that_takes_too_long_is_ended_and_its_upstream_closed(make_app: MakeApp, server: OfflineServer) -> None:
    server.replies = Reply("so " * 2000, delay=0.02)
    caller = Caller(make_app(run_seconds=0.3))
    [run] = caller.run("tutor")
    assert ended(caller, run) == ("failed", "run_time_limit")
    assert server.requests[0].wait()
    assert server.requests[0].disconnected
    assert text(caller.entry(run)).startswith("so so")


def test_nothing_changes_a_run_whose_end_is_about_to_be_stored(
    make_app: MakeApp, server: OfflineServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = make_app(stall_seconds=0.3)
    caller, made, refused = Caller(app), list[str](), list[str]()

    def change() -> list[Event]:
        made.append("made")
        return []

    def come_between(active: ActiveRun, _: object) -> None:
        try:
            RunChanges(app.extensions["assistream"].runtime().runner._worker).change(active, change)
        except Interrupted:
            refused.append("refused")

    monkeypatch.setattr(executor, "_complain", come_between)
    server.replies = STALLED
    [run_id] = caller.run("tutor")
    assert ended(caller, run_id) == ("failed", "upstream_stalled")
    assert (made, refused) == ([], ["refused"])


@pytest.mark.parametrize(
    "fault",
    ["401", "429", "500", "error_nested", "error_flat", "cut", "ends_early", "stall", "malformed", "function_call"],
)
def test_a_failed_run_leaves_the_thread_usable(make_app: MakeApp, server: OfflineServer, fault: str) -> None:
    server.replies = [Reply("one two three", fault=fault), "fine"]
    caller = Caller(make_app(stall_seconds=0.3))
    [first], [second] = caller.run("tutor"), caller.run("tutor", content="again")
    assert ended(caller, first)[0] == "failed"
    assert incomplete(caller, first) == "run_failed"
    assert ended(caller, second) == ("completed", None)
    partial = text(caller.entry(first))
    strict = [("user", "Hi"), ("assistant", partial), ("user", "again")] if partial else [("user", "Hi\n\nagain")]
    assert server.requests[-1].messages == strict


def test_an_answer_cut_at_the_token_limit_is_incomplete_not_failed(make_app: MakeApp, server: OfflineServer) -> None:
    server.replies = Reply("one two three four", fault="incomplete")
    caller = Caller(make_app())
    [run] = caller.run("tutor")
    assert ended(caller, run) == ("incomplete", None)
    assert caller.entry(run)["run"]["incomplete_details"] == {"reason": "max_completion_tokens"}
    assert incomplete(caller, run) == "max_tokens"


def test_reasoning_is_a_step_and_refusals_and_usage_are_stored(make_app: MakeApp, server: OfflineServer) -> None:
    server.replies = Reply("Well. ", refusal="No.", reasoning="Let me think.", usage=(3, 4))
    caller = Caller(make_app())
    [run] = caller.run("tutor")
    assert ended(caller, run) == ("completed", None)
    entry = caller.entry(run)
    assert [part["type"] for part in entry["message"]["content"]] == ["text", "refusal"]
    assert [step["step_details"]["reasoning"]["text"] for step in entry["steps"]] == ["Let me think."]
    assert entry["steps"][0]["status"] == "completed"
    assert entry["run"]["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}


# A run belongs to its thread


def test_a_run_outlives_the_request_that_made_it(make_app: MakeApp, server: OfflineServer) -> None:
    server.replies = Reply("one two three four five", delay=0.1)
    caller = Caller(make_app())
    body = {"assistant_ids": ["tutor"], "content": "Hi"}
    answer = caller.client.post(f"{caller.url}/runs", json=body, headers={"Accept": "text/event-stream"})
    assert b"thread.message.created" in next(answer.iter_encoded())
    answer.close()
    entries = caller.wait()
    assert text(entries[-1]) == "one two three four five"
    assert not server.requests[0].disconnected


def test_text_is_stored_while_it_grows(make_app: MakeApp, server: OfflineServer, tmp_path: Path) -> None:
    server.replies = Reply("one two three", reasoning="Well then.", fault="stall")
    caller = Caller(make_app(flush_seconds=0.05))
    caller.run("tutor")
    with sqlite3.connect(tmp_path / "test.sqlite3") as database:

        def stored(word: str) -> bool:
            query = """SELECT m.content, m.status, r.steps FROM assistream_messages m
                       JOIN assistream_runs r ON r.id = m.run_id"""
            content, status, steps = database.execute(query).fetchone()
            return word in content and status == "in_progress" and "Well then." in steps

        wait_until(lambda: stored("one"))
    database.close()


# The database fails for a while


class Outage:
    """Makes the store refuse to save."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.on, self.refused = False, 0
        for name in ("save", "save_grown"):
            save = getattr(ThreadStore, name)

            def outage(store: ThreadStore, *arguments: Any, save: Any = save) -> Any:
                if self.on:
                    self.refused += 1
                    raise OperationalError("save", None, Exception("the disk is full"))
                return save(store, *arguments)

            monkeypatch.setattr(ThreadStore, name, outage)


@pytest.fixture
def outage(monkeypatch: pytest.MonkeyPatch) -> Outage:
    return Outage(monkeypatch)


def test_a_database_that_fails_in_mid_run_loses_nothing(
    make_app: MakeApp, server: OfflineServer, outage: Outage
) -> None:
    server.replies = [Reply("one two three four five six", delay=0.1), "fine"]
    caller = Caller(make_app(flush_seconds=0.05))
    [run], [after] = caller.run("tutor"), caller.run("tutor", content="again")
    wait_until(lambda: text(caller.entry(run)))
    outage.on = True
    assert server.requests[0].wait()
    wait_until(lambda: outage.refused > 3)
    wait_until(lambda: text(caller.entry(run)) == "one two three four five six")
    outage.on = False
    assert ended(caller, run) == ("completed", None)
    assert text(caller.entry(run)) == "one two three four five six"
    assert ended(caller, after) == ("completed", None)
    assert ("assistant", "one two three four five six") in server.requests[1].messages


def test_a_run_that_cannot_be_begun_fails_and_the_thread_goes_on(
    make_app: MakeApp, server: OfflineServer, outage: Outage
) -> None:
    server.replies = "fine"
    caller = Caller(make_app())
    outage.on = True
    [run] = caller.run("tutor")
    wait_until(lambda: outage.refused)
    outage.on = False
    assert ended(caller, run)[0] in ("failed", "completed")
    [after] = caller.run("tutor", content="again")
    assert ended(caller, after) == ("completed", None)


# The worker goes


def test_another_worker_ends_a_lost_ones_runs_and_runs_those_that_waited(
    make_app: MakeApp, server: OfflineServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.replies = [STALLED, "fine", "fine"]
    monkeypatch.setattr(leases, "_RENEW_SECONDS", 0.2)
    shorten_leases(monkeypatch, 1.0)
    with monkeypatch.context() as patch:
        # A worker that is dead keeps no house.
        patch.setattr(Runtime, "start", lambda runtime: None)
        app = make_app(owner=me)
        old = Caller(app)
        [lost] = old.run("tutor")
        two, three = old.run("critic", "poet", content="two", mode="sequential")
        says(old, lost, "one two")
        app.extensions["assistream"].runtime().runner.flush()
    caller = Caller(make_app(owner=me), old.thread_id)
    assert ended(caller, lost) == ("failed", "worker_lost")
    assert text(caller.entry(lost)) == "one two"
    assert incomplete(caller, lost) == "run_failed"
    assert ended(caller, two) == ("completed", None)
    assert ended(caller, three) == ("completed", None)
    assert server.requests[1].messages == [("user", f"Hi\n\n{marked('Tutor', 'one two')}\n\ntwo")]
    assert server.requests[2].messages[-1][1].endswith("two\n\n" + marked("Critic", "fine"))
    # The lost worker comes back and may change nothing.
    old.cancel(lost)
    assert ended(caller, lost) == ("failed", "worker_lost")


def test_a_background_answer_without_an_id_that_began_to_speak_is_not_asked_for_again(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    shorten_leases(monkeypatch, 1.0)
    asked, leaves = list[httpx2.Request](), threading.Event()

    class Stream(httpx2.SyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            yield b'event: response.output_text.delta\ndata: {"type":"response.output_text.delta","delta":"one"}\n\n'
            leaves.wait(30)

    def transport(request: httpx2.Request) -> httpx2.Response:
        asked.append(request)
        return httpx2.Response(200, headers={"content-type": "text/event-stream"}, stream=Stream())

    http_client = httpx2.Client(transport=httpx2.MockTransport(transport))
    with openai.OpenAI(api_key=KEY, base_url="http://model/v1", http_client=http_client) as client:
        lasting = [Assistant("tutor", model="m", background=True)]
        with monkeypatch.context() as patch:
            patch.setattr(Runtime, "start", lambda runtime: None)
            app = make_app(lasting, owner=me, client=client)
            old = Caller(app)
            [run] = old.run("tutor")
            says(old, run, "one")
            app.extensions["assistream"].runtime().runner.flush()
        caller = Caller(make_app(lasting, owner=me, client=client), old.thread_id)
        assert ended(caller, run) == ("failed", "worker_lost")
        leaves.set()
    assert (text(caller.entry(run)), len(asked)) == ("one", 1)


def left_waiting(make_app: MakeApp, monkeypatch: pytest.MonkeyPatch) -> tuple[Caller, str, str]:
    """Give a thread in which a worker that died spoke as the tutor, and left the critic waiting."""
    shorten_leases(monkeypatch, 1.0)
    with monkeypatch.context() as patch:
        patch.setattr(Runtime, "start", lambda runtime: None)
        app = make_app(lambda: ASSISTANTS, owner=me)
        old = Caller(app)
        [lost] = old.run("tutor")
        [waiting] = old.run("critic", content="two")
        says(old, lost, "one two")
        app.extensions["assistream"].runtime().runner.flush()
    return old, lost, waiting


def critic(assistant_id: str, owner: str) -> Assistant | None:
    return next(one for one in ASSISTANTS if one.id == assistant_id)


def nobody(assistant_id: str, owner: str) -> Assistant | None:
    return None


def another(assistant_id: str, owner: str) -> Assistant | None:
    return ASSISTANTS[2]


def fails(assistant_id: str, owner: str) -> Assistant | None:
    raise LookupError(assistant_id)


@pytest.mark.parametrize(
    ("adopt", "said"),
    [(critic, None), (None, ""), (nobody, ""), (another, "must give the Assistant of that id"), (fails, "LookupError")],
)
def test_an_assistant_that_no_list_has_is_the_one_that_the_app_gives_or_its_run_is_lost(
    make_app: MakeApp,
    server: OfflineServer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    adopt: Callable[[str, str], Assistant | None] | None,
    said: str | None,
) -> None:
    server.replies = [STALLED, "fine"]
    old, _, waiting = left_waiting(make_app, monkeypatch)
    caller = Caller(make_app(lambda: ASSISTANTS, owner=me, adopt=adopt), old.thread_id)
    assert ended(caller, waiting) == (("completed", None) if said is None else ("failed", "worker_lost"))
    assert (said or "") in caplog.text


def test_the_app_is_asked_for_what_the_list_has_not_in_its_context_and_with_the_threads_owner(
    make_app: MakeApp, server: OfflineServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.replies = [STALLED, "fine"]
    old, _, waiting = left_waiting(make_app, monkeypatch)
    asked: list[tuple[str, str, str]] = []

    def adopt(assistant_id: str, owner: str) -> Assistant | None:
        asked.append((assistant_id, owner, current_app.name))
        return ASSISTANTS[0]

    caller = Caller(make_app(ASSISTANTS[1:], owner=me, adopt=adopt), old.thread_id)
    assert ended(caller, waiting) == ("completed", None)
    # What it is called that spoke before: the model hears the same as from the worker that died.
    assert server.requests[1].messages == [("user", f"Hi\n\n{marked('Tutor', 'one two')}\n\ntwo")]
    assert set(asked) == {("tutor", "me", "app")}


def test_shutdown_lets_runs_under_way_end(make_app: MakeApp, server: OfflineServer) -> None:
    server.replies = Reply("one two three four", delay=0.2)
    app = make_app(owner=me, drain_seconds=20)
    caller = Caller(app)
    [run] = caller.run("tutor")
    wait_until(lambda: text(caller.entry(run)))
    app.extensions["assistream"].close()
    after = Caller(make_app(owner=me), caller.thread_id)
    assert state(after, run) == ("completed", None)
    assert text(after.entry(run)) == "one two three four"


def test_a_worker_that_drains_keeps_its_runs_from_its_successor(
    make_app: MakeApp, server: OfflineServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "_RENEW_SECONDS", 0.2)
    shorten_leases(monkeypatch, 1.6)
    server.replies = Reply("one two three four", delay=1)
    app = make_app(owner=me, drain_seconds=20)
    caller = Caller(app)
    [run] = caller.run("tutor")
    wait_until(lambda: state(caller, run)[0] == "in_progress")
    successor = Caller(make_app(owner=me), caller.thread_id)
    assert state(successor, run)[0] == "in_progress"
    app.extensions["assistream"].close()
    assert ended(successor, run) == ("completed", None)
    assert text(successor.entry(run)) == "one two three four"


def test_shutdown_marks_what_it_cuts_off_and_leaves_what_waited_to_the_next(
    make_app: MakeApp, server: OfflineServer
) -> None:
    server.replies = [STALLED, "fine"]
    app = make_app(owner=me, drain_seconds=0)
    caller = Caller(app)
    [run], [waiting] = caller.run("tutor"), caller.run("critic", content="two")
    says(caller, run, "one two")
    app.extensions["assistream"].close()
    assert server.requests[0].wait()
    assert server.requests[0].disconnected
    after = Caller(make_app(owner=me), caller.thread_id)
    assert state(after, run) == ("incomplete", None)
    assert text(after.entry(run)) == "one two"
    assert incomplete(after, run) == "server_shutdown"
    assert ended(after, waiting) == ("completed", None)
    assert marked("Tutor", "one two") in server.requests[1].messages[0][1]
