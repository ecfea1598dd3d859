"""Who may see a thread: every route and verb of the app's own URL map, as owner, as another, as nobody."""

from __future__ import annotations

import contextlib
import itertools
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flask import Flask, request
from werkzeug.test import Client, TestResponse

from assistream_flask import Assistant, ConfigurationError, create_blueprint
from assistream_flask.runs.runtime import default_database
from assistream_flask.testing import OfflineServer
from tests.conftest import MakeApp, wait_until
from tests.http_helpers import P, named, read, refused

HELPER = {f"{P}/assistream.js", f"{P}/assistream.min.js"}
PUBLIC = {*HELPER, f"{P}/assistants"}
BODIES: dict[str, Any] = {
    "create_thread": {"metadata": {"a": "b"}},
    "add_message": {"content": "secret words"},
    "create_runs": {"assistant_ids": ["tutor"], "content": "secret words"},
    "cancel": {},
    "submit_tool_outputs": {"tool_outputs": [{"tool_call_id": "call_0", "output": "secret words"}]},
    "approvals": {"approvals": [{"tool_call_id": "call_0", "approve": True}]},
    "claim": {"holder": "a page"},
}
NO_THREAD = "thread_" + "0" * 32


def named_by_header() -> str | None:
    return request.headers.get("X-Me")


class Someone:
    """A caller: known by a header where the app names its callers, by the session's cookie where it does not."""

    def __init__(self, app: Flask, name: str | None) -> None:
        self.client: Client = app.test_client()
        self.headers = {"X-Me": name} if name is not None else {}

    def open(self, method: str, url: str, body: Any = None, **headers: str) -> TestResponse:
        extra: dict[str, Any] = {} if body is None else {"json": body}
        return self.client.open(url, method=method, headers={**self.headers, **headers}, **extra)


def verbs(app: Flask) -> Iterator[tuple[str, str, Any]]:
    """Give (method, URL rule, body) of every route of ours; what deletes comes last."""
    found = []
    for rule in app.url_map.iter_rules():
        blueprint, _, endpoint = rule.endpoint.rpartition(".")
        # The doctor's has no owner: test_doctor.py.
        if blueprint == "assistream" and endpoint != "doctor":
            found += [(method, rule.rule, BODIES.get(endpoint)) for method in sorted(rule.methods or ())]
    assert len(found) > 20
    yield from sorted(found, key=lambda one: (one[0] == "DELETE", one[1], one[0]))


@pytest.fixture(params=["callable", "session"])
def app(request: pytest.FixtureRequest, make_app: MakeApp) -> Flask:
    return make_app(owner=named_by_header if request.param == "callable" else None)


class World:
    """An owner with a thread, a message, a run; and two who have no business there."""

    def __init__(self, app: Flask) -> None:
        by_name = app.extensions["assistream"].parts["assistream"].owner is not None
        self.owner = Someone(app, "owner" if by_name else None)
        self.another = Someone(app, "another" if by_name else None)
        self.nobody = Someone(app, None)
        self.nobody_status = 401 if by_name else 404
        thread = self.owner.open("POST", f"{P}/threads", {}).get_json()
        self.its = self.another.open("POST", f"{P}/threads", {}).get_json()["id"]
        self.thread_id: str = thread["id"]
        self.url = f"{P}/threads/{self.thread_id}"
        started = self.owner.open(
            "POST", f"{self.url}/runs", {"assistant_ids": ["tutor"], "content": "secret words"}
        ).get_json()
        self.message_id: str = started["message"]["message"]["id"]
        self.run_id: str = started["runs"][0]["id"]
        wait_until(lambda: self.entries()[1]["run"]["status"] == "completed")

    def entries(self) -> Any:
        return self.owner.open("GET", f"{self.url}/messages?limit=200").get_json()["data"]

    def filled(self, rule: str, thread_id: str | None = None) -> str:
        url = rule.replace("<thread_id>", thread_id or self.thread_id).replace("<run_id>", self.run_id)
        url = url.replace("<call_id>", "call_0")
        assert "<" not in url, f"{rule}: tell this test what to fill in"
        return url

    def secrets(self) -> list[str]:
        return [self.thread_id, self.message_id, self.run_id, "secret words"]


