"""What a request may say, checked before anything is done. Every refusal states the fix. Knows no Flask."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from urllib.parse import urlsplit

from .. import events
from ..errors import RequestError
from ..events import Json


def invalid(message: str) -> RequestError:
    """Gives the 400 for a value that is not allowed."""
    return RequestError(400, "invalid_value", message)


def same_origin(origin: str | None, host: str, allowed: Sequence[str]) -> None:
    """Refuses a command that another site's page sent; ``host`` is the request's own.

    The scheme is not compared: behind a proxy that ends TLS the app sees another one than the page.
    """
    if origin is None or origin in allowed:
        return
    try:
        parts = urlsplit(origin)
    except ValueError:
        parts = urlsplit("")
    default = {"http": ":80", "https": ":443"}.get(parts.scheme, "")
    if not default or not parts.netloc or parts.netloc.removesuffix(default) != host.removesuffix(default):
        raise RequestError(
            403,
            "foreign_origin",
            "Commands are taken from this app's own pages only. Its operator can add an origin to "
            "ASSISTREAM_ALLOWED_ORIGINS, and must pass the Host header on where a proxy stands before the app.",
        )


def body(raw: bytes, mimetype: str, allowed: Sequence[str], required: Sequence[str] = ()) -> Json:
    """Gives the JSON object in ``raw``, which has no fields but the ``allowed`` and all that are ``required``."""
    if not raw and not required:
        return {}
    if mimetype != "application/json":
        raise RequestError(
            415, "unsupported_media_type", "Send the body as JSON with the header Content-Type: application/json."
        )
    try:
        found = json.loads(raw.decode("utf-8-sig"), parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise RequestError(400, "invalid_json", "The body is not valid JSON in UTF-8. Send a JSON object.") from None
    if not isinstance(found, dict):
        raise RequestError(400, "invalid_json", "The body is not a JSON object. Send one: {...}.")
    if unknown := sorted(set(found) - set(allowed)):
        raise RequestError(
            400, "unknown_field", f"Unknown field {unknown[0][:40]!r}. Allowed here: {', '.join(allowed) or 'none'}."
        )
    if missing := [field for field in required if field not in found]:
        raise invalid(f"The field {missing[0]!r} is missing. Add it to the body.")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(name)


def storable(text: str) -> bool:
    """Whether every database can hold it: PostgreSQL takes no NUL, UTF-8 no lone surrogate."""
    return "\0" not in text and text == events.clean(text)


def content(value: object, limit: int) -> str:
    """Gives the text of a message, of at most ``limit`` characters."""
    if not isinstance(value, str) or not value.strip():
        raise invalid("'content' must be a text that is not empty.")
    if len(value) > limit:
        raise RequestError(413, "message_too_long", f"The message has {len(value)} characters, {limit} are allowed.")
    if not storable(value):
        raise invalid("'content' has a NUL or half a surrogate pair in it. Remove it.")
    return value


def metadata(value: object) -> Json:
    """Gives a thread's metadata, within the limits of OpenAI's own: 16 pairs, keys of 64 characters, values of 512."""
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


def limit(text: str) -> int:
    """Gives the length of a page."""
    if not re.fullmatch(r"[0-9]{1,3}", text) or not 1 <= int(text) <= 200:
        raise invalid("'limit' must be a number from 1 to 200.")
    return int(text)


def mode(value: object) -> str:
    """Gives how the runs of one POST go."""
    if value not in ("parallel", "sequential"):
        raise invalid("'mode' must be 'parallel' or 'sequential'.")
    return str(value)


def assistant_ids(value: object, most: int) -> list[str]:
    """Gives the ids of 1 to ``most`` assistants."""
    if not isinstance(value, list) or not 1 <= len(value) <= most or not all(isinstance(one, str) for one in value):
        raise invalid(f"'assistant_ids' must be a list of 1 to {most} ids of assistants, see GET /assistants.")
    return value


def idempotency_key(value: str | None) -> str | None:
    """Gives the key, of 1 to 255 visible ASCII characters."""
    if value is not None and not re.fullmatch(r"[\x21-\x7e]{1,255}", value):
        raise invalid("Idempotency-Key must be 1 to 255 visible ASCII characters, such as a UUID.")
    return value
