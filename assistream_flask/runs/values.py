"""What a command may be given, checked before anything is done. Every refusal states the fix."""

from __future__ import annotations

import hashlib
import re
from typing import Final
from uuid import UUID

from .. import events
from ..errors import RequestError
from ..events import Json

ID: Final = re.compile(r"(thread|msg|run)_[0-9a-f]{32}")
"""Ids as :func:`..events.new_id` makes them. What is none is nobody's, and not for every database to read."""
CALL_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,40}")
"""Ids of tool calls: a model server's own, where it is one. OpenAI refuses longer ones in a chat."""
HASHED: Final = "assistream-sha256:"
"""What a hashed name begins with, and no name that an app gives: that one could be another's hash."""
MOST_ENTRIES: Final = 200
"""Entries, or threads, that a page may have."""


def invalid(message: str) -> RequestError:
    """Make the 400 for a value that is not allowed."""
    return RequestError(400, "invalid_value", message)


def storable(text: str) -> bool:
    """Tell whether every database can hold it: PostgreSQL takes no NUL, UTF-8 no lone surrogate."""
    return "\0" not in text and text == events.clean(text)


def owner_name(named: object) -> str | None:
    """Give the name that the store has for who the app says is the caller; ``None`` for nobody. Raises ``ValueError``,
    which says what to give, for what is no id.

    A name is an id: one that the store's column cannot hold is hashed, as one that is cut could be another's.
    """
    # Apps give "" and False for nobody too, and all nobodies would share such a name.
    if named is None or isinstance(named, bool) or (isinstance(named, str) and not named):
        return None
    if isinstance(named, int) and not named:
        raise ValueError("0, which many apps mean nobody by: give None for nobody, else the user's id as a text")
    # What other objects say of themselves can change, or be the same for two.
    if not isinstance(named, (str, int, UUID)):
        raise ValueError(f"a {type(named).__name__}: give the user's id, a text or a whole number, and None for nobody")
    name = str(named)
    fits = len(name) <= 255 and storable(name)
    return name if fits else HASHED + hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()


def former_name(name: str) -> str | None:
    """Give the name that earlier releases stored for an owner whose ``name`` is hashed, ``None`` for any other."""
    return name.removeprefix(HASHED) if name.startswith(HASHED) else None


def content(value: object, limit: int) -> str:
    """Check the text of a message, of at most ``limit`` characters."""
    if not isinstance(value, str) or not value.strip():
        raise invalid("'content' must be a text that is not empty.")
    if len(value) > limit:
        raise RequestError(413, "message_too_long", f"The message has {len(value)} characters, {limit} are allowed.")
    if not storable(value):
        raise invalid("'content' has a NUL or half a surrogate pair in it. Remove it.")
    return value


def metadata(value: object) -> dict[str, str]:
    """Check a thread's metadata by the limits of OpenAI's own: 16 pairs, keys of 64 characters, values of 512."""
    if value is None:
        return {}
    good = isinstance(value, dict) and len(value) <= 16
    found: Json = value if isinstance(value, dict) else {}
    for key, text in found.items():
        good = good and isinstance(text, str) and len(key) <= 64 and len(text) <= 512 and storable(key + text)
    if not good:
        raise invalid(
            "'metadata' must be an object of at most 16 texts, keys up to 64 and values up to 512 characters."
        )
    return found


def limit(value: int) -> int:
    """Check the length of a page."""
    if not 1 <= value <= MOST_ENTRIES:
        raise invalid(f"'limit' must be a number from 1 to {MOST_ENTRIES}.")
    return value


def mode(value: object) -> str:
    """Check how the runs of one command go."""
    if value not in ("parallel", "sequential"):
        raise invalid("'mode' must be 'parallel' or 'sequential'.")
    return str(value)


def tool_outputs(value: object, limit: int) -> list[tuple[str, str]]:
    """Check the outputs of tool calls, each of at most ``limit`` characters; give them with the calls' ids."""
    found = []
    for one in _calls("tool_outputs", value):
        output = one.get("output")
        if not isinstance(output, str):
            raise invalid("'output' of each of 'tool_outputs' must be a text; give JSON as a text too.")
        if len(output) > limit:
            raise RequestError(413, "message_too_long", f"An output has {len(output)} characters, {limit} are allowed.")
        if not storable(output):
            raise invalid("'output' has a NUL or half a surrogate pair in it. Remove it.")
        found.append((str(one["tool_call_id"]), output))
    return found


def approvals(value: object) -> list[Json]:
    """Check what people decided of tool calls."""
    found = _calls("approvals", value)
    for one in found:
        if not isinstance(one.get("approve"), bool):
            raise invalid("'approve' of each of 'approvals' must be true or false.")
        if not isinstance(one.get("remember", False), bool):
            raise invalid("'remember' must be true or false.")
        reason, arguments = one.get("reason"), one.get("arguments")
        if not (reason is None or (isinstance(reason, str) and len(reason) <= 1000 and storable(reason))):
            raise invalid("'reason' must be a text of at most 1000 characters.")
        if not (arguments is None or isinstance(arguments, dict)) or (arguments is not None and not one["approve"]):
            raise invalid("'arguments' must be an object, and comes with 'approve': true.")
        if arguments is not None and not storable(events.dumps(arguments).replace("\\u0000", "\0")):
            raise invalid("'arguments' has a NUL or half a surrogate pair in it. Remove it.")
        if unknown := sorted(one.keys() - {"tool_call_id", "approve", "reason", "arguments", "remember"}):
            raise invalid(f"{unknown[0][:50]!r} is no field of an approval. Remove it.")
    return found


def _calls(name: str, value: object) -> list[Json]:
    """Check a list of objects that each name another tool call."""
    if not isinstance(value, list) or not 1 <= len(value) <= MOST_ENTRIES:
        raise invalid(f"'{name}' must be a list of 1 to {MOST_ENTRIES} objects.")
    ids = [one.get("tool_call_id") if isinstance(one, dict) else None for one in value]
    if not all(isinstance(one, str) and CALL_ID.fullmatch(one) for one in ids) or len(set(ids)) < len(ids):
        raise invalid(f"Each of '{name}' must have the 'tool_call_id' of another call that waits.")
    return value


def holder(value: object) -> str:
    """Check by what name a page claims a call."""
    if not isinstance(value, str) or not 1 <= len(value) <= 255 or not storable(value):
        raise invalid("'holder' must be a text of 1 to 255 characters, which no other page has.")
    return value


def assistant_ids(value: object, most: int) -> list[str]:
    """Check the ids of 1 to ``most`` assistants."""
    if not isinstance(value, list) or not 1 <= len(value) <= most or not all(isinstance(one, str) for one in value):
        raise invalid(f"'assistant_ids' must be a list of 1 to {most} ids of assistants, see GET /assistants.")
    return value
