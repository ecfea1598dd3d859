"""What an assistant said and did is resent as no server refuses it, whatever became of it."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from assistream_flask.events import Json, Said
from assistream_flask.upstream.chat import Chat
from assistream_flask.upstream.items import (
    AGAIN,
    GO_ON,
    NOT_EXECUTED,
    Limit,
    Turn,
    closed,
    closed_items,
    in_words,
    shortened,
    turns_of,
)
from assistream_flask.upstream.protocol import ModelRequest

NAMES = {"tutor": "Tutor", "critic": "Critic"}


def said(text: str, **more: Any) -> Json:
    content = [{"type": "output_text", "text": text}]
    return {"type": "message", "role": "assistant", "content": content, **more}


def call(call_id: Any = "call_1", name: Any = "lookup", arguments: Any = "{}", **more: Any) -> Json:
    return {"type": "function_call", "call_id": call_id, "name": name, "arguments": arguments, **more}


def output(call_id: Any = "call_1", text: Any = "42", **more: Any) -> Json:
    return {"type": "function_call_output", "call_id": call_id, "output": text, **more}


def thought(encrypted: Any = "gAAA", **more: Any) -> Json:
    return {"type": "reasoning", "summary": [], "encrypted_content": encrypted, **more}


def refusal(items: Sequence[Mapping[str, Any]]) -> str | None:
    """Say why a server would refuse ``items``, in the words of one that did."""
    waiting: list[str] = []
    known: set[str] = set()
    for at, item in enumerate(items):
        if {"id", "status"} & item.keys():
            return f"Unknown parameter 'input[{at}].status'"
        wrong: str | None = None
        if item["type"] == "function_call":
            wrong = f"Duplicate item found with id {item['call_id']}" if item["call_id"] in known else bad_call(item)
            known.add(item["call_id"])
            waiting.append(item["call_id"])
        elif item["type"] == "function_call_output":
            if item["call_id"] not in waiting:
                return "No tool call found for function call output"
            waiting.remove(item["call_id"])
        else:
            wrong = bad_words(item, items[at:])
        if wrong is not None:
            return wrong
    return f"No tool output found for function call {waiting[0]}" if waiting else None


def bad_call(item: Mapping[str, Any]) -> str | None:
    for name in ("call_id", "name"):
        if not re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", item[name]):
            return f"Invalid {name!r}: string does not match pattern"
    return None if isinstance(json.loads(item["arguments"]), dict) else "arguments are no object"


def bad_words(item: Mapping[str, Any], rest: Sequence[Mapping[str, Any]]) -> str | None:
    if item["type"] == "reasoning":
        follower = next((one["type"] for one in rest if one["type"] != "reasoning"), "")
        if follower not in ("message", "function_call"):
            return "Item of type 'reasoning' was provided without its required following item."
        return None if item["encrypted_content"] else "Items are not persisted when `store` is false."
    if item["type"] != "message":
        return f"Invalid value: {item['type']!r}"
    is_said = item["content"] and all(part["text"].strip() for part in item["content"])
    return None if is_said else "the message must not be empty"


def chat_refusal(messages: Sequence[Json]) -> str | None:
    """Say why a server of Chat Completions would refuse ``messages``."""
    waiting: list[str] = []
    for message in messages:
        if message["role"] == "tool":
            if message["tool_call_id"] not in waiting:
                return "messages with role 'tool' must be a response to a preceeding message with 'tool_calls'"
            waiting.remove(message["tool_call_id"])
            continue
        if waiting:
            return "An assistant message with 'tool_calls' must be followed by tool messages"
        if not message.get("content") and not message.get("tool_calls"):
            return "the message must not be empty"
        waiting = [one["id"] for one in message.get("tool_calls", ())]
    return "An assistant message with 'tool_calls' must be followed by tool messages" if waiting else None


def anything(choose: random.Random) -> Json:
    """Give an item as it may be stored, whole or broken."""
    # Few ids, so that they meet.
    call_id = choose.choice(["call_1", "call_2", "call_3", "a b", "", None, "x" * 70])
    more = choose.choice([{}, {}, {"id": "fc_1", "status": "completed"}])
    arguments = choose.choice(
        ["{}", '{"q": 1}', '{"q": 1', "[1]", "", "null", None, {"q": 1}, '{"q": NaN}', '{"\ud800"']
    )
    text = choose.choice(["Hi.", "", " ", None, 5])
    makers: list[Callable[[], Json]] = [
        lambda: call(call_id, choose.choice(["lookup", "a.b", "", None, "n" * 90]), arguments, **more),
        lambda: call(call_id, "lookup", arguments, **more),
        lambda: output(
            call_id, choose.choice(["42", "", None, {"a": 1}, [{"type": "input_text", "text": "x"}]]), **more
        ),
        lambda: output(call_id, "42", **more),
        lambda: thought(choose.choice(["gAAA", "gAAA", None, ""]), **more),
        lambda: {
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": text}],
            **more,
        },
        lambda: said("Hi.", phase="commentary"),
        lambda: {
            "type": "message",
            "content": choose.choice([None, [], "Hi.", [{"type": "refusal", "refusal": "No"}]]),
        },
        lambda: {"type": "web_search_call", "id": "ws_1"},
        lambda: {"type": choose.choice(["item_reference", "custom_tool_call", "", None])},
        dict,
    ]
    return choose.choice(makers)()


def test_any_items_become_such_as_no_server_refuses() -> None:
    kept = 0
    for seed in range(5000):
        choose = random.Random(seed)
        items = [anything(choose) for _ in range(choose.randrange(12))]
        found = closed_items(items)
        assert refusal(found) is None, (seed, items, found)
        assert closed_items(found) == found, seed
        # Each call that was made is there, and each output that has a call, once.
        assert sum(one["type"] == "function_call" for one in found) == sum(
            one.get("type") == "function_call" for one in items
        )
        kept += len(found)
    assert kept > 10_000


@pytest.mark.parametrize("speaks", ["responses", "chat"])
def test_any_history_of_turns_with_items_is_one_that_no_server_refuses(speaks: str) -> None:
    for seed in range(2000):
        choose = random.Random(f"{speaks}/{seed}")
        turns = [
            Turn(
                role := choose.choice(("user", "assistant")),
                choose.choice(("", " ", f"w{at}")),
                [anything(choose) for _ in range(choose.randrange(6))] if role == "assistant" else (),
            )
            for at in range(choose.randrange(7))
        ]
        found = closed(turns, choose.choice((None, "Be kind.")))
        roles = [turn.role for turn in found]
        assert roles == (["user", "assistant"] * len(roles))[: len(roles)], seed
        if roles[-1] == "assistant":
            assert found[-1].items[-1]["type"] == "function_call_output", seed
        if speaks == "chat":
            assert chat_refusal(messages_of(found)) is None, (seed, found)
        else:
            items = [item for turn in found for item in turn.items or [said(turn.text)]]
            assert refusal(items) is None, (seed, items)
        assert closed(found) == found, seed
        assert all(in_words(turn).strip() for turn in found), seed


def messages_of(turns: Sequence[Turn]) -> list[Json]:
    asked: list[Json] = []

    class Client:
        base_url = type("URL", (), {"host": "model"})
        chat: Any = None

    def create(**arguments: Any) -> None:
        asked.extend(arguments["extra_body"]["messages"])

    client = Client()
    client.chat = type("Chat", (), {"completions": type("Completions", (), {"create": staticmethod(create)})})
    Chat().create(client, ModelRequest("a", "m", None, {}, False, turns, 5))  # type: ignore[arg-type]
    return asked


def test_a_call_without_output_gets_one_behind_its_block_and_in_its_place() -> None:
    assert closed_items([call("a"), call("b"), output("b", "2")]) == [
        call("a"),
        call("b"),
        output("a", NOT_EXECUTED),
        output("b", "2"),
    ]
    assert closed_items([call("a"), said("Never mind.")]) == [call("a"), output("a", NOT_EXECUTED), said("Never mind.")]
    assert closed_items([call("a"), output("a"), call("b")]) == [
        *(call("a"), output("a")),
        *(call("b"), output("b", NOT_EXECUTED)),
    ]


def test_arguments_that_cannot_be_read_are_none_and_an_output_without_its_call_is_left_out() -> None:
    assert closed_items([call("a", arguments='{"q": '), output("a"), output("b")]) == [call("a"), output("a")]


def test_reasoning_goes_with_what_came_of_it() -> None:
    assert closed_items([thought(), call("a"), output("a"), thought()]) == [thought(), call("a"), output("a")]
    assert closed_items([thought(None), said("Hi.")]) == [said("Hi.")]
    assert closed_items([thought(id="rs_1", status="completed"), said("Hi.")]) == [thought(), said("Hi.")]


def test_one_id_that_two_runs_gave_is_two_in_a_request() -> None:
    turns = [Turn("user", "Hi"), Turn("assistant", "", [call("c"), output("c", "1")])]
    first, second = closed([*turns, *turns])[1::2]
    assert [item["call_id"] for item in first.items] == ["c", "c"]
    assert [item["call_id"] for item in second.items] == ["c_2", "c_2"]


# Turns


def test_an_assistant_sees_what_it_did_and_of_others_which_tools_they_used() -> None:
    items = [call(), output(), call("call_2", "refund"), output("call_2"), call("call_3"), said("It is 42.")]
    history = [Said(None, "Hi"), Said("tutor", "It is 42.", True, items), Said(None, "Why?")]
    assert turns_of(history, "tutor", NAMES)[1] == Turn("assistant", "It is 42.", items)
    other = turns_of(history, "critic", NAMES)[1]
    assert other == Turn(
        "user", '<other-assistant name="Tutor">\nIt is 42.\n\n(used: lookup, refund)\n</other-assistant>'
    )


def test_a_reply_of_calls_alone_is_one_too() -> None:
    history = [Said(None, "Hi"), Said("tutor", "", False, [call(), output()])]
    assert turns_of(history, "critic", NAMES)[1].text.splitlines()[1] == "(used: lookup)"
    assert turns_of(history, "tutor", NAMES)[1:] == [Turn("assistant", "", [call(), output()])]


def test_behind_the_outputs_of_its_calls_an_assistant_goes_on_without_being_asked() -> None:
    waits, spoke = [call(), output()], [call(), output(), said("Well,")]
    assert closed([Turn("user", "Hi"), Turn("assistant", "", waits)])[-1].role == "assistant"
    assert closed([Turn("user", "Hi"), Turn("assistant", "", spoke)])[-1] == Turn("user", GO_ON)
    assert turns_of([Said("tutor", "Well,", False, spoke)], "tutor", NAMES)[-1] == Turn("user", AGAIN)


def test_turns_of_one_role_are_one_and_texts_among_items_are_items() -> None:
    turns = [Turn("user", "Hi"), Turn("assistant", "One."), Turn("assistant", "", [call(), output()])]
    assert closed(turns)[1:] == [Turn("assistant", "One.", [said("One."), call(), output()])]


def test_items_of_which_nothing_can_be_resent_leave_the_text() -> None:
    assert closed([Turn("user", "Hi"), Turn("assistant", "One.", [thought(None)]), Turn("user", "Why?")]) == [
        Turn("user", "Hi"),
        Turn("assistant", "One."),
        Turn("user", "Why?"),
    ]
    assert closed([Turn("user", "Hi"), Turn("assistant", "", [thought(None)]), Turn("user", "Why?")]) == [
        Turn("user", "Hi\n\nWhy?")
    ]


def test_a_limit_counts_what_is_sent_in_a_texts_place() -> None:
    long = Said("tutor", "x", True, [call(arguments=json.dumps({"q": "y" * 1000})), output()])
    assert Limit(1000, 9).of([long, Said(None, "Hi")]) == [Said(None, "Hi")]
    assert Limit(2000, 9).of([long, Said(None, "Hi")]) == [long, Said(None, "Hi")]


def test_an_apps_own_limit_keeps_the_items_of_what_it_keeps_whole() -> None:
    history = [Said("a", "One.", True, [call(), output()]), Said("a", "Two.", True, [call(), output()])]

    def shorten(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        messages[1]["content"] = "2"
        return messages

    assert shortened(history, shorten) == [history[0], Said("a", "2")]


# In other words


def test_a_completion_is_asked_with_the_calls_of_an_answer_in_one_message() -> None:
    items = [thought(), said("I look."), call("a"), call("b"), output("a", "1"), output("b", ["x"]), said("It is 1.")]
    assert messages_of([Turn("user", "Hi"), Turn("assistant", "", items), Turn("user", "Why?")]) == [
        {"role": "user", "content": "Hi"},
        {
            "role": "assistant",
            "content": "I look.",
            "tool_calls": [
                {"id": one, "type": "function", "function": {"name": "lookup", "arguments": "{}"}} for one in "ab"
            ],
        },
        {"role": "tool", "tool_call_id": "a", "content": "1"},
        {"role": "tool", "tool_call_id": "b", "content": '["x"]'},
        {"role": "assistant", "content": "It is 1."},
        {"role": "user", "content": "Why?"},
    ]


def test_in_words_a_call_is_a_line() -> None:
    items = [said("I look."), call(arguments='{"q": 1}'), output(text="42"), call("b"), output("b", "y" * 5000)]
    lines = in_words(Turn("assistant", "", items)).split("\n\n")
    assert lines[:2] == ["I look.", '[lookup({"q": 1}) gave: 42]']
    assert len(lines[2]) == 2000
    assert lines[2].endswith("y…]")
    assert in_words(Turn("user", "Hi")) == "Hi"
