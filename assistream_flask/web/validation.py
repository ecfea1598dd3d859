"""What a request may say beside the values of its command: its origin, its body, its query and its headers. Knows no
Flask."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from urllib.parse import urlsplit

from ..errors import RequestError
from ..events import Json
from ..runs import values


def same_origin(origin: str | None, host: str, allowed: Sequence[str]) -> None:
    """Refuse a command that another site's page sent; ``host`` is the request's own.

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
    """Give the JSON object in ``raw``, which has no fields but the ``allowed`` and all that are ``required``."""
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
    if unknown := set(found).difference(allowed):
        raise RequestError(
            400, "unknown_field", f"Unknown field {min(unknown)[:40]!r}. Allowed here: {', '.join(allowed) or 'none'}."
        )
    if missing := [field for field in required if field not in found]:
        raise values.invalid(f"The field {missing[0]!r} is missing. Add it to the body.")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(name)


def limit(text: str | None) -> int:
    """Read the length of a page, which is 50 where the query says nothing."""
    if text is None:
        return 50
    return values.limit(int(text) if re.fullmatch(r"[0-9]{1,3}", text) else 0)


def idempotency_key(value: str | None) -> str | None:
    """Give the key, of 1 to 255 visible ASCII characters."""
    if value is not None and not re.fullmatch(r"[\x21-\x7e]{1,255}", value):
        raise values.invalid("Idempotency-Key must be 1 to 255 visible ASCII characters, such as a UUID.")
    return value
