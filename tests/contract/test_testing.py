"""The offline server: its answers, its frames, its faults, and that it leaves nothing behind."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import re
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import openai
import pytest
from openai.types.beta import AssistantStreamEvent
from openai.types.beta.thread import Thread
from openai.types.beta.threads import Message, Run
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent

from assistream_flask.testing import FAULTS, OfflineServer, Replies, Reply, Request, scripted

# The SDK warns at every call of the Assistants API.
pytestmark = pytest.mark.filterwarnings("ignore:The Assistants API is deprecated:DeprecationWarning")

ROOT = Path(__file__).resolve().parents[2]
KEY = "sk-very-secret"
DIALECTS = ("responses", "chat", "assistants")
COMPLETING = ("unknown_events", "missing_fields", "crlf", "tiny_chunks")
TEXT = "Grüße, “quoted” 🌍🌙\n\nSecond   paragraph: naïve café, trailing spaces  "

PATHS = {"responses": "/v1/responses", "chat": "/v1/chat/completions", "assistants": "/v1/threads/runs"}
BODIES: dict[str, dict[str, Any]] = {
    "responses": {"model": "m", "input": "Hi", "instructions": "Be kind."},
    "chat": {
        "model": "m",
        "messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}],
    },
    "assistants": {
        "assistant_id": "asst_1",
        "instructions": "Be kind.",
        "thread": {"messages": [{"role": "user", "content": "Hi"}]},
    },
}
RESPONSE_EVENTS = {
    get_args(event.model_fields["type"].annotation)[0]: event for event in get_args(get_args(ResponseStreamEvent)[0])
}
ASSISTANT_EVENTS = {
    get_args(event.model_fields["event"].annotation)[0]: event for event in get_args(get_args(AssistantStreamEvent)[0])
}


@pytest.fixture
def server() -> Iterator[OfflineServer]:
    with OfflineServer(delay=0) as server:
        yield server


@pytest.fixture
def client(server: OfflineServer) -> Iterator[openai.OpenAI]:
    with server.client(api_key=KEY, max_retries=0, timeout=10) as client:
        yield client


def connect(server: OfflineServer) -> socket.socket:
    port = int(server.base_url.split(":")[2].removesuffix("/v1"))
    return socket.create_connection(("127.0.0.1", port), timeout=10)


def send(connection: socket.socket, path: str, body: Any, method: str = "POST") -> None:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Length: {len(data)}\r\n\r\n"
    connection.sendall(head.encode() + data)


class Answer:
    """One HTTP answer, read by hand: what came, in which chunks, and whether it ended as HTTP says it must."""

    def __init__(self, connection: socket.socket) -> None:
        with connection.makefile("rb") as file:
            self.status = int(file.readline().split()[1])
            self.headers: dict[str, str] = {}
            while line := file.readline().strip():
                name, _, value = line.decode().partition(": ")
                self.headers[name.lower()] = value
            self.chunks: list[bytes] = []
            self.complete = False
            if "content-length" in self.headers:
                length = int(self.headers["content-length"])
                self.chunks.append(file.read(length))
                self.complete = len(self.chunks[0]) == length
                return
            while size := file.readline():
                self.chunks.append(file.read(int(size, 16)))
                assert file.readline() == b"\r\n"
                if size == b"0\r\n":
                    self.complete = True
                    return

    @property
    def body(self) -> bytes:
        return b"".join(self.chunks)

    @property
    def frames(self) -> list[tuple[str | None, Any]]:
        """(event, parsed data); broken JSON stays bytes."""
        found: list[tuple[str | None, Any]] = []
        for block in self.body.replace(b"\r\n", b"\n").split(b"\n\n"):
            event, data = None, None
            for line in block.split(b"\n"):
                if line.startswith(b"event: "):
                    event = line[7:].decode()
                if line.startswith(b"data: "):
                    data = line[6:]
            if data is not None:
                try:
                    found.append((event, "[DONE]" if data == b"[DONE]" else json.loads(data)))
                except ValueError:
                    found.append((event, data))
        return found


def ask(server: OfflineServer, dialect: str, *, stream: bool = True, **more: Any) -> Answer:
    with connect(server) as connection:
        send(connection, PATHS[dialect], {**BODIES[dialect], "stream": stream, **more})
        return Answer(connection)


def text_of(dialect: str, frames: list[tuple[str | None, Any]], kind: str = "text") -> str:
    parts: list[str] = []
    for event, data in frames:
        if not isinstance(data, dict):
            continue
        if dialect == "responses":
            names = {"text": "output_text", "reasoning": "reasoning_summary_text"}
            if data.get("type") == f"response.{names.get(kind, kind)}.delta":
                parts.append(data["delta"])
        elif dialect == "chat":
            key = {"text": "content", "reasoning": "reasoning_content"}.get(kind, kind)
            parts += [choice["delta"].get(key) or "" for choice in data.get("choices", ())]
        elif event == "thread.message.delta":
            for part in data["delta"]["content"]:
                if part["type"] == kind:
                    parts.append(part["text"].get("value", "") if kind == "text" else part[kind])
    return "".join(parts)


def ends(dialect: str, frames: list[tuple[str | None, Any]]) -> str | None:
    """Give how the stream says that it ended: completed, incomplete, failed, ...; None when it doesn't say."""
    for event, data in frames:
        if dialect == "responses" and re.fullmatch(r"response\.(completed|incomplete|failed)", str(data.get("type"))):
            return str(data["response"]["status"])
        if dialect == "chat" and isinstance(data, dict):
            for choice in data.get("choices", ()):
                if choice.get("finish_reason"):
                    return str(choice["finish_reason"])
        over = r"thread\.run\.(completed|incomplete|failed|cancelled|requires_action)"
        if dialect == "assistants" and re.fullmatch(over, event or ""):
            return str(data["status"])
    return None


