"""The vocabulary: every object and event, key by key, and what the events of a reply add up to."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from assistream_flask import events
from assistream_flask.errors import RUN_ERRORS, RunError
from assistream_flask.events import Event, Json
from assistream_flask.runs.message_accumulator import MessageAccumulator, Stop
from assistream_flask.types import Run, Usage
from assistream_flask.upstream.deltas import Annotation, Delta, End, Reasoning, Refusal, Text
from tests.conftest import examples


@pytest.fixture(autouse=True)
def _stopped_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "now", lambda: 1_700_000_000)


def without_id(value: Mapping[str, Any], kind: str) -> Json:
    assert re.fullmatch(rf"{kind}_[0-9a-f]{{32}}", value["id"])
    return {key: value[key] for key in value if key != "id"}


def a_run() -> Run:
    return events.run("thread_1", "tutor", "gpt")


def a_reply() -> MessageAccumulator:
    run = a_run()
    message = events.message("thread_1", "assistant", [], assistant_id="tutor", run_id=run["id"])
    run["message_id"] = message["id"]
    return MessageAccumulator(run, message, [])


# Objects


def test_a_users_message_is_completed_from_the_start() -> None:
    message = events.message("thread_1", "user", [events.text_part("hi")])
    assert without_id(message, "msg") == {
        "object": "thread.message",
        "created_at": 1_700_000_000,
        "thread_id": "thread_1",
        "role": "user",
        "status": "completed",
        "content": [{"type": "text", "text": {"value": "hi", "annotations": []}}],
        "assistant_id": None,
        "run_id": None,
        "completed_at": 1_700_000_000,
        "incomplete_at": None,
        "incomplete_details": None,
        "metadata": {},
    }


def test_an_assistants_message_starts_empty_and_in_progress() -> None:
    message = events.message("thread_1", "assistant", [], assistant_id="tutor", run_id="run_1")
    assert without_id(message, "msg") == {
        "object": "thread.message",
        "created_at": 1_700_000_000,
        "thread_id": "thread_1",
        "role": "assistant",
        "status": "in_progress",
        "content": [],
        "assistant_id": "tutor",
        "run_id": "run_1",
        "completed_at": None,
        "incomplete_at": None,
        "incomplete_details": None,
        "metadata": {},
    }


def test_a_run_starts_queued() -> None:
    assert without_id(a_run(), "run") == {
        "object": "thread.run",
        "thread_id": "thread_1",
        "assistant_id": "tutor",
        "message_id": None,
        "status": "queued",
        "required_action": None,
        "expires_at": None,
        "last_error": None,
        "incomplete_details": None,
        "usage": None,
        "model": "gpt",
        "created_at": 1_700_000_000,
        "started_at": None,
        "completed_at": None,
        "failed_at": None,
        "cancelled_at": None,
        "metadata": {},
    }


def test_a_reasoning_step_has_these_keys() -> None:
    run = a_run()
    assert without_id(events.reasoning_step(run, 0), "step") == {
        "object": "thread.run.step",
        "run_id": run["id"],
        "thread_id": "thread_1",
        "assistant_id": "tutor",
        "type": "reasoning",
        "status": "in_progress",
        "created_at": 1_700_000_000,
        "completed_at": None,
        "content_index": 0,
        "step_details": {"type": "reasoning", "reasoning": {"text": ""}},
    }


def test_a_users_entry_has_no_run_and_no_steps() -> None:
    message = events.message("thread_1", "user", [])
    assert events.entry(message) == {"assistant_id": None, "message": message, "run": None, "steps": []}


def test_an_assistants_entry_has_its_run_and_steps() -> None:
    run = a_run()
    message = events.message("thread_1", "assistant", [], assistant_id="tutor", run_id=run["id"])
    step = events.reasoning_step(run, 0)
    assert events.entry(message, run, [step]) == {
        "assistant_id": "tutor",
        "message": message,
        "run": run,
        "steps": [step],
    }


# Events

# No constructor looks at more.
MESSAGE: Any = {"id": "msg_1", "run_id": "run_1", "status": "completed"}
INCOMPLETE: Any = {**MESSAGE, "status": "incomplete"}
RUN: Any = {"id": "run_1", "status": "failed"}
STEP: Any = {"id": "step_1", "run_id": "run_1", "status": "completed"}
PAGE: Any = [{"entry": 1}]


def content_delta(part: Any) -> Any:
    return {"id": "msg_1", "object": "thread.message.delta", "delta": {"content": [part]}}


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        (
            events.snapshot("thread_1", PAGE, True),
            Event("thread.snapshot", {"thread_id": "thread_1", "data": PAGE, "has_more": True}, None),
        ),
        (events.message_created(MESSAGE), Event("thread.message.created", MESSAGE, "run_1")),
        (
            events.text_delta(MESSAGE, 0, "hi"),
            Event(
                "thread.message.delta",
                content_delta({"index": 0, "type": "text", "text": {"value": "hi"}}),
                "run_1",
            ),
        ),
        (
            events.annotation_delta(MESSAGE, 1, {"url": "x"}),
            Event(
                "thread.message.delta",
                content_delta({"index": 1, "type": "text", "text": {"annotations": [{"url": "x"}]}}),
                "run_1",
            ),
        ),
        (
            events.refusal_delta(MESSAGE, 0, "no"),
            Event("thread.message.delta", content_delta({"index": 0, "type": "refusal", "refusal": "no"}), "run_1"),
        ),
        (events.message_ended(MESSAGE), Event("thread.message.completed", MESSAGE, "run_1")),
        (
            events.message_ended(INCOMPLETE),
            Event("thread.message.incomplete", INCOMPLETE, "run_1"),
        ),
        (events.run_created(RUN), Event("thread.run.created", RUN, "run_1")),
        (events.run_status(RUN), Event("thread.run.failed", RUN, "run_1")),
        (events.step_created(STEP), Event("thread.run.step.created", STEP, "run_1")),
        (
            events.reasoning_delta(STEP, "hm"),
            Event(
                "thread.run.step.delta",
                {
                    "id": "step_1",
                    "object": "thread.run.step.delta",
                    "run_id": "run_1",
                    "delta": {"step_details": {"type": "reasoning", "reasoning": {"text": "hm"}}},
                },
                "run_1",
            ),
        ),
        (events.step_ended(STEP), Event("thread.run.step.completed", STEP, "run_1")),
        (
            events.thread_deleted("thread_1"),
            Event("thread.deleted", {"id": "thread_1", "object": "thread.deleted", "deleted": True}, None),
        ),
    ],
    ids=lambda value: value.name if isinstance(value, Event) else "",
)
def test_each_event_has_exactly_this_name_data_and_key(event: Event, expected: Event) -> None:
    assert event == expected


# JSON


def test_json_is_compact_on_one_line_and_keeps_characters_as_they_are() -> None:
    assert events.dumps({"a": ["é\u2028\n", None, True]}) == '{"a":["é\u2028\\n",null,true]}'


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_what_json_does_not_know_is_refused(number: float) -> None:
    with pytest.raises(ValueError, match="Out of range"):
        events.dumps({"a": number})


SURROGATES = st.text(st.one_of(st.characters(codec=None), st.sampled_from("\ud83d\ude00\ud800\udfffa\0é😀")))


def cleaned(text: str) -> str:
    pairs = re.sub(
        "([\ud800-\udbff])([\udc00-\udfff])",
        lambda m: chr(0x10000 + ((ord(m[1]) - 0xD800) << 10) + ord(m[2]) - 0xDC00),
        text,
    )
    return re.sub("[\ud800-\udfff]", "\ufffd", pairs)


@settings(max_examples=examples(250), deadline=None)
@given(SURROGATES)
def test_clean_joins_surrogate_pairs_and_replaces_lone_halves(text: str) -> None:
    assert events.clean(text) == cleaned(text)


@settings(max_examples=examples(100), deadline=None)
@given(st.recursive(SURROGATES | st.integers() | st.none(), lambda v: st.lists(v) | st.dictionaries(SURROGATES, v)))
def test_any_json_is_one_line_that_utf_8_can_carry(value: Any) -> None:
    text = events.dumps(value)
    assert "\n" not in text
    assert "\r" not in text
    assert json.loads(text.encode().decode()) == json.loads(cleaned(json.dumps(value, ensure_ascii=False)))


# A reply: parts in, events out


class Model:
    """What a viewer has: the entry, kept with nothing but the events."""

    def __init__(self, reply: MessageAccumulator) -> None:
        run, message, steps = reply.snapshot()
        self.entry: Any = copy.deepcopy(events.entry(message, run, steps))

    def see(self, told: list[Event]) -> None:
        for name, data, key in copy.deepcopy(told):
            assert key == self.entry["run"]["id"]
            events.apply(self.entry, name, data)
            if name.startswith("thread.run.") and not name.startswith("thread.run.step."):
                self.entry["run"] = data
            elif name in ("thread.message.completed", "thread.message.incomplete"):
                self.entry["message"] = data


class Given:
    """All that was given out, with a copy made then."""

    def __init__(self) -> None:
        self._given: list[tuple[object, object]] = []

    def keep(self, value: object) -> None:
        self._given.append((value, copy.deepcopy(value)))

    def check(self) -> None:
        for value, was in self._given:
            assert value == was


@st.composite
def scripts(draw: st.DrawFn) -> list[list[Delta]]:
    """Batches of parts whose indexes are dense in the order of arrival, as :class:`.deltas.Slots` gives them."""
    kinds: list[str] = []
    batches: list[list[Delta]] = []
    for _ in range(draw(st.integers(0, 8))):
        batch: list[Delta] = []
        for _ in range(draw(st.integers(1, 4))):
            kind = draw(st.sampled_from(["text", "refusal", "annotation", "reasoning"]))
            if kind == "reasoning":
                batch.append(Reasoning(draw(st.text(max_size=3))))
                continue
            slot = "refusal" if kind == "refusal" else "text"
            places = [at for at, known in enumerate(kinds) if known == slot] + [len(kinds)]
            at = draw(st.sampled_from(places))
            if at == len(kinds):
                kinds.append(slot)
            if kind == "annotation":
                batch.append(Annotation(at, cast(Any, {"n": draw(st.integers(0, 9))})))
            else:
                batch.append((Text if kind == "text" else Refusal)(at, draw(st.text(max_size=3))))
        batches.append(batch)
    return batches


USAGE: Usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
ENDS = st.sampled_from(["completed", "max_tokens", "content_filter", "fail", "cancel", "cut_off"])


def end(reply: MessageAccumulator, how: Any) -> list[Event]:
    if how == "fail":
        return reply.end(RunError("upstream_cut"))
    if how == "cancel":
        return reply.end(Stop.CANCELLED)
    if how == "cut_off":
        return reply.end(Stop.SHUTDOWN)
    return reply.end(End(None if how == "completed" else how, USAGE))


@settings(max_examples=examples(250), deadline=None)
@given(scripts(), ENDS, st.lists(st.booleans(), min_size=9, max_size=9))
def test_the_events_add_up_to_the_snapshot_at_every_point_and_nothing_given_out_changes(
    batches: list[list[Delta]], how: str, looks: list[bool]
) -> None:
    reply = a_reply()
    model, given_out = Model(reply), Given()

    def look() -> None:
        snapshot = reply.snapshot()
        given_out.keep(snapshot)
        assert snapshot == (model.entry["run"], model.entry["message"], model.entry["steps"])

    told = reply.begin()
    given_out.keep(told)
    model.see(told)
    look()
    for batch, seen in zip(batches, looks, strict=False):
        told = reply.add(batch)
        given_out.keep(told)
        model.see(told)
        if seen:
            look()
    told = end(reply, how)
    given_out.keep(told)
    model.see(told)
    look()
    assert reply.is_over
    assert not [step for step in model.entry["steps"] if step["status"] != "completed"]
    given_out.check()


@settings(max_examples=examples(100), deadline=None)
@given(scripts(), scripts())
def test_a_snapshot_in_the_middle_can_be_grown_by_the_events_after_it(
    before: list[list[Delta]], after: list[list[Delta]]
) -> None:
    reply = a_reply()
    reply.begin()
    shift = 0
    for batch in before:
        reply.add(batch)
        shift = max([shift, *(part.at + 1 for part in batch if isinstance(part, Text | Refusal | Annotation))])
    model = Model(reply)
    for batch in after:
        moved = [
            part._replace(at=part.at + shift) if isinstance(part, Text | Refusal | Annotation) else part
            for part in batch
        ]
        model.see(reply.add(moved))
    run, message, steps = reply.snapshot()
    assert model.entry == events.entry(message, run, steps)


def test_the_order_of_events_is_reasoning_then_text_then_the_message_then_the_run() -> None:
    reply = a_reply()
    told = [
        *reply.begin(),
        *reply.add([Reasoning("hm"), Reasoning("m")]),
        *reply.add([Text(0, "a"), Reasoning("so"), Text(0, "b")]),
        *reply.end(End(None, USAGE)),
    ]
    assert [event.name.removeprefix("thread.") for event in told] == [
        "run.in_progress",
        "run.step.created",
        "run.step.delta",
        "run.step.delta",
        "run.step.completed",
        "message.delta",
        "run.step.created",
        "run.step.delta",
        "run.step.completed",
        "message.delta",
        "message.completed",
        "run.completed",
    ]


@pytest.mark.parametrize(
    ("how", "status", "message_status", "details", "run_details"),
    [
        ("completed", "completed", "completed", None, None),
        ("max_tokens", "incomplete", "incomplete", {"reason": "max_tokens"}, {"reason": "max_completion_tokens"}),
        ("content_filter", "incomplete", "incomplete", {"reason": "content_filter"}, {"reason": "content_filter"}),
        ("fail", "failed", "incomplete", {"reason": "run_failed"}, None),
        ("cancel", "cancelled", "incomplete", {"reason": "run_cancelled"}, None),
        ("cut_off", "incomplete", "incomplete", {"reason": "server_shutdown"}, {"reason": "server_shutdown"}),
    ],
)
def test_each_end_leaves_run_and_message_in_these_states(
    how: str, status: str, message_status: str, details: Json | None, run_details: Json | None
) -> None:
    reply = a_reply()
    reply.begin()
    reply.add([Text(0, "half")])
    end(reply, how)
    run, message, _ = reply.snapshot()
    assert (run["status"], message["status"]) == (status, message_status)
    assert (message["incomplete_details"], run["incomplete_details"]) == (details, run_details)
    assert message["content"] == [events.text_part("half")]
    at = {"failed": "failed_at", "cancelled": "cancelled_at"}.get(status, "completed_at")
    assert [key for key in ("completed_at", "failed_at", "cancelled_at") if run[key]] == [at]
    assert [key for key in ("completed_at", "incomplete_at") if message[key]] == [f"{message_status}_at"]
    assert run["usage"] == (USAGE if how in ("completed", "max_tokens", "content_filter") else None)
    cut = {"code": "upstream_cut", "message": RUN_ERRORS["upstream_cut"]}
    assert run["last_error"] == (cut if how == "fail" else None)
