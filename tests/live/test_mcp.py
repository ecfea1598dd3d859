"""MCP servers of the app's own, with a real one of the package ``mcp``: called, killed, brought back, hung."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pytest

from assistream_flask.testing import OfflineServer
from tests.conftest import at_once, wait_until
from tests.gunicorn_server import Gunicorn, running
from tests.mcp_server import McpProgram, mcp_server

APP: Final = """
import asyncio, itertools, json, os
from flask import Flask, current_app, jsonify
from openai import OpenAI
from assistream_flask import Assistant, McpServer, create_blueprint
from assistream_flask.runs import mcp_tools

app = Flask(__name__)
app.config.update(SECRET_KEY="only for tests", TOKEN="secret", **json.loads(os.environ["APP_CONFIG"]))
mcp_tools._AGAIN_SECONDS = 0.5
calls = itertools.count()

def headers(context):
    # It is the app's, and may wait, in the midst of the loop of coroutines.
    import time; time.sleep(0.002)
    return {"Authorization": f"Bearer {current_app.config['TOKEN']}-{next(calls) if context.tool_call_id else 'list'}",
            "X-Person": context.owner}

def server(name, **options):
    seconds = float(os.environ["MCP_SECONDS"])
    return McpServer(os.environ["MCP_URL"], name=name, headers=headers, timeout=seconds, list_seconds=1, **options)

async def local(seconds: float) -> str:
    "Wait here."
    await asyncio.to_thread(__import__("time").sleep, seconds)
    return "waited"

assistants = [
    Assistant(dialect, model="m", upstream=dialect, tools=[local], instructions="Be kind.", max_rounds=100, mcp=[
        server("dice"), server("files", allowed=["remove"], approval=True)])
    for dialect in ("responses", "chat", "assistants")
]
def client():
    return OpenAI(base_url=os.environ["MODEL_URL"], api_key="k")

app.register_blueprint(create_blueprint(assistants, client=client, owner=lambda: "ann"), url_prefix="/assistream")

@app.get("/page")
def page():
    return "<!doctype html><title>test</title>"
