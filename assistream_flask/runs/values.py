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


def assistant_ids(value: object, most: int) -> list[str]:
    """Check the ids of 1 to ``most`` assistants."""
    if not isinstance(value, list) or not 1 <= len(value) <= most or not all(isinstance(one, str) for one in value):
        raise invalid(f"'assistant_ids' must be a list of 1 to {most} ids of assistants, see GET /assistants.")
    return value
