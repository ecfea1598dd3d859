"""What is known of the OpenAI SDK beyond what it promises: where a request is seen before it is sent."""

from __future__ import annotations

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
