"""Background responses: another process goes on behind any place, and nothing is told twice or left out."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import openai
import pytest

from assistream_flask import Assistant, events
from assistream_flask.errors import RunError
from assistream_flask.events import Json
from assistream_flask.runs.message_accumulator import MessageAccumulator
from assistream_flask.testing import OfflineServer, Reply
from assistream_flask.upstream import answer_stream
from assistream_flask.upstream.delivered import Shown
from assistream_flask.upstream.deltas import Annotation, Begun, End, Reasoning, Refusal, Text
from assistream_flask.upstream.items import Turn
from tests.conftest import KEY, quick_client, wait_until

ASSISTANT = Assistant("tutor", model="m", background=True)
TURNS = (Turn("user", "Hi"),)
NOTES = tuple(
    {"type": "url_citation", "url": f"https://example.org/{n}", "title": "E", "start_index": 0, "end_index": 3}
    for n in range(3)
)
FULL = Reply(
    "Grüße, “quoted” 🌍🌙\n\nSecond   paragraph. ", reasoning="Let me think. ", refusal="No more.", annotations=NOTES
)


class Got:
    """All that was told of one answer, by one process or several."""

    def __init__(self) -> None:
        self.parts: dict[tuple[str, int], str] = {}
        self.notes: list[tuple[int, Any]] = []
        self.begun = 0
        self.end: End | None = None

    def add(self, parts: list[Any]) -> None:
        assert parts, "an empty list is nobody's business"
        assert self.end is None, "nothing comes after the end"
        for part in parts:
            match part:
                case Text(at, value) | Refusal(at, value):
                    key = type(part).__name__, at
                    assert value
                    assert key in self.parts or at == len([1 for kind, _ in self.parts if kind != "Reasoning"])
                    self.parts[key] = self.parts.get(key, "") + value
                case Reasoning(value):
                    self.parts["Reasoning", 0] = self.parts.get(("Reasoning", 0), "") + value
                case Annotation(at, value):
                    self.notes.append((at, value))
                case Begun():
                    assert not self.parts
                    self.begun += 1
                case End():
                    # What it is resent as is of each response its own.
                    self.end = part._replace(items=())

    def all(self) -> Any:
        return self.parts, self.notes, self.end, self.begun


def carried(state: Json | None) -> Json:
    """As a database or Redis carries it to another process."""
    assert state is not None
    found: Json = json.loads(json.dumps(state).encode("ascii"))
    return found


def read(stream: answer_stream.AnswerStream, got: Got) -> str | None:
    """Read to the end; give the code of the failure."""
    try:
        for parts in stream:
            got.add(parts)
    except RunError as error:
        return error.code
    finally:
        stream.close()
    return None


def begin(client: openai.OpenAI, stall: float = 5) -> answer_stream.AnswerStream:
    return answer_stream.open(client, ASSISTANT, TURNS, stall)


def resume(client: openai.OpenAI, state: Json | None, stall: float = 5) -> answer_stream.AnswerStream:
    return answer_stream.resume(client, ASSISTANT, carried(state), stall, every=0.01)


def read_lists(stream: answer_stream.AnswerStream, got: Got, count: int) -> bool:
    """Read so many lists, then leaves as a process does that ends; give whether there were so many."""
    batches = iter(stream)
    try:
        for _ in range(count):
            got.add(next(batches))
    except StopIteration:
        return False
    finally:
        stream.close()
    return True


def take_over_everywhere(client: openai.OpenAI, whole: Got) -> int:
    """Leave after each list in turn, and goes on in another process; give how often."""
    count = 0
    while True:
        count += 1
        stream, got = begin(client), Got()
        if not read_lists(stream, got, count):
            return count
        if got.end is None:
            assert read(resume(client, stream.state()), got) is None
            assert got.all() == whole.all()


@pytest.fixture
def client(server: OfflineServer) -> Iterator[openai.OpenAI]:
    with quick_client(server) as client:
        yield client


FORMS = (None, "missing_fields", "unknown_events", "crlf", "tiny_chunks", "incomplete")


@pytest.mark.slow
@pytest.mark.parametrize("fault", FORMS)
def test_at_every_place_another_process_gets_exactly_the_rest(
    server: OfflineServer, client: openai.OpenAI, fault: str | None
) -> None:
    server.replies = Reply(FULL.text, FULL.reasoning, FULL.refusal, fault=fault, annotations=NOTES, delay=0.001)
    whole = Got()
    assert read(begin(client), whole) is None
    assert whole.begun == 1
    assert take_over_everywhere(client, whole) > 5


@pytest.mark.parametrize("fault", FORMS)
def test_at_every_place_the_rest_is_polled_where_it_is_streamed_no_more(fault: str | None) -> None:
    reply = Reply(FULL.text, FULL.reasoning, FULL.refusal, fault=fault, annotations=NOTES, delay=0.001)
    with OfflineServer(reply, stream_window=0) as server, quick_client(server) as client:
        whole = Got()
        assert read(begin(client), whole) is None
        assert take_over_everywhere(client, whole) > 5


@pytest.mark.parametrize("window", [300, 0])
def test_a_mark_is_taken_off_whichever_process_tells_it(window: float) -> None:
    names = ["Tutor", "tutor"]
    with OfflineServer(Reply("[Tutor]\nHello there, you."), delay=0.001, stream_window=window) as server:
        for count in range(1, 20):
            with quick_client(server) as client:
                stream, got = answer_stream.open(client, ASSISTANT, TURNS, 5, names), Got()
                if read_lists(stream, got, count) and got.end is None:
                    rest = answer_stream.resume(client, ASSISTANT, carried(stream.state()), 5, every=0.01, names=names)
                    assert read(rest, got) is None
            assert got.parts == {("Text", 0): "Hello there, you."}


def test_what_was_held_back_as_a_stream_broke_is_told_once() -> None:
    whole = {"id": "resp_1", "status": "completed", "output": [message({"type": "output_text", "text": "[Tuesday]"})]}
    server = Habits([ANSWER[1], delta(0, 0, "[Tu"), delta(0, 0, "esday]")])
    server.events[-1]["response"] = whole
    with server.client() as client:
        stream, got = answer_stream.open(client, ASSISTANT, TURNS, 5, ["Tutor"]), Got()
        batches = iter(stream)
        got.add(next(batches))
        # What is held is no list, so the stream is left behind the piece after it, and taken up before.
        state = carried(stream.state())
        stream.close()
        rest = answer_stream.resume(client, ASSISTANT, state, 5, every=0.01, names=["Tutor"])
        assert read(rest, got) is None
    assert got.parts == {("Text", 0): "[Tuesday]"}


def test_a_worker_of_an_older_release_knows_that_a_text_was_told_in_pieces() -> None:
    for event in (delta(0, 0, "No", "refusal"), {"type": "response.output_text.done", "text": "No"}, delta(0, 0, "No")):
        server = Habits([ANSWER[1], event])
        with server.client() as client:
            stream = begin(client)
            assert read_lists(stream, Got(), 2)
            assert carried(stream.state())["told_by"] == "delta"


@pytest.mark.parametrize("window", [300, 0])
def test_each_list_may_be_told_by_a_process_of_its_own(window: float) -> None:
    with OfflineServer(FULL, delay=0.01, stream_window=window) as server, quick_client(server) as client:
        whole, got = Got(), Got()
        read(begin(client), whole)
        stream = begin(client)
        while got.end is None:
            assert read_lists(stream, got, 1)
            if got.end is None:
                stream = resume(client, stream.state())
        assert got.all() == whole.all()


def test_the_answer_is_asked_for_in_the_background_and_stored(server: OfflineServer, client: openai.OpenAI) -> None:
    read(begin(client), Got())
    body = server.requests[0].body
    assert (body["background"], body["store"], body["stream"]) == (True, True, True)


def test_only_an_answer_in_the_background_is_asked_for_under_a_key_which_the_app_can_leave_out(
    server: OfflineServer, client: openai.OpenAI
) -> None:
    left_out: Any = {"background": True, "extra_headers": {"Idempotency-Key": openai.Omit()}}
    for more in ({"background": True}, {}, left_out):
        stream = answer_stream.open(client, Assistant("a", model="m", **more), TURNS, 5, key="run_1-0")
        assert any(isinstance(parts[-1], End) for parts in stream)
    assert [one.headers.get("idempotency-key") for one in server.requests] == ["run_1-0", None, None]


def test_the_id_is_known_before_any_text(server: OfflineServer, client: openai.OpenAI) -> None:
    server.replies = Reply("one two", first_delay=600)
    stream = begin(client)
    assert stream.state() is None
    assert next(iter(stream)) == [Begun()]
    state = carried(stream.state())
    stream.close()
    assert client.responses.retrieve(state["response_id"]).status in ("queued", "in_progress")
    answer_stream.cancel(client, state)


@pytest.mark.parametrize("dialect", ["responses", "chat"])
def test_an_answer_in_the_foreground_has_no_state(server: OfflineServer, client: openai.OpenAI, dialect: str) -> None:
    stream = answer_stream.open(client, Assistant("a", model="m", upstream=dialect), TURNS, 5)
    for parts in stream:
        assert Begun() not in [part for part in parts if isinstance(part, Begun)]
        assert stream.state() is None


def test_a_state_stays_as_it_was_when_more_is_read(server: OfflineServer, client: openai.OpenAI) -> None:
    server.replies = Reply(FULL.text, delay=0.001)
    stream = begin(client)
    kept = []
    for _ in stream:
        state = stream.state()
        kept.append((state, json.dumps(state)))
    assert len({words for _, words in kept}) == len(kept)
    assert all(json.dumps(state) == words for state, words in kept)


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ("cut", "upstream_cut"),
        ("ends_early", "upstream_ended_early"),
        ("stall", "upstream_stalled"),
        ("malformed", "upstream_malformed"),
    ],
)
def test_a_stream_that_broke_is_resumed(server: OfflineServer, client: openai.OpenAI, fault: str, code: str) -> None:
    server.replies = Reply(FULL.text, reasoning="Hm.", fault=fault)
    stream, got = begin(client, stall=0.5 if fault == "stall" else 5), Got()
    assert read(stream, got) == code
    assert read(resume(client, stream.state()), got) is None
    assert got.parts == {("Reasoning", 0): "Hm.", ("Text", 0): FULL.text}


@pytest.mark.parametrize("window", [300, 0])
@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ("response_failed", "upstream_error"),
        ("error_nested", "upstream_error"),
        ("error_flat", "upstream_error"),
        ("function_call", "tools_not_supported"),
    ],
)
def test_an_answer_that_failed_fails_alike_for_who_takes_it_over(window: float, fault: str, code: str) -> None:
    reply = Reply("one two three", fault=fault)
    with OfflineServer(reply, stream_window=window) as server, quick_client(server) as client:
        stream, got = begin(client), Got()
        assert read_lists(stream, got, 1)
        assert read(resume(client, stream.state()), got) == code
        assert got.parts == ({} if fault == "function_call" else {("Text", 0): "one two"})


@pytest.mark.parametrize("window", [300, 0])
def test_a_cancelled_answer_ends_for_all_who_read_it(window: float) -> None:
    with OfflineServer(Reply("one two", delay=600), stream_window=window) as server, quick_client(server) as client:
        first, got = begin(client), Got()
        lists = iter(first)
        while not got.parts:
            got.add(next(lists))
        second = resume(client, first.state())
        codes: list[str | None] = []
        thread = threading.Thread(target=lambda: codes.append(read(second, got)))
        thread.start()
        answer_stream.cancel(client, carried(first.state()))
        thread.join(10)
        assert codes == ["upstream_error"]
        with pytest.raises(RunError):
            list(lists)
        assert client.responses.retrieve(carried(first.state())["response_id"]).status == "cancelled"
        answer_stream.cancel(client, carried(first.state()))


def test_cancelling_what_can_not_be_cancelled_is_only_logged(
    client: openai.OpenAI, caplog: pytest.LogCaptureFixture
) -> None:
    answer_stream.cancel(client, {"response_id": "resp_none"})
    assert "was not cancelled" in caplog.text


# Exact events, and servers of other habits, from a transport without a network


def delta(output: int | None, content: int | None, value: str, kind: str = "output_text") -> Json:
    return {"type": f"response.{kind}.delta", "output_index": output, "content_index": content, "delta": value}


def message(*content: Json) -> Json:
    return {"type": "message", "content": list(content)}


ANSWER: list[Json] = [
    {"type": "keepalive", "sequence_number": 99},
    {"type": "response.created", "response": {"id": "resp_1", "status": "queued"}},
    {"type": "response.queued", "response": {"id": "resp_1", "status": "queued"}},
    {"type": "response.reasoning_summary_text.delta", "delta": "Hm \ud83c"},
    {"type": "response.reasoning_summary_text.delta", "delta": "\udf0d."},
    {"type": "response.reasoning_summary_text.done"},
    {"type": "response.reasoning_summary_text.delta", "delta": "So?"},
    {"type": "response.reasoning_summary_text.done"},
    delta(1, 0, "a\ud83c"),
    delta(1, 0, "\udf0db\0c"),
    {"type": "response.output_text.annotation.added", "output_index": 1, "content_index": 0, "annotation": NOTES[0]},
    delta(1, 1, "\ud83c"),
    {"type": "keepalive", "sequence_number": 0},
    {"type": "response.output_text.annotation.added", "output_index": 1, "content_index": 0, "annotation": NOTES[0]},
    delta(1, 1, "\udf19"),
    delta(1, 1, "\ud83c!"),
    delta(1, 2, "No\ud83c", "refusal"),
    delta(1, 2, "\udf19.", "refusal"),
    {"type": "response.output_text.done", "output_index": 1, "content_index": 0, "text": "?"},
    delta(2, 0, "end"),
    {"type": "response.output_text.annotation.added", "output_index": 2, "content_index": 0, "annotation": NOTES[1]},
    delta(2, 0, ". \ud83c"),
]
OUTPUT: list[Json] = [
    {"type": "reasoning", "summary": [{"text": "Hm \ud83c\udf0d."}, {"text": "So?"}]},
    message(
        {"type": "output_text", "text": "a\ud83c\udf0db\0c", "annotations": [NOTES[0], NOTES[0]]},
        {"type": "output_text", "text": "\ud83c\udf19\ud83c!"},
        {"type": "refusal", "refusal": "No\ud83c\udf19."},
    ),
    message({"type": "output_text", "text": "end. \ud83c", "annotations": [NOTES[1]]}),
]
FINAL: Json = {"id": "resp_1", "status": "completed", "output": OUTPUT}
TOLD = {
    ("Reasoning", 0): "Hm 🌍.\n\nSo?",
    ("Text", 0): "a🌍b\ufffdc",
    ("Text", 1): "🌙\ufffd!",
    ("Refusal", 2): "No🌙.",
    ("Text", 3): "end. ",
}


def as_sent(response: Json) -> httpx2.Response:
    """With lone surrogates, which httpx2's own encoder refuses."""
    return httpx2.Response(200, content=json.dumps(response).encode())


