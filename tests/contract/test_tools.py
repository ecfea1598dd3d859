"""Tools, through the routes, in the three dialects: the offline server refuses what is no whole history."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from flask import Flask, current_app

from assistream_flask import Assistant, ToolContext, page_tool, run_ended, tool, tool_called
from assistream_flask.runs.tool_execution import ToolExecutions
from assistream_flask.testing import OfflineServer, Reply, ToolCall
from tests.conftest import Caller, MakeApp, at_once, text, wait_until
from tests.http_helpers import refused

DIALECTS = ("responses", "chat", "assistants")
DATE = {"type": "object", "properties": {"month": {"type": "string"}}, "required": ["month"]}


class House:
    """An app with one assistant, whose tools write down how they were called."""

    def __init__(self, make_app: MakeApp, server: OfflineServer, dialect: str) -> None:
        self._make_app, self.server, self.dialect = make_app, server, dialect
        self.called: list[Any] = []
        self.gate = threading.Event()
        self.app: Flask

    def open(
        self, *tools: Any, more: Sequence[Assistant] = (), settings: Mapping[str, Any] = {}, **of_it: Any
    ) -> Caller:
        clerk = Assistant("clerk", model="m", upstream=self.dialect, tools=tools, **of_it)
        self.app = self._make_app([clerk, *more], **settings)
        return Caller(self.app)

    def lookup(self, **options: Any) -> Any:
        @tool(**options)
        def lookup(query: str, context: ToolContext) -> dict[str, str]:
            """Look something up.

            Args:
                query: What.
            """
            self.called.append(query)
            assert current_app.name == self.app.name
            assert context.tool_call_id.startswith("call_")
            return {"found": query}

        return lookup

    def slow(self, **options: Any) -> Any:
        @tool(**options)
        def slow(number: int) -> str:
            """Wait until the test says so."""
            self.called.append(("began", number))
            self.gate.wait(10)
            self.called.append(("ended", number))
            return f"{number}"

        return slow

    def says(self, *replies: Any) -> None:
        self.server.replies = [Reply(one) if isinstance(one, str) else one for one in replies]


@pytest.fixture(params=DIALECTS)
def house(request: pytest.FixtureRequest, make_app: MakeApp, server: OfflineServer) -> House:
    return House(make_app, server, request.param)


def look(*queries: str, said: str = "") -> Reply:
    return Reply(said, calls=[ToolCall("lookup", {"query": one}) for one in queries])


def calls(entry: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        call for step in entry["steps"] if step["type"] == "tool_calls" for call in step["step_details"]["tool_calls"]
    ]


def ends(caller: Caller, *run_ids: str) -> list[dict[str, Any]]:
    wait_until(lambda: all(caller.entry(one)["run"]["status"] not in ("queued", "in_progress") for one in run_ids))
    return [caller.entry(one) for one in run_ids]


def ask(caller: Caller, content: str = "Hi", assistant: str = "clerk") -> dict[str, Any]:
    """Run it, and wait until it is over or waits; give the entry."""
    return ends(caller, *caller.run(assistant, content=content))[0]


def fine(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    assert (entry["run"]["status"], entry["run"]["last_error"]) == ("completed", None)
    return entry


def goes_on(house: House, caller: Caller) -> None:
    """Show that the thread is not stuck: the next request is taken."""
    house.says("On we go.")
    assert text(fine(ask(caller, "And now?"))) == "On we go."


def post(caller: Caller, entry: Mapping[str, Any], path: str, body: Any, **headers: str) -> Any:
    return caller.client.post(f"{caller.url}/runs/{entry['run']['id']}/{path}", json=body, headers=headers)


def waiting(entry: Mapping[str, Any]) -> list[dict[str, Any]]:
    assert entry["run"]["status"] == "requires_action"
    found: list[dict[str, Any]] = entry["run"]["required_action"]["submit_tool_outputs"]["tool_calls"]
    return found


def approve(caller: Caller, entry: Mapping[str, Any], *, approve: bool = True, **more: Any) -> Any:
    decided = [{"tool_call_id": call["id"], "approve": approve, **more} for call in waiting(entry)]
    return post(caller, entry, "approvals", {"approvals": decided})


# What the app executes


def test_a_function_is_called_and_the_model_hears_what_it_gave(house: House) -> None:
    caller = house.open(house.lookup())
    house.says(look("Ada", said="I look."), "She wrote it.")
    entry = fine(ask(caller))
    [call] = calls(entry)
    assert (call["function"]["name"], call["function"]["output"]) == ("lookup", '{"found":"Ada"}')
    assert (call["status"], call["kind"], call["error"]) == ("completed", "server", None)
    assert [part["text"]["value"] for part in entry["message"]["content"]] == ["I look.", "She wrote it."]
    assert [step["content_index"] for step in entry["steps"]] == [1]
    assert house.called == ["Ada"]
    goes_on(house, caller)
    if house.dialect != "assistants":
        assert [role for role, _ in house.server.requests[-1].messages].count("tool") == 1


def test_calls_of_one_answer_run_at_the_same_time_and_a_sequential_one_alone(house: House) -> None:
    caller = house.open(house.slow())
    house.says(Reply(calls=[ToolCall("slow", {"number": at}) for at in range(3)]), "Done.")
    [run_id] = caller.run("clerk")
    wait_until(lambda: len(house.called) == 3)
    house.gate.set()
    fine(ends(caller, run_id)[0])
    assert [what for what, _ in house.called] == ["began"] * 3 + ["ended"] * 3
    house.called.clear()
    other = House(house._make_app, house.server, house.dialect)
    caller = other.open(other.slow(sequential=True))
    other.gate.set()
    other.says(Reply(calls=[ToolCall("slow", {"number": at}) for at in range(3)]), "Done.")
    fine(ask(caller))
    assert [what for what, _ in other.called] == ["began", "ended"] * 3


@pytest.mark.parametrize(
    ("call", "output", "error"),
    [
        (ToolCall("lookup", '{"query": "A'), "no JSON object", "bad arguments"),
        (ToolCall("lookup", '{"query": NaN}'), "no JSON object", "bad arguments"),
        (ToolCall("lookup", {"query": 1}), "query", "bad arguments"),
        (ToolCall("nothing", {}), "There is no tool 'nothing'", "unknown tool"),
    ],
    ids=["malformed", "no-number", "mistyped", "unknown"],
)
def test_a_call_that_cannot_be_made_is_told_to_the_model(house: House, call: Any, output: str, error: str) -> None:
    caller = house.open(house.lookup())
    house.says(Reply(calls=[call]), "Sorry.")
    [found] = calls(fine(ask(caller)))
    assert output in found["function"]["output"]
    assert (found["status"], found["error"], house.called) == ("failed", error, [])
    goes_on(house, caller)


def test_what_a_function_raises_is_not_told_to_anybody(house: House, caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> str:
        """Fail."""
        raise ValueError("the secret of the house")

    caller = house.open(broken)
    house.says(Reply(calls=[ToolCall("broken")]), "It failed.")
    [call] = calls(fine(ask(caller)))
    assert (call["status"], call["error"]) == ("failed", "failed")
    assert "secret" not in call["function"]["output"]
    assert "the secret of the house" in caplog.text
    goes_on(house, caller)


def test_a_call_that_cannot_be_begun_is_over_and_is_not_begun_later(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(ToolExecutions, "start", broken)
    caller = house.open(house.lookup())
    house.says(look("a"), "Well.")
    [call] = calls(fine(ask(caller)))
    assert (call["status"], house.called) == ("interrupted", [])
    assert call["function"]["output"] == "The tool was started and its result is not known."
    goes_on(house, caller)


def test_a_background_response_is_not_gone_on_with_once_its_round_is_over(
    make_app: MakeApp, server: OfflineServer
) -> None:
    house = House(make_app, server, "responses")
    caller = house.open(house.lookup(), background=True)
    house.says(look("a"), Reply(fault="500"))
    entry = ask(caller)
    assert (entry["run"]["last_error"]["code"], house.called) == ("upstream_error", ["a"])
    assert len(calls(entry)) == 1


def test_a_function_that_takes_too_long_is_given_up(house: House) -> None:
    caller = house.open(house.slow(timeout=0.2))
    house.says(Reply(calls=[ToolCall("slow", {"number": 1})]), "Too late.")
    [call] = calls(fine(ask(caller)))
    house.gate.set()
    assert (call["function"]["output"], call["error"]) == ("Timed out after 0.2 seconds.", "timed out")
    goes_on(house, caller)


def test_after_so_many_rounds_the_model_gives_words(house: House) -> None:
    caller = house.open(house.lookup(), max_rounds=2)
    house.server.replies = lambda request: Reply(
        "Words.", calls=[ToolCall("lookup", {"query": str(len(house.called))})]
    )
    entry = fine(ask(caller))
    assert house.called == ["0", "1"]
    assert text(entry).endswith("Words.")


def test_three_equal_calls_in_a_row_are_the_last(house: House) -> None:
    caller = house.open(house.lookup())
    house.server.replies = lambda request: look("same", said="Words.")
    entry = fine(ask(caller))
    assert house.called == ["same", "same"]
    assert [call["error"] for call in calls(entry)] == [None, None, "repeated"]


def test_usage_is_the_sum_over_all_answers(house: House) -> None:
    caller = house.open(house.lookup())
    house.says(Reply(calls=[ToolCall("lookup", {"query": "a"})], usage=(10, 3)), Reply("Done.", usage=(20, 4)))
    usage = fine(ask(caller))["run"]["usage"]
    if house.dialect == "assistants":
        # There it is the server that counts.
        assert usage["completion_tokens"] >= 4
    else:
        assert usage == {"prompt_tokens": 30, "completion_tokens": 7, "total_tokens": 37}


def test_a_cancelled_run_ends_though_its_tool_does_not(house: House) -> None:
    caller = house.open(house.slow())
    house.says(Reply(calls=[ToolCall("slow", {"number": 1})]))
    [run_id] = caller.run("clerk")
    wait_until(lambda: house.called)
    caller.cancel(run_id)
    [entry] = ends(caller, run_id)
    assert entry["run"]["status"] == "cancelled"
    assert [call["status"] for call in calls(entry)] == ["interrupted"]
    goes_on(house, caller)
    house.gate.set()


def test_other_assistants_see_the_text_and_which_tools_were_used(house: House) -> None:
    caller = house.open(house.lookup(), more=[Assistant("critic", model="m", upstream=house.dialect)])
    house.says(look("Ada", said="I look."), "She wrote it.", "Hm.")
    fine(ask(caller))
    fine(ask(caller, "What do you say?", "critic"))
    seen = house.server.requests[-1].messages
    assert not [one for one in seen if one[0] == "tool"]
    assert [said for _, said in seen if "She wrote it." in said and "used: lookup" in said]


def test_the_app_hears_of_each_call_once(house: House) -> None:
    caller = house.open(house.lookup())
    heard: list[Any] = []

    def hear(app: Flask, **values: Any) -> None:
        heard.append((values["call"]["function"]["name"], values["call"]["status"]))

    with tool_called.connected_to(hear, house.app):
        house.says(look("a", "b"), "Done.")
        fine(ask(caller))
        wait_until(lambda: len(heard) == 2)
    assert heard == [("lookup", "completed")] * 2


# What waits for a person


def test_a_call_that_needs_approval_is_made_when_a_person_approves(house: House) -> None:
    caller = house.open(house.lookup(approval=True))
    house.says(look("Ada"), "Found.")
    entry = ask(caller)
    [asked] = waiting(entry)
    assert (asked["needs"], asked["function"]["arguments"]) == ("approval", '{"query":"Ada"}')
    assert (house.called, [call["status"] for call in calls(entry)]) == ([], ["requires_action"])
    assert approve(caller, entry).status_code == 200
    over = fine(ends(caller, entry["run"]["id"])[0])
    assert (text(over), house.called) == ("Found.", ["Ada"])
    assert (over["run"]["required_action"], over["run"]["expires_at"]) == (None, None)
    goes_on(house, caller)


def test_other_arguments_may_be_approved_where_they_are_valid(house: House) -> None:
    caller = house.open(house.lookup(approval=True))
    house.says(look("Ada"), "Found.")
    entry = ask(caller)
    refused(approve(caller, entry, arguments={"query": 1}), 400, "invalid_value")
    refused(approve(caller, entry, arguments={"other": "x"}), 400, "invalid_value")
    assert approve(caller, entry, arguments={"query": "Grace"}).status_code == 200
    over = fine(ends(caller, entry["run"]["id"])[0])
    assert house.called == ["Grace"]
    assert calls(over)[0]["function"]["arguments"] == '{"query":"Grace"}'
    goes_on(house, caller)


def test_a_call_that_is_denied_is_not_made_and_the_model_hears_why(house: House) -> None:
    caller = house.open(house.lookup(approval=True))
    house.says(look("Ada"), "Well.")
    entry = ask(caller)
    approve(caller, entry, approve=False, reason="Not today.")
    over = fine(ends(caller, entry["run"]["id"])[0])
    [call] = calls(over)
    assert (call["status"], house.called) == ("denied", [])
    assert call["function"]["output"].endswith("Not today.")
    goes_on(house, caller)


def test_what_is_approved_for_the_thread_is_not_asked_again_there_alone(house: House) -> None:
    caller = house.open(house.lookup(approval=True))
    house.says(look("a"), "Found.", look("b"), "Again.", look("c"))
    entry = ask(caller)
    approve(caller, entry, remember=True)
    fine(ends(caller, entry["run"]["id"])[0])
    assert text(fine(ask(caller, "More"))) == "Again."
    assert house.called == ["a", "b"]
    assert waiting(ask(Caller(house.app)))


def test_the_app_may_say_for_which_arguments_a_person_is_asked(house: House) -> None:
    def is_much(arguments: Mapping[str, Any], context: ToolContext) -> bool:
        return bool(arguments["query"] == "much")

    caller = house.open(house.lookup(approval=is_much))
    house.says(look("little", "much"), "Found.")
    entry = ask(caller)
    [asked] = waiting(entry)
    assert asked["function"]["arguments"] == '{"query":"much"}'
    assert house.called == ["little"]
    approve(caller, entry)
    fine(ends(caller, entry["run"]["id"])[0])
    assert house.called == ["little", "much"]


def test_calls_are_answered_one_by_one_and_the_last_answer_has_the_run_go_on(house: House) -> None:
    caller = house.open(house.lookup(approval=True))
    house.says(look("a", "b"), "Found.")
    entry = ask(caller)
    first, second = waiting(entry)
    answer = post(caller, entry, "approvals", {"approvals": [{"tool_call_id": second["id"], "approve": True}]})
    assert answer.get_json()["status"] == "requires_action"
    left = answer.get_json()["required_action"]["submit_tool_outputs"]["tool_calls"]
    assert [one["id"] for one in left] == [first["id"]]
    assert house.called == []
    post(caller, entry, "approvals", {"approvals": [{"tool_call_id": first["id"], "approve": True}]})
    fine(ends(caller, entry["run"]["id"])[0])
    assert sorted(house.called) == ["a", "b"]


def test_a_second_answer_is_told_what_was_decided(house: House) -> None:
    caller = house.open(house.lookup(approval=True))
    house.says(look("a"), "Found.")
    entry = ask(caller)
    approve(caller, entry, approve=False, reason="No.")
    again = approve(caller, entry)
    refused(again, 409, "already_answered")
    decision = again.get_json()["error"]["decision"]
    assert (decision["approve"], decision["reason"]) == (False, "No.")


def test_the_same_answer_under_the_same_key_gets_the_first_answer_again(house: House) -> None:
    caller = house.open(house.lookup(approval=True))
    house.says(look("a"), "Found.")
    entry = ask(caller)
    body = {"approvals": [{"tool_call_id": waiting(entry)[0]["id"], "approve": True}]}
    first, again = (post(caller, entry, "approvals", body, **{"Idempotency-Key": "k"}) for _ in range(2))
    assert (again.status_code, again.data) == (first.status_code, first.data)
    fine(ends(caller, entry["run"]["id"])[0])


def test_of_many_answers_at_once_one_is_taken(house: House) -> None:
    caller = house.open(house.lookup(approval=True))
    house.says(look("a"), "Found.")
    entry = ask(caller)
    url, body = (
        f"{caller.url}/runs/{entry['run']['id']}/approvals",
        {"approvals": [{"tool_call_id": waiting(entry)[0]["id"], "approve": True}]},
    )
    cookie = caller.client.get_cookie("session")
    assert cookie is not None

    def answer(_: int) -> int:
        client = house.app.test_client()
        client.set_cookie("session", cookie.value)
        return client.post(url, json=body).status_code

    found = at_once(20, answer)
    assert sorted(found) == [200] + [409] * 19
    fine(ends(caller, entry["run"]["id"])[0])
    assert house.called == ["a"]


def test_a_question_expires(house: House) -> None:
    caller = house.open(house.lookup(approval=True), settings={"action_seconds": 1})
    house.says(look("a"))
    entry = ask(caller)
    wait_until(lambda: caller.entry(entry["run"]["id"])["run"]["status"] == "expired", 60)
    over = caller.entry(entry["run"]["id"])
    assert over["message"]["incomplete_details"] == {"reason": "run_expired"}
    assert [call["status"] for call in calls(over)] == ["interrupted"]
    refused(approve(caller, entry), 409, "not_waiting")
    goes_on(house, caller)


def test_who_has_open_questions_can_still_ask_but_not_leave_any_number_open(house: House) -> None:
    # Nor does what waits take a place of its address's or its worker's.
    limits = {"max_runs": 1, "max_questions": 2, "address_runs": 1, "worker_runs": 1}
    caller = house.open(house.lookup(approval=True), settings=limits)
    house.says(look("a"), look("b"), look("c"), "Hello.", "Here it is.")
    others = [Caller(house.app, caller.client.post("/assistream/threads").get_json()["id"]) for _ in range(3)]
    for other in others:
        # The same user's.
        other.client = caller.client
    first = ask(caller)
    for other in others[:2]:
        waiting(ask(other))
    # One under way and two that waited were allowed: all three wait now.
    body = {"assistant_ids": ["clerk"], "content": "Hi"}
    answer = caller.client.post(f"{others[2].url}/runs", json=body)
    assert "You may have 2 answers that wait for you" in refused(answer, 429, "too_many_runs")
    assert int(answer.headers["Retry-After"]) == 60
    # A message closes the question of its thread, in the same moment.
    assert text(fine(ask(others[0], "Never mind."))) == "Hello."
    assert approve(caller, first).status_code == 200
    assert text(fine(ends(caller, first["run"]["id"])[0])) == "Here it is."


def test_a_run_that_goes_on_counts_for_the_address_that_the_answer_came_from(house: House) -> None:
    caller = house.open(house.lookup(approval=True), settings={"address_runs": 1})
    house.says(look("a"), Reply("Here it is.", fault="stall"))
    entry = ask(caller)
    assert approve(caller, entry).status_code == 200
    other = Caller(house.app)
    answer = other.client.post(f"{other.url}/runs", json={"assistant_ids": ["clerk"], "content": "Hi"})
    refused(answer, 429, "too_many_address_runs")
    caller.cancel(entry["run"]["id"])


@pytest.mark.parametrize("way", ["run", "message"])
def test_a_new_message_closes_the_question(house: House, way: str) -> None:
    caller = house.open(house.lookup(approval=True))
    house.says(look("a"), "Else.")
    entry = ask(caller)
    if way == "run":
        assert text(fine(ask(caller, "Something else"))) == "Else."
    else:
        assert caller.client.post(f"{caller.url}/messages", json={"content": "Never mind"}).status_code == 201
    over = caller.entry(entry["run"]["id"])
    assert over["run"]["status"] == "cancelled"
    [call] = calls(over)
    assert call["function"]["output"] == "The user went on without answering."
    assert house.called == []
    refused(approve(caller, entry), 409, "not_waiting")
    goes_on(house, caller)


def test_a_run_that_was_asked_before_the_question_does_not_wait_for_its_answer(house: House) -> None:
    caller = house.open(house.slow(), house.lookup(approval=True))
    house.says(Reply(calls=[ToolCall("slow", {"number": 1}), ToolCall("lookup", {"query": "a"})]), "The second.")
    [first] = caller.run("clerk")
    wait_until(lambda: house.called)
    [second] = caller.run("clerk", content="And?")
    house.gate.set()
    wait_until(lambda: caller.entry(second)["run"]["status"] == "completed")
    assert caller.entry(first)["run"]["status"] == "cancelled"


def test_a_run_that_waits_is_cancelled_at_once(house: House) -> None:
    caller = house.open(house.lookup(approval=True))
    house.says(look("a"))
    entry = ask(caller)
    heard: list[str] = []

    def hear(app: Flask, **values: Any) -> None:
        heard.append(values["run"]["status"])

    with run_ended.connected_to(hear, house.app):
        assert caller.cancel(entry["run"]["id"])["status"] == "cancelled"
        wait_until(lambda: heard == ["cancelled"])
    goes_on(house, caller)


def test_another_gets_404_whatever_they_answer(house: House) -> None:
    caller = house.open(house.lookup(approval=True), page_tool("pick", "Pick.", DATE))
    house.says(Reply(calls=[ToolCall("lookup", {"query": "a"}), ToolCall("pick", {"month": "May"})]))
    entry = ask(caller)
    other = Caller(house.app)
    one, two = (call["id"] for call in waiting(entry))
    for path, body in (
        ("approvals", {"approvals": [{"tool_call_id": one, "approve": True}]}),
        ("submit_tool_outputs", {"tool_outputs": [{"tool_call_id": two, "output": "x"}]}),
        (f"tool_calls/{two}/claim", {"holder": "me"}),
    ):
        url = f"{caller.url}/runs/{entry['run']['id']}/{path}"
        refused(other.client.post(url, json=body), 404, "thread_not_found")
        url = f"{other.url}/runs/{entry['run']['id']}/{path}"
        assert other.client.post(url, json=body).status_code == 404
    assert len(waiting(caller.entry(entry["run"]["id"]))) == 2


def test_another_process_goes_on_with_what_waits(house: House, make_app: MakeApp) -> None:
    caller = house.open(house.lookup(approval=True))
    house.says(look("a"), "Found.")
    entry = ask(caller)
    cookie = caller.client.get_cookie("session")
    assert cookie is not None
    house.app.extensions["assistream"].close()
    house.open(house.lookup(approval=True))
    after = Caller(house.app, caller.thread_id)
    after.client.set_cookie("session", cookie.value)
    assert waiting(after.entry(entry["run"]["id"])) == waiting(entry)
    assert approve(after, entry).status_code == 200
    fine(ends(after, entry["run"]["id"])[0])
    assert house.called == ["a"]


# What the page executes


def test_the_output_of_a_page_is_what_the_model_hears(house: House) -> None:
    caller = house.open(page_tool("pick", "Asks for a day.", DATE), house.lookup())
    house.says(Reply(calls=[ToolCall("pick", {"month": "May"}), ToolCall("lookup", {"query": "a"})]), "Friday, then.")
    entry = ask(caller)
    [asked] = waiting(entry)
    assert (asked["needs"], asked["function"]["name"], house.called) == ("output", "pick", ["a"])
    outputs = {"tool_outputs": [{"tool_call_id": asked["id"], "output": "the 5th"}]}
    assert post(caller, entry, "submit_tool_outputs", outputs).status_code == 200
    over = fine(ends(caller, entry["run"]["id"])[0])
    assert [call["kind"] for call in calls(over)] == ["page", "server"]
    assert [said for role, said in house.server.requests[-1].messages if role == "tool"][:1] == ["the 5th"]
    refused(post(caller, entry, "submit_tool_outputs", outputs), 409, "already_answered")
    goes_on(house, caller)


def test_one_page_has_a_call_until_it_lets_its_claim_run_out(house: House) -> None:
    caller = house.open(page_tool("pick", "Asks for a day.", DATE), settings={"claim_seconds": 1})
    house.says(Reply(calls=[ToolCall("pick", {"month": "May"})]), "Friday.")
    entry = ask(caller)
    path = f"tool_calls/{waiting(entry)[0]['id']}/claim"
    first = post(caller, entry, path, {"holder": "one"})
    assert first.status_code == 200
    assert first.get_json()["until"] > time.time() - 5
    assert first.get_json()["seconds"] == 1
    refused(post(caller, entry, path, {"holder": "two"}), 409, "already_claimed")
    assert post(caller, entry, path, {"holder": "one"}).status_code == 200
    wait_until(lambda: post(caller, entry, path, {"holder": "two"}).status_code == 200)
    refused(post(caller, entry, path, {"holder": "one"}), 409, "already_claimed")


def test_a_page_that_releases_its_claim_leaves_the_call_to_the_next_and_no_other_page_s(house: House) -> None:
    caller = house.open(page_tool("pick", "Asks for a day.", DATE))
    house.says(Reply(calls=[ToolCall("pick", {"month": "May"})]), "Friday.")
    entry = ask(caller)
    path = f"tool_calls/{waiting(entry)[0]['id']}/claim"
    assert post(caller, entry, path, {"holder": "one", "release": False}).get_json()["seconds"] == 90
    refused(post(caller, entry, path, {"holder": "two", "release": True}), 409, "already_claimed")
    refused(post(caller, entry, path, {"holder": "two"}), 409, "already_claimed")
    assert post(caller, entry, path, {"holder": "one", "release": True}).get_json()["seconds"] == 0
    assert post(caller, entry, path, {"holder": "two"}).status_code == 200
    refused(post(caller, entry, path, {"holder": "one"}), 409, "already_claimed")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("submit_tool_outputs", {"tool_outputs": []}),
        ("submit_tool_outputs", {"tool_outputs": [{"tool_call_id": "x"}]}),
        ("submit_tool_outputs", {"tool_outputs": [{"tool_call_id": "x", "output": {}}]}),
        ("submit_tool_outputs", {"tool_outputs": [{"tool_call_id": "x", "output": "\0"}]}),
        ("submit_tool_outputs", {"tool_outputs": [{"tool_call_id": "x", "output": "a"}] * 2}),
        ("approvals", {"approvals": "all"}),
        ("approvals", {"approvals": [{"tool_call_id": "x", "approve": 1}]}),
        ("approvals", {"approvals": [{"tool_call_id": "x", "approve": False, "arguments": {}}]}),
        ("approvals", {"approvals": [{"tool_call_id": "x", "approve": True, "reason": 1}]}),
        ("approvals", {"approvals": [{"tool_call_id": "x", "approve": True, "else": 1}]}),
        ("tool_calls/x/claim", {"holder": ""}),
        ("tool_calls/x/claim", {"holder": "one", "release": 1}),
    ],
)
def test_what_is_no_answer_gets_400_and_leaves_the_question_open(
    make_app: MakeApp, server: OfflineServer, path: str, body: Any
) -> None:
    house = House(make_app, server, "responses")
    caller = house.open(house.lookup(approval=True))
    house.says(look("a"))
    entry = ask(caller)
    refused(post(caller, entry, path, body), 400, "invalid_value")
    assert waiting(caller.entry(entry["run"]["id"]))


def test_an_answer_of_the_other_kind_says_where_it_belongs(make_app: MakeApp, server: OfflineServer) -> None:
    house = House(make_app, server, "responses")
    caller = house.open(house.lookup(approval=True))
    house.says(look("a"))
    entry = ask(caller)
    outputs = {"tool_outputs": [{"tool_call_id": waiting(entry)[0]["id"], "output": "x"}]}
    answer = post(caller, entry, "submit_tool_outputs", outputs)
    refused(answer, 409, "not_waiting")
    assert "approvals" in answer.get_json()["error"]["message"]
