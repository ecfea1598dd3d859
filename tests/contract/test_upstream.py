"""The three dialects: one contract, over real HTTP with the real SDK."""

from __future__ import annotations

import gc
import json
import socket
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx2
import openai
import pytest

from assistream_flask import Assistant, ConfigurationError, types
from assistream_flask.errors import RUN_ERRORS, RunError
from assistream_flask.platform import openai_sdk
from assistream_flask.testing import FAULTS, OfflineServer, Reply
from assistream_flask.upstream import answer_stream
from assistream_flask.upstream.deltas import Annotation, End, Reasoning, Refusal, Text
from assistream_flask.upstream.items import Turn
from tests.conftest import KEY, quick_client, wait_until

DIALECTS = ("responses", "chat", "assistants")
TEXT = "Grüße, “quoted” 🌍🌙\n\nSecond   paragraph: naïve café, and no end of words  "

CODES: dict[str, str | None] = {
    "401": "upstream_unauthorized",
    "429": "rate_limit_exceeded",
    "500": "upstream_error",
    "400": "upstream_rejected",
    "error_nested": "upstream_error",
    "error_flat": "upstream_error",
    "error_first": "upstream_error",
    "response_failed": "upstream_error",
    "cut": "upstream_cut",
    "ends_early": "upstream_ended_early",
    "stall": "upstream_stalled",
    "stall_headers": "upstream_stalled",
    "malformed": "upstream_malformed",
    "function_call": "tools_not_supported",
    "unknown_events": None,
    "missing_fields": None,
    "crlf": None,
    "tiny_chunks": None,
    "incomplete": None,
    "content_filter": None,
    # They are of calls, and here is none: test_tools.py.
    **{fault: None for fault in FAULTS if fault.startswith("call_")},
}
IN_MID_STREAM = ("error_nested", "error_flat", "response_failed", "cut", "ends_early", "stall", "malformed")
COMPLETING = ("unknown_events", "missing_fields", "crlf", "tiny_chunks")


@dataclass
class Got:
    """All that one answer gave."""

    texts: dict[int, str] = field(default_factory=dict)
    refusals: dict[int, str] = field(default_factory=dict)
    reasoning: str = ""
    annotations: list[types.Annotation] = field(default_factory=list)
    end: End | None = None
    code: str | None = None

    @property
    def text(self) -> str:
        return "".join(self.texts.values())


def read(make: Callable[[], answer_stream.AnswerStream]) -> Got:
    got = Got()
    stream = None
    try:
        stream = make()
        for parts in stream:
            assert parts, "an empty list is nobody's business"
            assert got.end is None, "nothing comes after the end"
            for part in parts:
                if isinstance(part, Text):
                    got.texts[part.at] = got.texts.get(part.at, "") + part.value
                elif isinstance(part, Refusal):
                    got.refusals[part.at] = got.refusals.get(part.at, "") + part.value
                elif isinstance(part, Annotation):
                    got.annotations.append(part.value)
                elif isinstance(part, Reasoning):
                    got.reasoning += part.value
                elif isinstance(part, End):
                    got.end = part
    except RunError as error:
        got.code = error.code
    finally:
        if stream is not None:
            stream.close()
            stream.close()
    assert got.code is None or got.code in RUN_ERRORS
    assert (got.end is None) == (got.code is not None)
    return got


@pytest.fixture
def client(server: OfflineServer) -> Iterator[openai.OpenAI]:
    """With the SDK's own default of two retries, which a run must not use."""
    with quick_client(server) as client:
        yield client