class Habits:
    """A server with one answer. ``hears`` tells whether it knows ``starting_after``; who asks for the rest gets ``cut``
    events, and no more by a stream."""

    def __init__(
        self,
        events: list[Json],
        *,
        numbered: bool = True,
        hears: bool = True,
        streams: bool = True,
        cut: int | None = None,
    ) -> None:
        self.events = [*events, {"type": "response.completed", "response": FINAL}]
        if numbered:
            self.events = [{"sequence_number": n, **event} for n, event in enumerate(self.events)]
        self.hears, self.streams, self.cut = hears, streams, cut
        self.final: list[httpx2.Response | Exception] = []
        self.asked: list[str] = []

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        self.asked.append(f"{request.method} {request.url.raw_path.decode()}")
        query = request.url.params
        if request.method == "GET" and query.get("stream") != "true":
            answer = self.final.pop(0) if self.final else as_sent(FINAL)
            if isinstance(answer, Exception):
                raise answer
            return answer
        after = int(query["starting_after"]) if "starting_after" in query and self.hears else -1
        if request.method == "GET" and not self.streams:
            return httpx2.Response(400, json={"error": {"message": "no longer"}})
        frames = [
            f"data: {json.dumps(event)}\n\n".encode()
            for event in self.events
            if after < 0 or event["sequence_number"] > after
        ]
        if request.method == "GET":
            frames, self.streams = frames[: self.cut], self.streams and self.cut is None
        return httpx2.Response(200, headers={"content-type": "text/event-stream"}, content=iter(frames))

    def client(self) -> openai.OpenAI:
        http_client = httpx2.Client(transport=httpx2.MockTransport(self), verify=False)
        return openai.OpenAI(api_key=KEY, base_url="http://model.test/v1", http_client=http_client)