def check(dialect: str, event: str | None, data: Any) -> None:
    """Check that a frame is what the SDK's own types say, strictly."""
    if dialect == "responses":
        assert event == data["type"]
        RESPONSE_EVENTS[data["type"]].model_validate(data, strict=True)
    elif dialect == "chat":
        assert event is None
        if data != "[DONE]":
            ChatCompletionChunk.model_validate(data, strict=True)
    elif event == "done":
        assert data == "[DONE]"
    else:
        assert event is not None
        ASSISTANT_EVENTS[event].model_validate({"event": event, "data": data}, strict=True)


def sdk_stream(client: openai.OpenAI, dialect: str, **more: Any) -> Any:
    body = {**BODIES[dialect], "stream": True, **more}
    creates: dict[str, Callable[..., Any]] = {
        "responses": client.responses.create,
        "chat": client.chat.completions.create,
        "assistants": client.beta.threads.create_and_run,
    }
    return creates[dialect](**body)


# Replies


@pytest.mark.parametrize("text", ["", " ", "a", "one two", TEXT, "\n\n", "漢字" * 40, "a\u2028b\u0085c\x1fd"])
def test_tokens_joined_are_the_text(text: str) -> None:
    assert "".join(Reply(text).tokens) == text


def test_an_unknown_fault_is_refused_with_the_known_names() -> None:
    with pytest.raises(ValueError, match=r"'nonsense'.*429"):
        Reply(fault="nonsense")


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_list_of_replies_is_used_up_in_order_then_the_script_answers(server: OfflineServer, dialect: str) -> None:
    server.replies = ["One.", Reply("Two.")]
    texts = [text_of(dialect, ask(server, dialect).frames) for _ in range(3)]
    assert texts[:2] == ["One.", "Two."]
    assert "offline assistant" in texts[2]


def test_one_reply_or_string_is_for_every_request(server: OfflineServer) -> None:
    for replies in ("Same.", Reply("Same.")):
        server.replies = replies
        assert [text_of("chat", ask(server, "chat").frames) for _ in range(2)] == ["Same.", "Same."]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_callable_gets_the_request_with_its_history(server: OfflineServer, dialect: str) -> None:
    def reply(request: Request) -> str:
        return f"{request.dialect}|{request.instructions}|{request.messages}|{request.key}"

    server.replies = reply
    answer = text_of(dialect, ask(server, dialect).frames)
    assert answer == f"{dialect}|Be kind.|[('user', 'Hi')]|{KEY}"


def test_a_script_that_fails_is_an_http_500_that_says_why(server: OfflineServer) -> None:
    def reply(request: Request) -> Reply:
        raise KeyError("my bug")

    server.replies = reply
    answer = ask(server, "responses")
    assert answer.status == 500
    assert "my bug" in answer.body.decode()


# The scripted assistant


def test_the_script_answers_alike_for_alike_and_otherwise_for_other_personas() -> None:
    def request(who: str, *messages: tuple[str, str]) -> Request:
        made = Request("POST", "/", {}, {}, 0.0)
        made.instructions, made.messages = f"You are {who}.", list(messages)
        return made

    people = ["a patient tutor", "a stern critic", "a poet", "an astronomer", "helpful"]
    turns = (("user", "First?"), ("assistant", "Yes."), ("user", "And {this}?"))
    for history in (turns[:1], turns):
        answers = [scripted(request(who, *history)).text or "" for who in people]
        assert len(set(answers)) == len(people)
        for who, answer in zip(people, answers, strict=True):
            assert scripted(request(who, *history)).text == answer
            assert 40 <= len(Reply(answer).tokens) <= 120
            assert history[-1][1] in answer
            assert "a script, no model" in answer
            assert not answer.isascii()
    longer = scripted(request(people[0], *turns)).text or ""
    assert "“First?”" in longer
    assert "Turn 2, 3 messages seen" in longer
    assert "reply before mine: “Mine.”" in str(scripted(request("", turns[0], ("assistant", "Mine."))).text)
    assert scripted(request("")).text  # no history, no trouble


