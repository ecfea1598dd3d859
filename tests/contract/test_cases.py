"""Streams and answers of real servers, and what must become of each: over real HTTP, through the routes.

``cases/wire.json`` came with the project, ``cases/forms.json`` was found in public reports (each case names where), and
``cases/more.json`` was made up by who tried to break the reading of those.
``body`` is what the server sends, a network write a frame; ``cut``: the connection breaks then; ``open``: it stays
open, with heartbeats; ``http``: it answers so instead; ``content_type``: that of the answer.
"""

from __future__ import annotations

import json
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from flask import Flask

from assistream_flask import Assistant, run_ended
from assistream_flask.errors import RUN_ERRORS
from tests.conftest import KEY, Caller, MakeApp
from tests.http_helpers import request_of
from tests.socket_server import SocketServer

CASES: list[dict[str, Any]] = [
    case
    for name in ("wire", "forms", "more")
    for case in json.loads((Path(__file__).parent / "cases" / f"{name}.json").read_text())
]


class CaseServer:
    """A model server whose model ``m`` answers with what case number ``m`` says."""

    def __init__(self) -> None:
        self._closing = threading.Event()
        self._server = SocketServer(self._serve)
        self.url = self._server.url

    def close(self) -> None:
        self._closing.set()
        self._server.close()

    def _serve(self, peer: socket.socket, _: int) -> None:
        asked = json.loads(request_of(peer).partition(b"\r\n\r\n")[2])
        self._answer(peer, CASES[int(asked.get("model") or asked["assistant_id"])])

    def _answer(self, peer: socket.socket, case: dict[str, Any]) -> None:
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if "http" in case:
            status, answer = case["http"]
            text = answer.encode() if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False).encode()
            kind = case.get("content_type", "application/json").encode()
            head = b"HTTP/1.1 %d X\r\nContent-Type: %b\r\nContent-Length: %d\r\nConnection: close\r\n\r\n"
            peer.sendall(head % (status, kind, len(text)) + text)
            return
        kind = case.get("content_type", "text/event-stream").encode()
        peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nTransfer-Encoding: chunked\r\n\r\n" % kind)
        for frame in case["body"].encode().split(b"\n\n"):
            if frame:
                end = b"\n\n" if case["body"].endswith("\n\n") or b"data:" in frame else b""
                peer.sendall(b"%x\r\n%b\r\n" % (len(frame + end), frame + end))
        while case.get("open") and not self._closing.wait(0.1):
            peer.sendall(b"c\r\n: heartbeat\n\r\n")
        if not case.get("cut"):
            peer.sendall(b"0\r\n\r\n")


def is_loading(case: dict[str, Any]) -> bool:
    return bool(case["expect"].get("code") == "model_loading")


def assistant_of(number: int) -> Assistant:
    """Its id and its model are the case's number."""
    name, case = str(number), CASES[number]
    if case["dialect"] == "assistants":
        return Assistant(name, upstream=case["dialect"], assistant_id=name)
    return Assistant(name, model=name, upstream=case["dialect"], **case.get("arguments", {}))


@pytest.fixture(scope="module")
def app_for(make_shared_app: MakeApp) -> Iterator[Callable[[int], Flask]]:
    """Give the app that has an assistant for this case: one for all, and one that waits for no model that loads."""
    case_server = CaseServer()
    # A connection a case: what one case does to its own is no matter of the next.
    http_client = openai.DefaultHttpxClient(verify=False, limits=httpx2.Limits(max_keepalive_connections=0))
    with openai.OpenAI(api_key=KEY, base_url=case_server.url, http_client=http_client) as client:
        assistants: dict[bool, list[Assistant]] = {True: [], False: []}
        for number, case in enumerate(CASES):
            assistants[is_loading(case)].append(assistant_of(number))
        apps = {
            loading: make_shared_app(these, client=client, stall_seconds=20, run_seconds=2 if loading else 60)
            for loading, these in assistants.items()
        }
        yield lambda number: apps[is_loading(CASES[number])]
        case_server.close()


def test_a_case_says_what_must_become_of_it_once() -> None:
    names = [case["name"] for case in CASES]
    assert len(names) == len(set(names))
    assert {case["expect"]["status"] for case in CASES} == {"completed", "incomplete", "failed"}
    assert {case["expect"]["code"] for case in CASES if "code" in case["expect"]} <= set(RUN_ERRORS)


@pytest.mark.parametrize("number", range(len(CASES)), ids=[case["name"] for case in CASES])
def test_what_a_real_server_sent_becomes_the_right_run(
    app_for: Callable[[int], Flask], number: int, caplog: pytest.LogCaptureFixture
) -> None:
    want = CASES[number]["expect"]
    caplog.set_level(logging.INFO, "assistream_flask")
    app, ended = app_for(number), threading.Event()
    caller = Caller(app)
    with run_ended.connected_to(lambda *_, **__: ended.set(), sender=app):
        (run_id,) = caller.run(str(number))
        assert ended.wait(20)
    entry = caller.entry(run_id)
    run, parts = entry["run"], entry["message"]["content"]
    assert (run["status"], run["last_error"] and run["last_error"]["code"]) == (
        want["status"],
        want.get("code", run["last_error"] and run["last_error"]["code"]),
    )
    assert "".join(part.get("refusal") or part["text"]["value"] for part in parts) == want["text"]
    if "reasoning" in want:
        thoughts = [step["step_details"]["reasoning"]["text"] for step in entry["steps"]]
        assert "".join(thoughts) == want["reasoning"]
    for note in want.get("annotations", []):
        assert [one for part in parts for one in part["text"]["annotations"]].count(note) == 1
    if want["status"] == "failed":
        # One line for whoever has to find out why, with the code that the user was told.
        lines = [record.message for record in caplog.records if f"run {run_id}" in record.message]
        assert sum("failed: " + run["last_error"]["code"] in line for line in lines) == 1, lines