HABITS: dict[str, Callable[[], Habits]] = {
    "as OpenAI": lambda: Habits(ANSWER),
    "polled": lambda: Habits(ANSWER, streams=False),
    "from the start": lambda: Habits(ANSWER, hears=False),
    "without numbers": lambda: Habits(ANSWER, numbered=False),
    "polled without numbers": lambda: Habits(ANSWER, numbered=False, streams=False),
}


@pytest.mark.parametrize("habit", HABITS)
def test_at_every_event_of_any_server_another_process_gets_exactly_the_rest(habit: str) -> None:
    server = HABITS[habit]()
    with server.client() as client:
        whole = Got()
        assert read(begin(client), whole) is None
        assert whole.parts == TOLD
        assert whole.notes == [(0, NOTES[0]), (0, NOTES[0]), (3, NOTES[1])]
        assert take_over_everywhere(client, whole) > 15


@pytest.mark.parametrize("habit", HABITS)
def test_what_a_worker_of_an_older_release_told_is_not_told_again(habit: str) -> None:
    server = HABITS[habit]()
    with server.client() as client:
        stream, got = begin(client), Got()
        assert read_lists(stream, got, 12)
        state = carried(stream.state())
        slots = [slot for slot in state["slots"] if slot[0] != "thought"]
        older = {name: state[name] for name in ("response_id", "sequence", "told_by", "paragraph")}
        assert read(resume(client, {**older, "slots": slots}), got) is None
    assert got.parts == TOLD