@pytest.fixture(params=DIALECTS)
def dialect(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


def assistant(dialect: str, **arguments: Any) -> Assistant:
    model = None if dialect == "assistants" else "m"
    return Assistant("asst_1", upstream=dialect, **{"model": model, "instructions": "Be kind.", **arguments})


def ask(
    client: openai.OpenAI, dialect: str, turns: tuple[Turn, ...] = (Turn("user", "Hi"),), stall: float = 5, **more: Any
) -> Got:
    return read(lambda: answer_stream.open(client, assistant(dialect, **more), turns, stall))


def test_every_fault_has_its_code() -> None:
    assert set(CODES) == set(FAULTS)
    assert {code for code in CODES.values() if code} <= set(RUN_ERRORS)


def test_text_arrives_whole_and_in_order(server: OfflineServer, client: openai.OpenAI, dialect: str) -> None:
    server.replies = Reply(TEXT)
    got = ask(client, dialect)
    assert got.texts == {0: TEXT}
    assert got.end is not None
    assert got.end.reason is None


def test_text_arrives_while_the_model_speaks(server: OfflineServer, client: openai.OpenAI, dialect: str) -> None:
    server.replies = Reply("one two three", fault="stall")
    stream = answer_stream.open(client, assistant(dialect), [Turn("user", "Hi")], 20)
    said = ""
    for parts in stream:
        said += "".join(part.value for part in parts if isinstance(part, Text))
        if said == "one two":
            break
    stream.close()
    assert server.requests[0].wait()
    assert server.requests[0].disconnected


@pytest.mark.parametrize("fault", [None, "cut", "500"])
def test_a_request_with_its_history_is_freed_as_the_answer_ends(
    server: OfflineServer, client: openai.OpenAI, dialect: str, fault: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[weakref.ref[object]] = []
    send = client._client.send

    def noted(request: httpx2.Request, **more: Any) -> httpx2.Response:
        sent.append(weakref.ref(request))
        return send(request, **more)

    monkeypatch.setattr(client._client, "send", noted)
    made: list[weakref.ref[object]] = []
    with_options = client.with_options

    def copied(**more: Any) -> openai.OpenAI:
        copy = with_options(**more)
        made.append(weakref.ref(copy))
        return copy

    monkeypatch.setattr(client, "with_options", copied)
    server.replies = Reply("one two three", fault=fault)
    gc.disable()
    try:
        try:
            list(answer_stream.open(client, assistant(dialect), TURNS, 5))
        except RunError as error:
            # As a run does: who raised it has it.
            error.with_traceback(None)
        wait_until(lambda: sent[0]() is None and made[0]() is None)
    finally:
        gc.enable()


def test_a_refusal_is_a_part_of_its_own(server: OfflineServer, client: openai.OpenAI, dialect: str) -> None:
    server.replies = Reply("Well. ", refusal="I can not help with that.")
    got = ask(client, dialect)
    assert got.texts == {0: "Well. "}
    assert got.refusals == {1: "I can not help with that."}


@pytest.mark.parametrize("speaks", ["responses", "chat"])
def test_reasoning_comes_before_the_text(server: OfflineServer, client: openai.OpenAI, speaks: str) -> None:
    server.replies = Reply("Yes.", reasoning="Let me think about that.")
    got = ask(client, speaks)
    assert (got.reasoning, got.text) == ("Let me think about that.", "Yes.")


def test_usage_is_counted_in_one_vocabulary(server: OfflineServer, client: openai.OpenAI, dialect: str) -> None:
    server.replies = Reply("Yes.", usage=(12, 34))
    got = ask(client, dialect)
    assert got.end == End(None, {"prompt_tokens": 12, "completion_tokens": 34, "total_tokens": 46})


def test_annotations_come_with_their_text(server: OfflineServer, client: openai.OpenAI, dialect: str) -> None:
    note = {
        "type": "url_citation",
        "url": "https://example.org/",
        "title": "Example",
        "start_index": 0,
        "end_index": 3,
    }
    server.replies = Reply("See there.", annotations=(note,))
    got = ask(client, dialect)
    assert got.texts == {0: "See there."}
    assert [{key: found.get(key) for key in note} for found in got.annotations] == [note]


@pytest.mark.parametrize(("fault", "reason"), [("incomplete", "max_tokens"), ("content_filter", "content_filter")])
def test_an_answer_that_stops_short_says_why(
    server: OfflineServer, client: openai.OpenAI, dialect: str, fault: str, reason: str
) -> None:
    server.replies = Reply("one two three four", fault=fault)
    got = ask(client, dialect)
    assert got.text == "one two"
    assert got.end is not None
    assert got.end.reason == reason


@pytest.mark.parametrize("fault", [fault for fault, code in CODES.items() if code])
def test_a_fault_fails_the_run_with_its_code_and_one_request(
    server: OfflineServer, client: openai.OpenAI, dialect: str, fault: str
) -> None:
    server.replies = Reply("one two three four five", fault=fault)
    got = ask(client, dialect, stall=0.3 if "stall" in fault else 5)
    assert got.code == CODES[fault]
    if fault in IN_MID_STREAM:
        assert got.text == "one two three"
    assert len(server.requests) == 1


@pytest.mark.parametrize("fault", COMPLETING)
def test_what_the_standard_or_a_server_allows_completes(
    server: OfflineServer, client: openai.OpenAI, dialect: str, fault: str
) -> None:
    server.replies = Reply(TEXT, fault=fault)
    got = ask(client, dialect)
    assert got.texts == {0: TEXT}
    assert got.code is None


def test_nobody_at_the_address_is_unreachable(dialect: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with openai.OpenAI(api_key=KEY, base_url=f"http://127.0.0.1:{port}/v1") as client:
        assert ask(client, dialect).code == "upstream_unreachable"


def test_no_key_is_unauthorized(monkeypatch: pytest.MonkeyPatch, dialect: str) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    class NoKey(openai.OpenAI):
        def with_options(self, **_: Any) -> Any:
            return openai.OpenAI()

    with NoKey(api_key="x") as client:
        assert ask(client, dialect).code == "upstream_unauthorized"


class Counting(OfflineServer):
    connections = 0

    def _serve(self, connection: socket.socket, address: Any) -> None:
        self.connections += 1
        super()._serve(connection, address)


def test_the_next_run_uses_the_connection_of_a_complete_one(dialect: str) -> None:
    with Counting(delay=0) as server, quick_client(server) as client:
        for _ in range(5):
            assert ask(client, dialect).code is None
        assert server.connections == 1


# What is sent


TURNS = (Turn("user", "Hi"), Turn("assistant", "Hello."), Turn("user", "No."), Turn("user", "Why?"))
SENT: dict[str, dict[str, Any]] = {
    "responses": {
        "model": "m",
        "instructions": "Be kind.",
        "store": False,
        "stream": True,
        "temperature": 0.5,
        "input": [
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Hello."}]},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "No.\n\nWhy?"}]},
        ],
    },
    "chat": {
        "model": "m",
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0.5,
        "messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello."},
            {"role": "user", "content": "No.\n\nWhy?"},
        ],
    },
    "assistants": {
        "assistant_id": "asst_1",
        "instructions": "Be kind.",
        "stream": True,
        "temperature": 0.5,
        "thread": {
            "messages": [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Hello."},
                {"role": "user", "content": "No.\n\nWhy?"},
            ]
        },
    },
}


def test_the_request_holds_history_and_arguments_and_nothing_else(client: openai.OpenAI, dialect: str) -> None:
    with OfflineServer(delay=0, strict=True) as server, quick_client(server) as client:
        assert ask(client, dialect, TURNS, temperature=0.5).code is None
        assert [request.body for request in server.requests] == [SENT[dialect]]


def test_an_assistant_of_the_assistants_api_may_be_named_apart(server: OfflineServer, client: openai.OpenAI) -> None:
    named = Assistant("tutor", upstream="assistants", assistant_id="asst_9", model="m2")
    assert read(lambda: answer_stream.open(client, named, TURNS, 5)).code is None
    assert server.requests[0].body["assistant_id"] == "asst_9"
    assert server.requests[0].body["model"] == "m2"


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        (
            "temprature",
            r"temprature= is no argument of .*: write temperature=, or, .*extra_body=\{\"temprature\": \.\.\.\}",
        ),
        ("instruction", "write instructions=, or"),
        ("max_histroy", "write max_history=, or"),
        ("grammar", "remove it, or, where your model server knows it, extra_body="),
    ],
)
def test_an_argument_that_the_call_does_not_know_is_refused_with_the_fix(
    dialect: str, argument: str, says: str
) -> None:
    with pytest.raises(ConfigurationError, match=says):
        assistant(dialect, **{argument: 0.5})


