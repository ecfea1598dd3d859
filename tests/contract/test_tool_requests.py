"""What model servers are asked where an assistant has tools, in the three dialects, and what is asked instead where one
refuses it: over HTTP with the real SDK."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import httpx2
import openai
import pytest

from assistream_flask import Assistant, tool
from assistream_flask.errors import RunError
from assistream_flask.events import Json
from assistream_flask.testing import OfflineServer, Reply
from assistream_flask.upstream import answer_stream
from assistream_flask.upstream.as_given import as_given
from assistream_flask.upstream.deltas import Begun, Call, Delta, End, Reasoning, Text
from assistream_flask.upstream.dialects import DIALECTS
from assistream_flask.upstream.items import GO_ON, Turn
from assistream_flask.upstream.responses import Responses
from tests.conftest import KEY, quick_client

everyone = pytest.mark.parametrize("speaks", DIALECTS)
HI = Turn("user", "Hi")
SEARCH = {"type": "web_search"}


@tool
def lookup(query: str) -> str:
    """Look something up.

    Args:
        query: What to look up.
    """
    return query


def assistant(speaks: str, **more: Any) -> Assistant:
    return Assistant("asst_1", **{"upstream": speaks, "model": "m", "tools": [lookup], **more})


Answer = Callable[[Json], "httpx2.Response | None"]
ENDS: dict[str, list[Json]] = {
    "responses": [{"type": "response.completed", "response": {"status": "completed", "output": []}}],
    "chat": [{"choices": [{"delta": {"content": "Hi."}, "finish_reason": "stop"}]}],
    "assistants": [{"event": "thread.run.completed", "data": {"id": "run_2"}}],
}


def stream_of(events: Sequence[Json]) -> httpx2.Response:
    frames = [
        f"event: {event['event']}\ndata: {json.dumps(event['data'])}\n\n"
        if "event" in event
        else f"data: {json.dumps(event)}\n\n"
        for event in events
    ]
    return httpx2.Response(200, headers={"content-type": "text/event-stream"}, content="".join(frames).encode())


class Server:
    """Notes what it is asked, and answers as it is told."""

    def __init__(self, speaks: str, answer: Answer = lambda body: None) -> None:
        self.asked: list[tuple[str, Json]] = []
        self.keys: list[str | None] = []
        self._speaks, self._answer = speaks, answer

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        body = json.loads(request.content)
        self.asked.append((request.url.path, body))
        self.keys.append(request.headers.get("idempotency-key"))
        return self._answer(body) or stream_of(ENDS[self._speaks])

    @property
    def bodies(self) -> list[Json]:
        return [body for _, body in self.asked]


@contextmanager
def client_of(server: Server, url: str = "http://model/v1") -> Iterator[openai.OpenAI]:
    http_client = httpx2.Client(transport=httpx2.MockTransport(server))
    with openai.OpenAI(api_key=KEY, base_url=url, http_client=http_client, max_retries=0) as client:
        yield client


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have each test's dialects know nothing of any server."""
    monkeypatch.setitem(DIALECTS, "responses", Responses())


def told(stream: answer_stream.AnswerStream) -> list[Delta]:
    return [part for parts in stream for part in parts]


def sent(speaks: str, turns: Sequence[Turn] = (HI,), more: Mapping[str, Any] | None = None, **asked: Any) -> Json:
    server = Server(speaks)
    with client_of(server) as client:
        told(answer_stream.open(client, assistant(speaks, **(more or {})), turns, 5, **asked))
    return server.bodies[-1]


# What is asked


@everyone
def test_a_request_tells_the_functions_as_its_dialect_has_them(speaks: str) -> None:
    function = {
        "name": "lookup",
        "description": "Look something up.",
        "parameters": lookup.spec.parameters,
        "strict": lookup.spec.strict,
    }
    want = {"type": "function", **function} if speaks == "responses" else {"type": "function", "function": function}
    assert sent(speaks)["tools"] == [want]
    assert "tool_choice" not in sent(speaks)


@everyone
def test_tools_of_the_server_and_those_in_the_apps_own_body_are_sent_beside_them(speaks: str) -> None:
    body = sent(speaks, more={"tools": [lookup, SEARCH], "extra_body": {"tools": [{"type": "own"}], "top_k": 5}})
    assert [one["type"] for one in body["tools"]] == ["own", "function", "web_search"]
    assert body["top_k"] == 5