@pytest.fixture
def world(app: Flask) -> World:
    return World(app)


def whole(answer: TestResponse) -> str:
    """Give the body, or the beginning of a stream."""
    if answer.mimetype == "text/event-stream" and answer.request and answer.request.method != "HEAD":
        return str(read(answer, lambda frame: True))
    text = answer.text
    answer.close()
    return text


def test_the_owner_may_use_every_route(app: Flask, world: World) -> None:
    for method, rule, body in verbs(app):
        answer = world.owner.open(method, world.filled(rule), body)
        whole(answer)
        if method == "POST" and rule.endswith(("/submit_tool_outputs", "/approvals", "/claim")):
            # That the run calls nothing is for its owner to know: test_tools.py has one that does.
            refused(answer, 404, "tool_call_not_found")
            continue
        assert answer.status_code < 400, (method, rule, answer.status_code)


@pytest.mark.parametrize("who", ["another", "nobody"])
def test_no_route_gives_or_does_anything_to_another_or_to_nobody(app: Flask, world: World, who: str) -> None:
    before = world.entries()
    someone: Someone = getattr(world, who)
    status = 404 if who == "another" else world.nobody_status
    leaks, tried = [], 0
    for method, rule, body in verbs(app):
        if "<" not in rule or method == "OPTIONS":
            continue
        for accept in ("*/*", "text/event-stream"):
            answer = someone.open(method, world.filled(rule), body, Accept=accept)
            tried += 1
            text = whole(answer)
            if answer.status_code != status or any(secret in text for secret in world.secrets()):
                leaks.append((method, rule, answer.status_code, text[:200]))
    assert tried >= 16
    assert leaks == []
    assert world.entries() == before


@pytest.mark.parametrize("who", ["another", "nobody"])
def test_no_list_shows_what_is_anothers(app: Flask, world: World, who: str) -> None:
    someone: Someone = getattr(world, who)
    for method, rule, body in verbs(app):
        if "<" not in rule:
            text = whole(someone.open(method, rule, body))
            assert not [secret for secret in world.secrets() if secret in text], (method, rule)


def test_a_caller_without_a_name_gets_401_on_every_route_but_the_helper_files(make_app: MakeApp) -> None:
    app = make_app(owner=named_by_header)
    world = World(app)
    nameless = Someone(app, "")
    for someone in (world.nobody, nameless):
        for method, rule, body in verbs(app):
            if method not in ("HEAD", "OPTIONS") and rule not in HELPER:
                refused(someone.open(method, world.filled(rule), body), 401, "unauthenticated")


@pytest.mark.parametrize("who", ["owner", "nobody"])
def test_nothing_but_the_helper_may_be_kept_and_nothing_taken_for_another_type(
    app: Flask, world: World, who: str
) -> None:
    someone: Someone = getattr(world, who)
    for method, rule, body in [*verbs(app), ("GET", f"{P}/nowhere", None), ("PUT", f"{P}/threads", None)]:
        for accept in ("*/*", "text/event-stream"):
            answer = someone.open(method, world.filled(rule), body, Accept=accept)
            kept = rule in HELPER and method != "OPTIONS"
            assert ("no-store" in answer.headers["Cache-Control"]) is not kept, (method, rule, answer.headers)
            assert answer.headers["X-Content-Type-Options"] == "nosniff", (method, rule, answer.headers)
            answer.close()


def test_a_thread_of_another_and_one_that_does_not_exist_are_answered_alike(app: Flask, world: World) -> None:
    compared = 0
    for method, rule, body in verbs(app):
        if "<thread_id>" not in rule or method in ("HEAD", "OPTIONS"):
            continue
        anothers = world.another.open(method, world.filled(rule), body)
        missing = world.another.open(method, world.filled(rule, NO_THREAD), body)
        odd = world.another.open(method, world.filled(rule, "no-id-at-all"), body)
        refused(anothers, 404, "thread_not_found")
        for other in (missing, odd):
            assert (anothers.status_code, anothers.data) == (other.status_code, other.data)
            assert dict(anothers.headers) == dict(other.headers)
        compared += 1
    assert compared >= 6


