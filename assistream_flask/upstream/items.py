"""What a model is sent of a thread: turns that every server takes, whichever dialect it speaks.

Strict chat templates want a user's and an assistant's turns by turns, a user's first and last, and none without words
(``"Conversation roles must alternate user/assistant"``). A thread has several assistants, several messages in a row,
answers that failed or say nothing. :func:`turns_of` tells who said what, :func:`closed` makes of it what is sent.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any, Final, NamedTuple, Protocol, TypeAlias

from ..errors import ConfigurationError
from ..events import Json, Said, dumps
from .deltas import Begun, Delta, Reasoning, Text, is_object

BEGIN: Final = "Begin."
"""What an assistant is asked that speaks before any user did: servers refuse an empty history."""
GO_ON: Final = "Go on."
"""What one is asked that spoke last itself."""
AGAIN: Final = "That answer was cut short. Give it again, whole."
"""The same, where its last answer was not whole."""

NOT_EXECUTED: Final = "The tool was not executed."
"""The output of a call of which nobody knows another."""

_TAG: Final = "other-assistant"
# Anyone could write such a mark; in what others than us wrote it is no mark.
_FORGED: Final = re.compile(rf"<(?=\s*/?\s*{_TAG}\b)", re.IGNORECASE)


class Turn(NamedTuple):
    """One turn of the history. ``role`` is ``user`` or ``assistant``.

    ``items``, of an assistant's, are what takes the place of its ``text`` where there are any: reasoning, texts,
    function calls and their outputs, in the words of the Responses API (``reasoning``, ``message``, ``function_call``,
    ``function_call_output``). Each call among them has its output.
    """

    role: str
    text: str
    items: Sequence[Mapping[str, Any]] = ()


class Limit(NamedTuple):
    """So much of a history is sent, the oldest messages left out; the newest is sent in any case."""

    characters: int
    messages: int

    def within(self, asked: object) -> Limit:
        """Give the limit of an assistant's ``max_history``; what that does not limit is as in this one."""
        return self._replace(**asked) if isinstance(asked, Mapping) else self

    def of(self, said: Sequence[Said]) -> Sequence[Said]:
        """Give the newest of ``said`` that are within the limit."""
        left, start = self.characters, len(said)
        for at in range(len(said) - 1, max(-1, len(said) - 1 - self.messages), -1):
            left -= _size(said[at])
            if left < 0 and start < len(said):
                break
            start = at
        return said[start:]


def _size(one: Said) -> int:
    return sum(len(dumps(item)) for item in one.items) or len(one.text)


Shorten: TypeAlias = Callable[[list[dict[str, Any]]], Sequence[Mapping[str, Any]]]
"""An app's own way to shorten a history: takes ``[{"role", "assistant_id", "content"}...]``, oldest first, gives those
to send."""


def shortened(said: Sequence[Said], shorten: Shorten) -> list[Said]:
    """Give what the app's ``shorten`` leaves of ``said``.

    Raises :class:`ConfigurationError` for what is no history.
    """
    roles = {True: "user", False: "assistant"}
    given = [{"role": roles[one.speaker is None], "assistant_id": one.speaker, "content": one.text} for one in said]
    whole = {id(one): origin for one, origin in zip(given, said, strict=True)}
    found: list[Said] = []
    for one in shorten(list(given)):
        text = one.get("content") if isinstance(one, Mapping) else None
        if not isinstance(text, str):
            raise ConfigurationError(
                f"max_history gave {type(one).__name__!r} for a message: give those that it was called with, or "
                '{"role", "assistant_id", "content"} with a text for content'
            )
        if one.get("role", "user") != ("user" if one.get("assistant_id") is None else "assistant"):
            raise ConfigurationError(
                f"max_history gave a message with the role {one.get('role')!r} and the assistant_id "
                f"{one.get('assistant_id')!r}: give 'user' without, or 'assistant' with an assistant_id"
            )
        kept = whole.get(id(one))
        speaker, is_whole = one.get("assistant_id"), kept is None or kept.is_whole
        is_same = kept is not None and (kept.speaker, kept.text) == (speaker, text)
        # They say what the text says: where that was changed, they would say it as it was.
        found.append(Said(speaker, text, is_whole, kept.items if kept is not None and is_same else ()))
    return found


