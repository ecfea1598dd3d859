"""The routes of threads and their messages."""

from __future__ import annotations

from flask import Response

from ..runs.service import OwnedThread
from ..store.sql import AnsweredBefore
from .answers import Answer, json_answer, page, read_body
from .auth import Call, someone
from .idempotency import Once, start


def create_thread(call: Call) -> Response:
    """``POST /threads``: begin a thread."""
    body = read_body(call.runtime, ["metadata"])
    owner = someone(call)
    once = Once(call, owner)
    thread = call.service.new_thread(body.get("metadata"))
    answer = once.before()
    if answer is None:
        try:
            call.service.create_thread(owner, thread, once.answer(201, thread, thread_id=thread["id"]))
        except AnsweredBefore:
            answer = once.before()
    return json_answer(answer.body if answer else thread, 201)


def threads(call: Call) -> Response:
    """``GET /threads``: the caller's own threads, newest first."""
    # A page asks this first: naming the caller here keeps two first commands at once from making two callers.
    data, has_more = call.service.threads(someone(call), *page())
    return json_answer({"data": data, "has_more": has_more})


def delete_thread(call: Call, thread: OwnedThread) -> Response:
    """``DELETE /threads/<id>``: delete a thread with all that is in it."""
    thread.delete()
    return Answer(status=204)


def messages(call: Call, thread: OwnedThread) -> Response:
    """``GET /threads/<id>/messages``: a page of entries, with the place in the log as of which it is exact."""
    data, has_more, event_id = thread.messages(*page())
    response = json_answer({"data": data, "has_more": has_more})
    response.headers["Last-Event-ID"] = str(event_id)
    return response


def add_message(call: Call, thread: OwnedThread) -> Response:
    """``POST /threads/<id>/messages``: store a message that nobody answers."""
    body = read_body(call.runtime, ["content"], ["content"])
    given = start(call, thread, thread.message(body["content"]), 201, lambda started: started.message or {})
    return json_answer(given.body, 201)