def spoken(*words: str) -> list[Json]:
    return [
        {"type": "response.created", "response": {"id": "resp_1"}},
        *({"type": "response.output_text.delta", "output_index": 0, "delta": word} for word in words),
    ]


@pytest.mark.parametrize(
    ("words", "whole", "rest"),
    [
        ((" Good", " morning", ".  "), ["Good morning."], ""),
        (("Good", " morning."), ["Good", " morning."], ""),
        (("Good", " morning"), ["Good morning, all."], ", all."),
    ],
    ids=["without the blanks around it", "in two parts", "with more"],
)
@pytest.mark.parametrize("streams", [True, False])
def test_an_answer_that_is_told_in_another_form_the_second_time_is_told_once(
    words: tuple[str, ...], whole: list[str], rest: str, streams: bool
) -> None:
    output = [message({"type": "output_text", "text": text}) for text in whole]
    server = Habits(spoken(*words), numbered=False, streams=streams)
    with server.client() as client:
        stream, got = begin(client), Got()
        assert read_lists(stream, got, 1 + len(words))
        server.events = [
            {"type": "response.created", "response": {"id": "resp_1"}},
            {"type": "response.completed", "response": {"id": "resp_1", "status": "completed", "output": output}},
        ]
        server.final = [as_sent({"status": "completed", "output": output})]
        assert read(resume(client, stream.state()), got) is None
    assert got.parts == {("Text", 0): "".join(words) + rest}


