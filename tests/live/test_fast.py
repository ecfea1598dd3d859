"""What is there only for speed: each can be switched off, none is needed, and the doctor tells of each."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from greenlet import greenlet

from assistream_flask import ConfigurationError, sse
from assistream_flask.fast import direct_send, install, switches
from assistream_flask.fast.switches import NAMES, VARIABLE, wanted
from assistream_flask.platform import interrupt, reliances
from assistream_flask.testing import OfflineServer
from tests.conftest import MakeApp
from tests.gunicorn_server import Gunicorn
from tests.renames import Rename, environment

# It counts what goes each of the fast ways.
APP = """
import collections, json, os
from flask import Flask, jsonify
from assistream_flask import Assistant, create_blueprint
from assistream_flask.fast import batch_scheduler, chunk_reader, direct_send, event_template
from assistream_flask.log.protocol import Receipt

went = collections.Counter()

def counted(name, kind, method, is_one):
    plain = getattr(kind, method)

    def call(*arguments):
        found = plain(*arguments)
        went[name] += is_one(found)
        return found

    setattr(kind, method, call)

counted("chunk_reader", chunk_reader.Connection, "chunks", lambda found: True)
counted("event_template", event_template.EventTemplate, "read", lambda found: found is not None)
counted("batched_reading", batch_scheduler.BatchScheduler, "wait", lambda found: True)
counted("direct_send", direct_send.ViewerConnection, "send", lambda found: found is not Receipt.NO)

app = Flask(__name__)
app.config.update(SECRET_KEY="long enough for a test", **json.loads(os.environ["APP_CONFIG"]))
kinds = ["responses"] * 22 + ["chat", "assistants"]
assistants = [
    Assistant(f"a{n}", model="m", upstream=kind, **({"assistant_id": "asst_1"} if kind == "assistants" else {}))
    for n, kind in enumerate(kinds)
]
# It names no client, as the first app of everybody.
app.register_blueprint(create_blueprint(assistants, owner=lambda: "me"), url_prefix="/assistream")

@app.get("/went")
def counts():
    return jsonify(went)

@app.get("/page")
def page():
    return "up"