"""

KINDS: Final = ["gevent", "gthread", "gevent on a server with sessions"]
LISTED: Final = ["add", "remove", "slow", "fail", "much", "who", "draw"]


class World:
    """An app, its model server and its MCP server."""

    def __init__(self, gunicorn: Gunicorn, model: OfflineServer, mcp: McpProgram) -> None:
        self.gunicorn, self.model, self.mcp = gunicorn, model, mcp

    def ask(self, *lines: str, by: str = "responses") -> Any:
        """Give the entry of an answer, in a thread of its own."""
        thread = self.gunicorn.thread()
        self.gunicorn.run(thread, by, content="\n".join(lines))
        return self.gunicorn.settled(thread)[-1]

    def told(self) -> Any:
        """Give what the model server was asked last."""
        return self.model.requests[-1]


def calls(entry: Any) -> list[Any]:
    return [
        {**call["function"], "status": call["status"], "error": call["error"]}
        for step in entry["steps"]
        for call in step["step_details"].get("tool_calls", ())
    ]


def outputs(entry: Any) -> list[Any]:
    return [call["output"] for call in calls(entry)]


@contextmanager
def a_world(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: int) -> Iterator[World]:
    kind, _, is_legacy = kind.partition(" ")
    with OfflineServer(delay=0) as model, mcp_server(tmp_path / "mcp", *(["legacy"] if is_legacy else [])) as mcp:
        monkeypatch.setenv("MODEL_URL", f"{model.base_url}")
        monkeypatch.setenv("MCP_URL", mcp.url)
        monkeypatch.setenv("MCP_SECONDS", str(seconds))
        options = ["--threads", "40"] if kind == "gthread" else []
        with running(tmp_path, app=APP, worker_class=kind, options=options, max_runs=200) as gunicorn:
            yield World(gunicorn, model, mcp)
            # Neither a key, nor a loop that found another one running.
            assert not re.search("secret|RuntimeError", gunicorn.log())


@pytest.fixture(params=KINDS)
def world(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    with a_world(request.param, tmp_path, monkeypatch, 60) as world:
        yield world


@pytest.fixture(params=KINDS)
def hasty_world(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    with a_world(request.param, tmp_path, monkeypatch, 4) as world:
        yield world


def test_a_server_s_tools_are_called_with_fresh_headers_and_errors_are_told_to_the_model(world: World) -> None:
    for dialect in ("responses", "chat", "assistants"):
        entry = world.ask('call dice__add {"first": 1, "second": 2}', "call dice__who", "call dice__fail", by=dialect)
        assert entry["run"]["status"] == "completed"
        assert outputs(entry) == ["3", "ann", "Error executing tool fail"]
        assert [call["error"] for call in calls(entry)] == [None, None, "failed"]
        assert entry["run"]["metadata"] == {}
    asked = world.model.requests[-1]
    assert {tool["name"] for tool in asked.tools} == {"local", "files__remove", *(f"dice__{name}" for name in LISTED)}
    called = [one["authorization"] for one in world.mcp.asked if one["method"] == "tools/call"]
    assert len(set(called)) == len(called) == 9
    assert all(one["authorization"].startswith("Bearer secret-") for one in world.mcp.asked)
    # What another answers is cut as any output is, and what is no text is told in a line.
    entry = world.ask(
        'call dice__much {"characters": 150000}', "call dice__draw", 'call dice__much {"characters": 3000000}'
    )
    cut, drawn, too_much = outputs(entry)
    assert cut.endswith("[Cut: these are 100,000 of 150,000 characters.]")
    assert drawn == "A die:\n[image, image/png: not shown]"
    assert too_much == "The tool's answer is too much to be read. Ask it for less."


def test_a_call_that_needs_approval_is_made_once_it_is_allowed_and_once(world: World) -> None:
    gunicorn = world.gunicorn
    thread = gunicorn.thread()
    [run_id] = gunicorn.run(thread, "responses", content='call files__remove {"path": "a.txt"}')
    wait_until(lambda: gunicorn.entries(thread)[-1]["run"]["status"] == "requires_action", 20)
    run = gunicorn.entries(thread)[-1]["run"]
    [call] = run["required_action"]["submit_tool_outputs"]["tool_calls"]
    assert (call["function"]["name"], call["needs"]) == ("files__remove", "approval")
    assert world.mcp.made == []
    body = {"approvals": [{"tool_call_id": call["id"], "approve": True, "arguments": {"path": "b.txt"}}]}
    gunicorn.request("POST", f"{thread}/runs/{run_id}/approvals", body)
    assert outputs(gunicorn.settled(thread)[-1]) == ["b.txt is removed"]
    assert world.mcp.made == ["remove b.txt"]


def test_a_call_that_is_allowed_while_its_server_is_away_is_not_made_and_the_run_goes_on(world: World) -> None:
    gunicorn = world.gunicorn
    thread = gunicorn.thread()
    [run_id] = gunicorn.run(thread, "responses", content='call files__remove {"path": "a.txt"}')
    wait_until(lambda: gunicorn.entries(thread)[-1]["run"]["status"] == "requires_action", 20)
    [call] = gunicorn.entries(thread)[-1]["run"]["required_action"]["submit_tool_outputs"]["tool_calls"]
    world.mcp.kill()
    wait_until(lambda: world.ask("Hi")["run"]["metadata"] != {}, 20)
    body = {"approvals": [{"tool_call_id": call["id"], "approve": True}]}
    gunicorn.request("POST", f"{thread}/runs/{run_id}/approvals", body)
    entry = gunicorn.settled(thread)[-1]
    assert outputs(entry) == ["The server of this tool cannot be reached now. The tool was not executed."]
    assert (entry["run"]["status"], calls(entry)[0]["error"]) == ("completed", "unreachable")
    assert entry["run"]["metadata"] == {"mcp_unavailable": "dice, files"}


def test_a_server_that_is_away_leaves_runs_without_its_tools_that_say_so_and_comes_back(world: World) -> None:
    assert outputs(world.ask('call dice__add {"first": 1, "second": 2}')) == ["3"]
    world.mcp.kill()
    # The list is known for a second more.
    wait_until(lambda: world.ask("Hi")["run"]["metadata"] == {"mcp_unavailable": "dice, files"}, 20)
    entry = world.ask('call dice__add {"first": 3, "second": 4}', 'call local {"seconds": 0}')
    assert (entry["run"]["status"], outputs(entry)) == ("completed", ["waited"])
    assert {tool["name"] for tool in world.told().tools} == {"local"}
    assert world.told().instructions.startswith("Be kind.\n\nThe tools of dice, files cannot be reached at the moment.")
    log = world.gunicorn.log()
    # Of the two, whichever fails first: it is one complaint.
    assert re.search("the MCP server (dice|files) cannot be asked for its tools: runs go on without them", log)
    world.mcp.start()
    wait_until(lambda: world.ask("Hi")["run"]["metadata"] == {}, 20)
    assert outputs(world.ask('call dice__add {"first": 3, "second": 4}')) == ["7"]


def test_a_server_that_dies_in_the_midst_of_a_call_fails_that_call_and_it_is_not_made_again(world: World) -> None:
    thread = world.gunicorn.thread()
    world.gunicorn.run(thread, "responses", content='call dice__slow {"seconds": 2.5}')
    wait_until(lambda: "slow 2.5" in world.mcp.made, 20)
    world.mcp.kill()
    entry = world.gunicorn.settled(thread)[-1]
    assert entry["run"]["status"] == "completed"
    assert [(call["status"], call["error"]) for call in calls(entry)] == [("failed", "unreachable")]
    assert "could not be reached, or failed" in outputs(entry)[0]
    assert world.mcp.made == ["slow 2.5"]


def test_a_server_that_hangs_is_waited_for_no_longer_than_its_time(hasty_world: World) -> None:
    world = hasty_world
    entry = world.ask('call dice__slow {"seconds": 600}')
    assert outputs(entry) == ["Timed out after 4 seconds."]
    world.mcp.kill(signal.SIGSTOP)
    # Neither its list: the run goes on without.
    wait_until(lambda: world.ask("Hi")["run"]["metadata"] == {"mcp_unavailable": "dice, files"}, 40)
    world.mcp.kill(signal.SIGCONT)
    wait_until(lambda: outputs(world.ask('call dice__add {"first": 1, "second": 1}')) == ["2"], 40)


def test_a_run_that_is_cancelled_ends_the_wait_for_a_server(world: World) -> None:
    gunicorn = world.gunicorn
    thread = gunicorn.thread()
    [run_id] = gunicorn.run(thread, "responses", content='call dice__slow {"seconds": 600}')
    wait_until(lambda: "slow 600.0" in world.mcp.made, 20)
    gunicorn.request("POST", f"{thread}/runs/{run_id}/cancel", {})
    assert gunicorn.settled(thread)[-1]["run"]["status"] == "cancelled"


def test_many_calls_at_once_each_get_their_own_answer_beside_other_coroutines(world: World) -> None:
    def ask(number: int) -> list[Any]:
        lines = [f'call dice__add {{"first": {number}, "second": {other}}}' for other in range(5)]
        return outputs(world.ask(*lines, 'call local {"seconds": 0.05}'))

    found = at_once(10, ask)
    assert found == [[*(str(number + other) for other in range(5)), "waited"] for number in range(10)]
    assert len(world.mcp.made) == 50