def test_an_answer_that_is_told_again_to_an_assistant_of_another_name_has_its_mark_off() -> None:
    server = Habits(spoken("[Tutor]", "\n", "Hello", " there"), numbered=False)
    with server.client() as client:
        stream, got = answer_stream.open(client, ASSISTANT, TURNS, 5, ["Tutor"]), Got()
        assert read_lists(stream, got, 2)
        state = carried(stream.state())
        assert read(answer_stream.resume(client, ASSISTANT, state, 5, every=0.01, names=["Teacher"]), got) is None
    assert got.parts["Text", 0].startswith("Hello there")
    assert "Tutor" not in got.parts["Text", 0]


@pytest.mark.parametrize("habit", HABITS)
def test_what_viewers_have_beyond_the_state_is_left_out_too(habit: str) -> None:
    server, count = HABITS[habit](), 0
    with server.client() as client:
        whole = Got()
        read(begin(client), whole)
        states: list[tuple[Json, int]] = []
        lists: list[list[Any]] = []
        stream = begin(client)
        for parts in stream:
            lists.append(parts)
            if state := stream.state():
                states.append((carried(state), len(lists)))
        for state, at in states:
            for seen in range(at, len(lists)):
                run, empty = events.run("t", "tutor", "m"), events.message("t", "assistant", [])
                got, reply = Got(), MessageAccumulator(run, empty, [])
                for parts in lists[:seen]:
                    got.add(parts)
                    reply.add(parts)
                _, message, steps = reply.snapshot()
                rest = answer_stream.resume(client, ASSISTANT, state, 5, every=0.01, shown=Shown(message, steps))
                assert read(rest, got) is None
                assert got.all() == whole.all()
                count += 1
    assert count > 100