def test_a_lone_surrogate_in_the_history_breaks_nothing(server: OfflineServer) -> None:
    with connect(server) as connection:
        send(connection, PATHS["responses"], b'{"model": "m", "input": "x\\ud800y", "stream": true}')
        assert ends("responses", Answer(connection).frames) == "completed"


# Frames


FULL = Reply(TEXT, reasoning="Let me think about it.", refusal="I’d rather not.")


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    "reply",
    [
        Reply(TEXT),
        Reply(""),
        FULL,
        Reply(refusal="No, sorry."),
        Reply(TEXT, fault="incomplete"),
        Reply(TEXT, fault="content_filter"),
        Reply(TEXT, fault="response_failed"),
        Reply(fault="function_call"),
        Reply(TEXT, usage=(3, 4)),
    ],
    ids=lambda reply: reply.fault or ("full" if reply is FULL else "text"),
)
def test_every_frame_is_one_of_the_sdks_own_types(server: OfflineServer, dialect: str, reply: Reply) -> None:
    server.replies = reply
    answer = ask(server, dialect, max_output_tokens=None, stream_options={"include_usage": True})
    assert answer.complete
    assert answer.headers["content-type"].startswith("text/event-stream")
    for event, data in answer.frames:
        if dialect == "chat" and "error" in data:
            continue  # chat has no frame of its own for a failure
        check(dialect, event, data)
    if reply.fault is None:
        assert text_of(dialect, answer.frames) == (reply.text or "")
        assert text_of(dialect, answer.frames, "refusal") == reply.refusal
        if dialect != "assistants":
            assert text_of(dialect, answer.frames, "reasoning") == reply.reasoning


def test_a_responses_stream_has_openais_events_in_openais_order(server: OfflineServer) -> None:
    server.replies = Reply("Hi you.", reasoning="Hm.")
    frames = ask(server, "responses").frames
    assert [event for event, _ in frames] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.reasoning_summary_part.added",
        "response.reasoning_summary_text.delta",
        "response.reasoning_summary_text.done",
        "response.reasoning_summary_part.done",
        "response.output_item.done",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [data["sequence_number"] for _, data in frames] == list(range(len(frames)))
    final = frames[-1][1]["response"]
    assert [item["type"] for item in final["output"]] == ["reasoning", "message"]
    assert final["output"][1]["content"][0]["text"] == "Hi you."
    assert final["usage"]["output_tokens"] == 3
    assert final["usage"]["output_tokens_details"]["reasoning_tokens"] == 1


def test_a_chat_stream_starts_with_the_role_and_ends_with_finish_usage_and_done(server: OfflineServer) -> None:
    server.replies = "Hi you."
    frames = [data for _, data in ask(server, "chat", stream_options={"include_usage": True}).frames]
    assert frames[0]["choices"][0]["delta"]["role"] == "assistant"
    assert frames[-3]["choices"][0]["finish_reason"] == "stop"
    assert frames[-2]["choices"] == []
    assert frames[-2]["usage"]["completion_tokens"] == 2
    assert frames[-1] == "[DONE]"
    assert all(frame["usage"] is None for frame in frames[:-2])
    assert "usage" not in ask(server, "chat").frames[0][1]


def test_an_assistants_stream_has_openais_events_in_openais_order(server: OfflineServer) -> None:
    server.replies = "Hi."
    assert [event for event, _ in ask(server, "assistants").frames] == [
        "thread.created",
        "thread.run.created",
        "thread.run.queued",
        "thread.run.in_progress",
        "thread.run.step.created",
        "thread.run.step.in_progress",
        "thread.message.created",
        "thread.message.in_progress",
        "thread.message.delta",
        "thread.message.completed",
        "thread.run.step.completed",
        "thread.run.completed",
        "done",
    ]


def test_obfuscation_is_there_until_it_is_refused(server: OfflineServer) -> None:
    for dialect in ("responses", "chat"):
        assert b"obfuscation" in ask(server, dialect).body
        assert b"obfuscation" not in ask(server, dialect, stream_options={"include_obfuscation": False}).body


def test_annotations_arrive_in_every_dialect_and_validate(server: OfflineServer) -> None:
    url = {"type": "url_citation", "start_index": 0, "end_index": 2, "title": "T", "url": "https://example.com"}
    cite = {"type": "file_citation", "text": "Hi", "start_index": 0, "end_index": 2, "file_citation": {"file_id": "f"}}
    notes: dict[str, dict[str, Any]] = {
        "responses": url,
        "chat": {"url_citation": {k: v for k, v in url.items() if k != "type"}},
        "assistants": cite,
    }
    for dialect in DIALECTS:
        server.replies = Reply("Hi.", annotations=(notes[dialect],))
        answer = ask(server, dialect)
        assert b"_citation" in answer.body
        for event, data in answer.frames:
            check(dialect, event, data)


