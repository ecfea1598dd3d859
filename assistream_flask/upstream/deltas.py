"""What an answer consists of, the same for the three dialects."""

from __future__ import annotations

import json
import logging
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain, groupby
from typing import Any, Final, Literal, NamedTuple, TypeAlias, cast

from pydantic_core import from_json

from .. import types
from ..errors import RunError, masked
from ..events import Json, clean, dumps

_log = logging.getLogger(__name__)

_TEXTS: Final = ("text", "content", "value", "reasoning", "thinking", "summary")
_PIECES: Final = 64
"""So many are added up at a time."""
_PARTS: Final = 1_000
"""So many texts and thoughts an answer may have: one that is told once more may be looked for among all."""
_LOOKS: Final = 500_000
"""So many may be looked at for that, in one answer."""
_LONGEST_NAME: Final = 255

Cut: TypeAlias = Literal["max_tokens", "content_filter"]
"""Why an answer is not complete."""
Meaning: TypeAlias = Literal["", "stop", "tool_calls"] | Cut
"""What a server's word for an end means: see :func:`meaning`."""


class Begun(NamedTuple):
    """A background response has its id: :meth:`AnswerStream.state` is there from now on. Alone in its list, and no text
    came before it."""


class Text(NamedTuple):
    """``value`` goes to the end of content part ``at``."""

    at: int
    value: str


class Refusal(NamedTuple):
    """``value`` goes to the end of the refusal that is content part ``at``."""

    at: int
    value: str


class Annotation(NamedTuple):
    """A citation in text part ``at``."""

    at: int
    value: types.Annotation


class Reasoning(NamedTuple):
    """``value`` goes to the end of the summary of the model's reasoning."""

    value: str


class Call(NamedTuple):
    """``value`` goes to the end of the arguments of the answer's tool call ``at``, whose id and name are those of the
    model server: ``""`` as long as they are not known. ``kind`` is ``function``, or what a tool is called that the
    model server executes itself."""

    at: int
    call_id: str
    name: str
    kind: str
    value: str


class WholeCall(NamedTuple):
    """A function that the model calls, as it is known once the answer is over: what the model server calls the call,
    and its arguments as they came, which may be no JSON."""

    call_id: str
    name: str
    arguments: str


class Source(NamedTuple):
    """What a model server says of an answer as a whole: what it calls it, and the model that gave it; ``None`` for what
    it does not say."""

    id: str | None
    model: str | None


class End(NamedTuple):
    """The answer is over. ``reason`` is ``None`` for a complete one, else ``max_tokens`` or ``content_filter``.
    ``usage`` counts tokens, in the words of the Assistants API.

    ``calls`` are the functions that the model calls, in the order of their :class:`Call` deltas of the kind
    ``function``; the last of them is missing where the answer was cut within its arguments. ``items`` is what the
    answer is resent as, in the words of the Responses API and as every server takes it: reasoning that has
    ``encrypted_content``, texts, function calls, without ids and status. It is empty where the texts alone say as much.
    ``followup`` is there where the server waits for the outputs of the calls: JSON for :func:`.answer_stream.open`.
    """

    reason: Cut | None
    usage: types.Usage | None
    calls: Sequence[WholeCall] = ()
    items: Sequence[Json] = ()
    followup: Json | None = None


class Failed(NamedTuple):
    """The answer failed behind the parts before this one; whoever iterates an upstream gets the error instead."""

    error: RunError


Delta = Begun | Text | Refusal | Annotation | Reasoning | Call | End | Failed


def merged(parts: Sequence[Delta]) -> Sequence[Delta]:
    """Give the same with neighbours joined that go to the same place: one event for what one read brought."""
    if len(parts) < 2:
        return parts
    found: list[Delta] = []
    for _, group in groupby(parts, lambda part: (type(part), *part[:-1])):
        first, *more = group
        if more and isinstance(first, Text | Refusal | Reasoning | Call):
            rest = [part.value for part in more if isinstance(part, Text | Refusal | Reasoning | Call)]
            found.append(first._replace(value="".join([first.value, *rest])))
        else:
            found += [first, *more]
    return found