class Names(Protocol):
    """What assistants are called, by their ids."""

    def get(self, assistant_id: str, otherwise: str, /) -> str:
        """Give the name, ``otherwise`` where it is not known."""


def turns_of(said: Sequence[Said], assistant_id: str, names: Names, *, is_cut: bool = False) -> list[Turn]:
    """Give the turns that the assistant is to see: its own messages as an assistant's, all others as a user's, those
    of other assistants between marks with their name, and at the end something for it to answer.

    Of its own it sees all that it said and did, of others' which tools they used. ``is_cut`` says that older messages
    were left out.
    """
    turns: list[Turn] = []
    last: Said | None = None
    for one in said:
        is_own = one.speaker == assistant_id
        text = one.text if is_own else _with_tools(one)
        if not text.strip() and not (is_own and one.items):
            continue
        last = one
        if is_own:
            turns.append(Turn("assistant", text, one.items))
        else:
            text = _FORGED.sub("&lt;", text)
            turns.append(
                Turn("user", text if one.speaker is None else marked(names.get(one.speaker, one.speaker), text))
            )
    if is_cut:
        # Half a conversation begins with a question.
        first = next((at for at, turn in enumerate(turns) if turn.role == "user"), 0)
        turns = turns[first:]
    if last is not None and last.speaker == assistant_id and not _is_answered(last.items):
        turns.append(Turn("user", GO_ON if last.is_whole else AGAIN))
    return turns


def _with_tools(one: Said) -> str:
    """Give what others are to know of a message: its text, and in one line which tools were used for it."""
    used = dict.fromkeys(f"{item.get('name')}" for item in one.items if item.get("type") == "function_call")
    return "\n\n".join(filter(str.strip, (one.text, f"(used: {', '.join(used)})" if used else "")))


def _is_answered(items: Sequence[Mapping[str, Any]]) -> bool:
    """Tell whether the model is to go on by itself: what it called last has its output."""
    return bool(items) and items[-1].get("type") == "function_call_output"


def closed(turns: Sequence[Turn], system: str | None = None) -> list[Turn]:
    """Give ``turns`` as every server takes them: by turns, a user's first and last, none blank. ``system`` is folded
    into the first one. Behind the outputs of what it called an assistant goes on by itself, without a user's turn."""
    taken: set[str] = set()
    known = [turn._replace(items=closed_items(turn.items, taken)) if turn.items else turn for turn in turns]
    said = [turn for turn in known if turn.text.strip() or turn.items]
    if not said or said[0].role != "user":
        said.insert(0, Turn("user", BEGIN))
    if said[-1].role != "user" and not _is_answered(said[-1].items):
        said.append(Turn("user", GO_ON))
    if system is not None and system.strip():
        said.insert(0, Turn("user", system))
    return [_joined(role, list(group)) for role, group in groupby(said, lambda turn: turn.role)]


def _joined(role: str, turns: Sequence[Turn]) -> Turn:
    text = "\n\n".join(turn.text for turn in turns if turn.text.strip())
    if not any(turn.items for turn in turns):
        return Turn(role, text)
    return Turn(role, text, [item for turn in turns for item in turn.items or [message_item("assistant", turn.text)]])


# Items


def message_item(role: str, text: str) -> Json:
    """Give a turn's text as an item."""
    # llama.cpp takes an assistant's turn in this form only; OpenAI takes both.
    kind = "output_text" if role == "assistant" else "input_text"
    return {"type": "message", "role": role, "content": [{"type": kind, "text": text}]}


def plain(item: Mapping[str, Any]) -> Json | None:
    """Give an item as every server takes it, without its id and status; ``None`` for one that can't be resent, such as
    reasoning that has no ``encrypted_content``, and the call of a tool that the model server executed itself."""
    match item.get("type"):
        case "message":
            return _plain_message(item)
        case "reasoning" if isinstance(item.get("encrypted_content"), str) and item["encrypted_content"]:
            summary = item.get("summary")
            kept = summary if isinstance(summary, list) else []
            return {"type": "reasoning", "summary": kept, "encrypted_content": item["encrypted_content"]}
        case "function_call":
            return _plain_call(item)
        case "function_call_output" if isinstance(item.get("call_id"), str):
            output = item.get("output")
            output = output if isinstance(output, str | list) else "" if output is None else dumps(output)
            return {"type": "function_call_output", "call_id": item["call_id"], "output": output}
    return None