@pytest.mark.parametrize(
    ("dialect", "limit", "ending"),
    [
        ("responses", "max_output_tokens", "incomplete"),
        ("chat", "max_completion_tokens", "length"),
        ("chat", "max_tokens", "length"),
        ("assistants", "max_completion_tokens", "incomplete"),
    ],
)
def test_the_token_limit_is_kept(server: OfflineServer, dialect: str, limit: str, ending: str) -> None:
    server.replies = "One two three four."
    limits: list[dict[str, Any]] = [{limit: 2}, {limit: 4}]
    frames = ask(server, dialect, **limits[0]).frames
    assert text_of(dialect, frames) == "One two"
    assert ends(dialect, frames) == ending
    for event, data in frames:
        check(dialect, event, data)
    assert ends(dialect, ask(server, dialect, **limits[1]).frames) in {"completed", "stop"}


# Through the SDK


def test_the_sdk_reads_all_three_dialects(server: OfflineServer, client: openai.OpenAI) -> None:
    server.replies = TEXT
    with sdk_stream(client, "responses") as stream:
        events = list(stream)
    assert events[-1].response.output_text == TEXT
    with sdk_stream(client, "chat") as stream:
        chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == TEXT
    with sdk_stream(client, "assistants") as stream:
        events = list(stream)
    assert events[-1].data.status == "completed"
    assert next(e for e in events if e.event == "thread.message.completed").data.content[0].text.value == TEXT


def test_unstreamed_answers_are_the_sdks_own_types(server: OfflineServer, client: openai.OpenAI) -> None:
    for reply in (Reply(TEXT, reasoning="Hm."), Reply(fault="function_call"), Reply(TEXT, fault="incomplete")):
        server.replies = reply
        Response.model_validate(json.loads(ask(server, "responses", stream=False).body), strict=True)
        ChatCompletion.model_validate(json.loads(ask(server, "chat", stream=False).body), strict=True)
        Run.model_validate(json.loads(ask(server, "assistants", stream=False).body), strict=True)
    server.replies = TEXT
    assert client.responses.create(model="m", input="Hi").output_text == TEXT
    chat = client.chat.completions.create(model="m", messages=[{"role": "user", "content": "Hi"}])
    assert chat.choices[0].message.content == TEXT
    names = [model.id for model in client.models.list()]
    assert names == ["offline", *(f"offline-{fault}" for fault in FAULTS)]


def test_assistants_threads_keep_messages_and_runs(server: OfflineServer, client: openai.OpenAI) -> None:
    server.replies = lambda request: f"{len(request.messages)} seen"
    threads = client.beta.threads
    thread = threads.create(messages=[{"role": "user", "content": "One"}], metadata={"a": "b"})
    Thread.model_validate(thread.model_dump(), strict=True)
    assert threads.retrieve(thread.id).metadata == {"a": "b"}
    Message.model_validate(threads.messages.create(thread.id, role="user", content="Two").model_dump(), strict=True)
    run = threads.runs.create_and_poll(thread_id=thread.id, assistant_id="asst_1")
    assert run.status == "completed"
    with threads.runs.create(thread.id, assistant_id="asst_1", stream=True) as stream:
        assert next(event.event for event in list(stream)) == "thread.run.created"
    texts = [m.content[0].text.value for m in threads.messages.list(thread.id, order="asc")]  # type: ignore[union-attr]
    assert texts == ["One", "Two", "2 seen", "3 seen"]
    newest = threads.messages.list(thread.id).data[0]
    assert newest.content[0].text.value == "3 seen"  # type: ignore[union-attr]
    with pytest.raises(openai.NotFoundError):
        threads.retrieve("thread_x")
    with pytest.raises(openai.NotFoundError):
        threads.runs.retrieve("run_x", thread_id=thread.id)
    with pytest.raises(openai.BadRequestError, match="completed"):
        threads.runs.cancel(run.id, thread_id=thread.id)


def test_an_assistants_run_can_be_cancelled_even_while_it_stalls(server: OfflineServer, client: openai.OpenAI) -> None:
    server.replies = Reply("One two three four.", fault="stall")
    with sdk_stream(client, "assistants") as stream:
        seen: list[str] = []
        for event in stream:
            seen.append(event.event)
            if event.event == "thread.run.created":
                run = event.data
            if seen.count("thread.message.delta") == 2 and seen[-1] == "thread.message.delta":
                client.beta.threads.runs.cancel(run.id, thread_id=run.thread_id)
    assert seen[-4:] == [
        "thread.message.delta",
        "thread.message.incomplete",
        "thread.run.step.cancelled",
        "thread.run.cancelled",
    ]
    assert seen.count("thread.message.delta") == 2


