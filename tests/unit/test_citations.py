"""Links that would run as a page's own script: no citation brings one."""

from __future__ import annotations

from typing import Any

import pytest

from assistream_flask.events import Json
from assistream_flask.upstream import answer_stream
from assistream_flask.upstream.deltas import Annotation
from tests.contract.test_upstream import DIALECTS

SCRIPTS = ("javascript:alert(1)", "JavaScript:x", " javascript:x", "java\nscript:x", "data:text/html,x", "//x.org")
KEPT = {"type": "url_citation", "url": "https://example.org/?q=javascript:x", "title": "javascript: the good parts"}


def noted(told: Json | list[Json]) -> list[Any]:
    stream = answer_stream.translate(iter(told if isinstance(told, list) else [told]))
    return [part.value for parts in stream for part in parts if isinstance(part, Annotation)]


def citing(dialect: str, notes: list[Json], *, whole: bool) -> list[Json]:
    """Give an answer with these annotations, in deltas or told as a whole."""
    if dialect == "responses":
        part = {"type": "output_text", "text": "a", "annotations": notes}
        added: list[Json] = [{"type": "response.output_text.annotation.added", "annotation": note} for note in notes]
        output = [{"type": "message", "content": [part]}] if whole else []
        return [
            {"type": "response.output_text.delta", "delta": "a"},
            *([] if whole else added),
            {"type": "response.completed", "response": {"status": "completed", "output": output}},
        ]
    if dialect == "chat":
        message = {"message" if whole else "delta": {"content": "a", "annotations": notes}}
        return [{"choices": [{**message, "finish_reason": "stop"}]}]
    content = [{"index": 0, "type": "text", "text": {"value": "a", "annotations": notes}}]
    told: Json = {"id": "m", "content": content} if whole else {"id": "m", "delta": {"content": content}}
    event = f"thread.message.{'completed' if whole else 'delta'}"
    return [{"event": event, "data": told}, {"event": "thread.run.completed", "data": {}}]


@pytest.mark.parametrize("url", SCRIPTS)
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_citation_whose_link_is_no_web_address_is_left_out(dialect: str, whole: bool, url: str) -> None:
    notes: list[Json] = [
        KEPT,
        {"type": "url_citation", "url": url},
        {"type": "url_citation", "url_citation": {"url": url, "title": "x"}},
        {"type": "x", "sources": [{"imageUrls": ["https://example.org", url]}]},
        {"type": "url_citation", "url": "https://example.org/last"},
        {"type": "file_citation", "file_id": "file_1"},
    ]
    assert noted(citing(dialect, notes, whole=whole)) == [notes[0], notes[4], notes[5]]


def test_what_is_left_out_is_told_of_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    assert noted(citing("chat", [{"url": "javascript:x"}], whole=False)) == []
    assert "left out" in caplog.text


def test_what_was_left_out_counts_for_nobody_who_goes_on() -> None:
    told = citing("responses", [{"url": "javascript:x"}, KEPT, KEPT | {"url": "http://example.org/2"}], whole=False)
    done = citing("responses", [{"url": "javascript:x"}, KEPT, KEPT | {"url": "http://example.org/2"}], whole=True)
    assert [note["url"] for note in noted([*told[:-1], done[-1]])] == [KEPT["url"], "http://example.org/2"]
