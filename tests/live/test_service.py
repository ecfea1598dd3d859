"""The commands from an app's own code: without a request, under an explicit owner, from any process."""

from __future__ import annotations

import contextlib
import re
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flask import Flask, request

from assistream_flask import (
    Assistant,
    Commands,
    ConfigurationError,
    NotFoundError,
    RequestError,
    RunList,
    WaitTimeoutError,
    create_blueprint,
    current_assistream,
)
from assistream_flask.log.protocol import LogUnavailableError
from assistream_flask.testing import OfflineServer, Reply
from tests.cluster import clustered
from tests.conftest import ASSISTANTS, Caller, MakeApp, quick_client, text, wait_until
from tests.postgres_server import PostgresServer
from tests.redis_server import RedisServer
from tests.unit.test_runner import Held
from tests.unit.test_runner import held as held

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "docs/guides/python.md").read_text()
NO_THREAD, NO_RUN = "thread_" + "0" * 32, "run_" + "0" * 32
P = "/assistream"


def named_by_header() -> str | None:
    return request.headers.get("X-Me")


@pytest.fixture
def app(make_app: MakeApp) -> Iterator[Flask]:
    """Give an app whose context is there, and no request."""
    app = make_app(owner=named_by_header)
    with app.app_context():
        yield app


def of(app: Flask) -> Commands:
    found: Commands = app.extensions["assistream"]
    return found


def begun(server: OfflineServer, count: int = 1) -> None:
    wait_until(lambda: len(server.requests) == count)


# A job


def test_a_job_runs_assistants_without_a_request_and_its_users_page_has_all_of_it(
    app: Flask, server: OfflineServer
) -> None:
    server.replies = "Forty-two."
    thread = current_assistream.create_thread(owner="42", metadata={"title": "The day"})
    assert current_assistream.thread(thread["id"], owner="42") == thread
    runs = current_assistream.run(thread["id"], ("tutor", "critic"), content="What?", owner="42")
    assert [run["assistant_id"] for run in runs] == ["tutor", "critic"]
    ended = runs.wait(20)
    assert isinstance(ended, RunList)
    assert [(run["id"], run["status"]) for run in ended] == [(run["id"], "completed") for run in runs]
    assert ended.wait(0) == ended
    entries = current_assistream.messages(thread["id"], owner="42")
    assert [text(entry) for entry in entries] == ["What?", "Forty-two.", "Forty-two."]
    assert entries[0] == runs.message == ended.message
    assert not entries.has_more

    client, me = app.test_client(), {"X-Me": "42"}
    assert client.get(f"{P}/threads", headers=me).get_json()["data"] == [thread]
    assert client.get(f"{P}/threads/{thread['id']}/messages", headers=me).get_json()["data"] == entries


def test_lists_are_paged(app: Flask) -> None:
    made = [current_assistream.create_thread(owner="42")["id"] for _ in range(3)]
    page = current_assistream.threads(owner="42", limit=2)
    assert ([thread["id"] for thread in page], page.has_more) == ([made[2], made[1]], True)
    page = current_assistream.threads(owner="42", before=made[1])
    assert ([thread["id"] for thread in page], page.has_more) == ([made[0]], False)
    said = [current_assistream.add_message(made[0], word, owner="42") for word in ("one", "two", "three")]
    entries = current_assistream.messages(made[0], owner="42", limit=1, before=said[2]["message"]["id"])
    assert (list(entries), entries.has_more) == ([said[1]], True)


def test_a_sequential_run_hears_the_answers_before_it(app: Flask, server: OfflineServer) -> None:
    server.replies = ["first", "second"]
    thread_id = current_assistream.create_thread(owner="42")["id"]
    current_assistream.run(thread_id, ["tutor", "critic"], content="Hi", mode="sequential", owner="42").wait(20)
    assert "first" in server.requests[1].messages[-1][1]


