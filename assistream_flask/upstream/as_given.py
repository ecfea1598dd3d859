"""A client that is asked and read as the app made it, so that what is wrapped around its calls sees whole answers.

Ours is a copy of the app's, which asks once and whose bytes are read: cheap, but a span that tracing puts around a
client's calls is not around the copy's, or waits for events that nobody takes from its stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Final, cast

import openai

from ..errors import ConfigurationError

# What asks for an answer. All else is the copy's, also what goes on with one in the background.
_ASKS: Final = (
    *("responses.create", "chat.completions.create"),
    *("beta.threads.create_and_run", "beta.threads.runs.submit_tool_outputs"),
)


def as_given(client: openai.OpenAI) -> openai.OpenAI:
    """Give what stands for ``client``. Raises :class:`ConfigurationError` for one that may ask twice."""
    if getattr(client, "max_retries", 0):
        raise ConfigurationError(
            'create_blueprint(read="sdk") asks with the client as it is, and this one tries again by itself, so that '
            "an answer could be paid twice: give OpenAI(max_retries=0)"
        )
    return cast(openai.OpenAI, _Client(client, client, {}))


class _Part:
    """A client, or a part of one: asks are ``given``'s, all else is ``plain``'s."""

    def __init__(self, given: Any, plain: Any, headers: Mapping[str, Any], path: str = "") -> None:
        self._given, self._plain, self._headers, self._path = given, plain, headers, path

    def __getattr__(self, name: str) -> Any:
        path = f"{self._path}{name}"
        if path in _ASKS:
            return partial(_ask, getattr(self._given, name), self._headers)
        if any(one.startswith(f"{path}.") for one in _ASKS):
            return _Part(getattr(self._given, name), getattr(self._plain, name), self._headers, f"{path}.")
        return getattr(self._plain, name)


class _Client(_Part):
    def with_options(self, *, default_headers: Mapping[str, Any] | None = None, **options: Any) -> _Client:
        more = default_headers or {}
        plain = self._plain.with_options(default_headers=more, **options)
        return _Client(self._given, plain, {**self._headers, **more})


def _ask(call: Callable[..., Any], headers: Mapping[str, Any], **arguments: Any) -> _Events:
    # The copy would have them as its defaults.
    if headers:
        arguments["extra_headers"] = {**headers, **(arguments.get("extra_headers") or {})}
    return _Events(call(**arguments))


class _Events:
    """A stream that can be iterated over only."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    @property
    def response(self) -> _Connection | None:
        """Give what there is to hang up."""
        found = getattr(self._stream, "response", None)
        return None if found is None else _Connection(found)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._stream)

    def close(self) -> None:
        """End it, for what is wrapped around it too."""
        self._stream.close()


class _Connection:
    """A response without its bytes, which would be read where they could."""

    def __init__(self, response: Any) -> None:
        self._response = response

    @property
    def extensions(self) -> Any:
        """Give what the transport has with it."""
        return self._response.extensions

    @property
    def http_version(self) -> Any:
        """Give the version of HTTP."""
        return self._response.http_version

    @property
    def is_closed(self) -> Any:
        """Tell whether it is."""
        return self._response.is_closed