class _Slot:
    """What of one text, refusal, thought, or of the reasoning, was told."""

    __slots__ = ("_pieces", "_sum", "at", "cited", "half", "notes", "seen", "told", "wholes")

    def __init__(self) -> None:
        # Its index among the content parts.
        self.at: int | None = None
        # The first half of a surrogate pair.
        self.half = ""
        # How many characters were told, and what they add up to; None where that is not known.
        self.told = 0
        self._sum: int | None = 0
        self._pieces: list[str] = []
        # How many came since: fewer than were told, while the answer is told again from its start.
        self.seen = 0
        # How many annotations were told, and those of which more than their number is known.
        self.notes = 0
        self.cited: Counter[str] = Counter()
        # Which whole text of the server this slot was found to be, for each kind of event that tells texts once more.
        self.wholes: dict[str, object] = {}

    @property
    def sum(self) -> int | None:
        """Give what the characters add up to."""
        if self._sum is not None and self._pieces:
            self._sum = _summed("".join(self._pieces), self._sum)
        self._pieces.clear()
        return self._sum

    def restore(self, told: int, notes: int, known: int | None, *, from_start: bool) -> None:
        """Take what another process counted."""
        self.told, self._sum = told, known if told else 0
        self.seen, self.notes = (0, 0) if from_start else (told, notes)

    def take(self, value: str) -> str:
        """Count a piece; give what is to be told of it, as pages and databases can read it."""
        if not value:
            return value
        if self.half or not value.isascii() or "\0" in value:
            value, self.half = readable(self.half + value)
        before, self.seen = self.seen, self.seen + len(value)
        if self.seen <= self.told:
            return value
        self._pieces.append(value[self.told - before :] if before < self.told else value)
        self.told = self.seen
        if len(self._pieces) > _PIECES:
            # Added up many at a time: for each by itself it would be half of what a delta costs.
            self.sum  # noqa: B018
        return value

    def begins(self, whole: str) -> bool:
        """Tell whether what was told is the beginning of ``whole``, as far as that is known."""
        return self.told <= len(whole) and self.sum in (None, _summed(whole[: self.told]))


