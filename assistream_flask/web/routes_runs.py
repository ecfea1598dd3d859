"""The routes of runs: starting them, with their events as the answer where that is asked for, and cancelling one."""

from __future__ import annotations

from flask import Response, request

from ..log.protocol import EventId
from ..runs.open_streams import OpenStream
from ..runs.runner import Started
from ..runs.service import OwnedThread
from ..store.sql import AnsweredBefore, StoredAnswer
from . import event_streams
from .answers import json_answer, read_body
from .auth import Call, asking_again
from .idempotency import Once, start
from .routes_events import streamed


def create_runs(call: Call, thread: OwnedThread) -> Response:
    """``POST /threads/<id>/runs``: have assistants answer; where an event stream is accepted, answer with theirs."""
    body = read_body(call.runtime, ["assistant_ids", "content", "mode"], ["assistant_ids"])
    command = thread.runs(body["assistant_ids"], body.get("content"), body.get("mode", "parallel"))

    def begin() -> StoredAnswer:
        return start(call, thread, command, 202, Started.public)

    def follow(send: event_streams.Send, place: OpenStream) -> event_streams.Frames:
        given = begin()
        message = given.body["message"]
        runs = {run["id"] for run in given.body["runs"]}
        message_id = message["message"]["id"] if message else None
        event_id = EventId.parse(given.event_id)
        ask_again = asking_again(call)
        return event_streams.follow(call.runtime, thread.id, message_id, runs, event_id, send, ask_again, place)

    if any(kind.lower() == "text/event-stream" and quality for kind, quality in request.accept_mimetypes):
        return streamed(call, follow)
    return json_answer(begin().body, 202)


def cancel(call: Call, thread: OwnedThread, run_id: str) -> Response:
    """``POST /threads/<id>/runs/<id>/cancel``: cancel a run that is not over."""
    read_body(call.runtime, [])
    once = Once(call, thread.owner)
    given = once.before()
    if given is None:
        run = thread.cancel(run_id)
        given = once.answer(202, run) or StoredAnswer("", "", 202, run)
        if once.key:
            try:
                call.runtime.store.remember(thread.owner, given)
            except AnsweredBefore:
                given = once.before() or given
    return json_answer(given.body, 202)
