"""When the body of an event stream is woken."""

from __future__ import annotations

from pathlib import Path

from assistream_flask import events, sse
from assistream_flask.log.protocol import Receipt
from assistream_flask.runs.open_streams import OpenStream
from assistream_flask.runs.runtime import Runtime
from assistream_flask.settings import Settings
from assistream_flask.store.sql import Owner, thread_object
from assistream_flask.web import event_streams


def test_a_silent_viewer_is_woken_once_for_a_heartbeat_and_the_asking_who_it_is(tmp_path: Path) -> None:
    settings = Settings(database_url=f"sqlite:///{tmp_path / 'a.sqlite3'}", heartbeat_seconds=0.1, drain_seconds=0)
    runtime, thread_id = Runtime(settings, lambda scope, assistant_id: None), events.new_id("thread")
    answers = iter([True] * 7)
    try:
        thread = thread_object({"id": thread_id, "created_at": 1, "metadata": {}})
        runtime.store.create_thread(Owner("", "me"), thread)
        place, event_id = OpenStream("me"), runtime.log.end(thread_id)
        frames = event_streams.view(
            runtime, thread_id, event_id, lambda data: Receipt.NO, lambda: next(answers, False), place
        )
        assert list(frames) == [sse.RETRY + b"\n", *[sse.PING] * 8]
    finally:
        runtime.stop()