class Slots:
    """Gives every content part of the upstream an index of ours: dense, in the order of arrival.

    Where a text is cut inside a surrogate pair, the first half waits for the second. What was given is counted, so that
    another process can go on behind it, and added up, so that a text which is told once more, as a whole, is known.

    The first part is number ``start``. ``keeps`` has the texts kept, for :meth:`said`.
    """

    def __init__(self, start: int = 0, *, keeps: bool = False) -> None:
        self._slots: dict[tuple[str, object], _Slot] = {}
        self._next = start
        self._looks = 0
        self._has_unread = False
        self._said: list[str] | None = [] if keeps else None

    def state(self) -> list[list[Any]]:
        """Give all that :meth:`restore` needs but the sums, as JSON."""
        return [
            # A lone surrogate is no text that a database takes.
            [*name, slot.at, slot.told, slot.notes, ord(slot.half or "\0")]
            for name, slot in self._slots.items()
        ]

    def sums(self) -> list[int | None]:
        """Give the sums of what :meth:`state` counts, in its order."""
        return [slot.sum for slot in self._slots.values()]

    def restore(self, state: list[list[Any]], sums: Sequence[int | None] = (), *, from_start: bool = False) -> None:
        """Take what :meth:`state` and :meth:`sums` gave; workers of older releases give no sums.

        Where the answer is told again ``from_start``, its texts are known by what they said.
        """
        for number, (kind, key, at, told, notes, half) in enumerate(state):
            if from_start and kind == "thought":
                # These only count, and are counted again.
                continue
            slot = self._slots[kind, tuple(key) if isinstance(key, list) else key] = _Slot()
            slot.at = at
            self._next += at is not None
            slot.restore(told, notes, sums[number] if number < len(sums) else None, from_start=from_start)
            if half and not from_start:
                slot.half = chr(half)

    def text(self, key: object, value: object) -> list[Delta]:
        """Give the text for the part that ``key`` names."""
        slot, whole = self._take("text", key, value)
        if self._said is not None:
            self._said.append(whole)
        return [Text(self._place(slot), whole)] if whole else []

    def said(self) -> str:
        """Give all texts that were told, in the order in which they came, where they are kept."""
        return "".join(self._said or ())

    def refusal(self, key: object, value: object) -> list[Delta]:
        """Give the refusal for the part that ``key`` names."""
        slot, whole = self._take("refusal", key, value)
        return [Refusal(self._place(slot), whole)] if whole else []

    def reasoning(self, key: object, value: object, gap: str = "") -> list[Delta]:
        """Give a piece of the reasoning's summary, of which there is one. ``key`` names the thought that it is of,
        ``gap`` parts that from the one before."""
        _, piece = self._take("thought", key, value)
        _, whole = self._take("reasoning", None, gap + piece if piece else "")
        return [Reasoning(whole)] if whole else []

    def annotation(self, key: object, value: object) -> list[Delta]:
        """Give the annotation for the text part that ``key`` names; nothing for one that no page may have."""
        if not may_leave(value):
            self.unread(value)
            return []
        whole = storable(value)
        if not isinstance(whole, dict):
            self.unread(value)
            return []
        slot = self._slot("text", key)
        slot.cited[_identity(whole)] += 1
        slot.notes += 1
        return [Annotation(self._place(slot), cast(types.Annotation, whole))]

    def annotations(self, key: object, values: object) -> list[Delta]:
        """Give those of all annotations of a part that were not given before."""
        if not isinstance(values, list):
            return []
        slot = self._slots.get(("text", key)) or _Slot()
        known = Counter(slot.cited)
        # Of those that another process gave only the count is known.
        before = max(0, slot.notes - known.total())
        parts: list[Delta] = []
        # What may not leave was not counted.
        for value in [value for value in values if may_leave(value)][before:]:
            identity = _identity(as_object(value))
            if known[identity]:
                known[identity] -= 1
            else:
                parts += self.annotation(key, value)
        return parts

    def rest(self, way: str, kind: str, keys: Sequence[object], value: object) -> tuple[object, str]:
        """Give the key of a text that is told as a whole, and what of it was not told before.

        ``keys`` are those that it may have been told under: a server may leave indexes out of its deltas, and count
        otherwise in the whole than in them. What was told is known by what it says, then. Each of the ``way`` s to
        tell all texts once more tells each once: what one whole was found to be is no other of that way.
        """
        if not isinstance(value, str):
            self.unread(value)
            return keys[0], ""
        # Half a pair at its end is no text.
        whole = clean(re.sub("[\ud800-\udbff]$", "", value)).replace("\0", "\ufffd")
        named = [(key, slot) for key in keys if (slot := self._slots.get((kind, key)))]
        known = [(key, slot) for key, slot in named if slot.wholes.get(way, keys[0]) == keys[0]]
        for key, slot in chain(known, self._alike(way, kind, keys[0], len(whole), bool(known))):
            if slot.begins(whole):
                slot.wholes[way], slot.half = keys[0], ""
                return key, whole[slot.seen :]
        for key, slot in known:
            # It was told in other words, such as without the blanks around it: those that came first count.
            slot.wholes[way] = keys[0]
            return key, ""
        return keys[0], whole

    def _alike(self, way: str, kind: str, own: object, size: int, is_known: bool) -> Iterator[tuple[object, _Slot]]:
        """Give what may have been told of a whole of ``size`` under another key than its ``own``."""
        self._looks += len(self._slots)
        if self._looks > _LOOKS:
            raise RunError("answer_too_long", said=f"{len(self._slots)} parts are told again and again")
        free = [
            (key, slot) for (one, key), slot in self._slots.items() if one == kind and slot.wholes.get(way, own) == own
        ]
        yield from (one for one in free if one[1].told == size)
        if not is_known:
            # Of these the rest may come under another key: nothing said so far what their whole is.
            yield from (one for one in free if one[1].told and not one[1].wholes)

    def begins(self, kind: str, key: object, whole: str) -> bool:
        """Tell whether what was told of a text, if anything, is the beginning of ``whole``."""
        slot = self._slots.get((kind, key))
        return slot is None or slot.begins(whole)

    def has_text(self) -> bool:
        """Tell whether any text or refusal was told."""
        return any(slot.told and kind in ("text", "refusal") for (kind, _), slot in self._slots.items())

    def says(self, text: str) -> bool:
        """Tell whether ``text`` is what was told as one text."""
        told = [slot for (kind, _), slot in self._slots.items() if kind == "text" and slot.told]
        return len(told) == 1 and told[0].told == len(text) and told[0].begins(text)

    def unread(self, value: object) -> None:
        """Say in the log, once an answer, that something of it can't be read."""
        if not self._has_unread and value not in (None, "", [], {}, False):
            self._has_unread = True
            _log.warning("a part of an answer is left out, as it cannot be read: %s", masked(f"{value!r}"))

    def _slot(self, kind: str, key: object) -> _Slot:
        slot = self._slots.get((kind, key))
        if slot is None:
            if len(self._slots) >= _PARTS:
                raise RunError("answer_too_long", said=f"an answer has more than {_PARTS} parts")
            slot = self._slots[kind, key] = _Slot()
        return slot

    def _take(self, kind: str, key: object, value: object) -> tuple[_Slot, str]:
        slot = self._slot(kind, key)
        if isinstance(value, str):
            return slot, slot.take(value)
        self.unread(value)
        return slot, ""

    def _place(self, slot: _Slot) -> int:
        if slot.at is None:
            slot.at, self._next = self._next, self._next + 1
        return slot.at


