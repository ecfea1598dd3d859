"""The signals: each sent once, by the worker that did it, and in nobody's way."""

from __future__ import annotations

import contextlib
import logging
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flask import Flask, current_app

from assistream_flask import (
    Assistant,
    Commands,
    current_assistream,
    message_created,
    run_ended,
    run_started,
)
from assistream_flask.testing import OfflineServer, Reply
from tests.conftest import Caller, MakeApp, text, wait_until
from tests.unit.test_runner import Held
from tests.unit.test_runner import held as held

GUIDE = (Path(__file__).resolve().parents[2] / "docs/guides/python.md").read_text()


class Heard:
    """What an app is sent: (signal, owner, ids), and all that comes with it."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.values: list[dict[str, Any]] = []

    def take(self, name: str, app: Flask, values: dict[str, Any]) -> None:
        assert current_app._get_current_object() is app  # type: ignore[attr-defined]
        self.values.append(values)
        self.names.append(name)


@contextlib.contextmanager
def hearing(app: Flask) -> Iterator[Heard]:
    heard = Heard()

    def created(app: Flask, **values: Any) -> None:
        heard.take("message_created", app, values)

    def started(app: Flask, **values: Any) -> None:
        heard.take("run_started", app, values)

    def ended(app: Flask, **values: Any) -> None:
        heard.take("run_ended", app, values)

    with (
        message_created.connected_to(created, sender=app),
        run_started.connected_to(started, sender=app),
        run_ended.connected_to(ended, sender=app),
    ):
        yield heard


def of(app: Flask) -> Commands:
    found: Commands = app.extensions["assistream"]
    return found


def me() -> str:
    return "me"


def test_a_message_and_its_run_are_told_once_and_in_order(make_app: MakeApp, server: OfflineServer) -> None:
    server.replies = "Forty-two."
    app, other = make_app(owner=me), make_app(owner=me)
    with hearing(app) as heard, hearing(other) as others:
        caller = Caller(app)
        (run_id,) = caller.run("tutor", content="What?")
        asked, answer = caller.wait()
        wait_until(lambda: len(heard.names) == 3)
        caller.client.post(f"{caller.url}/messages", json={"content": "Thanks."})
        wait_until(lambda: len(heard.names) == 4)
    assert heard.names == ["message_created", "run_started", "run_ended", "message_created"]
    created, started, ended, _ = heard.values
    assert created == {"owner": "me", "blueprint": "assistream", "message": asked["message"]}
    assert (started["run"]["id"], started["run"]["status"]) == (run_id, "in_progress")
    assert ended == {"owner": "me", "blueprint": "assistream", "run": answer["run"], "message": answer["message"]}
    assert others.names == []


def test_runs_end_once_however_they_end(make_app: MakeApp, server: OfflineServer, held: Held) -> None:
    app = make_app(owner=me)
    with hearing(app) as heard:
        caller = Caller(app)
        (first,) = caller.run("tutor")
        wait_until(lambda: len(server.requests) == 1)
        (queued,) = caller.run("critic", content=None)
        for run_id in (queued, first, first, queued):
            caller.cancel(run_id)
        server.replies = Reply("x", fault="400")
        (failed,) = caller.run("tutor", content=None)
        caller.wait()
        wait_until(lambda: heard.names.count("run_ended") == 3)
    told = [
        (name, values["run"]["id"]) for name, values in zip(heard.names, heard.values, strict=True) if "run" in values
    ]
    assert told == [
        ("run_started", first),
        ("run_ended", queued),
        ("run_ended", first),
        ("run_started", failed),
        ("run_ended", failed),
    ]
    assert [values["run"]["status"] for values in heard.values[-1:]] == ["failed"]


def test_a_receiver_that_raises_is_logged_and_costs_nobody_anything(
    make_app: MakeApp, caplog: pytest.LogCaptureFixture
) -> None:
    app = make_app(owner=me)

    def broken(app: Flask, **values: Any) -> None:
        raise RuntimeError("the app's own fault")

    def leaves(app: Flask, **values: Any) -> None:
        raise SystemExit

    caplog.set_level(logging.ERROR)
    with (
        message_created.connected_to(broken, sender=app),
        run_started.connected_to(leaves, sender=app),
        run_ended.connected_to(broken, sender=app),
        hearing(app) as heard,
    ):
        caller = Caller(app)
        caller.run("tutor")
        assert caller.wait()[1]["run"]["status"] == "completed"
        wait_until(lambda: "run_ended" in heard.names)
    assert {"message_created", "run_ended"} <= set(heard.names)
    said = [record.getMessage() for record in caplog.records]
    assert any("a receiver of the signal message_created failed" in one for one in said)
    assert any("a notice of run_started could not be given" in one for one in said)
    assert "the app's own fault" in caplog.text


def test_a_slow_receiver_holds_up_no_answer_and_may_use_the_commands(make_app: MakeApp) -> None:
    app, free = make_app(owner=me), threading.Event()

    def slow(app: Flask, **values: Any) -> None:
        assert free.wait(20)

    def thanks(app: Flask, run: Any, owner: str, **values: Any) -> None:
        current_assistream.add_message(run["thread_id"], "Noted.", owner=owner)

    with message_created.connected_to(slow, sender=app), run_ended.connected_to(thanks, sender=app):
        caller = Caller(app)
        caller.run("tutor")
        assert [entry["run"]["status"] for entry in caller.wait()[1:]] == ["completed"]
        free.set()
        wait_until(lambda: text(caller.entries()[-1]) == "Noted.")


def test_what_a_receiver_does_to_an_object_is_its_own_affair(make_app: MakeApp) -> None:
    app = make_app(owner=me)

    def spoil(app: Flask, message: dict[str, Any], **values: Any) -> None:
        message["content"].clear()

    with message_created.connected_to(spoil, sender=app), run_ended.connected_to(spoil, sender=app):
        with hearing(app) as heard:
            caller = Caller(app)
            caller.run("tutor", content="Hi")
            caller.wait()
            wait_until(lambda: "run_ended" in heard.names)
        assert [bool(text(entry)) for entry in caller.entries()] == [True, True]


def test_of_a_run_that_another_worker_goes_on_with_each_tells_what_it_did(
    make_app: MakeApp, server: OfflineServer
) -> None:
    server.replies = Reply("a long answer of quite some words " * 5, delay=0.1)
    lasting = [Assistant("lasting", model="m", background=True)]
    app, other = make_app(lasting, owner=me), make_app(lasting, owner=me)
    with hearing(app) as heard, hearing(other) as others:
        thread_id = of(other).create_thread(owner="me")["id"]
        runs = of(app).run(thread_id, ["lasting"], content="Hi", owner="me")
        wait_until(lambda: bool(text(of(app).messages(thread_id, owner="me")[-1])))
        app.extensions["assistream"].close()
        assert runs.wait(30)[0]["status"] == "completed"
        wait_until(lambda: bool(others.names))
    assert (heard.names, others.names) == (["message_created", "run_started"], ["run_ended"])


def test_a_run_that_goes_with_its_thread_does_not_end(make_app: MakeApp, server: OfflineServer) -> None:
    server.replies = Reply("one two three", fault="stall")
    app = make_app(owner=me)
    with hearing(app) as heard:
        caller = Caller(app)
        caller.run("tutor")
        wait_until(lambda: len(server.requests) == 1)
        caller.client.delete(caller.url)
        assert server.requests[0].wait(10)
        app.extensions["assistream"].close()
    assert heard.names == ["message_created", "run_started"]


JOB = """
import sys, time
from flask import Flask
from openai import OpenAI
from assistream_flask import Assistant, create_blueprint, current_assistream, run_ended

