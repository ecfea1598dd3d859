"""The offline server's background mode, with the real SDK over real HTTP."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx2
import openai
import pytest

from assistream_flask.testing import OfflineServer, Reply
from tests.conftest import quick_client, wait_until
from tests.contract.test_testing import check

ASK: Any = {"model": "m", "input": "Hi", "stream": True, "background": True}
NOTE = {"type": "url_citation", "url": "https://example.org/", "title": "E", "start_index": 0, "end_index": 3}
FULL = Reply("Grüße 🌍🌙, one two three. ", reasoning="Let me see.", refusal="No more.", annotations=(NOTE,))
BREAKING = ("cut", "ends_early", "stall", "malformed")


@pytest.fixture
def client(server: OfflineServer) -> Iterator[openai.OpenAI]:
    with quick_client(server, max_retries=0, timeout=10) as client:
        yield client


def events(stream: Any) -> list[Any]:
    """Give the events as they were sent, as far as they came."""
    found = []
    buffer = b""
    for chunk in stream.response.iter_bytes():
        buffer += chunk
    for frame in buffer.split(b"\n\n"):
        for line in frame.split(b"\n"):
            if line.startswith(b"data: ") and line != b"data: [DONE]":
                found.append(json.loads(line[6:]))
    return found


def create(client: openai.OpenAI, **more: Any) -> list[Any]:
    with client.responses.create(**{**ASK, **more}) as stream:
        return events(stream)


def retrieve(client: openai.OpenAI, id: str, **more: Any) -> list[Any]:
    with client.responses.retrieve(id, stream=True, **more) as stream:
        return events(stream)


def begin(client: openai.OpenAI) -> str:
    """Start a response, reads its id, and leave."""
    with client.responses.create(**ASK) as stream:
        first = next(stream)
        assert first.type == "response.created"
        return str(first.response.id)


def text_of(found: list[Any]) -> str:
    return "".join(event["delta"] for event in found if event["type"] == "response.output_text.delta")


def over(client: openai.OpenAI, id: str) -> Any:
    wait_until(lambda: client.responses.retrieve(id).status not in ("queued", "in_progress"))
    return client.responses.retrieve(id)


def test_events_are_numbered_from_nought_and_are_the_sdks_own_types(
    server: OfflineServer, client: openai.OpenAI
) -> None:
    server.replies = FULL
    found = create(client)
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    begun = [(event["type"], event["response"]["status"]) for event in found[:3]]
    assert begun == [
        ("response.created", "queued"),
        ("response.queued", "queued"),
        ("response.in_progress", "in_progress"),
    ]
    assert found[-1]["type"] == "response.completed"
    assert text_of(found) == FULL.text
    for event in found:
        check("responses", event["type"], event)
    assert found[0]["response"]["background"] is True


@pytest.mark.parametrize("fault", [None, "incomplete", "response_failed", "error_nested", "function_call"])
def test_after_any_number_comes_exactly_the_rest(
    server: OfflineServer, client: openai.OpenAI, fault: str | None
) -> None:
    server.replies = Reply(FULL.text, reasoning=FULL.reasoning, annotations=(NOTE,), fault=fault)
    whole = create(client)
    id = whole[0]["response"]["id"]
    assert retrieve(client, id) == whole
    for n in range(len(whole)):
        assert retrieve(client, id, starting_after=n) == whole[n + 1 :]


def test_an_answer_goes_on_when_its_client_leaves(server: OfflineServer, client: openai.OpenAI) -> None:
    server.replies = Reply("one two three four five", delay=1)
    id = begin(client)
    assert server.requests[0].wait()
    assert server.requests[0].disconnected
    found = retrieve(client, id, starting_after=0)
    assert found[0]["type"] == "response.queued"
    assert text_of(found) == "one two three four five"
    assert client.responses.retrieve(id).output_text == "one two three four five"


@pytest.mark.parametrize("again", [True, False])
def test_who_asks_again_under_a_key_gets_the_same_response_from_its_start(
    server: OfflineServer, client: openai.OpenAI, again: bool
) -> None:
    server.replies = ["one two three", "another"]
    first = create(client, extra_headers={"Idempotency-Key": "k1"})
    found = create(client, extra_headers={"Idempotency-Key": "k1" if again else "k2"})
    assert text_of(found) == ("one two three" if again else "another")
    assert (found[0]["response"]["id"] == first[0]["response"]["id"]) == again
    assert create(client)[0]["response"]["id"] != first[0]["response"]["id"]


def test_a_key_counts_for_responses_in_the_background_only(server: OfflineServer, client: openai.OpenAI) -> None:
    server.replies = ["one", "two"]
    key: Any = {"extra_headers": {"Idempotency-Key": "k1"}, "background": False}
    assert [text_of(create(client, **key)) for _ in range(2)] == ["one", "two"]


def test_two_who_come_back_at_once_get_the_same(server: OfflineServer, client: openai.OpenAI) -> None:
    server.replies = Reply("one two three four five", delay=0.02)
    id = begin(client)
    got: list[list[Any]] = []
    threads = [threading.Thread(target=lambda: got.append(retrieve(client, id, starting_after=3))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got[0] == got[1]
    assert text_of(got[0]) == "one two three four five"


def test_the_object_tells_the_text_so_far_and_then_the_whole(server: OfflineServer, client: openai.OpenAI) -> None:
    server.replies = Reply("one two three", delay=0.3)
    id = begin(client)
    seen: list[tuple[str, str]] = []

    def look() -> bool:
        now = client.responses.retrieve(id)
        seen.append((str(now.status), now.output_text))
        return now.status == "completed"

    wait_until(look)
    assert seen[-1] == ("completed", "one two three")
    assert {status for status, _ in seen} <= {"queued", "in_progress", "completed"}
    assert all("one two three".startswith(text) for _, text in seen)
    assert any(status == "in_progress" and text for status, text in seen)


def test_without_a_stream_it_is_queued_at_once_and_can_not_be_streamed(
    server: OfflineServer, client: openai.OpenAI
) -> None:
    server.replies = FULL
    made = client.responses.create(model="m", input="Hi", background=True)
    assert (made.status, made.background, made.output) == ("queued", True, [])
    assert over(client, made.id).output_text == FULL.text
    with pytest.raises(openai.BadRequestError, match="stream=true"):
        retrieve(client, made.id)


@pytest.mark.parametrize("fault", BREAKING)
def test_a_fault_of_the_connection_befalls_the_first_stream_only(
    server: OfflineServer, client: openai.OpenAI, fault: str
) -> None:
    server.replies = Reply("one two three four five", fault=fault)
    said, id, number = "", "", -1
    try:
        with client.responses.create(**ASK, timeout=0.5 if fault == "stall" else 10) as stream:
            for event in stream:
                number = event.sequence_number
                if event.type == "response.created":
                    id = event.response.id
                if event.type == "response.output_text.delta":
                    said += event.delta
    except (openai.APIError, ValueError):
        assert fault != "ends_early"
    else:
        assert fault == "ends_early"
    assert said == "one two three"
    assert said + text_of(retrieve(client, id, starting_after=number)) == "one two three four five"
    assert over(client, id).status == "completed"


@pytest.mark.parametrize(
    ("fault", "status"),
    [
        ("error_nested", "failed"),
        ("error_flat", "failed"),
        ("error_first", "failed"),
        ("response_failed", "failed"),
        ("incomplete", "incomplete"),
        ("content_filter", "incomplete"),
        ("function_call", "completed"),
        ("missing_fields", "completed"),
        ("unknown_events", "completed"),
        ("crlf", "completed"),
        ("tiny_chunks", "completed"),
        ("stall_headers", "completed"),
    ],
)
def test_a_fault_of_the_answer_is_told_by_the_object_too(
    server: OfflineServer, client: openai.OpenAI, fault: str, status: str
) -> None:
    server.replies = Reply("one two three", fault=fault)
    id = f"resp_{1:032x}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server, "_id", lambda prefix: id if prefix == "resp" else f"{prefix}_1")
        try:
            with client.responses.create(**ASK, timeout=0.3 if fault == "stall_headers" else 10) as stream:
                for _ in stream.response.iter_bytes():
                    pass
        except openai.APITimeoutError:
            assert fault == "stall_headers"
    found = over(client, id)
    assert found.status == status
    assert (found.error is not None) == (status == "failed")


def test_cancelling_ends_the_answer_and_its_streams_and_can_be_done_twice(
    server: OfflineServer, client: openai.OpenAI
) -> None:
    server.replies = Reply("one two three", delay=600)
    with client.responses.create(**ASK) as stream:
        id = next(iter(stream)).response.id
        wait_until(lambda: client.responses.retrieve(id).output_text == "one")
        assert [client.responses.cancel(id).status for _ in range(2)] == ["cancelled"] * 2
        rest = [event.type for event in stream]
    assert rest[-1] == "response.output_text.delta"
    found = client.responses.retrieve(id)
    assert (found.status, found.output_text) == ("cancelled", "one")
    assert text_of(retrieve(client, id)) == "one"


def test_only_what_goes_on_in_the_background_can_be_cancelled(server: OfflineServer, client: openai.OpenAI) -> None:
    id = begin(client)
    assert over(client, id).status == "completed"
    with pytest.raises(openai.BadRequestError, match="completed"):
        client.responses.cancel(id)
    ordinary = client.responses.create(model="m", input="Hi")
    assert client.responses.retrieve(ordinary.id).output_text == ordinary.output_text
    with pytest.raises(openai.BadRequestError, match="synchronous"):
        client.responses.cancel(ordinary.id)
    with pytest.raises(openai.BadRequestError, match="background=true"):
        retrieve(client, ordinary.id)
    unstored = client.responses.create(model="m", input="Hi", store=False)
    for id in (unstored.id, "resp_none"):
        for call in (client.responses.cancel, client.responses.retrieve):
            with pytest.raises(openai.NotFoundError):
                call(id)


def test_an_answer_that_broke_off_is_not_stored(server: OfflineServer, client: openai.OpenAI) -> None:
    server.replies = Reply("one two three", fault="ends_early")
    id = create(client, background=False)[0]["response"]["id"]
    assert server.requests[0].wait()
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(id)


def test_after_the_window_it_is_an_object_only() -> None:
    with OfflineServer("one two", delay=0, stream_window=0) as server, quick_client(server, max_retries=0) as client:
        id = begin(client)
        with pytest.raises(openai.BadRequestError, match="no longer be streamed because it is more than") as refused:
            retrieve(client, id, starting_after=0)
        assert refused.value.type == "invalid_request_error"
        assert over(client, id).output_text == "one two"


def test_what_can_not_work_is_refused(server: OfflineServer, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="store"):
        create(client, store=False)
    id = begin(client)
    with pytest.raises(openai.BadRequestError, match="starting_after"):
        retrieve(client, id, extra_query={"starting_after": "x"})


def test_only_the_newest_responses_are_kept() -> None:
    with OfflineServer("one", delay=0, keep=2) as server, quick_client(server, max_retries=0) as client:
        ids = [create(client)[0]["response"]["id"] for _ in range(3)]
        assert [client.responses.retrieve(id).status for id in ids[1:]] == ["completed"] * 2
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(ids[0])


def test_a_stream_that_the_server_closes_did_not_end() -> None:
    with OfflineServer(Reply("one two", delay=600), delay=0) as server, quick_client(server) as client:
        stream = client.responses.create(**ASK)
        assert next(stream).type == "response.created"
        server.close()
        with pytest.raises((openai.APIError, httpx2.TransportError)):
            list(stream)


def test_closing_ends_what_goes_on_in_the_background() -> None:
    before = set(threading.enumerate())
    with OfflineServer(Reply("one two", delay=600), delay=0) as server, quick_client(server) as client:
        begin(client)
        assert set(threading.enumerate()) > before
    assert set(threading.enumerate()) <= before