@pytest.mark.parametrize("numbered", [True, False])
def test_an_answer_that_breaks_while_it_is_told_again_goes_on_where_it_was(numbered: bool) -> None:
    """It has a mark before it, and as a whole it lacks the blanks around it."""
    words = ["[tu", "tor]", " Good", " ", "morning", ".  "]
    told: list[Json] = [
        {"type": "response.created", "response": {"id": "resp_1"}},
        *(
            {"type": "response.output_text.delta", "output_index": 0, "content_index": 0, "delta": word}
            for word in words
        ),
    ]
    final = {"status": "completed", "output": [message({"type": "output_text", "text": "[tutor] Good morning."})]}
    count = 0
    for left in range(1, len(told)):
        for cut in range(len(told)):
            server, got = Habits(told, numbered=numbered, hears=numbered, cut=cut), Got()
            server.final = [as_sent(final)]
            with server.client() as client:
                stream = answer_stream.open(client, ASSISTANT, TURNS, 5, ["tutor"])
                if read_lists(stream, got, left) and got.end is None:
                    count += 1
                    state = carried(stream.state())
                    rest = answer_stream.resume(client, ASSISTANT, state, 5, every=0.01, names=["tutor"])
                    assert read(rest, got) is None
                    assert got.parts["Text", 0].strip() == "Good morning."
                    assert got.end is not None
    assert count > 15


def test_at_every_event_of_a_server_without_indexes_the_rest_is_polled() -> None:
    events: list[Json] = [
        {"type": "response.created", "response": {"id": "resp_1"}},
        *({"type": "response.output_text.delta", "delta": word} for word in ("one ", "\ud83c", "\udf0d", " two")),
    ]
    server = Habits(events, numbered=False, streams=False)
    final = {"status": "completed", "output": [message({"type": "output_text", "text": "one 🌍 two"})]}
    server.events[-1] = {"type": "response.completed", "response": final}
    server.final = [httpx2.Response(200, json=final) for _ in range(20)]
    with server.client() as client:
        whole = Got()
        read(begin(client), whole)
        assert whole.parts == {("Text", 0): "one 🌍 two"}
        assert take_over_everywhere(client, whole) == 6


def test_the_place_is_asked_for_by_its_number_and_the_object_by_its_id() -> None:
    server = Habits(ANSWER, streams=False)
    with server.client() as client:
        stream, got = begin(client), Got()
        assert read_lists(stream, got, 1)
        assert read(resume(client, stream.state()), got) is None
    assert server.asked == [
        "POST /v1/responses",
        "GET /v1/responses/resp_1?starting_after=1&stream=true",
        "GET /v1/responses/resp_1",
    ]


STATE: Json = {"response_id": "resp_1", "sequence": 1, "told_by": "", "paragraph": False, "slots": []}