def storable(value: object) -> Any:
    """Give JSON as pages and every database can read it; ``None`` for what is no JSON."""
    try:
        return json.loads(dumps(value).replace("\\u0000", "\\ufffd"))
    except (ValueError, TypeError):
        return None


def readable(text: str) -> tuple[str, str]:
    """Give ``text`` as pages and databases can read it, and the first half of a surrogate pair at its end."""
    half = text[-1:] if "\ud800" <= text[-1:] <= "\udbff" else ""
    # PostgreSQL stores no NUL, and no reader wants one.
    return clean(text.removesuffix(half)).replace("\0", "\ufffd"), half


def _summed(text: str, so_far: int = 0) -> int:
    return zlib.crc32(text.encode(), so_far)


def _identity(note: Json) -> str:
    """Give what tells one annotation from another: a server may tell more of it the second time."""
    inner = note.get(str(note.get("type")))
    note = {**note, **inner} if isinstance(inner, dict) else note
    # A delta of the Assistants API counts its annotations under this name, which elsewhere is a place.
    place = note.get("start_index", note.get("index"))
    return repr([place, *(note.get(name) for name in ("type", "url", "file_id", "end_index"))])


def may_leave(value: object, name: str = "", deep: int = 8) -> bool:
    """Tell whether each URL in an annotation is one of http or https, or empty: what a page has as a link would run
    ``javascript:`` as its own script. URLs are known by their names, such as ``url`` or ``imageUrls``; wherever a text
    with such a name stands, in whatever is nested."""
    if isinstance(value, dict):
        return deep > 0 and all(may_leave(one, str(key), deep - 1) for key, one in value.items())
    if isinstance(value, list):
        return deep > 0 and all(may_leave(one, name, deep - 1) for one in value)
    is_url = isinstance(value, str) and value != "" and _URL_NAMES.search(name) is not None
    # As it begins: browsers pass over blanks and line ends before and within a scheme.
    return not is_url or _WEB.match(str(value)) is not None


_URL_NAMES: Final = re.compile(r"(?i)(url|uri|href|link|src)s?$")
_WEB: Final = re.compile(r"(?i)https?://")


