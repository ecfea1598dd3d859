"""Tells a connection that had been closed before it was used again from a server that failed.

A server closes connections that were idle for long, and a request that is sent in the same moment gets no byte. Nobody
has seen it then, so that it may be sent once more (RFC 9110, section 9.2.2), which is what browsers do.
"""

from __future__ import annotations

import time
from typing import Any, Final

import httpx2
import openai

from ..platform import openai_sdk

_SECONDS: Final = 2.0
"""Who closed it before the request tells so at once; one that took longer may have been at work on the answer."""


class RequestWatch:
    """Watches the requests of ``client``, a copy that is used for one answer.

    It follows httpcore2's trace of a request, an extension that httpx2 passes on. Where there is no trace, as of a
    transport of the app's own, no connection is known to be one that was used before.
    """

    def __init__(self, client: openai.OpenAI) -> None:
        self._seen: set[str] = set()
        self._asked_at = 0.0
        openai_sdk.on_request(client, self._begin)

    def was_stale(self) -> bool:
        """Tell whether the last request went over a connection that was used before, and got no answer's head."""
        seen = self._seen
        return (
            # An HTTP/2 connection has no place of its own for a request.
            "http11.send_request_headers.started" in seen
            and "http11.receive_response_headers.complete" not in seen
            and not any(".connect_tcp" in step or ".connect_unix" in step for step in seen)
            and time.monotonic() - self._asked_at < _SECONDS
        )

    def _begin(self, request: httpx2.Request) -> None:
        self._seen, self._asked_at = set(), time.monotonic()
        request.extensions.setdefault("trace", self._trace)

    def _trace(self, name: str, info: dict[str, Any]) -> None:
        self._seen.add(name)