def test_what_the_sdk_takes_for_each_call_may_be_given(client: openai.OpenAI, dialect: str) -> None:
    more: dict[str, Any] = {
        "extra_body": {"grammar": "g"},
        "extra_headers": {"X-A": "b"},
        "extra_query": {"q": "1"},
        "metadata": {},
    }
    assert ask(client, dialect, temperature=0.5, **more).code is None


def test_where_the_sdks_call_takes_anything_so_does_an_assistant(dialect: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_sdk, "keywords", lambda _: None)
    assert assistant(dialect, temprature=0.5).arguments == {"temprature": 0.5}
    monkeypatch.undo()

    def anything(**more: object) -> None:
        """Take what an instrumented client passes on."""

    assert openai_sdk.keywords(anything) is None


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"id": ""}, "use 1 to 64"),
        ({"id": "a b"}, "use 1 to 64"),
        ({"id": "x" * 65}, "use 1 to 64"),
        ({"id": "tutor\n"}, "use 1 to 64"),
        ({"id": 5}, "use 1 to 64"),
        ({"upstream": "completions"}, "is not one of responses, chat, assistants"),
        ({"model": None}, "add model="),
        ({"model": None, "upstream": "chat"}, "add model="),
        *[
            ({name: "x"}, f"{name} is set by assistream")
            for name in (
                "input",
                "messages",
                "thread",
                "stream",
                "timeout",
                "conversation",
                "previous_response_id",
            )
        ],
        ({"background": "x"}, "use True or False"),
        ({"background": True, "upstream": "chat"}, 'needs upstream="responses"'),
        ({"background": True, "upstream": "assistants"}, 'needs upstream="responses"'),
        ({"background": True, "store": False}, "remove store="),
    ],
)
def test_an_assistant_that_cannot_work_is_refused_with_the_fix(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        Assistant(**{"id": "tutor", "model": "m", **arguments})


# Exact bytes, from a transport without a network


def literal(dialect: str, *deltas: str) -> str:
    """Give an answer whose deltas are these JSON literals."""
    match dialect:
        case "responses":
            frames = [f'{{"type":"response.output_text.delta","delta":{delta}}}' for delta in deltas]
            frames.append('{"type":"response.completed","response":{"status":"completed"}}')
            return "".join(f"data: {frame}\n\n" for frame in frames)
        case "chat":
            frames = [f'{{"choices":[{{"delta":{{"content":{delta}}}}}]}}' for delta in deltas]
            return "".join(f"data: {frame}\n\n" for frame in [*frames, "[DONE]"])
    found = [
        f'event: thread.message.delta\ndata: {{"delta":{{"content":[{{"index":0,"type":"text","text":'
        f'{{"value":{delta}}}}}]}}}}\n\n'
        for delta in deltas
    ]
    whole = 'event: thread.message.completed\ndata: {"id":"msg_1","content":[{"type":"text","text":{"value":"x"}}]}\n\n'
    return "".join(found) + whole + "event: thread.run.completed\ndata: {}\n\nevent: done\ndata: [DONE]\n\n"


def canned(body: str, seen: list[Any] | None = None, base_url: str = "http://model.test/v1") -> openai.OpenAI:
    def answer(request: httpx2.Request) -> httpx2.Response:
        if seen is not None:
            seen.append(json.loads(request.content))
        return httpx2.Response(200, headers={"content-type": "text/event-stream"}, content=iter([body.encode()]))

    return openai.OpenAI(
        api_key=KEY, base_url=base_url, http_client=httpx2.Client(transport=httpx2.MockTransport(answer), verify=False)
    )


@pytest.mark.parametrize(
    ("deltas", "whole"),
    [
        ((r'"a\ud83c"', r'"\udf0db"'), "a🌍b"),
        ((r'"\ud83c"', r'"\udf0d"', r'"\ud83c"', r'"\udf19"'), "🌍🌙"),
        ((r'"a\ud83cb"',), "a\ufffdb"),
        ((r'"a\udf0d"', '"b"'), "a\ufffdb"),
        ((r'"a\u0000b"',), "a\ufffdb"),
        ((r'"a\u2028b"', '"\\r\\n"', '""'), "a\u2028b\r\n"),
        (("null", "5", "[5]", '"ok"'), "ok"),
    ],
)
def test_text_is_what_utf_8_and_a_database_can_carry(dialect: str, deltas: tuple[str, ...], whole: str) -> None:
    with canned(literal(dialect, *deltas)) as client:
        got = ask(client, dialect)
    assert (got.texts, got.code) == ({0: whole}, None)


@pytest.mark.parametrize(
    ("speaks", "one"),
    [
        ("responses", '{"type":"response.reasoning_summary_text.delta","delta":%s}'),
        ("chat", '{"choices":[{"delta":{"reasoning_content":%s}}]}'),
    ],
)
def test_reasoning_is_cleaned_as_text_is(speaks: str, one: str) -> None:
    thoughts = "".join(f"data: {one % delta}\n\n" for delta in (r'"a\u0000\ud83c"', r'"\udf0d"'))
    with canned(thoughts + literal(speaks, '"ok"')) as client:
        got = ask(client, speaks)
    assert (got.reasoning, got.text) == ("a\ufffd🌍", "ok")


@pytest.mark.parametrize("speaks", DIALECTS)
def test_nothing_is_taken_from_behind_the_end(speaks: str) -> None:
    with canned(literal(speaks, '"ok"') + literal(speaks, '"late"')) as client:
        parts = [
            part for batch in answer_stream.open(client, assistant(speaks), [Turn("user", "Hi")], 5) for part in batch
        ]
    assert [type(part) for part in parts] == [Text, End]
    assert parts[0] == Text(0, "ok")


@pytest.mark.parametrize(
    ("host", "asked"),
    [
        ("https://api.openai.com/v1", True),
        ("https://eu.api.openai.com/v1", True),
        ("https://mine.openai.azure.com/openai/v1", True),
        ("http://127.0.0.1:8080/v1", False),
        ("https://notopenai.com/v1", False),
        ("https://api.openai.com.example.org/v1", False),
    ],
)
def test_padding_is_declined_at_openai_only(host: str, asked: bool) -> None:
    for speaks in DIALECTS:
        seen: list[Any] = []
        with canned(literal(speaks, '"ok"'), seen, host) as client:
            assert ask(client, speaks).text == "ok"
        options = seen[0].get("stream_options") or {}
        assert options.get("include_obfuscation") == (False if asked and speaks != "assistants" else None)


RESPONSE_ITEM = {"type": "message", "content": [{"type": "output_text", "text": "Hello."}]}


@pytest.mark.parametrize(
    "events",
    [
        [{"type": "response.output_text.done", "text": "Hello."}],
        [{"type": "response.output_item.done", "item": RESPONSE_ITEM}],
        [{"type": "response.content_part.done"}],
        [{"type": "response.output_text.delta", "delta": "Hello."}, {"type": "response.output_text.done"}],
    ],
)
def test_a_response_is_told_once_however_a_server_tells_it(events: list[dict[str, Any]]) -> None:
    end = {"type": "response.completed", "response": {"status": "completed", "output": [RESPONSE_ITEM]}}
    got = read(lambda: answer_stream.translate(iter([*events, end])))
    assert got.texts == {0: "Hello."}


@pytest.mark.parametrize(
    ("error", "code"),
    [
        ({"code": "rate_limit_exceeded"}, "rate_limit_exceeded"),
        ({"code": "insufficient_quota"}, "insufficient_quota"),
        ({"code": 429}, "rate_limit_exceeded"),
        ({"type": "authentication_error"}, "upstream_unauthorized"),
        ({"code": "model_not_found"}, "upstream_rejected"),
        ({"type": "invalid_request_error"}, "upstream_rejected"),
        ({"code": None, "message": "?"}, "upstream_error"),
        ("a mere word", "upstream_error"),
    ],
)
def test_an_error_event_nested_or_flat_is_told_by_code_and_type(error: Any, code: str) -> None:
    nested = {"type": "error", "error": error}
    assert read(lambda: answer_stream.translate(iter([nested]))).code == code
    assert read(lambda: answer_stream.translate(iter([{"error": error}]))).code == code
    if isinstance(error, dict) and "type" not in error:
        assert read(lambda: answer_stream.translate(iter([{**error, "type": "error"}]))).code == code


@pytest.mark.parametrize("wrong", [None, 5, "text", [], [5], {"a": 1}, True])
def test_values_of_the_wrong_type_fail_the_run_and_nothing_else(wrong: Any) -> None:
    events: list[dict[str, Any]] = [
        {"type": "response.output_text.delta", "delta": wrong, "output_index": wrong},
        {"type": "response.output_text.annotation.added", "annotation": wrong},
        {"type": "response.output_item.done", "item": wrong},
        {"type": "response.output_item.done", "item": {"type": "message", "content": wrong}},
        {"type": "response.completed", "response": wrong},
        {"type": "response.incomplete", "response": {"incomplete_details": wrong, "usage": wrong, "output": wrong}},
        {"type": "response.failed", "response": {"error": wrong}},
        {"choices": wrong},
        {"choices": [{"delta": wrong, "finish_reason": wrong}], "usage": wrong},
        {"choices": [{"delta": {"content": wrong, "refusal": wrong, "tool_calls": wrong, "annotations": wrong}}]},
        {"event": "thread.message.delta", "data": {"delta": wrong}},
        {"event": "thread.message.delta", "data": {"id": wrong, "delta": {"content": [{"text": wrong}]}}},
        {"event": "thread.run.failed", "data": {"last_error": wrong}},
        {"event": "thread.run.incomplete", "data": {"incomplete_details": wrong, "usage": wrong}},
        {"event": "thread.run.completed", "data": wrong},
        {"event": "error", "data": wrong},
        {"type": wrong, "error": wrong},
    ]
    for event in events:
        read(lambda event=event: answer_stream.translate(iter([event])))  # type: ignore[misc]


# Streams of a developer's own


def own(client: openai.OpenAI, dialect: str) -> Any:
    if dialect == "responses":
        return client.responses.create(model="m", input="Hi", stream=True)
    if dialect == "chat":
        return client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": "Hi"}], stream=True, stream_options={"include_usage": True}
        )
    return client.beta.threads.create_and_run(
        assistant_id="asst_1", thread={"messages": [{"role": "user", "content": "Hi"}]}, stream=True
    )