@everyone
def test_who_may_not_call_is_told_so_whatever_the_app_says(speaks: str) -> None:
    more: Json = {"tool_choice": "required"}
    assert sent(speaks, more=more)["tool_choice"] == "required"
    assert sent(speaks, more=more, may_call=False)["tool_choice"] == "none"
    # A server may refuse the word where there is nothing to choose.
    assert "tool_choice" not in sent(speaks, more={"tools": []}, may_call=False)


@everyone
def test_an_assistant_without_tools_is_asked_as_before(speaks: str) -> None:
    assert {"tools", "tool_choice", "include", "parallel_tool_calls"} & sent(speaks, more={"tools": []}).keys() == set()


@pytest.mark.parametrize(
    ("tools", "include"),
    [
        ([lookup], None),
        ([{"type": "web_search_preview_2025_03_11"}], ["web_search_call.action.sources"]),
        (
            [SEARCH, {"type": "file_search", "vector_store_ids": ["vs"]}, {"type": "code_interpreter"}],
            ["web_search_call.action.sources", "file_search_call.results", "code_interpreter_call.outputs"],
        ),
        ([{"type": "mcp", "server_label": "dice"}], None),
    ],
)
def test_what_tools_of_the_server_found_is_asked_for(tools: list[Any], include: list[str] | None) -> None:
    assert sent("responses", more={"tools": tools}).get("include") == include


@pytest.mark.parametrize("own", [{"include": []}, {"extra_body": {"include": []}}])
def test_what_the_app_includes_is_all_that_is_included(own: Json) -> None:
    assert sent("responses", more={"tools": [SEARCH], **own})["include"] == []