"""
ALL = [f"a{n}" for n in range(24)]
WORDS = " ".join(f"word{n}" for n in range(50))


class Served(Gunicorn):
    """The app under gunicorn, and a model server for it."""

    def __init__(self, folder: Path, server: OfflineServer, env: dict[str, str], **settings: Any) -> None:
        super().__init__(folder, app=APP, max_assistants=len(ALL), **settings)
        self.folder = folder
        self.env.update(OPENAI_BASE_URL=server.base_url, OPENAI_API_KEY="k", **env)

    def __enter__(self) -> Served:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def answers(self, assistants: Sequence[str]) -> dict[str, str]:
        """Ask for answers and read them as one stream, to its end; give the text of each run."""
        path = f"{self.url}{self.thread()}/runs"
        body = json.dumps({"assistant_ids": list(assistants), "content": "Hello"}).encode()
        head = {"Content-Type": "application/json", "Accept": "text/event-stream"}
        with urllib.request.urlopen(urllib.request.Request(path, body, head), timeout=60) as answer:
            frames = sse.Decoder().feed(answer.read())
        assert frames[-1].event == "done"
        texts = dict[str, str]()
        for frame in frames:
            if frame.event == "thread.message.delta":
                data = json.loads(frame.data)
                said = "".join(part["text"]["value"] for part in data["delta"]["content"])
                texts[data["id"]] = texts.get(data["id"], "") + said
        return texts

    def went(self) -> set[str]:
        """Tell which of the fast ways was gone."""
        return {name for name, count in self.get("/went").items() if count}

    def doctor(self, *options: str) -> str:
        command = [sys.executable, "-m", "flask", "--app", "live_app", "assistream", "doctor", *options]
        done = subprocess.run(command, cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done
        return done.stdout


@pytest.fixture(scope="module")
def models() -> Iterator[OfflineServer]:
    with OfflineServer(WORDS, delay=0.005) as server:
        yield server


@pytest.fixture(scope="module")
def slow_models() -> Iterator[OfflineServer]:
    """Give the last of many answers begins before the first is over: else they are not read in batches."""
    with OfflineServer(WORDS, delay=0.08) as server:
        yield server


@pytest.fixture(autouse=True)
def _nothing_is_set_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)


SETTINGS = ["on", "off", *(f"-{name}" for name in NAMES)]


@pytest.mark.parametrize("setting", SETTINGS)
def test_each_can_be_switched_off_and_answers_come_whole(
    setting: str, tmp_path: Path, slow_models: OfflineServer
) -> None:
    with Served(tmp_path, slow_models, {VARIABLE: setting}) as live:
        assert list(live.answers(ALL).values()) == [WORDS] * len(ALL)
        assert live.went() == wanted(setting)
        told = live.doctor()
        assert " is off" not in live.log()
    for name in NAMES:
        assert f"ok   {name} is {'on' if name in wanted(setting) else f'off: {VARIABLE} says so'}\n" in told


def test_the_app_may_say_so_too_and_the_doctor_tells_what_a_worker_has(tmp_path: Path, models: OfflineServer) -> None:
    with Served(tmp_path, models, {}, fast="-direct_send") as live:
        assert list(live.answers(ALL[-3:]).values()) == [WORDS] * 3
        assert live.went() == {"chunk_reader", "event_template"}
        told = live.doctor("--url", f"{live.url}/assistream")
    for name in NAMES:
        how = f"off: {VARIABLE} says so" if name == "direct_send" else "on"
        assert f"ok   in the worker: {name} is {how}\n" in told


def missing(library: str, name: str) -> str:
    return f"{library} {metadata.version(library)} has no {name}"


RENAMES = [
    (Rename("httpx2", r"\b_mounts\b", "_mounted"), "chunk_reader", "Client._mounts"),
    (Rename("httpx2", r"\b_transport\b", "_sender"), "chunk_reader", "Client._transport"),
    (Rename("httpx2", r"\b_pool\b", "_connections"), "chunk_reader", "HTTPTransport._pool"),
    (Rename("httpcore2", r"\b_network_backend\b", "_network"), "chunk_reader", "ConnectionPool._network_backend"),
    (Rename("httpcore2", r"\b_http2\b", "_h2"), "chunk_reader", "ConnectionPool._http2"),
    (Rename("gunicorn", r"\bself\.wsgi\b", "self.application"), "direct_send", "Worker.wsgi"),
    (Rename("gunicorn", r"\bheaders_sent\b", "head_sent"), "direct_send", "http.wsgi.Response.headers_sent"),
    (Rename("gunicorn", r"\bresponse_length\b", "length"), "direct_send", "http.wsgi.Response.response_length"),
    (Rename("gunicorn", r"\bResponse\b", "Answer"), "direct_send", "http.wsgi.Response(req, sock, cfg)"),
    (
        Rename("gunicorn", r"\(environ, resp\.start_response\)", "(environ, lambda *a: resp.start_response(*a))"),
        "direct_send",
        "method of its Response for start_response",
    ),
    (Rename("openai", r"\b_send_request\b", "_send"), "bounded_bodies", "OpenAI._send_request"),
    (Rename("openai", r"\b_prepare_request\b", "_prepare"), "stale_connection", "OpenAI._prepare_request"),
]


@pytest.mark.parametrize(("rename", "who", "name"), RENAMES, ids=[name for _, _, name in RENAMES])
def test_a_library_that_renames_what_is_its_own_costs_a_line_in_the_log_and_no_answer(
    rename: Rename, who: str, name: str, tmp_path: Path, models: OfflineServer
) -> None:
    with Served(tmp_path, models, environment(tmp_path, [rename])) as live:
        for _ in range(2):
            assert list(live.answers(ALL[-3:]).values()) == [WORDS] * 3
        log = live.log()
        assert live.went() == {"chunk_reader", "event_template", "direct_send"} - {who}
    assert re.findall(r"(.*) is off, and ", log) == [f"{missing(rename.package, name)}: {who}"]
    assert "Traceback" not in log


def test_the_doctor_says_what_is_missing_in_the_shell_and_in_the_worker(tmp_path: Path, models: OfflineServer) -> None:
    renames = [RENAMES[0][0], RENAMES[5][0], RENAMES[-1][0]]
    with Served(tmp_path, models, environment(tmp_path, renames)) as live:
        assert list(live.answers(ALL[-3:]).values()) == [WORDS] * 3
        here, there = live.doctor(), live.doctor("--url", f"{live.url}/assistream")
        assert live.log().count(" is off, and ") == 3
    mounts = f"chunk_reader is off: {missing('httpx2', 'Client._mounts')}\n     fix: all works, but slower: upgrade"
    assert f"warn {mounts}" in here
    for line in (
        mounts,
        f"direct_send is off: {missing('gunicorn', 'Worker.wsgi')}",
        f"stale_connection is off: {missing('openai', 'OpenAI._prepare_request')}",
    ):
        assert f"warn in the worker: {line}" in there
    assert "ok   in the worker: event_template is on\n" in there


def test_a_worker_of_threads_sends_by_its_own_loop_and_the_doctor_says_why(
    tmp_path: Path, models: OfflineServer
) -> None:
    with Served(tmp_path, models, {}, worker_class="gthread", options=["--threads", "20"]) as live:
        assert list(live.answers(ALL[-3:]).values()) == [WORDS] * 3
        told = live.doctor("--url", f"{live.url}/assistream")
        assert " is off" not in live.log()
    assert "ok   in the worker: direct_send is off: it is for gunicorn's gevent worker" in told


# Within this process


def test_a_word_that_is_none_is_refused_with_those_there_are(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    for said in ("no", "-", "direct_send", "-direct_send,-", "-stencil", "-on", "on,-direct_send"):
        with pytest.raises(ConfigurationError, match=f"{re.escape(repr(said))}: give on, off, .*{', '.join(NAMES)}"):
            make_app(fast=said)
    monkeypatch.setenv(VARIABLE, "-stencil")
    with pytest.raises(ConfigurationError, match="-stencil"):
        make_app(fast="on")


def test_the_environment_goes_before_the_setting_where_it_says_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    assert wanted() == wanted("on") == wanted(" on ") == set(NAMES)
    assert wanted("-direct_send, -chunk_reader") == {"event_template", "batched_reading"}
    monkeypatch.setenv(VARIABLE, "")
    assert wanted("off") == set()
    monkeypatch.setenv(VARIABLE, "-event_template")
    assert wanted("off") == set(NAMES) - {"event_template"}


def test_what_was_chosen_last_counts_and_before_that_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = switches.Switches()
    monkeypatch.setenv(VARIABLE, "off")
    assert not ours.is_on("direct_send")
    monkeypatch.delenv(VARIABLE)
    assert ours.is_on("direct_send")
    ours.choose("-direct_send")
    assert (ours.is_on("direct_send"), ours.is_on("chunk_reader")) == (False, True)
    ours.choose("on")
    assert ours.is_on("direct_send")


class Answer:
    """Gunicorn's response, as an app sees it."""

    def start_response(self, *_: Any) -> None:
        pass