def test_bad_requests_do_not_tell_whether_anothers_thread_exists(world: World) -> None:
    for url, body in itertools.product(
        (f"{P}/threads/{{}}/runs", f"{P}/threads/{{}}/messages"), ({"nonsense": 1}, {"content": ""}, [])
    ):
        answers = [world.another.open("POST", url.format(one), body) for one in (world.thread_id, NO_THREAD)]
        assert [answer.status_code for answer in answers] == [404, 404]
        assert answers[0].data == answers[1].data


def test_ids_of_another_in_the_query_give_nothing(world: World) -> None:
    url = f"{P}/threads/{world.its}"
    refused(world.another.open("GET", f"{url}/messages?before={world.message_id}"), 404, "message_not_found")
    refused(world.another.open("GET", f"{P}/threads?before={world.thread_id}"), 404, "thread_not_found")
    refused(world.another.open("POST", f"{url}/runs/{world.run_id}/cancel", {}), 404, "run_not_found")
    event_id = world.owner.open("GET", f"{world.url}/messages").headers["Last-Event-ID"].split("-")[0] + "-0"
    [frame] = read(world.another.open("GET", f"{url}/events?last_event_id={event_id}"), named("thread.snapshot"))
    assert frame.data == {"thread_id": world.its, "data": [], "has_more": False}


def test_an_idempotency_key_of_one_owner_gives_nothing_to_another(world: World) -> None:
    key = {"Idempotency-Key": "the-same"}
    first = world.owner.open("POST", f"{P}/threads", {}, **key)
    second = world.another.open("POST", f"{P}/threads", {}, **key)
    assert first.status_code == second.status_code == 201
    assert first.get_json()["id"] != second.get_json()["id"]
    world.owner.open("POST", f"{world.url}/messages", {"content": "mine"}, **{"Idempotency-Key": "k2"})
    answer = world.another.open("POST", f"{world.url}/messages", {"content": "mine"}, **{"Idempotency-Key": "k2"})
    refused(answer, 404, "thread_not_found")


def test_a_forged_session_is_nobody(make_app: MakeApp) -> None:
    app = make_app()
    world = World(app)
    cookie = world.owner.client.get_cookie("session")
    assert cookie is not None
    for forged in (cookie.value[:-3] + "AAA", "x", cookie.value.split(".")[0]):
        bare = app.test_client(use_cookies=False)
        answer = bare.get(f"{world.url}/messages", headers={"Cookie": f"session={forged}"})
        refused(answer, 404, "thread_not_found")


def test_the_session_is_filled_by_what_a_page_asks_first_and_by_no_other_reading(make_app: MakeApp) -> None:
    client = make_app().test_client()
    for url in (f"{P}/assistants", f"{P}/threads/{NO_THREAD}/messages"):
        assert "Set-Cookie" not in client.get(url).headers
    assert "Set-Cookie" in client.get(f"{P}/threads").headers


def test_long_names_are_told_apart_to_the_last_character(make_app: MakeApp) -> None:
    app = make_app(owner=named_by_header)
    one, two = Someone(app, "n" * 300 + "1"), Someone(app, "n" * 300 + "2")
    thread_id = one.open("POST", f"{P}/threads", {}).get_json()["id"]
    assert one.open("GET", f"{P}/threads/{thread_id}/messages").status_code == 200
    refused(two.open("GET", f"{P}/threads/{thread_id}/messages"), 404, "thread_not_found")