ITEMS: list[Json] = [
    {"type": "reasoning", "summary": [], "encrypted_content": "gAAA"},
    {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I look."}]},
    {"type": "function_call", "call_id": "call_1", "name": "lookup", "arguments": '{"query": "x"}'},
    {"type": "function_call_output", "call_id": "call_1", "output": "42"},
]


@everyone
def test_what_a_model_called_is_resent_and_nothing_is_asked_behind_it(speaks: str) -> None:
    body = sent(speaks, [HI, Turn("assistant", "", ITEMS)])
    if speaks == "responses":
        assert body["input"][1:] == ITEMS
    elif speaks == "chat":
        assert [one["role"] for one in body["messages"]] == ["user", "assistant", "tool"]
    else:
        # There it can only be told, to a new run.
        assert body["thread"]["messages"][1:] == [
            {"role": "assistant", "content": 'I look.\n\n[lookup({"query": "x"}) gave: 42]'},
            {"role": "user", "content": GO_ON},
        ]


# Reasoning


def reasoned(body: Json) -> httpx2.Response:
    item = {"type": "reasoning", "id": "rs_1", "summary": []}
    return stream_of([{"type": "response.output_item.added", "output_index": 0, "item": item}, *ENDS["responses"]])


def ask(client: openai.OpenAI, turns: Sequence[Turn] = (HI,), **more: Any) -> list[Delta]:
    return told(answer_stream.open(client, assistant("responses", **more), turns, 5))


def test_a_model_that_was_seen_to_reason_is_asked_for_its_reasoning_from_then_on() -> None:
    server = Server("responses", reasoned)
    with client_of(server) as client, client_of(server, "http://other/v1") as other:
        ask(client)
        ask(client)
        ask(client, model="else")
        ask(other)
        ask(client, include=["message.output_text.logprobs"])
    assert [body.get("include") for body in server.bodies] == [
        None,
        ["reasoning.encrypted_content"],
        None,
        None,
        ["message.output_text.logprobs"],
    ]


def refused(message: str, when: Callable[[Json], object], status: int = 400, **more: Any) -> Answer:
    def answer(body: Json) -> httpx2.Response | None:
        return httpx2.Response(status, json={"error": {"message": message, **more}}) if when(body) else None

    return answer


def test_a_model_that_gives_no_reasoning_is_asked_once_more_and_never_for_it_again() -> None:
    no = refused("Encrypted content is not supported with this model.", lambda body: "include" in body)
    server = Server("responses", lambda body: no(body) or reasoned(body))
    with client_of(server) as client:
        for _ in range(3):
            assert isinstance(ask(client)[-1], End)
    assert ["include" in body for body in server.bodies] == [False, True, False, False]


@pytest.mark.parametrize("background", [False, True])
def test_reasoning_that_the_server_cannot_read_is_left_out_once(background: bool) -> None:
    def has_reasoning(body: Json) -> bool:
        return any(item["type"] == "reasoning" for item in body["input"])

    server = Server(
        "responses",
        refused("The encrypted content could not be verified.", has_reasoning, code="invalid_encrypted_content"),
    )
    with client_of(server) as client:
        ours = assistant("responses", background=background)
        found = told(answer_stream.open(client, ours, [HI, Turn("assistant", "", ITEMS)], 5, key="run-0"))
    assert isinstance(found[-1], End)
    assert [has_reasoning(body) for body in server.bodies] == [True, False]
    assert server.bodies[1]["input"][1:] == ITEMS[1:]
    # A server that knows the key would give its refusal again.
    assert server.keys == (["run-0", "run-0-less"] if background else [None, None])


@pytest.mark.parametrize("message", ["invalid_encrypted_content", "Encrypted content is not supported with this model"])
def test_a_refusal_that_nothing_helps_against_is_asked_once_more_at_most(message: str) -> None:
    server = Server("responses", refused(message, lambda body: True))
    with client_of(server) as client, pytest.raises(RunError) as failed:
        ask(client, [HI, Turn("assistant", "", ITEMS)])
    assert (failed.value.code, len(server.asked)) == ("upstream_rejected", 2)


@everyone
def test_any_other_refusal_is_asked_for_once(speaks: str) -> None:
    server = Server(speaks, refused("No.", lambda body: True))
    with client_of(server) as client, pytest.raises(RunError):
        answer_stream.open(client, assistant(speaks), [HI, Turn("assistant", "", ITEMS)], 5)
    assert len(server.asked) == 1


# A run that waits for outputs

FOLLOWUP = {"thread_id": "thread_1", "run_id": "run_1", "calls": ["call_up"], "outputs": ["42"]}


@pytest.mark.parametrize("given", [False, True])
def test_outputs_go_to_the_run_that_waits_for_them(given: bool) -> None:
    server = Server("assistants")
    with client_of(server) as client:
        ours = as_given(client) if given else client
        turns = [HI, Turn("assistant", "", ITEMS)]
        more = {"extra_headers": {"x-app": "1"}, "temperature": 0.5}
        found = told(answer_stream.open(ours, assistant("assistants", **more), turns, 5, followup=FOLLOWUP))
    assert isinstance(found[-1], End)
    assert server.asked == [
        (
            "/v1/threads/thread_1/runs/run_1/submit_tool_outputs",
            {"tool_outputs": [{"tool_call_id": "call_up", "output": "42"}], "stream": True},
        )
    ]


@pytest.mark.parametrize("status", [400, 404])
def test_where_that_run_is_gone_a_new_one_is_told_what_was_done(status: int) -> None:
    gone = refused("Runs in status 'expired' do not accept tool outputs.", lambda body: "tool_outputs" in body, status)
    server = Server("assistants", gone)
    with client_of(server) as client:
        turns = [HI, Turn("assistant", "", ITEMS)]
        told(answer_stream.open(client, assistant("assistants"), turns, 5, followup=FOLLOWUP))
    assert [path for path, _ in server.asked][1:] == ["/v1/threads/runs"]
    assert "gave: 42]" in server.bodies[1]["thread"]["messages"][1]["content"]


@pytest.mark.parametrize("more", [{"may_call": False}, {"followup": {**FOLLOWUP, "calls": ["a", "b"]}}])
def test_a_new_run_is_begun_where_the_one_that_waits_would_not_do(more: Json) -> None:
    server = Server("assistants")
    with client_of(server) as client:
        turns = [HI, Turn("assistant", "", ITEMS)]
        told(answer_stream.open(client, assistant("assistants"), turns, 5, **{"followup": FOLLOWUP, **more}))
    assert [path for path, _ in server.asked] == ["/v1/threads/runs"]


# A round, there and back


@pytest.fixture
def offline() -> Iterator[tuple[OfflineServer, openai.OpenAI]]:
    with OfflineServer(delay=0) as server, quick_client(server, max_retries=0) as client:
        yield server, client


@everyone
def test_a_round_goes_there_and_back(speaks: str, offline: tuple[OfflineServer, openai.OpenAI]) -> None:
    server, client = offline
    server.replies = Reply("It is 42.", fault="function_call")
    first = told(answer_stream.open(client, assistant(speaks), [HI], 5))
    end = first[-1]
    assert isinstance(end, End)
    [call] = end.calls
    assert (call.name, json.loads(call.arguments)) == ("lookup", {"query": "Hi"})
    assert {(part.call_id, part.name) for part in first if isinstance(part, Call)} == {(call.call_id, "lookup")}
    if speaks == "assistants":
        assert end.followup is not None
        assert end.followup["calls"] == [call.call_id]
        return
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "42"}
    turns = [HI, Turn("assistant", "", [*end.items, output])]
    second = told(answer_stream.open(client, assistant(speaks), turns, 5, start=2))
    assert "".join(part.value for part in second if isinstance(part, Text)) == "It is 42."
    assert {part.at for part in second if isinstance(part, Text)} == {2}