def around(app: Callable[..., Any]) -> Callable[..., Any]:
    return lambda environ, start_response: app(environ, start_response)


@pytest.mark.parametrize(
    ("inside", "outside", "method", "is_let"),
    [
        (None, None, "GET", True),
        (around, None, "GET", True),
        (None, None, "HEAD", False),
        (lambda app: lambda *arguments: iter(app(*arguments)), None, "GET", False),
        # Whoever comes later, and is around all, may have a hand in the body.
        (None, around, "GET", False),
    ],
)
def test_only_a_body_that_gunicorn_is_given_as_it_was_made_may_be_sent_past_it(
    inside: Any, outside: Any, method: str, is_let: bool
) -> None:
    peer, answer = direct_send.ViewerConnection({}, 1, 1), Answer()

    def app(environ: Any, start_response: Any) -> Any:
        # As a middleware may do, for those behind it.
        environ["REQUEST_METHOD"] = "GET"
        start_response("200 OK", [])
        return direct_send.UnwrappedBody([b"one"], peer)

    worker = SimpleNamespace(wsgi=inside(app) if inside else app)
    worker.wsgi = direct_send.OutermostApp(worker)
    worker.wsgi = outside(worker.wsgi) if outside else worker.wsgi
    assert list(worker.wsgi({"REQUEST_METHOD": method}, answer.start_response)) == [b"one"]
    assert (peer._seen is answer) == is_let


def test_nothing_is_missing_of_what_is_installed() -> None:
    assert [state for state in install.states("on", in_worker=False) if state.why_off] == []


def test_without_greenlets_frames_a_wait_is_ended_at_once_and_that_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Frameless(greenlet):
        @property
        def gr_frame(self) -> Any:
            raise AttributeError

    monkeypatch.setattr(reliances, "_MISSING", {})
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert not interrupt._tidying(Frameless())
    assert [line.partition(":")[0] for line in caplog.messages] == [missing("greenlet", "greenlet.gr_frame")]
    assert reliances.missing("interrupt") == missing("greenlet", "greenlet.gr_frame")