def test_two_names_share_nothing_not_even_keys(make_app: MakeApp, server: OfflineServer) -> None:
    app = make_app(owner=lambda: "me")
    with server.client() as client:
        app.register_blueprint(
            create_blueprint([Assistant("tutor", model="m")], owner=lambda: "me", client=client, name="second"),
            url_prefix="/second",
        )
        me = Someone(app, None)
        ids = [
            me.open("POST", f"{prefix}/threads", {}, **{"Idempotency-Key": "k"}).get_json()["id"]
            for prefix in (P, "/second")
        ]
        assert ids[0] != ids[1]
        for prefix, mine, other in ((P, ids[0], ids[1]), ("/second", ids[1], ids[0])):
            assert [one["id"] for one in me.open("GET", f"{prefix}/threads").get_json()["data"]] == [mine]
            for method, rest in (("GET", "/messages"), ("GET", "/events"), ("DELETE", "")):
                refused(me.open(method, f"{prefix}/threads/{other}{rest}"), 404, "thread_not_found")
        app.extensions["assistream"].close()


def owner_callable() -> str | None:
    return "me"


@pytest.mark.parametrize("owner", [None, owner_callable])
def test_without_a_secret_key_and_an_owner_registration_fails_and_says_what_to_do(
    owner: Callable[[], str | None] | None,
) -> None:
    app = Flask("app")
    blueprint = create_blueprint([Assistant("tutor", model="m")], owner=owner)
    if owner is not None:
        app.register_blueprint(blueprint, url_prefix=P)
        return
    with pytest.raises(ConfigurationError, match=r"SECRET_KEY.*owner=") as error:
        app.register_blueprint(blueprint, url_prefix=P)
    assert "register_blueprint" in str(error.value)


def test_the_owners_own_refusal_is_the_apps_answer(make_app: MakeApp) -> None:
    from flask import abort, redirect

    def to_login() -> str | None:
        if request.headers.get("X-Me") is None:
            abort(redirect("/login"))
        if request.headers["X-Me"] == "banned":
            abort(403, "You are banned. Ask the operator.")
        return request.headers["X-Me"]

    app = make_app(owner=to_login)
    answer = Someone(app, None).open("GET", f"{P}/threads")
    assert (answer.status_code, answer.headers["Location"]) == (302, "/login")
    message = refused(Someone(app, "banned").open("GET", f"{P}/threads"), 403, "invalid_request")
    assert message == "You are banned. Ask the operator."


@pytest.mark.parametrize("nobody", [None, "", False, True])
def test_what_apps_give_for_nobody_is_nobody(make_app: MakeApp, nobody: Any) -> None:
    client = make_app(owner=lambda: nobody).test_client()
    assert client.post(f"{P}/threads", json={}).status_code == 401


def test_folders_and_keys_that_are_made_for_an_app_are_its_users_alone(tmp_path: Path) -> None:
    from example_app import _kept_secret

    makers: list[Callable[[Path], str]] = [_kept_secret, lambda folder: default_database(str(folder))]
    for at, make in enumerate(makers):
        folder = tmp_path / "instances" / str(at)
        make(folder)
        assert folder.stat().st_mode & 0o777 == 0o700
        assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} <= {0o600}
        folder.chmod(0o750)
        make(folder)
        assert folder.stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "instances" / "0" / "secret_key").exists()


def test_a_deleted_threads_text_is_nowhere_in_the_database(make_app: MakeApp, tmp_path: Path) -> None:
    client = make_app(owner=lambda: "me").test_client()
    body = {"metadata": {"title": "Nobody may read this"}}
    created = client.post(f"{P}/threads", json=body, headers={"Idempotency-Key": "zero"}).get_json()
    url = f"{P}/threads/{created['id']}"
    key = {"Idempotency-Key": "one"}
    assert client.post(f"{url}/messages", json={"content": "Nobody may read this"}, headers=key).status_code == 201
    assert client.delete(url).status_code == 204
    with contextlib.closing(sqlite3.connect(tmp_path / "test.sqlite3")) as database:
        assert "Nobody may read this" not in "".join(database.iterdump())
    again = client.post(f"{P}/threads", json=body, headers={"Idempotency-Key": "zero"})
    assert (again.status_code, again.get_json()) == (201, {**created, "metadata": {}})