def words(value: Any) -> str | None:
    """Give the text that stands there, by itself or within an object or a list; ``None`` where there is none."""
    if isinstance(value, dict):
        return next((words(value[name]) for name in _TEXTS if value.get(name)), None)
    if isinstance(value, list):
        found = [text for one in value if (text := words(one)) is not None]
        return "".join(found) if found else None
    return value if isinstance(value, str) else None


def indexed(value: object) -> object:
    """Give an index that a key can hold, ``None`` for any other value."""
    return value if isinstance(value, int | str) else None


def as_object(value: Any) -> Json:
    """Give ``value`` where it is an object, else an empty one."""
    return value if isinstance(value, dict) else {}


def is_object(text: str) -> bool:
    """Tell whether a text is a JSON object."""
    try:
        return isinstance(from_json(text, allow_inf_nan=False), dict)
    except (ValueError, TypeError):
        # The other one is of lone surrogates.
        return False


def inner(data: Any, name: str) -> Json:
    """Give the object that stands there, an empty one where there is none."""
    return as_object(as_object(data).get(name))


def listed(data: Any, name: str) -> list[Any]:
    """Give the list that stands there, an empty one where there is none."""
    found = data.get(name) if isinstance(data, dict) else None
    return found if isinstance(found, list) else []


def usage(value: Any) -> types.Usage | None:
    """Give token counts in the Assistants API's words, from any dialect's."""
    if not isinstance(value, dict):
        return None
    prompt = value.get("prompt_tokens", value.get("input_tokens"))
    completion = value.get("completion_tokens", value.get("output_tokens"))
    if not isinstance(prompt, int) or not isinstance(completion, int):
        return None
    total = value.get("total_tokens")
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": total if isinstance(total, int) else prompt + completion,
    }


def source(data: Json) -> Source | None:
    """Give what an object of a model server's, of any dialect, says of the answer that it is, or is a piece of."""
    told = (data.get(name) for name in Source._fields)
    found = Source(*(clean(value)[:_LONGEST_NAME] if isinstance(value, str) and value else None for value in told))
    return found if any(found) else None


STOP: Final = "stop"
TOOLS: Final = "tool_calls"
# What the servers' words mean, by what is in them; a limit of a rate or of a time is a failure.
_MEANINGS: Final[tuple[tuple[Meaning, str], ...]] = (
    ("content_filter", r"data_inspection|harmful|unsafe"),
    ("", r"rate.?limit|time|repe(at|tition)|insufficient|error(?!_(toxic|limit))|abort|cancel|fail"),
    (TOOLS, r"tool|function"),
    ("max_tokens", r"length|limit|max|truncat|context|out_of_tokens|^incomplete$"),
    (
        "content_filter",
        r"filter|safety|recitation|block|prohibit|spii|guardrail|moderat|sensitiv|toxic|refus|polic|censor|violat|risk",
    ),
    (
        STOP,
        r"^(stop\w*|eos\w*|end|end_?(of\w*|turn)|done|complete[d]?|finish(ed)?|normal|success\w*|eot\w*|natural)$",
    ),
)


_UNSAID: Final = ("", "null", "none", "nil", "undefined", "unspecified", "in_progress", "not_finished")


def is_said(word: object) -> bool:
    """Tell whether a server's reason for an end is one: some give the word null in every chunk, or an empty one."""
    return isinstance(word, str) and _plainly(word) not in _UNSAID


def _plainly(word: str) -> str:
    return re.sub("[^a-z]+", "_", word.lower()).strip("_").removeprefix("finish_reason_")


def meaning(word: str) -> Meaning:
    """Give why an answer ended, for a server's word: :data:`STOP`, :data:`TOOLS`, ``max_tokens``, ``content_filter``,
    or ``""`` where it did not end as it should."""
    word = _plainly(word)
    return next((found for found, pattern in _MEANINGS if re.search(pattern, word)), "")


def reason(value: Any) -> Cut:
    """Give the Assistants API's word for why a message is incomplete."""
    return "content_filter" if isinstance(value, str) and meaning(value) == "content_filter" else "max_tokens"