def _plain_message(item: Mapping[str, Any]) -> Json | None:
    content = item.get("content")
    parts = content if isinstance(content, list) else [{"text": content}]
    # Not every server takes a refusal for what it is.
    texts = [part.get("text") or part.get("refusal") for part in parts if isinstance(part, Mapping)]
    said = [text for text in texts if isinstance(text, str) and text.strip()]
    if not said:
        return None
    phase = {"phase": item["phase"]} if isinstance(item.get("phase"), str) else {}
    told = [{"type": "output_text", "text": text} for text in said]
    return {"type": "message", "role": "assistant", "content": told, **phase}


def _plain_call(item: Mapping[str, Any]) -> Json:
    arguments, call_id = item.get("arguments"), item.get("call_id")
    return {
        "type": "function_call",
        "call_id": call_id if isinstance(call_id, str) else "",
        # A model may call what nobody has, by any name: OpenAI refuses some of those that it made up.
        "name": re.sub("[^a-zA-Z0-9_-]", "_", f"{item.get('name') or ''}")[:64] or "unknown",
        "arguments": arguments if isinstance(arguments, str) and is_object(arguments) else "{}",
    }


def closed_items(items: Sequence[Mapping[str, Any]], taken: set[str] | None = None) -> list[Json]:
    """Give what an assistant said and did as no server refuses it.

    Each call has one output, behind the block of the model's answer that it is in, and each reasoning its follower.
    Whatever an item lacks is made up for, what can't be resent is left out. Ids of calls that are ``taken`` already, by
    other items of the same request, are replaced by others.
    """
    taken = set() if taken is None else taken
    known = [item for one in items if (item := plain(one)) is not None]
    outputs = _outputs(known)
    found: list[Json] = []
    block: list[tuple[int, Json]] = []
    for at, item in enumerate(known):
        if item["type"] != "function_call_output":
            block.append((at, item))
        elif any(outputs.get(number) is item for number, _ in block):
            found += _closed_block(block, outputs, taken)
            block = []
    return followed([*found, *_closed_block(block, outputs, taken)])


def _outputs(items: Sequence[Json]) -> dict[int, Json]:
    """Give the output of each call that has one, by the call's place: the first behind it that has its id, and that no
    call before it has."""
    found: dict[int, Json] = {}
    waiting: dict[str, list[int]] = {}
    for at, item in enumerate(items):
        if item["type"] == "function_call":
            waiting.setdefault(item["call_id"], []).append(at)
        elif item["type"] == "function_call_output" and waiting.get(item["call_id"]):
            found[waiting[item["call_id"]].pop(0)] = item
    return found


def _closed_block(block: Sequence[tuple[int, Json]], outputs: Mapping[int, Json], taken: set[str]) -> list[Json]:
    """Give what a model answered, and then the outputs of all that it called."""
    said: list[Json] = []
    told: list[Json] = []
    end, has_outputs = 0, False
    for at, item in block:
        said.append(item)
        if item["type"] == "function_call":
            said[-1], end = {**item, "call_id": _own_id(item["call_id"], taken)}, len(said)
            output = outputs[at]["output"] if at in outputs else NOT_EXECUTED
            has_outputs = has_outputs or at in outputs
            told.append({"type": "function_call_output", "call_id": said[-1]["call_id"], "output": output})
    # Behind calls of which none was executed the model said the rest without waiting for them.
    end = len(said) if has_outputs else end
    return [*said[:end], *told, *said[end:]]


def _own_id(call_id: str, taken: set[str]) -> str:
    # OpenAI takes no others.
    name = re.sub("[^a-zA-Z0-9_-]", "_", call_id)[:40] or "call"
    number, found = 1, name
    while found in taken:
        number += 1
        found = f"{name[:34]}_{number}"
    taken.add(found)
    return found


def followed(items: Sequence[Json]) -> list[Json]:
    """Give ``items`` without the reasoning that nothing follows which came of it: neither words nor a call."""
    found: list[Json] = []
    has_follower = False
    for item in reversed(items):
        if item["type"] != "reasoning":
            has_follower = item["type"] in ("message", "function_call")
        if item["type"] != "reasoning" or has_follower:
            found.append(item)
    return found[::-1]


