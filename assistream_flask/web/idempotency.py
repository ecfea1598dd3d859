"""The same Idempotency-Key and request get the first answer again, and nothing is done twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any, cast

from flask import request

from ..errors import RequestError
from ..runs.runner import Started
from ..runs.service import KeepRun, OwnedThread, RunCommand
from ..store.sql import AnsweredBefore, Owner, StoredAnswer
from ..types import Run
from . import validation
from .auth import Call


class Once:
    """The request's Idempotency-Key: the same key and request get the first answer again.

    https://datatracker.ietf.org/doc/draft-ietf-httpapi-idempotency-key-header/
    """

    def __init__(self, call: Call, owner: Owner) -> None:
        self._store, self._owner = call.runtime.store, owner
        self.key = validation.idempotency_key(request.headers.get("Idempotency-Key"))
        body = request.get_data(cache=True)
        # The part of the path that names the route and its objects; a prefix may change.
        route = json.dumps([request.endpoint, request.view_args])
        self._fingerprint = hashlib.sha256(route.encode() + b"\n" + body).hexdigest()

    def before(self) -> StoredAnswer | None:
        """Give the first answer, where there is one. Raises :class:`RequestError` for a key used otherwise."""
        answer = self._store.answer(self._owner, self.key) if self.key else None
        if answer is not None and answer.fingerprint != self._fingerprint:
            raise RequestError(
                422, "idempotency_key_reused", "This Idempotency-Key was used for another request. Use a new one."
            )
        return answer

    def answer(
        self, status: int, body: Mapping[str, Any], event_id: str | None = None, thread_id: str | None = None
    ) -> StoredAnswer | None:
        """Give what to store with the change that the request makes, to the thread that its path names or
        ``thread_id``."""
        thread_id = thread_id or (request.view_args or {}).get("thread_id")
        return StoredAnswer(self.key, self._fingerprint, status, body, event_id, thread_id) if self.key else None


def start(
    call: Call, thread: OwnedThread, command: RunCommand, status: int, body: Callable[[Started], Mapping[str, Any]]
) -> StoredAnswer:
    """Store and start what the request asks for; give the answer."""

    def act(key: Once) -> StoredAnswer:
        started = thread.start(command, lambda started: key.answer(status, body(started), str(started.event_id)))
        return StoredAnswer("", "", status, body(started), str(started.event_id))

    return _once(call, thread, act)


def answered(call: Call, thread: OwnedThread, act: Callable[[KeepRun], Run]) -> Run:
    """Do what the request asks for, once; give the run that it is answered with. ``act`` is given what makes of that
    what is to be stored beside the change."""
    given = _once(call, thread, lambda key: StoredAnswer("", "", 200, act(lambda run: key.answer(200, run))))
    return cast(Run, given.body)


def _once(call: Call, thread: OwnedThread, act: Callable[[Once], StoredAnswer]) -> StoredAnswer:
    key = Once(call, thread.owner)
    given = key.before()
    if given is None:
        try:
            return act(key)
        except AnsweredBefore:
            given = key.before()
            assert given is not None
        except RequestError as error:
            # The same request may have been the one that was first.
            given = key.before() if error.status == 409 else None
            if given is None:
                raise
    return given