app = Flask("job")
app.config.update(ASSISTREAM_DATABASE_URL=sys.argv[1])
client = lambda: OpenAI(base_url=sys.argv[2], api_key="k")
app.register_blueprint(create_blueprint([Assistant("tutor", model="m")], owner=lambda: "me", client=client))

@run_ended.connect_via(app)
def slow(app, run, **extra):
    time.sleep(0.5)
    print(run["status"])

with app.app_context():
    thread = current_assistream.create_thread(owner="me")
    current_assistream.run(thread["id"], ["tutor"], content="Hi", owner="me").wait(30)
"""


def test_a_job_that_ends_lets_its_receivers_finish(server: OfflineServer, tmp_path: Path) -> None:
    command = [sys.executable, "-c", JOB, f"sqlite:///{tmp_path / 'a.sqlite3'}", server.base_url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("completed\n", "")


def test_the_guides_receiver_bills_what_a_run_used(make_app: MakeApp, server: OfflineServer) -> None:
    server.replies = Reply("Hi", usage=(3, 4))
    app, billed = make_app(owner=me), list[tuple[str, int]]()

    class Usage:
        @staticmethod
        def add(owner: str, tokens: int) -> None:
            billed.append((owner, tokens))

    _, example = re.findall(r"^```python\n(.*?)^```", GUIDE, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {"app": app, "Usage": Usage}
    exec(example, names)
    Caller(app).run("tutor")
    wait_until(lambda: billed == [("me", 7)])
    run_ended.disconnect(names["bill"], sender=app)