# Refusals


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "hint"),
    [
        ("POST", "/v1/nothing", {}, 404, "Invalid URL (POST /v1/nothing)"),
        ("GET", "/v1/responses", b"", 405, "GET"),
        ("POST", "/v1/responses", b"{broken", 400, "parse"),
        ("POST", "/v1/responses", b"[1]", 400, "object"),
        ("POST", "/v1/responses", {"input": "Hi"}, 400, "'model'"),
        ("POST", "/v1/responses", {"model": "m"}, 400, "'input'"),
        ("POST", "/v1/responses", {"model": 1, "input": "Hi"}, 400, "'model'"),
        ("POST", "/v1/responses", {"model": "m", "input": ["Hi"]}, 400, "input[0]"),
        ("POST", "/v1/responses", {"model": "m", "input": [{"role": "tutor", "content": "x"}]}, 400, "'tutor'"),
        ("POST", "/v1/responses", {"model": "m", "input": "Hi", "stream": "yes"}, 400, "'stream'"),
        (
            "POST",
            "/v1/responses",
            {"model": "m", "input": [{"role": "assistant", "content": [{"type": "input_text", "text": "x"}]}]},
            400,
            "Invalid value: 'input_text'. Supported values are: 'output_text', 'refusal'.",
        ),
        ("POST", "/v1/responses", {"model": "offline-typo", "input": "Hi"}, 404, "offline-429"),
        ("POST", "/v1/chat/completions", {"model": "m", "messages": []}, 400, "'messages'"),
        ("POST", "/v1/chat/completions", {**BODIES["chat"], "stream_options": {"a": 1}}, 400, "'stream_options'"),
        ("POST", "/v1/threads/runs", {}, 400, "'assistant_id'"),
        ("POST", "/v1/threads/x/messages", {"role": "user", "content": "Hi"}, 404, "No thread found"),
        ("BREW", "/v1/responses", b"", 501, "BREW"),
    ],
)
def test_a_wrong_request_gets_openais_error_shape(
    server: OfflineServer, method: str, path: str, body: Any, status: int, hint: str
) -> None:
    with connect(server) as connection:
        send(connection, path, body, method)
        answer = Answer(connection)
    assert answer.status == status
    error = json.loads(answer.body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert hint in error["message"]


def test_history_is_taken_in_both_forms_unless_strict() -> None:
    items = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    typed = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Yes?"}]}
    for strict, history, status in [(False, items, 200), (True, items, 400), (True, [items[0], typed], 200)]:
        with OfflineServer(delay=0, strict=strict) as server:
            assert ask(server, "responses", input=history).status == status
            if status == 200:
                assert server.requests[0].messages == [("user", "Hi"), ("assistant", "Yes?")]


# Faults


def test_every_fault_is_named_and_described() -> None:
    assert len(FAULTS) == 30
    assert all(re.fullmatch(r"[a-z0-9_]+", name) and "\n" not in line for name, line in FAULTS.items())


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("fault", ["401", "429", "500", "400"])
def test_an_http_fault_is_its_status_and_holds_the_key(
    server: OfflineServer, client: openai.OpenAI, dialect: str, fault: str
) -> None:
    server.replies = Reply(fault=fault)
    with pytest.raises(openai.APIStatusError, match=KEY) as caught:
        sdk_stream(client, dialect)
    assert caught.value.status_code == int(fault)
    assert caught.value.response.headers.get("retry-after") == ("1" if fault == "429" else None)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("fault", sorted(FAULTS.keys() - {"stall", "stall_headers"}))
def test_a_fault_can_be_asked_for_by_the_models_name(server: OfflineServer, dialect: str, fault: str) -> None:
    server.replies = Reply(TEXT)
    by_name = ask(server, dialect, model=f"offline-{fault}")
    if dialect == "assistants":
        assert ask(server, dialect, assistant_id=f"asst_offline-{fault}").status == by_name.status
    server.replies = Reply(TEXT, fault=fault)
    by_reply = ask(server, dialect)
    assert (by_name.status, by_name.complete) == (by_reply.status, by_reply.complete)
    assert len(by_name.frames) == len(by_reply.frames)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("fault", COMPLETING)
def test_a_fault_of_form_only_loses_no_text(
    server: OfflineServer, client: openai.OpenAI, dialect: str, fault: str
) -> None:
    server.replies = Reply(TEXT, reasoning="Hm, so.", fault=fault)
    answer = ask(server, dialect)
    assert answer.complete
    assert text_of(dialect, answer.frames) == TEXT
    assert ends(dialect, answer.frames) in ("completed", "stop")
    with sdk_stream(client, dialect) as stream:
        assert list(stream)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_the_faults_of_form_do_what_their_lines_say(server: OfflineServer, dialect: str) -> None:
    def body(fault: str) -> Answer:
        server.replies = Reply(TEXT, fault=fault)
        return ask(server, dialect)

    crlf = body("crlf").body
    assert crlf.count(b"\n") == crlf.count(b"\r\n") > 0
    tiny = body("tiny_chunks").chunks
    assert max(map(len, tiny)) <= 7

    def splits_a_character(chunk: bytes) -> bool:
        try:
            chunk.decode()
        except UnicodeDecodeError:
            return True
        return False

    assert any(map(splits_a_character, tiny))
    strange = body("unknown_events").body
    for line in (b"\n: keepalive\n", b"retry: 3000\n", b"id: offline-", b"surprise"):
        assert line in strange
    bare = body("missing_fields")
    assert bare.frames[-1][1] == "[DONE]"
    assert b"null" not in bare.body
    for missing in (b"sequence_number", b"output_index", b"content_index", b"obfuscation", b"text.done", b"step"):
        assert missing not in bare.body
    if dialect != "assistants":
        assert b"event:" not in bare.body


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("fault", ["error_nested", "error_flat", "error_first", "response_failed"])
def test_an_error_in_the_stream_holds_the_key_and_nothing_follows(
    server: OfflineServer, dialect: str, fault: str
) -> None:
    server.replies = Reply(TEXT, fault=fault)
    answer = ask(server, dialect)
    assert (answer.status, answer.complete) == (200, True)
    text = text_of(dialect, answer.frames)
    assert text == "" if fault == "error_first" else TEXT.startswith(text) and 0 < len(text) < len(TEXT)
    frames = [frame for frame in answer.frames if frame[1] != "[DONE]"]
    event, data = frames[-1]
    assert KEY in json.dumps(data)
    if fault == "response_failed" and dialect != "chat":
        assert ends(dialect, frames) == "failed"
        return
    assert event == (None if dialect == "chat" else "error")
    assert ("error" in data) == (fault != "error_flat")
    assert "message" in (data if fault == "error_flat" else data["error"])
    if fault == "error_flat" and dialect != "chat":
        check(dialect, event, data)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_cut_differs_from_a_clean_early_end(server: OfflineServer, client: openai.OpenAI, dialect: str) -> None:
    for fault, complete in (("cut", False), ("ends_early", True)):
        server.replies = Reply(TEXT, fault=fault)
        answer = ask(server, dialect)
        assert answer.complete is complete
        assert 0 < len(text_of(dialect, answer.frames)) < len(TEXT)
        assert ends(dialect, answer.frames) is None
        assert "[DONE]" not in [data for _, data in answer.frames]
        assert not server.requests[-1].disconnected
    server.replies = [Reply(TEXT, fault="cut"), Reply(TEXT, fault="ends_early")]
    with pytest.raises(openai.APIConnectionError), sdk_stream(client, dialect) as stream:
        list(stream)
    with sdk_stream(client, dialect) as stream:
        assert list(stream)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_malformed_is_one_broken_event_and_the_rest_follows(
    server: OfflineServer, client: openai.OpenAI, dialect: str
) -> None:
    server.replies = Reply(TEXT, fault="malformed")
    answer = ask(server, dialect)
    assert [type(data) for _, data in answer.frames].count(bytes) == 1
    good = [frame for frame in answer.frames if not isinstance(frame[1], bytes)]
    assert text_of(dialect, good) == TEXT
    assert ends(dialect, good) in ("completed", "stop")
    with pytest.raises(json.JSONDecodeError), sdk_stream(client, dialect) as stream:
        list(stream)


def test_function_call_asks_for_the_first_tool_then_answers_its_output(server: OfflineServer) -> None:
    server.replies = Reply("Done.", fault="function_call")
    schema = {"type": "object", "properties": {}, "required": [], "additionalProperties": False}
    tool = {"type": "function", "name": "weather", "parameters": schema, "strict": True}
    last = ask(server, "responses", tools=[tool]).frames[-1][1]["response"]
    assert (last["status"], last["output"][0]["name"]) == ("completed", "weather")
    assert json.loads(last["output"][0]["arguments"]) == {"query": "Hi"}
    output = {"type": "function_call_output", "call_id": last["output"][0]["call_id"], "output": "Sunny"}
    answered = ask(server, "responses", input=[{"role": "user", "content": "Hi"}, last["output"][0], output])
    assert text_of("responses", answered.frames) == "Done."
    chat = ask(server, "chat", tools=[{"type": "function", "function": {"name": "weather"}}]).frames
    assert ends("chat", chat) == "tool_calls"
    calls = [call for _, data in chat[:-1] for call in data["choices"][0]["delta"].get("tool_calls", ())]
    assert calls[0]["function"]["name"] == "weather"
    assert json.loads("".join(call["function"]["arguments"] for call in calls)) == {"query": "Hi"}
    run = ask(server, "assistants").frames[-2][1]
    assert run["status"] == "requires_action"
    assert run["required_action"]["submit_tool_outputs"]["tool_calls"][0]["function"]["name"] == "lookup"


@pytest.mark.parametrize(
    ("fault", "endings"),
    [("incomplete", ["incomplete", "length", "incomplete"]),
     ("content_filter", ["incomplete", "content_filter", "incomplete"])],
)  # fmt: skip
def test_half_an_answer_says_so(server: OfflineServer, fault: str, endings: list[str]) -> None:
    server.replies = Reply("One two three four.", fault=fault)
    frames = {dialect: ask(server, dialect).frames for dialect in DIALECTS}
    assert [text_of(dialect, frames[dialect]) for dialect in DIALECTS] == ["One two"] * 3
    assert [ends(dialect, frames[dialect]) for dialect in DIALECTS] == endings
    reason = frames["responses"][-1][1]["response"]["incomplete_details"]["reason"]
    assert reason == {"incomplete": "max_output_tokens"}.get(fault, fault)


@pytest.mark.parametrize("fault", sorted(FAULTS))
def test_unstreamed_requests_get_the_nearest_thing(server: OfflineServer, fault: str) -> None:
    if fault.startswith("stall"):
        return
    server.replies = Reply(TEXT, fault=fault)
    for dialect in DIALECTS:
        answer = ask(server, dialect, stream=False)
        failed = fault == "response_failed" and dialect == "chat"
        assert answer.status == (int(fault) if fault.isdigit() else 500 if "error_" in fault or failed else 200)
        assert answer.complete == (fault not in ("cut", "ends_early"))
        if fault == "malformed":
            with pytest.raises(json.JSONDecodeError):
                json.loads(answer.body)


# Clients that leave


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("reply", [Reply(fault="stall"), Reply(fault="stall_headers"), Reply(TEXT, delay=30)])
def test_a_client_that_leaves_is_noticed_at_once(
    server: OfflineServer, dialect: str, reply: Reply, stream: bool
) -> None:
    server.replies = reply
    with connect(server) as connection:
        send(connection, PATHS[dialect], {**BODIES[dialect], "stream": stream})
        if stream and reply.fault != "stall_headers":
            assert connection.recv(10).startswith(b"HTTP/1.1")
        [request] = server.wait_for(1)
        assert not request.wait(0.1)
        assert not request.disconnected
        left = time.monotonic()
    assert request.wait(5)
    assert request.disconnected
    assert request.closed_at is not None
    assert request.closed_at - left < 2


def test_closing_the_sdks_stream_is_noticed(server: OfflineServer, client: openai.OpenAI) -> None:
    server.delay = 0.01
    stream = sdk_stream(client, "responses")
    next(iter(stream))
    stream.close()
    [request] = server.requests
    assert request.wait(5)
    assert request.disconnected


def test_a_client_that_has_it_all_did_not_leave_early(server: OfflineServer, client: openai.OpenAI) -> None:
    for dialect in DIALECTS:
        with sdk_stream(client, dialect) as stream:
            list(stream)
    assert all(request.wait(5) and not request.disconnected for request in server.requests)


def test_a_pipelined_request_is_not_taken_for_a_client_that_leaves(server: OfflineServer) -> None:
    server.replies = Reply("One two three.", delay=0.01)
    with connect(server) as connection:
        for _ in range(2):
            send(connection, PATHS["chat"], BODIES["chat"])
        assert b"One two three." in Answer(connection).body
        assert b"One two three." in Answer(connection).body
    assert not any(request.disconnected for request in server.requests)


# Its life


def test_requests_are_recorded_with_headers_and_body(server: OfflineServer, client: openai.OpenAI) -> None:
    client.responses.create(model="m", input="Hi", extra_headers={"X-Thing": "1"})
    [request] = server.requests
    assert (request.method, request.path, request.key) == ("POST", "/v1/responses", KEY)
    assert request.headers["x-thing"] == "1"
    assert request.body == {"model": "m", "input": "Hi"}
    assert (request.dialect, request.model) == ("responses", "m")


def test_only_the_newest_requests_are_kept() -> None:
    with OfflineServer("Hi.", delay=0, keep=2) as server:
        for n in range(4):
            ask(server, "assistants", metadata={"n": str(n)})
        assert [request.body["metadata"]["n"] for request in server.requests] == ["2", "3"]
        assert len(server.wait_for(4)) == 2
        with pytest.raises(TimeoutError, match="4 came"):
            server.wait_for(5, timeout=0.01)


def test_one_connection_serves_many_requests(server: OfflineServer) -> None:
    with connect(server) as connection:
        for dialect in DIALECTS * 2:
            send(connection, PATHS[dialect], {**BODIES[dialect], "stream": True})
            assert Answer(connection).complete


def test_the_same_requests_get_the_same_frames() -> None:
    def session() -> list[bytes]:
        with OfflineServer(["One.", FULL], delay=0) as server:
            bodies = [ask(server, dialect).body for dialect in DIALECTS * 2]
        return [re.sub(rb'_at":\d+|created":\d+', b"", body) for body in bodies]

    assert session() == session()


@pytest.mark.slow
def test_close_leaves_no_thread_and_no_socket() -> None:
    def files() -> dict[str, str]:
        gc.collect()
        found = {}
        for number in os.listdir("/proc/self/fd"):
            # The folder's own is closed again.
            with contextlib.suppress(FileNotFoundError):
                found[number] = os.readlink(f"/proc/self/fd/{number}")
        return found

    # Those of a test before this one may end meanwhile; none may be new.
    threads, before = set(threading.enumerate()), files()
    started = time.monotonic()
    for replies in ("Hi.", Reply(fault="stall"), Reply(TEXT, delay=60), Reply(fault="stall_headers")) * 25:
        server = OfflineServer(replies, delay=0).start()
        with connect(server) as used, connect(server):
            send(used, PATHS["responses"], {**BODIES["responses"], "stream": True})
            [request] = server.wait_for(1)
            server.close()
            assert request.wait(0)
            assert not request.disconnected
    until = time.monotonic() + 10
    while len(files()) > len(before) and time.monotonic() < until:
        time.sleep(0.1)
    assert len(after := files()) <= len(before), after.items() - before.items()
    assert set(threading.enumerate()) <= threads
    assert time.monotonic() - started < 60


def test_it_starts_and_closes_more_than_once() -> None:
    server = OfflineServer("Hi.", delay=0)
    with pytest.raises(RuntimeError, match="start"):
        _ = server.base_url
    server.close()
    for _ in range(2):
        assert server.start() is server.start()
        assert server.base_url.endswith("/v1")
        assert text_of("chat", ask(server, "chat").frames) == "Hi."
        server.close()
        server.close()


def test_pacing_follows_the_delays() -> None:
    with OfflineServer(Reply("One two three."), delay=0.02, first_delay=0.05) as server:
        started = time.monotonic()
        ask(server, "responses")
        assert time.monotonic() - started >= 0.09
        server.replies = Reply("One two three.", delay=0, first_delay=0.2)
        started = time.monotonic()
        ask(server, "responses")
        assert time.monotonic() - started >= 0.2


@pytest.mark.slow
def test_fifty_streams_at_once_under_gevent() -> None:
    script = """
        import assistream_flask.testing as early  # importing first must not matter
        from gevent import monkey; monkey.patch_all()
        import threading, time
        import gevent
        from assistream_flask.testing import OfflineServer, Reply
        text = "word " * 20
        started = time.monotonic()
        with OfflineServer(Reply(text, delay=0.05)) as server:
            client = server.client(max_retries=0)
            def one():
                with client.responses.create(model="m", input="Hi", stream=True) as stream:
                    return "".join(event.delta for event in stream if event.type == "response.output_text.delta")
            jobs = [gevent.spawn(one) for _ in range(50)]
            gevent.joinall(jobs, raise_error=True)
            assert all(job.value == text for job in jobs)
            server.replies = Reply(fault="stall")
            stream = client.chat.completions.create(model="offline", messages=[{"role": "user", "content": "Hi"}],
                                                    stream=True)
            next(iter(stream)); stream.close()
            request = server.requests[-1]
            assert request.wait(5) and request.disconnected
            hanging = gevent.spawn(lambda: list(client.responses.create(model="m", input="Hi", stream=True)))
            server.wait_for(52)
        gevent.sleep(0.1)
        assert hanging.ready() and not hanging.successful()
        client.close()
        taken = time.monotonic() - started
        assert taken < 30, taken  # one after another would be 50 s
        print("fine", threading.active_count())
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.startswith("fine 1"), done.stderr


def test_it_runs_by_hand() -> None:
    command = [sys.executable, "-m", "assistream_flask.testing", "--port", "0", "--delay", "0", "--first-delay", "0"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"OPENAI_BASE_URL=(\S+)", line)
        assert found, line
        with openai.OpenAI(api_key="x", base_url=found[1], max_retries=0) as client:
            assert "offline" in client.responses.create(model="m", input="Hi").output_text
        process.terminate()  # SIGINT may be ignored where tests run in the background
        assert process.stderr is not None
        out, err = process.stdout.read(), process.stderr.read()
    assert all(f"offline-{fault}" in out for fault in FAULTS)
    assert err == ""


def test_the_example_in_the_docstring_runs() -> None:
    import assistream_flask.testing as module

    code = textwrap.dedent((module.__doc__ or "").split("As a pytest fixture::")[1].split("By hand:")[0])
    namespace: dict[str, Any] = {}
    exec(code.replace("@pytest.fixture", ""), namespace)
    for server in namespace["openai_server"]():
        namespace["test_it_answers"](server)


def test_replies_is_a_public_type() -> None:
    replies: Replies = ["Hi."]
    assert OfflineServer(replies).replies is replies