FORMS: dict[str, Callable[[Any], Any]] = {
    "the SDK's stream": lambda stream: stream,
    "typed events": lambda stream: (event for event in stream),
    "dicts": lambda stream: (event.to_dict() for event in stream),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("fault", [None, *COMPLETING])
def test_any_iterator_of_any_dialect_is_recognized(
    server: OfflineServer, client: openai.OpenAI, dialect: str, form: str, fault: str | None
) -> None:
    server.replies = Reply(TEXT, fault=fault, usage=(1, 2))
    with own(client, dialect) as stream:
        got = read(lambda: answer_stream.translate(FORMS[form](stream)))
    assert got.texts == {0: TEXT}
    assert got.end == End(None, {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3})


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("fault", [*IN_MID_STREAM, "error_first", "function_call"])
def test_any_iterator_fails_with_the_code_of_its_fault(
    server: OfflineServer, dialect: str, form: str, fault: str
) -> None:
    server.replies = Reply("one two three four five", fault=fault)
    with quick_client(server, timeout=0.3 if fault == "stall" else 5) as client, own(client, dialect) as stream:
        got = read(lambda: answer_stream.translate(FORMS[form](stream)))
    assert got.code == CODES[fault]


def test_a_stream_that_was_begun_already_goes_on(server: OfflineServer, client: openai.OpenAI, dialect: str) -> None:
    server.replies = Reply("one two three")
    with own(client, dialect) as stream:
        next(stream)
        assert read(lambda: answer_stream.translate(stream)).text == "one two three"


def test_what_is_no_stream_of_events_is_a_type_error(server: OfflineServer, client: openai.OpenAI) -> None:
    async def events() -> Any:
        yield {}

    whole = client.responses.create(model="m", input="Hi")
    wrongs: tuple[object, ...] = (None, 5, "text", b"text", {}, events(), whole, openai.OpenAI)
    for wrong in wrongs:
        with pytest.raises(TypeError, match=r"stream=True"):
            answer_stream.translate(wrong)


def test_the_error_of_a_broken_iterator_is_no_answer() -> None:
    def events() -> Iterator[dict[str, Any]]:
        yield {"type": "response.output_text.delta", "delta": "one"}
        raise RuntimeError("broken")

    got = read(lambda: answer_stream.translate(events()))
    assert (got.text, got.code) == ("one", "upstream_cut")


@pytest.mark.parametrize(
    "message",
    [
        "This model's maximum context length is 8192 tokens.",
        "request (4125 tokens) exceeds the available context size (4096 tokens), try increasing it",
        "Your input exceeds the context window of this model.",
    ],
)
def test_a_thread_too_long_for_the_model_is_told_as_that(message: str) -> None:
    def refuse(request: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(400, json={"error": {"message": message, "type": "invalid_request_error"}})

    with openai.OpenAI(
        api_key="none",
        base_url="http://127.0.0.1/v1",
        http_client=httpx2.Client(transport=httpx2.MockTransport(refuse)),
    ) as client:
        with pytest.raises(RunError) as failed:
            answer_stream.open(client, Assistant("a", model="m"), [Turn("user", "Hi")], 1)
        assert failed.value.code == "context_length_exceeded"