_LONGEST_LINE: Final = 2_000


def in_words(turn: Turn) -> str:
    """Give a turn in words alone, for who takes no calls: each is a line, of bounded length."""
    outputs = {item["call_id"]: item["output"] for item in turn.items if item["type"] == "function_call_output"}
    lines: list[str] = []
    for item in turn.items:
        if item["type"] == "message":
            lines += [part["text"] for part in item["content"]]
        elif item["type"] == "function_call":
            output = outputs.get(item["call_id"], NOT_EXECUTED)
            output = output if isinstance(output, str) else dumps(output)
            line = f"[{item['name']}({item['arguments']}) gave: {output}]"
            lines.append(line if len(line) <= _LONGEST_LINE else f"{line[: _LONGEST_LINE - 2]}…]")
    return "\n\n".join(lines) if turn.items else turn.text


def marked(name: str, text: str) -> str:
    """Give another assistant's message as a part of a user's turn: a model takes every assistant's turn for its own
    words, and some servers continue the last one."""
    return f'<{_TAG} name="{html.escape(name)}">\n{text}\n</{_TAG}>'


class Unmark:
    """Takes off the mark that a model puts before its answer, because it saw such before others'.

    What may be the beginning of one is held back until more of it comes.
    """

    def __init__(self, names: Sequence[str], state: Mapping[str, Any] | None = None) -> None:
        self._names = own = [name for name in names if name]
        # Behind the first kind comes a blank or a colon: a link is none, nor is "[x] " of a list of things to do.
        ends = ("\n", ":", " \n", "\r\n")
        self._marks = [f"[{name}]{end}" for name in own for end in (ends if len(name) < 3 else (*ends, " "))]
        self._marks += [f'<{_TAG} name="{html.escape(name)}">' for name in own]
        self._held = ""
        self._cut = 0
        self._at: int | None = None
        # Whether a mark was taken off, and whether anything was said behind it.
        self._is_within = self._has_begun = False
        self.is_over = False
        if state is not None:
            self._held, self._cut, self._at = state["held"], state["cut"], state["at"]
            self._is_within, self._has_begun, self.is_over = state["within"], state["begun"], state["over"]

    def state(self) -> dict[str, Any]:
        """Give how far this is, as JSON. ``cut`` and ``held`` are what was told to nobody."""
        return {
            # The assistant may have others by the time at which its answer is told again.
            "names": self._names,
            "held": self._held,
            "cut": self._cut,
            "at": self._at,
            "within": self._is_within,
            "begun": self._has_begun,
            "over": self.is_over,
        }

    def take(self, parts: Sequence[Delta]) -> list[Delta]:
        """Give ``parts`` without the mark."""
        found: list[Delta] = []
        for part in parts:
            if isinstance(part, Text) and not self.is_over and self._at in (None, part.at):
                self._at = part.at
                if text := self._text(part.value):
                    found.append(Text(part.at, text))
                continue
            if not isinstance(part, Reasoning | Begun):
                # Nothing comes any more that could make it a mark.
                found += self.rest()
            found.append(part)
        return found

    def rest(self) -> list[Delta]:
        """Give what was held back."""
        held, self._held, self.is_over = self._held, "", True
        return [Text(self._at, held)] if held and self._at is not None else []

    def _text(self, value: str) -> str:
        value, self._held = self._held + value, ""
        if not self._is_within:
            bare = value.lstrip()
            mark = next((mark for mark in self._marks if bare.startswith(mark)), None)
            if mark is None:
                if any(one.startswith(bare) for one in self._marks):
                    self._held = value
                    return ""
                self.is_over = True
                return value
            self._cut += len(value) - len(bare) + len(mark)
            value, self._is_within = bare[len(mark) :], True
        if not self._has_begun:
            bare = value.lstrip(": \t\r\n")
            self._cut += len(value) - len(bare)
            value, self._has_begun = bare, bool(bare)
        return self._ended(value)

    def _ended(self, value: str) -> str:
        """Give the text behind a mark without the mark's end, which may be cut."""
        end = f"</{_TAG}>"
        found = value.replace(end, "")
        self._cut += len(value) - len(found)
        at = found.rfind("<")
        if at >= 0 and end.startswith(found[at:]):
            found, self._held = found[:at], found[at:]
        return found