def test_what_passes_is_waited_out_while_polling() -> None:
    server = Habits(ANSWER, streams=False)
    server.final = [
        httpx2.Response(200, json={"id": "resp_1", "status": "queued"}),
        httpx2.ConnectError("refused"),
        httpx2.Response(500),
        httpx2.ReadTimeout("slow"),
        httpx2.Response(429),
        as_sent({"id": "resp_1", "status": "in_progress", "output": OUTPUT[:1]}),
    ]
    got = Got()
    with server.client() as client:
        assert read(resume(client, STATE), got) is None
    assert got.parts == TOLD
    assert len(server.asked) == 8


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (httpx2.Response(404), "worker_lost"),
        (httpx2.Response(401), "upstream_unauthorized"),
        (httpx2.Response(400), "upstream_rejected"),
        (httpx2.Response(200, content=b"<html>"), "upstream_malformed"),
        (httpx2.Response(200, json=[]), "upstream_malformed"),
        (httpx2.Response(200, json={"status": "lost"}), "upstream_malformed"),
        (httpx2.Response(200, json={"status": "cancelled"}), "upstream_error"),
        (httpx2.Response(200, json={"status": "failed", "error": {"code": "rate_limit"}}), "rate_limit_exceeded"),
    ],
)
def test_what_does_not_pass_ends_the_polling(answer: httpx2.Response, code: str) -> None:
    server = Habits(ANSWER, streams=False)
    server.final = [answer]
    with server.client() as client:
        assert read(resume(client, STATE), Got()) == code


def test_what_a_failed_answer_said_is_told_before_its_failure() -> None:
    server = Habits(ANSWER, streams=False)
    server.final = [as_sent({"status": "failed", "output": OUTPUT})]
    got = Got()
    with server.client() as client:
        assert read(resume(client, STATE), got) == "upstream_error"
    assert got.parts == TOLD


def test_an_incomplete_answer_says_why_when_it_is_polled() -> None:
    server = Habits(ANSWER, streams=False)
    why = {"reason": "max_output_tokens"}
    server.final = [httpx2.Response(200, json={"status": "incomplete", "incomplete_details": why})]
    got = Got()
    with server.client() as client:
        assert read(resume(client, STATE), got) is None
    assert got.end == End("max_tokens", None)


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (404, "worker_lost"),
        (401, "upstream_unauthorized"),
        (403, "upstream_unauthorized"),
        (429, "rate_limit_exceeded"),
        (503, "upstream_error"),
    ],
)
def test_a_server_that_refuses_to_resume_says_why_once(status: int, code: str) -> None:
    asked = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        asked.append(request)
        return httpx2.Response(status)

    http_client = httpx2.Client(transport=httpx2.MockTransport(answer), verify=False)
    client = openai.OpenAI(api_key=KEY, base_url="http://model.test/v1", http_client=http_client)
    with client, pytest.raises(RunError) as failed:
        resume(client, STATE)
    assert failed.value.code == code
    assert len(asked) == 1


def test_closing_ends_the_polling() -> None:
    server = Habits(ANSWER, streams=False)
    server.final = [httpx2.Response(200, json={"id": "resp_1", "status": "queued"})]
    with server.client() as client:
        stream = answer_stream.resume(client, ASSISTANT, STATE, 5, every=600)
        codes: list[str | None] = []
        thread = threading.Thread(target=lambda: codes.append(read(stream, Got())))
        thread.start()
        wait_until(lambda: len(server.asked) == 2)
        stream.close()
        thread.join(10)
    assert codes == ["upstream_cut"]


def test_a_server_that_knows_nothing_of_it_streams_as_ever() -> None:
    server = Habits([{"type": "response.output_text.delta", "delta": "Hello."}], numbered=False)
    server.events[-1] = {"type": "response.completed", "response": {"status": "completed"}}
    got = Got()
    with server.client() as client:
        stream = begin(client)
        assert read(stream, got) is None
        assert stream.state() is None
    assert got.all() == ({("Text", 0): "Hello."}, [], End(None, None), 0)


def test_padding_is_declined_at_openai_when_resuming_too() -> None:
    server = Habits(ANSWER)
    with server.client() as client, client.with_options(base_url="https://api.openai.com/v1") as at_openai:
        assert read(resume(at_openai, STATE), Got()) is None
    assert "include_obfuscation=false" in server.asked[0]
