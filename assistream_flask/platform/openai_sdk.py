"""What is known of the OpenAI SDK beyond what it promises: where a request can be seen, and what a call takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import httpx2
import openai

from . import reliances


def on_request(client: openai.OpenAI, call: Callable[[httpx2.Request], None]) -> None:
    """Have ``call`` called with each request of ``client``, a copy that nobody else uses, before it is sent.

    The SDK has a method for that, which is its own to call and an app's class to override. The hooks of the HTTP client
    below are no other way: that one is shared by all copies, and which of them a request is of shows nowhere.
    """
    prepare: Any = getattr(client, "_prepare_request", None)
    if prepare is None:
        # What an app's tests have in its place has none either.
        if isinstance(client, openai.OpenAI):
            missing = reliances.Missing("openai", "OpenAI._prepare_request")
            reliances.miss("stale_connection", missing, "a request that meets a closed connection fails its run")
        return

    def prepared(request: httpx2.Request) -> None:
        prepare(request)
        call(request)

    client._prepare_request = prepared  # type: ignore[method-assign]


def keywords(call: Callable[..., Any]) -> frozenset[str] | None:
    """Name what a method of the SDK takes; ``None`` where that is anything, or cannot be told."""
    try:
        parameters = inspect.signature(call).parameters
    except (TypeError, ValueError):
        return None
    if any(one.kind in (one.VAR_KEYWORD, one.VAR_POSITIONAL) for one in parameters.values()):
        return None
    return frozenset(parameters) - {"self"}