def test_the_guides_job_prints_the_answer(server: OfflineServer, tmp_path: Path) -> None:
    server.replies = "The day in a word."
    script, _ = re.findall(r"^```python\n(.*?)^```", GUIDE, re.MULTILINE | re.DOTALL)
    assert len([line for line in script.splitlines() if line]) <= 10
    (tmp_path / "job.py").write_text(script)
    (tmp_path / "wsgi.py").write_text(
        "from flask import Flask\nfrom openai import OpenAI\n"
        "from assistream_flask import Assistant, create_blueprint\n"
        "app = Flask(__name__)\n"
        f"app.config['ASSISTREAM_DATABASE_URL'] = 'sqlite:///{tmp_path}/a.sqlite3'\n"
        f"client = lambda: OpenAI(base_url={server.base_url!r}, api_key='k')\n"
        "app.register_blueprint(create_blueprint([Assistant('tutor', model='m')], owner=lambda: '42', client=client))\n"
    )
    done = subprocess.run([sys.executable, "job.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("tutor completed None\nThe day in a word.\n", "")


def test_the_guide_names_every_command_and_no_other() -> None:
    told = set(re.findall(r"^\| `(\w+)\(", GUIDE, re.MULTILINE))
    assert told == {name for name in vars(Commands) if not name.startswith("_")}


# Owners


def test_a_job_for_the_sessions_owner_is_in_the_visitors_page(make_app: MakeApp) -> None:
    app = make_app()

    @app.get("/me")
    def me() -> dict[str, str | None]:
        return {"owner": current_assistream.caller()}

    visitor, other = Caller(app), Caller(app)
    owner = visitor.client.get("/me").get_json()["owner"]
    assert app.test_client().get("/me").get_json() == {"owner": None}
    with app.app_context():
        assert [one["id"] for one in current_assistream.threads(owner=owner)] == [visitor.thread_id]
        current_assistream.add_message(visitor.thread_id, "from a job", owner=owner)
        with pytest.raises(NotFoundError):
            current_assistream.add_message(other.thread_id, "from a job", owner=owner)
    assert [text(entry) for entry in visitor.entries()] == ["from a job"]


@pytest.mark.parametrize("name", ["n" * 300, "half \udc80 a pair", "42"])
def test_a_name_means_the_same_user_in_a_job_and_in_the_routes(make_app: MakeApp, name: str) -> None:
    app = make_app(owner=lambda: name)
    visitor = Caller(app)
    with app.app_context():
        assert [one["id"] for one in current_assistream.threads(owner=name)] == [visitor.thread_id]
        # As text, as the routes take what is none.
        if name == "42":
            assert current_assistream.threads(owner=42)  # type: ignore[arg-type]
    with app.test_request_context():
        seen = current_assistream.caller()
        assert seen is not None
        assert current_assistream.threads(owner=seen)


@pytest.mark.parametrize("nobody", [None, "", False])
def test_what_names_nobody_is_refused(app: Flask, nobody: Any) -> None:
    with pytest.raises(RequestError, match="'owner' must be the name of a user"):
        current_assistream.threads(owner=nobody)


def test_several_blueprints_share_nothing_and_one_must_be_named(app: Flask) -> None:
    thread_id = current_assistream.create_thread(owner="42")["id"]
    app.register_blueprint(create_blueprint(ASSISTANTS, owner=named_by_header, name="second"), url_prefix="/second")
    with pytest.raises(ConfigurationError, match=r"'assistream', 'second'.*current_assistream.blueprint\(name\)"):
        current_assistream.threads(owner="42")
    assert [one["id"] for one in current_assistream.blueprint("assistream").threads(owner="42")] == [thread_id]
    assert current_assistream.blueprint("second").threads(owner="42") == []
    with pytest.raises(ConfigurationError, match="no blueprint 'third'"):
        current_assistream.blueprint("third")


# Errors


def test_a_thread_of_another_and_one_that_is_not_there_raise_the_same(app: Flask) -> None:
    thread_id = current_assistream.create_thread(owner="42")["id"]
    commands: list[Callable[[str], object]] = [
        lambda one: current_assistream.thread(one, owner="7"),
        lambda one: current_assistream.messages(one, owner="7"),
        lambda one: current_assistream.add_message(one, "Hi", owner="7"),
        lambda one: current_assistream.run(one, ["tutor"], content="Hi", owner="7"),
        lambda one: current_assistream.cancel(one, NO_RUN, owner="7"),
        lambda one: current_assistream.delete_thread(one, owner="7"),
    ]
    for command in commands:
        told = set()
        for one in (thread_id, NO_THREAD, "no id at all"):
            with pytest.raises(NotFoundError) as error:
                command(one)
            told.add((error.value.code, str(error.value)))
        assert told == {("thread_not_found", "There is no such thread, or it is not yours.")}
    assert current_assistream.messages(thread_id, owner="42") == []


def test_what_is_not_there_is_said_by_a_code(app: Flask) -> None:
    thread_id = current_assistream.create_thread(owner="42")["id"]
    commands: dict[str, Callable[[], object]] = {
        "run_not_found": lambda: current_assistream.cancel(thread_id, NO_RUN, owner="42"),
        "message_not_found": lambda: current_assistream.messages(thread_id, before="msg_" + "0" * 32, owner="42"),
        "thread_not_found": lambda: current_assistream.threads(before=NO_THREAD, owner="42"),
        "assistant_not_found": lambda: current_assistream.run(thread_id, ["tutor", "nobody"], owner="42"),
    }
    for code, command in commands.items():
        with pytest.raises(NotFoundError) as error:
            command()
        assert error.value.code == code


def test_values_that_no_route_would_take_are_refused(app: Flask) -> None:
    thread_id = current_assistream.create_thread(owner="42")["id"]
    commands: list[Callable[[], object]] = [
        lambda: current_assistream.create_thread(owner="42", metadata={"a": "b" * 513}),
        lambda: current_assistream.threads(owner="42", limit=0),
        lambda: current_assistream.messages(thread_id, owner="42", limit=201),
        lambda: current_assistream.add_message(thread_id, " ", owner="42"),
        lambda: current_assistream.run(thread_id, "tutor", owner="42"),
        lambda: current_assistream.run(thread_id, [], owner="42"),
        lambda: current_assistream.run(thread_id, ["tutor"], mode="random", owner="42"),
    ]
    for command in commands:
        with pytest.raises(RequestError) as error:
            command()
        assert error.value.code == "invalid_value"
    assert current_assistream.messages(thread_id, owner="42") == []


def test_without_a_blueprint_or_a_context_the_error_says_what_is_missing() -> None:
    with pytest.raises(RuntimeError, match="application context"):
        current_assistream.threads(owner="42")
    with Flask("bare").app_context(), pytest.raises(ConfigurationError, match="register_blueprint"):
        current_assistream.threads(owner="42")


def test_a_list_for_requests_is_not_asked_in_a_job_but_adopt_is(make_app: MakeApp) -> None:
    def of_request() -> list[Assistant]:
        return [Assistant(request.headers["X-Assistant"], model="m")]

    def adopt(assistant_id: str, owner: str) -> Assistant | None:
        return Assistant(assistant_id, model="m") if (assistant_id, owner) == ("tutor", "42") else None

    for app, fails in ((make_app(of_request), True), (make_app(of_request, adopt=adopt), False)):
        with app.app_context():
            thread_id = current_assistream.create_thread(owner="42")["id"]
            if fails:
                with pytest.raises(ConfigurationError, match="adopt="):
                    current_assistream.run(thread_id, ["tutor"], content="Hi", owner="42")
            else:
                (run,) = current_assistream.run(thread_id, ["tutor"], content="Hi", owner="42").wait(20)
                assert run["status"] == "completed"
                with pytest.raises(NotFoundError):
                    current_assistream.run(thread_id, ["critic"], content="Hi", owner="42")
        with app.test_request_context(headers={"X-Assistant": "poet"}):
            (run,) = current_assistream.run(thread_id, ["poet"], content="Hi", owner="42").wait(20)
            assert run["status"] == "completed"


# Waiting


def test_a_wait_that_takes_too_long_says_so_and_the_runs_go_on(app: Flask, held: Held) -> None:
    thread_id = current_assistream.create_thread(owner="42")["id"]
    runs = current_assistream.run(thread_id, ["tutor", "critic"], content="Hi", owner="42")
    with pytest.raises(TimeoutError, match=r"2 of 2 runs have not ended within 0\.1 s; they go on"):
        runs.wait(0.1)
    with pytest.raises(WaitTimeoutError):
        runs.wait(0)
    held.let_go()
    assert [run["status"] for run in runs.wait(20)] == ["completed", "completed"]


def test_a_run_that_fails_or_is_cancelled_has_ended(app: Flask, server: OfflineServer) -> None:
    server.replies = [Reply("x", fault="400"), Reply("one two three", fault="stall")]
    thread_id = current_assistream.create_thread(owner="42")["id"]
    (failed,) = current_assistream.run(thread_id, ["tutor"], content="Hi", owner="42").wait(20)
    assert failed["last_error"] is not None
    assert (failed["status"], failed["last_error"]["code"]) == ("failed", "upstream_rejected")
    runs = current_assistream.run(thread_id, ["tutor"], content="Hi", owner="42")
    begun(server, 2)
    assert current_assistream.cancel(thread_id, runs[0]["id"], owner="42")["status"] == "cancelled"
    assert runs.wait(20)[0]["status"] == "cancelled"


def test_a_wait_ends_when_the_thread_is_deleted(app: Flask, server: OfflineServer, held: Held) -> None:
    thread_id = current_assistream.create_thread(owner="42")["id"]
    runs = current_assistream.run(thread_id, ["tutor"], content="Hi", owner="42")
    timer = threading.Timer(0.3, lambda: of(app).delete_thread(thread_id, owner="42"))
    timer.start()
    with pytest.raises(NotFoundError, match="deleted"):
        runs.wait(20)
    timer.join()


def test_a_wait_sees_the_end_of_a_run_that_another_worker_took_over(
    app: Flask, make_app: MakeApp, server: OfflineServer, held: Held
) -> None:
    other = make_app(owner=named_by_header)
    thread_id = current_assistream.create_thread(owner="42")["id"]
    of(other).threads(owner="42")
    first = of(other).run(thread_id, ["tutor"], content="Hi", owner="42")
    begun(server)
    second = current_assistream.run(thread_id, ["critic"], content="Hi", owner="42")
    # It waits for the other worker's, and is left to that one.
    app.extensions["assistream"].close()
    threading.Timer(0.3, held.let_go).start()
    assert [run["status"] for run in second.wait(30)] == ["completed"]
    assert [run["status"] for run in first.wait(0)] == ["completed"]
    assert text(of(other).messages(thread_id, owner="42")[-1]) == "I am critic."


def test_a_wait_goes_on_while_the_log_is_away(
    app: Flask, server: OfflineServer, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    thread_id = current_assistream.create_thread(owner="42")["id"]
    runs = current_assistream.run(thread_id, ["tutor"], content="Hi", owner="42")
    # The run itself needs the log no more until it ends.
    begun(server)
    log, asked = app.extensions["assistream"].runtime().log, []

    def away(thread_id: str) -> None:
        asked.append(thread_id)
        if len(asked) == 2:
            held.let_go()
        raise LogUnavailableError

    with monkeypatch.context() as patched:
        patched.setattr(log, "end", away)
        assert runs.wait(20)[0]["status"] == "completed"
    assert len(asked) > 2


# Deletion


def dump(path: Path) -> str:
    with contextlib.closing(sqlite3.connect(path)) as database:
        return "".join(database.iterdump())


def test_nothing_of_a_deleted_owner_is_stored_and_nothing_of_others_is_gone(
    app: Flask, server: OfflineServer, tmp_path: Path
) -> None:
    client, key = app.test_client(), {"Idempotency-Key": "k"}
    made = {}
    for owner in ("4242-gone", "7171-stays"):
        body = {"metadata": {"title": f"of {owner}"}}
        made[owner] = [
            client.post(f"{P}/threads", json=body, headers={"X-Me": owner, **key}).get_json()["id"],
            *(current_assistream.create_thread(owner=owner)["id"] for _ in range(2)),
        ]
        for thread_id in made[owner][:2]:
            current_assistream.run(thread_id, ["tutor"], content=f"words of {owner}", owner=owner).wait(20)
    server.replies = Reply("one two three", fault="stall")
    running = current_assistream.run(made["4242-gone"][2], ["tutor"], content="Hi", owner="4242-gone")
    begun(server, 5)
    kept = current_assistream.messages(made["7171-stays"][0], owner="7171-stays")

    current_assistream.delete_owner("4242-gone")
    assert current_assistream.threads(owner="4242-gone") == []
    stored = dump(tmp_path / "test.sqlite3")
    assert "4242-gone" not in stored
    assert not [one for one in made["4242-gone"] if one in stored]
    assert server.requests[-1].wait(10)
    with pytest.raises(NotFoundError):
        running.wait(10)
    assert {one["id"] for one in current_assistream.threads(owner="7171-stays")} == set(made["7171-stays"])
    assert current_assistream.messages(made["7171-stays"][0], owner="7171-stays") == kept
    # Nobody is no error, and a user may come back.
    current_assistream.delete_owner("4242-gone")
    assert client.post(f"{P}/threads", json={}, headers={"X-Me": "4242-gone", **key}).status_code == 201


def test_an_owner_with_more_threads_than_a_page_is_deleted_whole(app: Flask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("assistream_flask.runs.values.MOST_ENTRIES", 2)
    for _ in range(5):
        current_assistream.create_thread(owner="42")
    current_assistream.delete_owner("42")
    assert current_assistream.threads(owner="42", limit=2) == []


# Two processes


def test_a_job_and_a_gunicorn_on_one_redis_and_one_database_see_each_others_runs(
    tmp_path: Path, redis_server: RedisServer, postgres: PostgresServer
) -> None:
    url = postgres.new_database()
    with OfflineServer(delay=0) as model, quick_client(model) as client:
        model.replies = ["A job's answer.", Reply("one two three", fault="stall")]
        app = Flask("job")
        app.config.update(ASSISTREAM_DATABASE_URL=url, ASSISTREAM_REDIS_URL=redis_server.url)
        app.register_blueprint(create_blueprint(ASSISTANTS, owner=named_by_header, client=client))
        with clustered(tmp_path, redis_server, url, workers=1, model_url=model.base_url) as cluster, app.app_context():
            (web,) = cluster.gunicorns
            # The gunicorn's app names every caller so.
            thread_id = current_assistream.create_thread(owner="me")["id"]
            runs = current_assistream.run(thread_id, ["tutor"], content="Hi", owner="me")
            assert runs.wait(30)[0]["status"] == "completed"
            path = f"/assistream/threads/{thread_id}"
            assert [text(one) for one in web.request("GET", f"{path}/messages")["data"]] == ["Hi", "A job's answer."]
            runs = current_assistream.run(thread_id, ["tutor"], content="More", owner="me")
            wait_until(lambda: len(model.requests) == 2)
            web.request("POST", f"{path}/runs/{runs[0]['id']}/cancel", {})
            assert runs.wait(30)[0]["status"] == "cancelled"
            app.extensions["assistream"].close()
