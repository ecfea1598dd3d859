"""Function calls as model servers tell of them, in the three dialects and with the habits of each, to deltas."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import pytest

from assistream_flask.errors import RunError
from assistream_flask.events import Json, step_created, tool_call, tool_calls_step
from assistream_flask.events import message as new_message
from assistream_flask.events import run as new_run
from assistream_flask.upstream.background import ResumePoint
from assistream_flask.upstream.delivered import Delivered, Shown
from assistream_flask.upstream.deltas import Call, Delta, End, Failed, Reasoning, Text, WholeCall, merged
from assistream_flask.upstream.dialects import DIALECTS
from assistream_flask.upstream.protocol import Reading
from assistream_flask.upstream.responses import ResponsesTranslator

A, B = '{"q":"é","n":1}', '{"x":[true]}'


class Got(NamedTuple):
    """What an answer gave: its texts, its calls as they were told, and its end."""

    texts: dict[int, str]
    calls: list[tuple[str, str, str, str]]
    end: End | None
    code: str | None


def got(deltas: Sequence[Delta]) -> Got:
    texts: dict[int, str] = {}
    calls: dict[int, Call] = {}
    end: End | None = None
    code: str | None = None
    for part in deltas:
        if isinstance(part, Text):
            texts[part.at] = texts.get(part.at, "") + part.value
        elif isinstance(part, Call):
            assert part.at <= len(calls), "they are numbered in the order in which they come"
            before = calls.get(part.at)
            assert before is None or before.call_id in ("", part.call_id), "an id that was told stays"
            calls[part.at] = part._replace(value=(before.value if before else "") + part.value)
        elif isinstance(part, End):
            end = part
        elif isinstance(part, Failed):
            code = part.error.code
    assert sorted(calls) == list(range(len(calls)))
    told = [(call.call_id, call.name, call.kind, call.value) for _, call in sorted(calls.items())]
    return Got(texts, told, end, code)


def kind_of(event: Json) -> str:
    return str(event.get("event") or event.get("type") or "")


def fed(speaks: str, events: Sequence[Json], *, start: int = 0, has_tools: bool = True) -> list[Delta]:
    translator = DIALECTS[speaks].translator(Reading(has_tools=has_tools), start)
    deltas: list[Delta] = []
    for event in events:
        deltas += translator.feed(kind_of(event), event.get("data", event))
        if deltas and isinstance(deltas[-1], End | Failed):
            break
    if not deltas or not isinstance(deltas[-1], End | Failed):
        deltas += [end] if (end := translator.settled()) is not None else []
    return deltas


def read(speaks: str, events: Sequence[Json], **more: Any) -> Got:
    return got(fed(speaks, events, **more))


def called(*calls: tuple[str, str, str]) -> list[WholeCall]:
    return [WholeCall(*call) for call in calls]


def shown(*calls: tuple[str, str, str]) -> list[tuple[str, str, str, str]]:
    return [(call_id, name, "function", arguments) for call_id, name, arguments in calls]


def item(call_id: str | None, name: str, arguments: Any, **more: Any) -> Json:
    return {"type": "function_call", "call_id": call_id, "name": name, "arguments": arguments, **more}


# Responses


def added(item: Json, at: int | None = None) -> Json:
    place = {} if at is None else {"output_index": at}
    return {"type": "response.output_item.added", "item": item, **place}


def done(item: Json, at: int | None = None) -> Json:
    return {**added(item, at), "type": "response.output_item.done"}


def grown(value: Any, **more: Any) -> Json:
    return {"type": "response.function_call_arguments.delta", "delta": value, **more}


def whole(value: Any, **more: Any) -> Json:
    return {"type": "response.function_call_arguments.done", "arguments": value, **more}


def over(*output: Json, status: str = "completed", **more: Any) -> Json:
    return {"type": f"response.{status}", "response": {"status": status, "output": list(output), **more}}


def said(text: str, at: int = 0) -> list[Json]:
    message = {"type": "message", "id": f"msg_{at}", "content": [{"type": "output_text", "text": text}]}
    return [
        added({"type": "message", "id": f"msg_{at}", "content": []}, at),
        {"type": "response.output_text.delta", "output_index": at, "content_index": 0, "delta": text},
        done(message, at),
    ]


ONE = item("call_1", "lookup", "", id="fc_1")
ONE_DONE = item("call_1", "lookup", A, id="fc_1", status="completed")
TWO = item("call_2", "refund", "", id="fc_2")
TWO_DONE = item("call_2", "refund", B, id="fc_2", status="completed")
BOTH = (("call_1", "lookup", A), ("call_2", "refund", B))

RESPONSES: dict[str, list[Json]] = {
    "as OpenAI tells them": [
        added(ONE, 0),
        grown(A[:5], item_id="fc_1", output_index=0),
        grown(A[5:], item_id="fc_1", output_index=0),
        whole(A, item_id="fc_1", output_index=0),
        done(ONE_DONE, 0),
        added(TWO, 1),
        grown(B, item_id="fc_2", output_index=1),
        whole(B, item_id="fc_2", output_index=1),
        done(TWO_DONE, 1),
        over(ONE_DONE, TWO_DONE),
    ],
    "interleaved": [
        added(ONE, 0),
        added(TWO, 1),
        grown(A[:5], item_id="fc_1", output_index=0),
        grown(B[:3], item_id="fc_2", output_index=1),
        grown(A[5:], item_id="fc_1", output_index=0),
        grown(B[3:], item_id="fc_2", output_index=1),
        done(TWO_DONE, 1),
        done(ONE_DONE, 0),
        over(ONE_DONE, TWO_DONE),
    ],
    "arguments without ids, each done before the next begins": [
        added(ONE),
        grown(A[:5]),
        grown(A[5:]),
        whole(A),
        added(TWO),
        grown(B),
        whole(B),
        over(),
    ],
    "arguments without ids, all begun before the first grows": [
        added(ONE),
        added(TWO),
        grown(A[:5]),
        grown(A[5:]),
        whole(A),
        grown(B),
        whole(B),
        over(),
    ],
    "arguments without ids, and nothing says that a call is whole": [
        added(ONE),
        grown(A[:5]),
        grown(A[5:]),
        added(TWO),
        grown(B),
        over(),
    ],
    "the final items have no arguments": [
        added(ONE, 0),
        grown(A, item_id="fc_1"),
        added(TWO, 1),
        grown(B, item_id="fc_2"),
        done(item("call_1", "lookup", ""), 0),
        done(item("call_2", "refund", None), 1),
        over(item("call_1", "lookup", ""), {"type": "function_call", "call_id": "call_2", "name": "refund"}),
    ],
    "llama.cpp: items have a call id alone, which deltas call the item's": [
        added(item("call_1", "lookup", "")),
        grown(A[:2], item_id="call_1"),
        grown(A[2:], item_id="call_1"),
        added(item("call_2", "refund", "")),
        grown(B, item_id="call_2"),
        done(item("call_1", "lookup", A)),
        done(item("call_2", "refund", B)),
        over(item("call_1", "lookup", A), item("call_2", "refund", B)),
    ],
    "vLLM: only the first is told as done": [
        added(ONE, 0),
        grown(A, item_id="fc_1", output_index=0),
        done(ONE_DONE, 0),
        over(ONE_DONE, TWO_DONE),
    ],
    "ids that are others each time": [
        added(ONE, 0),
        grown(A, item_id="fc_x", output_index=0),
        done(item("call_y", "lookup", A, id="fc_y"), 0),
        added(TWO, 1),
        grown(B, item_id="fc_z", output_index=1),
        done(item("call_z", "refund", B, id="fc_w"), 1),
        over(item("call_v", "lookup", A, id="fc_v"), item("call_u", "refund", B, id="fc_u")),
    ],
    "told by the end alone": [over(ONE_DONE, TWO_DONE)],
    "told by items alone": [done(ONE_DONE, 0), done(TWO_DONE, 1), over()],
    "told by items as they begin alone": [
        added(item("call_1", "lookup", A)),
        added(item("call_2", "refund", B)),
        over(),
    ],
    "arguments that are an object": [
        added(ONE, 0),
        done(item("call_1", "lookup", json.loads(A)), 0),
        over(item("call_1", "lookup", json.loads(A)), item("call_2", "refund", json.loads(B))),
    ],
    "a name that comes late": [
        added(item("call_1", "", "", id="fc_1"), 0),
        grown(A, item_id="fc_1"),
        whole(A, item_id="fc_1", name="lookup"),
        added(item("call_2", "", "", id="fc_2"), 1),
        grown(B, item_id="fc_2"),
        done(TWO_DONE, 1),
        over(),
    ],
    "everything at the same place": [
        added(ONE, 0),
        grown(A, item_id="fc_1", output_index=0),
        done(ONE_DONE, 0),
        added(TWO, 0),
        grown(B, item_id="fc_2", output_index=0),
        done(TWO_DONE, 0),
        over(ONE_DONE, TWO_DONE),
    ],
}


@pytest.mark.parametrize("habit", RESPONSES)
def test_calls_of_a_response_are_the_same_whatever_the_servers_habit(habit: str) -> None:
    found = read("responses", RESPONSES[habit])
    assert found.end is not None
    assert found.end.reason is None
    assert [call[:2] for call in found.calls] == [call[:2] for call in BOTH]
    assert [json.loads(call.arguments) for call in found.end.calls] == [json.loads(A), json.loads(B)]
    assert [call[:2] for call in found.end.calls] == [call[:2] for call in BOTH]
    assert [one["call_id"] for one in found.end.items] == ["call_1", "call_2"]
    if "as they begin alone" not in habit:
        assert [json.loads(call[3]) for call in found.calls] == [json.loads(A), json.loads(B)]


def test_equal_calls_are_several_where_the_server_says_so() -> None:
    first, second = item("call_1", "f", "{}", id="fc_1"), item("call_2", "f", "{}", id="fc_2")
    for events in (
        [done(first, 0), done(second, 1), over(first, second)],
        [done(first, 0), over(first, second)],
        [over(first, second)],
        [added(first, 0), over(second, first)],
    ):
        found = read("responses", events)
        assert found.end is not None
        assert {call.call_id for call in found.end.calls} == {"call_1", "call_2"}


def test_the_last_whole_arguments_that_can_be_read_count() -> None:
    events = [added(ONE, 0), grown('{"q": 1', item_id="fc_1"), done(item("call_1", "lookup", '{"q": 2}'), 0), over()]
    found = read("responses", events)
    assert found.end is not None
    assert found.end.calls == tuple(called(("call_1", "lookup", '{"q": 2}')))
    events = [added(ONE, 0), grown('{"q": 1}', item_id="fc_1"), whole('{"q":', item_id="fc_1"), over()]
    found = read("responses", events)
    assert found.end is not None
    assert found.end.calls == tuple(called(("call_1", "lookup", '{"q": 1}')))


def test_no_arguments_are_an_empty_object() -> None:
    found = read("responses", [added(ONE, 0), whole("", item_id="fc_1"), done(ONE, 0), over(ONE)])
    assert found.end is not None
    assert found.end.calls == (WholeCall("call_1", "lookup", "{}"),)


@pytest.mark.parametrize("cut", [A[:6], ""])
@pytest.mark.parametrize("ends", [over(status="incomplete", incomplete_details={"reason": "max_output_tokens"})])
def test_a_response_that_is_cut_within_a_call_is_one_without_that_call(cut: str, ends: Json) -> None:
    second = item("call_2", "refund", cut, id="fc_2", status="incomplete")
    events = [done(ONE_DONE, 0), added(TWO, 1), *([grown(cut, item_id="fc_2")] if cut else []), done(second, 1), ends]
    found = read("responses", events)
    assert found.end is not None
    assert (found.end.reason, [call.call_id for call in found.end.calls]) == ("max_tokens", ["call_1"])
    assert [one["call_id"] for one in found.end.items] == ["call_1"]


def test_a_call_that_was_whole_before_the_response_was_cut_stays() -> None:
    found = read("responses", [done(ONE_DONE, 0), *said("But", 1), over(status="incomplete")])
    assert found.end is not None
    assert [call.call_id for call in found.end.calls] == ["call_1"]


REASONING = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "gAAA", "status": "completed"}


def test_what_a_response_is_resent_as_has_its_order_and_neither_ids_nor_status() -> None:
    speech = {"type": "message", "id": "m", "status": "completed", "phase": "commentary"}
    speech["content"] = [{"type": "output_text", "text": "I look.", "annotations": [], "logprobs": []}]  # type: ignore[assignment]
    want = [
        {"type": "reasoning", "summary": [], "encrypted_content": "gAAA"},
        {
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "I look."}],
            "phase": "commentary",
        },
        {"type": "function_call", "call_id": "call_1", "name": "lookup", "arguments": A},
    ]
    each = [done(REASONING, 0), done(speech, 1), done(ONE_DONE, 2)]
    for events in (
        [*each, over(REASONING, speech, ONE_DONE)],
        [*each, over()],
        [each[0], each[2], each[1], over()],
        [over(REASONING, speech, ONE_DONE)],
        [each[2], over(REASONING, speech, ONE_DONE)],
    ):
        found = read("responses", events)
        assert found.end is not None
        assert list(found.end.items) == want


def test_what_only_deltas_said_is_resent_too() -> None:
    text = {"type": "response.output_text.delta", "delta": "I look."}
    found = read("responses", [text, added(ONE, 1), grown(A, item_id="fc_1"), over()])
    assert found.end is not None
    assert [one["type"] for one in found.end.items] == ["message", "function_call"]
    assert found.end.items[0]["content"] == [{"type": "output_text", "text": "I look."}]


def test_nothing_is_resent_beside_the_text_where_that_says_all() -> None:
    bare = {**REASONING, "encrypted_content": None}
    for has_tools in (True, False):
        for events in ([*said("Hi."), over()], [done(bare, 0), *said("Hi.", 1), over()]):
            assert read("responses", events, has_tools=has_tools).end == End(None, None)
        found = read("responses", [done(REASONING, 0), *said("Hi.", 1), over()], has_tools=has_tools).end
        assert found is not None
        assert [one["type"] for one in found.items] == ["reasoning", "message"]


def test_reasoning_that_led_to_a_tool_of_the_server_is_not_resent_without_it() -> None:
    search = {"type": "web_search_call", "id": "ws_1", "status": "completed", "action": {"type": "search"}}
    found = read("responses", [done(REASONING, 0), done(search, 1), *said("Hi.", 2), over()])
    assert found.end == End(None, None)


@pytest.mark.parametrize(
    ("told", "kind", "name", "value"),
    [
        (
            {"type": "web_search_call", "id": "h", "action": {"type": "search", "query": "x"}},
            "web_search",
            "web_search",
            {"action": {"type": "search", "query": "x"}},
        ),
        (
            {"type": "file_search_call", "id": "h", "queries": ["x"], "results": None},
            "file_search",
            "file_search",
            {"queries": ["x"], "results": None},
        ),
        (
            {"type": "code_interpreter_call", "id": "h", "code": "1+1", "outputs": [{"type": "logs", "logs": "2"}]},
            "code_interpreter",
            "code_interpreter",
            {"code": "1+1", "outputs": [{"type": "logs", "logs": "2"}]},
        ),
        (
            {"type": "image_generation_call", "id": "h", "result": "iVBOR" * 9, "revised_prompt": "a cat"},
            "image_generation",
            "image_generation",
            {"revised_prompt": "a cat"},
        ),
        (
            {"type": "mcp_call", "id": "h", "name": "roll", "server_label": "dice", "arguments": "{}", "output": "4"},
            "mcp",
            "roll",
            {"server_label": "dice", "arguments": "{}", "output": "4"},
        ),
        (
            {"type": "web_search_call", "id": "h", "action": {"url": "javascript:alert(1)"}, "n": 1},
            "web_search",
            "web_search",
            {"n": 1},
        ),
        (
            {"type": "file_search_call", "id": "h", "queries": ["x"], "results": ["y" * 70_000]},
            "file_search",
            "file_search",
            {"queries": ["x"]},
        ),
    ],
)
def test_a_tool_of_the_server_is_shown_and_never_answered_or_resent(
    told: Json, kind: str, name: str, value: Json
) -> None:
    begun = {"type": told["type"], "id": "h", "status": "in_progress", **({"name": name} if kind == "mcp" else {})}
    events = [added(begun, 0), done({**told, "status": "completed"}, 0), *said("Hi.", 1), over(told)]
    found = read("responses", events)
    assert [call[:3] for call in found.calls] == [("h", name, kind)]
    assert json.loads(found.calls[0][3]) == value
    assert found.end == End(None, None)
    # Today's answers without tools of ours do not tell of them.
    assert read("responses", events, has_tools=False).calls == []


@pytest.mark.parametrize(
    "kind",
    [
        *("custom_tool_call", "computer_call", "local_shell_call", "shell_call", "apply_patch_call"),
        "mcp_approval_request",
    ],
)
def test_what_nobody_here_can_answer_fails(kind: str) -> None:
    for events in ([added({"type": kind}, 0)], [done({"type": kind}, 0)]):
        with pytest.raises(RunError) as failed:
            fed("responses", events)
        assert failed.value.code == "tools_not_supported"
    assert read("responses", [over({"type": kind})]).code == "tools_not_supported"


# Chat


def chunk(delta: Json | None = None, finish: Any = None, **more: Any) -> Json:
    return {"choices": [{"index": 0, "delta": delta or {}, "finish_reason": finish, **more}]}


def piece(call_id: str | None = None, name: str | None = None, arguments: Any = None, **more: Any) -> Json:
    function = {key: value for key, value in (("name", name), ("arguments", arguments)) if value is not None}
    return {**({} if call_id is None else {"id": call_id}), "type": "function", "function": function, **more}


def calls(*pieces: Json) -> Json:
    return chunk({"tool_calls": list(pieces)})


END, DONE = chunk(finish="tool_calls"), {"event": "[DONE]", "data": {}}
CHAT: dict[str, list[Json]] = {
    "as OpenAI tells them": [
        calls(piece("call_1", "lookup", "", index=0)),
        calls(piece(arguments=A[:5], index=0)),
        calls(piece(arguments=A[5:], index=0)),
        calls(piece("call_2", "refund", "", index=1)),
        calls(piece(arguments=B, index=1)),
        END,
        DONE,
    ],
    "interleaved, and several in one delta": [
        calls(piece("call_1", "lookup", A[:3], index=0), piece("call_2", "refund", "", index=1)),
        calls(piece(arguments=B[:4], index=1), piece(arguments=A[3:], index=0)),
        calls(piece(arguments=B[4:], index=1)),
        END,
        DONE,
    ],
    "late ids and names": [
        calls(piece(arguments=A[:4], index=0)),
        calls(piece(arguments=A[4:], index=0)),
        calls(piece("call_1", "lookup", index=0)),
        calls(piece(name="refund", index=1)),
        calls(piece("call_2", arguments=B, index=1)),
        END,
        DONE,
    ],
    "names in pieces": [
        calls(piece("call_1", "look", index=0)),
        calls(piece(None, "up", index=0)),
        calls(piece(arguments=A, index=0)),
        calls(piece("call_2", "ref", "", index=1), piece(None, "und", B, index=1)),
        END,
        DONE,
    ],
    "name and id with every piece": [
        calls(piece("call_1", "lookup", A[:4], index=0)),
        calls(piece("call_1", "lookup", A[4:], index=0)),
        calls(piece("call_1", "lookup", "", index=0)),
        calls(piece("call_2", "refund", B[:4], index=1)),
        calls(piece("call_2", "refund", B[4:], index=1)),
        END,
        DONE,
    ],
    "no index, the id tells": [
        calls(piece("call_1", "lookup", A[:4])),
        calls(piece("call_1", None, A[4:])),
        calls(piece("call_2", "refund", B[:4])),
        calls(piece("call_2", None, B[4:])),
        END,
        DONE,
    ],
    "no index, ids where they begin": [
        calls(piece("call_1", "lookup", "")),
        calls(piece(arguments=A[:4])),
        calls(piece(arguments=A[4:])),
        calls(piece("call_2", "refund", "")),
        calls(piece(arguments=B)),
        END,
        DONE,
    ],
    "all at index 0": [
        calls(piece("call_1", "lookup", A, index=0)),
        calls(piece("call_2", "refund", B, index=0)),
        END,
        DONE,
    ],
    "all whole in one delta, without indexes": [
        calls(piece("call_1", "lookup", A), piece("call_2", "refund", B)),
        DONE,
    ],
    "arguments that are objects": [
        calls(piece("call_1", "lookup", json.loads(A), index=0), piece("call_2", "refund", json.loads(B), index=1)),
        END,
        DONE,
    ],
    "stop, though calls came": [
        calls(piece("call_1", "lookup", A, index=0), piece("call_2", "refund", B, index=1)),
        chunk(finish="stop"),
        DONE,
    ],
    "no reason at all": [
        calls(piece("call_1", "lookup", A, index=0), piece("call_2", "refund", B, index=1)),
        DONE,
    ],
    "no mark of the end": [
        calls(piece("call_1", "lookup", A, index=0), piece("call_2", "refund", B, index=1)),
        END,
    ],
    "the reason with the calls": [
        chunk(
            {"tool_calls": [piece("call_1", "lookup", A, index=0), piece("call_2", "refund", B, index=1)]}, "tool_calls"
        ),
        DONE,
    ],
    "a whole message": [
        chunk(
            message={"tool_calls": [piece("call_1", "lookup", A), piece("call_2", "refund", B)]}, finish="tool_calls"
        ),
        DONE,
    ],
    "deltas, and the whole message once more": [
        calls(piece("call_1", "lookup", A, index=0), piece("call_2", "refund", B, index=1)),
        chunk(
            message={"tool_calls": [piece("call_1", "lookup", A), piece("call_2", "refund", B)]}, finish="tool_calls"
        ),
        DONE,
    ],
    "deltas, and the whole message with other ids": [
        calls(piece("call_1", "lookup", A, index=0), piece("call_2", "refund", B, index=1)),
        chunk(message={"tool_calls": [piece("x", "lookup", A), piece("y", "refund", B)]}, finish="tool_calls"),
        DONE,
    ],
    "deltas, and the last of them with all once more": [
        calls(piece("call_1", "lookup", A[:3], index=0), piece("call_2", "refund", B, index=1)),
        calls(piece(arguments=A[3:], index=0)),
        calls(piece("call_1", "lookup", A, index=0), piece("call_2", "refund", B, index=1)),
        END,
        DONE,
    ],
    "a field that others leave out": [
        chunk({"content": None, "tool_calls": [piece("call_1", "lookup", A, index=0)], "function_call": None}),
        chunk({"content": "", "tool_calls": [piece("call_2", "refund", B, index=1)]}),
        END,
        DONE,
    ],
}


@pytest.mark.parametrize("habit", CHAT)
def test_calls_of_a_completion_are_the_same_whatever_the_servers_habit(habit: str) -> None:
    found = read("chat", CHAT[habit])
    assert found.end is not None
    assert found.end.reason is None
    assert [call[:2] for call in found.calls] == [call[:2] for call in BOTH]
    assert [json.loads(call[3]) for call in found.calls] == [json.loads(A), json.loads(B)]
    assert [call[:2] for call in found.end.calls] == [call[:2] for call in BOTH]
    assert [json.loads(call.arguments) for call in found.end.calls] == [json.loads(A), json.loads(B)]
    assert [one["type"] for one in found.end.items] == ["function_call", "function_call"]


def test_a_piece_of_arguments_that_is_what_all_before_it_are_is_a_piece() -> None:
    pieces = ['{"not":', '{"not":', "1}}"]
    found = read("chat", [calls(piece("call_1", "lookup", one, index=0)) for one in pieces] + [END, DONE])
    assert found.end is not None
    assert [call.arguments for call in found.end.calls] == ['{"not":{"not":1}}']


@pytest.mark.parametrize("where", ["delta", "message"])
def test_a_call_as_it_was_before_tools_is_one(where: str) -> None:
    if where == "delta":
        events = [chunk({"function_call": {"name": "f", "arguments": ""}}), chunk({"function_call": {"arguments": A}})]
    else:
        events = [chunk(message={"function_call": {"name": "f", "arguments": A}})]
    found = read("chat", [*events, chunk(finish="function_call"), DONE])
    assert found.end is not None
    assert found.end.calls == (WholeCall("", "f", A),)


def test_a_call_that_has_no_arguments_and_one_of_the_same_name_are_two_by_their_ids() -> None:
    events = [calls(piece("a", "f", "{}", index=0)), calls(piece("b", "f", "{}", index=0)), END, DONE]
    found = read("chat", events)
    assert found.end is not None
    assert found.end.calls == tuple(called(("a", "f", "{}"), ("b", "f", "{}")))


def test_a_text_before_calls_is_resent_with_them_and_a_text_alone_is_not() -> None:
    text = [chunk({"content": "I "}), chunk({"content": "look."})]
    found = read("chat", [*text, calls(piece("call_1", "lookup", A, index=0)), END, DONE])
    assert found.texts == {0: "I look."}
    assert found.end is not None
    assert [one["type"] for one in found.end.items] == ["message", "function_call"]
    assert found.end.items[0]["content"] == [{"type": "output_text", "text": "I look."}]
    assert read("chat", [*text, chunk(finish="stop"), DONE]).end == End(None, None)


def test_a_reason_of_calls_without_a_call_fails() -> None:
    assert read("chat", [chunk({"content": "Hm."}), END, DONE]).code == "upstream_error"
    assert read("chat", [chunk({"content": "Hm."}), END]).code == "upstream_error"


def test_a_completion_that_is_cut_within_a_call_is_one_without_that_call() -> None:
    first, second = piece("call_1", "lookup", A, index=0), piece("call_2", "refund", B[:3], index=1)
    found = read("chat", [calls(first), calls(second), chunk(finish="length"), DONE])
    assert found.end is not None
    assert (found.end.reason, [call.call_id for call in found.end.calls]) == ("max_tokens", ["call_1"])


def test_a_custom_call_of_a_completion_fails() -> None:
    with pytest.raises(RunError) as failed:
        fed("chat", [calls({"index": 0, "id": "c", "type": "custom", "custom": {"name": "f", "input": "x"}})])
    assert failed.value.code == "tools_not_supported"


# Assistants


def step(*found: Json) -> Json:
    details = {"type": "tool_calls", "tool_calls": list(found)}
    return {"event": "thread.run.step.delta", "data": {"id": "step_1", "delta": {"step_details": details}}}


def waits(*found: Json) -> Json:
    action = {"type": "submit_tool_outputs", "submit_tool_outputs": {"tool_calls": list(found)}}
    data = {"id": "run_1", "thread_id": "thread_1", "status": "requires_action", "required_action": action}
    return {"event": "thread.run.requires_action", "data": data}


ASSISTANTS: dict[str, list[Json]] = {
    "as OpenAI tells them": [
        step(piece("call_1", "lookup", "", index=0)),
        step(piece(arguments=A[:4], index=0)),
        step(piece(arguments=A[4:], index=0)),
        step(piece("call_2", "refund", "", index=1)),
        step(piece(arguments=B, index=1)),
        waits(piece("call_1", "lookup", A), piece("call_2", "refund", B)),
    ],
    "told where the run waits alone": [waits(piece("call_1", "lookup", A), piece("call_2", "refund", B))],
    "steps without indexes": [
        step(piece("call_1", "lookup", A), piece("call_2", "refund", B)),
        waits(piece("call_1", "lookup", A), piece("call_2", "refund", B)),
    ],
}


@pytest.mark.parametrize("habit", ASSISTANTS)
def test_calls_of_a_run_that_waits_end_its_answer(habit: str) -> None:
    found = read("assistants", ASSISTANTS[habit])
    assert found.end is not None
    assert found.calls == shown(*BOTH)
    assert found.end.calls == tuple(called(*BOTH))
    assert found.end.followup == {"thread_id": "thread_1", "run_id": "run_1", "calls": ["call_1", "call_2"]}


def test_a_step_that_ends_tells_no_call_of_an_answer_before() -> None:
    details = {"type": "tool_calls", "tool_calls": [piece("call_1", "lookup", A, output="42")]}
    whole = {"event": "thread.run.step.completed", "data": {"id": "step_1", "step_details": details}}
    output = step({"index": 0, "type": "function", "function": {"output": "42"}})
    end = {"event": "thread.run.completed", "data": {"id": "run_1"}}
    found = read("assistants", [output, whole, end])
    assert (found.calls, found.end) == ([], End(None, None))


def test_a_tool_of_the_assistants_server_is_shown_as_its_step_ends() -> None:
    code = {"id": "ci_1", "type": "code_interpreter", "code_interpreter": {"input": "1+1", "outputs": []}}
    whole = {"id": "step_1", "step_details": {"type": "tool_calls", "tool_calls": [code]}}
    events = [
        step({**code, "index": 0}),
        {"event": "thread.run.step.completed", "data": whole},
        {"event": "thread.run.completed", "data": {}},
    ]
    found = read("assistants", events)
    told = json.dumps({"code_interpreter": code["code_interpreter"]}, separators=(",", ":"))
    assert found.calls == [("ci_1", "code_interpreter", "code_interpreter", told)]


def test_a_run_that_waits_for_nothing_or_for_something_else_fails() -> None:
    for event, code in ((waits(), "upstream_malformed"), (waits({"type": "else", "id": "x"}), "tools_not_supported")):
        with pytest.raises(RunError) as failed:
            fed("assistants", [event])
        assert failed.value.code == code


# All


ALL = [
    *(("responses", events) for events in RESPONSES.values()),
    *(("chat", events) for events in CHAT.values()),
    *(("assistants", events) for events in ASSISTANTS.values()),
]


@pytest.mark.parametrize("number", range(len(ALL)))
def test_an_assistant_without_tools_fails_where_its_model_calls_one(number: int) -> None:
    try:
        code = read(*ALL[number], has_tools=False).code
    except RunError as error:
        code = error.code
    assert code == "tools_not_supported"


@pytest.mark.parametrize("speaks", DIALECTS)
def test_texts_begin_with_the_part_that_is_named(speaks: str) -> None:
    events = {
        "responses": [*said("Hi.", 0), *said("Ho.", 1), over()],
        "chat": [chunk({"content": "Hi."}), chunk({"refusal": "Ho."}), DONE],
        "assistants": [
            {
                "event": "thread.message.delta",
                "data": {"id": f"m{at}", "delta": {"content": [{"text": {"value": text}}]}},
            }
            for at, text in enumerate(("Hi.", "Ho."))
        ],
    }[speaks]
    parts = [part for part in fed(speaks, events, start=3) if not isinstance(part, End)]
    assert [(part.at, part.value) for part in parts if not isinstance(part, Reasoning | Failed)] == [  # type: ignore[union-attr]
        (3, "Hi."),
        (4, "Ho."),
    ]


@pytest.mark.parametrize("speaks", DIALECTS)
def test_calls_cut_anywhere_into_pieces_are_whole(speaks: str) -> None:
    for seed in range(300):
        choose = random.Random(f"{speaks}/{seed}")
        want = [
            (
                f"call_{number}",
                choose.choice(("f", "g")),
                json.dumps({"t": _text(choose)}, ensure_ascii=choose.random() < 0.5),
            )
            for number in range(choose.randrange(1, 5))
        ]
        events = _cut(speaks, want, choose)
        deltas = fed(speaks, events)
        found = got(deltas)
        assert found.calls == shown(*want), seed
        assert got(merged(deltas)) == found
        assert found.end is not None
        assert found.end.calls == tuple(called(*want))


def _text(choose: random.Random) -> str:
    return "".join(choose.choice(("a", '"', "\\", "🌍", "\n", "é", "{", "}", " ")) for _ in range(choose.randrange(30)))


def _cut(speaks: str, want: Sequence[tuple[str, str, str]], choose: random.Random) -> list[Json]:
    pieces: list[tuple[int, str]] = []
    for number, (_, _, arguments) in enumerate(want):
        # As UTF-16 has it: some servers cut there.
        units = arguments.encode("utf-16-le", "surrogatepass")
        cuts = sorted({0, len(units), *(2 * choose.randrange(len(units) // 2) for _ in range(choose.randrange(6)))})
        pieces += [(number, units[start:end].decode("utf-16-le", "surrogatepass")) for start, end in pairwise(cuts)]
    if choose.random() < 0.5:
        order = [number for number, _ in pieces]
        choose.shuffle(order)
        rest = {number: [text for one, text in pieces if one == number] for number in range(len(want))}
        pieces = [(number, rest[number].pop(0)) for number in order]
    if speaks == "responses":
        begun = [added(item(call_id, name, "", id=f"fc_{at}"), at) for at, (call_id, name, _) in enumerate(want)]
        grows = [grown(text, item_id=f"fc_{at}", output_index=at) for at, text in pieces]
        final = [item(*call, id=f"fc_{at}") for at, call in enumerate(want)]
        ends = [done(one, at) for at, one in enumerate(final) if choose.random() < 0.5]
        return [*begun, *grows, *ends, over(*(final if choose.random() < 0.5 else []))]
    begun = [piece(call_id, name, "", index=at) for at, (call_id, name, _) in enumerate(want)]
    grows = [piece(arguments=text, index=at) for at, text in pieces]
    if speaks == "chat":
        return [calls(*begun), *map(calls, grows), END, DONE]
    return [step(*begun), *map(step, grows), waits(*(piece(*call) for call in want))]


@pytest.mark.parametrize("speaks", DIALECTS)
def test_calls_without_end_are_an_answer_that_is_too_long(speaks: str) -> None:
    events: dict[str, list[Json]] = {
        "responses": [done(item(f"c{at}", "f", "{}"), at) for at in range(1100)],
        "chat": [calls(piece(f"c{at}", "f", "{}", index=at)) for at in range(1100)],
        "assistants": [waits(*(piece(f"c{at}", "f", "{}") for at in range(1100)))],
    }
    with pytest.raises(RunError) as failed:
        fed(speaks, events[speaks])
    assert failed.value.code == "answer_too_long"


@pytest.mark.parametrize("speaks", DIALECTS)
def test_what_no_database_takes_comes_in_no_call(speaks: str) -> None:
    bad = ("c\0\ud800", "f\0", '{"a": "\ud83c"}')
    event = {
        "responses": done(item(*bad), 0),
        "chat": calls(piece(*bad, index=0)),
        "assistants": step(piece(*bad, index=0)),
    }[speaks]
    for part in fed(speaks, [event]):
        assert isinstance(part, Call)
        json.dumps(part).encode("ascii")
        assert "\0" not in "".join(part[1:])
        "".join(part[1:]).encode()


# Another worker goes on


@pytest.mark.parametrize("habit", RESPONSES)
@pytest.mark.parametrize("start", [0, 2])
def test_another_worker_goes_on_within_calls_and_tells_nothing_twice(habit: str, start: int) -> None:
    events = [*said("Hi.", 7), *RESPONSES[habit]]
    full = fed("responses", events, start=start)
    for left in range(len(events)):
        first = ResponsesTranslator(Reading(has_tools=True), start)
        before = [part for event in events[:left] for part in first.feed(event["type"], event)]
        state = {"response_id": "r", "sequence": 1, **json.loads(json.dumps(first.state()).encode("ascii"))}
        assert state["start"] == start
        place = ResumePoint(Reading(has_tools=True), state["start"], state)
        rest = [part for event in events[left:] for part in place.translator.feed(event["type"], event)]
        assert got([*before, *rest]) == got(full)
        # One that is told from its start, to who counts what was delivered.
        delivered = Delivered(state, None)
        delivered.from_start(state)
        again = place.again(state)
        told = [part for event in events for part in delivered.rest(again.translator.feed(event["type"], event))]
        assert got([*before, *told]) == got(full)


def test_the_state_of_an_older_release_has_no_calls_and_begins_with_the_first_part() -> None:
    translator = ResponsesTranslator(Reading(has_tools=True))
    for event in said("Hi."):
        translator.feed(event["type"], event)
    state = translator.state()
    for name in ("start", "calls", "items"):
        del state[name]
    restored = ResponsesTranslator(Reading(has_tools=True))
    restored.restore(state)
    assert restored.feed(kind_of(over()), over()) == [End(None, None)]
    assert Delivered(state, None).characters == 3


def test_what_viewers_have_of_the_present_answer_alone_is_counted() -> None:
    run, message = new_run("thread", "tutor", None), new_message("thread", "assistant", [])
    message["content"] = [
        {"type": "text", "text": {"value": "Before.", "annotations": []}},
        {"type": "text", "text": {"value": "Hi", "annotations": []}},
    ]
    step = tool_calls_step(run, 2)
    assert step["step_details"]["type"] == "tool_calls"
    call = tool_call("call_1", "lookup", "server")
    call["function"]["arguments"] = A[:4]
    step["step_details"]["tool_calls"].append(call)
    assert step_created(step).data is step
    events = [*said("Hi.", 0), added(ONE, 1), grown(A, item_id="fc_1"), over()]
    state = ResponsesTranslator(Reading(has_tools=True), 1).state()
    delivered = Delivered(state, Shown(message, [step], 1))
    assert delivered.characters == 2 + 4
    found = delivered.rest(fed("responses", events, start=1))
    assert found[:-1] == [Text(1, "."), Call(0, "call_1", "lookup", "function", A[4:])]
    assert isinstance(found[-1], End)