def test_a_background_response_is_taken_over_in_the_midst_of_its_calls(
    offline: tuple[OfflineServer, openai.OpenAI],
) -> None:
    server, client = offline
    server.replies = Reply(fault="function_call")
    ours = assistant("responses", background=True)
    whole = [part for part in told(answer_stream.open(client, ours, [HI], 5)) if not isinstance(part, Begun)]
    count = 0
    while True:
        count += 1
        stream, found = answer_stream.open(client, ours, [HI], 5), list[Delta]()
        for number, parts in enumerate(stream, 1):
            found += parts
            if number == count:
                break
        if isinstance(found[-1], End):
            break
        state = json.loads(json.dumps(stream.state()))
        stream.close()
        found += told(answer_stream.resume(client, ours, state, 5, every=0.01))
        assert joined(found) == joined(whole)
    assert count > 2


def joined(parts: Sequence[Delta]) -> tuple[dict[int, str], Delta]:
    calls: dict[int, str] = {}
    for part in parts:
        if isinstance(part, Call):
            calls[part.at] = calls.get(part.at, "") + part.value
    end = parts[-1]
    assert isinstance(end, End)
    return calls, end._replace(calls=[call._replace(call_id="") for call in end.calls], items=[], usage=None)


def calling(value: str) -> Answer:
    item = {"type": "function_call", "call_id": "c", "name": "lookup", "arguments": value}
    events: list[Json] = [
        {"type": "response.output_text.delta", "output_index": 0, "content_index": 0, "delta": "[Tutor]\nI look."},
        {"type": "response.output_item.added", "output_index": 1, "item": {**item, "arguments": ""}},
        {"type": "response.function_call_arguments.delta", "output_index": 1, "delta": value},
        {"type": "response.completed", "response": {"status": "completed", "output": [item]}},
    ]
    return lambda body: stream_of(events)


def test_a_mark_that_is_taken_off_an_answer_is_not_resent() -> None:
    with client_of(Server("responses", calling('{"query": "x"}'))) as client:
        found = told(answer_stream.open(client, assistant("responses"), [HI], 5, ["Tutor"]))
    assert [part.value for part in found if isinstance(part, Text)] == ["I look."]
    assert isinstance(found[-1], End)
    assert found[-1].items[0]["content"] == [{"type": "output_text", "text": "I look."}]
    assert found[-1].items[1]["type"] == "function_call"


def test_arguments_count_for_the_length_of_an_answer(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    with client_of(Server("responses", calling(json.dumps({"query": "x" * 1000})))) as client:
        found = told(answer_stream.open(client, assistant("responses"), [HI], 5, most=500))
    assert found[-1] == End("max_tokens", None)
    assert not any(isinstance(part, Reasoning) for part in found)
    assert sum(len(part.value) for part in found if isinstance(part, Text | Call)) <= 500
    assert "ASSISTREAM_MAX_ANSWER_CHARS" in caplog.text


def test_a_stream_of_the_apps_own_fails_where_it_calls_a_function() -> None:
    with client_of(Server("responses", calling("{}"))) as client:
        stream = client.responses.create(model="m", input="Hi", stream=True)
        with pytest.raises(RunError) as failed:
            told(answer_stream.translate(stream))
    assert failed.value.code == "tools_not_supported"
