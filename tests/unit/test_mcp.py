"""MCP servers: what is refused where they are named, what a hostile one can do, what a model is told of its tools."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import subprocess
import sys
import threading
import time
import tomllib
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, Self

import flask
import pytest

from assistream_flask import Assistant, ConfigurationError, McpServer, ToolContext, mcp, tool
from assistream_flask.platform import mcp_spans
from assistream_flask.platform.log_throttle import LogThrottle
from assistream_flask.runs import mcp_tools
from assistream_flask.runs.mcp_tools import REFUSED, TOO_LARGE, UNKNOWN, Equipment, McpTools
from assistream_flask.runs.tool_execution import Outcome, ToolExecutions
from assistream_flask.upstream import mcp_session, tool_schema
from assistream_flask.upstream.tool_schema import UnfitError
from assistream_flask.web import doctor
from tests.conftest import wait_until
from tests.programs import free_port, passes_under_gevent

CONTEXT: Final = ToolContext("thread_1", "run_1", "clerk", "ann", "call_1")
SECONDS: Final = 20.0
URL: Final = "https://mcp.example.org/mcp"


# Where they are named


@pytest.mark.parametrize(
    ("url", "options", "said"),
    [
        ("npx -y server", {}, "commands (stdio) cannot be used"),
        (["npx", "server"], {}, "commands (stdio) cannot be used"),
        ("mcp.example.org/mcp", {}, "give the address of a server that speaks streamable HTTP"),
        ("ftp://example.org", {}, "is none of HTTP"),
        ("https://", {}, "is none of HTTP"),
        ("https://example.org/a b", {}, "is none of HTTP"),
        ("https://ann:pa55word@example.org/mcp", {}, 'give headers={"Authorization": ...} instead'),
        ("https://example.org:pa55word/mcp", {}, "cannot be read"),
        ("https://example.org/mcp#tools", {}, "remove it and what is behind it"),
        (URL, {"name": "a__b"}, "use 1 to 24 letters"),
        (URL, {"name": "a_"}, "use 1 to 24 letters"),
        (URL, {"name": "a" * 25}, "use 1 to 24 letters"),
        (URL, {"name": 3}, "use 1 to 24 letters"),
        (URL, {"timeout": 0}, "timeout=0: give a number of seconds above 0"),
        (URL, {"list_seconds": "5"}, "list_seconds='5': give a number"),
        (URL, {"sequential": 1}, "use True or False"),
        (URL, {"allowed": "add"}, "give a list of names of tools"),
        (URL, {"approval": "add"}, "give a list of names of tools"),
        (URL, {"approval": lambda one: True}, "approval= cannot be called"),
        (URL, {"approval": ["remove"], "allowed": ["add"]}, "approval= names 'remove', which allowed= has not"),
        (URL, {"approval": ["remove"]}, "name all that may be called in allowed=, or give approval=True"),
        (URL, {"headers": "pa55word"}, "headers= gave no dict"),
        (URL, {"headers": {"X-Key": b"pa55word"}}, "something else than texts"),
        (URL, {"headers": {"X Key": "pa55word"}}, "no header's"),
        (URL, {"headers": {"X-Key": "pa55word\r\nHost: x"}}, "that no header can have"),
        (URL, {"headers": {"Mcp-Session-Id": "pa55word"}}, "which assistream sends itself"),
        (URL, {"headers": lambda one, two: {}}, "takes several arguments"),
    ],
)
def test_a_server_that_cannot_work_is_refused_with_what_to_do_and_no_secret(
    url: Any, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigurationError) as refused:
        McpServer(url, **options)
    assert said in str(refused.value)
    assert "pa55word" not in str(refused.value)


def test_headers_of_an_async_def_are_refused() -> None:
    async def headers() -> dict[str, str]:
        return {}

    with pytest.raises(ConfigurationError, match="give a plain function"):
        McpServer(URL, headers=headers)  # type: ignore[arg-type]


def test_without_its_package_a_server_is_refused_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "mcp" else found(name))
    with pytest.raises(ConfigurationError, match=r"pip install 'assistream-flask\[mcp\]'"):
        McpServer(URL)


@pytest.mark.parametrize("version", ["1.27.0", "2.2.9", "0.1"])
def test_a_client_that_is_too_old_is_refused_with_what_to_install(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = importlib.metadata.distribution("mcp")
    monkeypatch.setattr(type(installed), "version", version)
    with pytest.raises(ConfigurationError, match=rf"mcp {version}, and has to be 2.3: pip install 'assistream"):
        McpServer(URL)


def test_the_lowest_version_of_the_client_is_that_of_the_extra() -> None:
    extras = tomllib.loads(Path("pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras["mcp"][0].startswith("mcp>=" + ".".join(map(str, mcp._LOWEST)))


SHADOWED: Final = """
import sys
from contextlib import nullcontext
import assistream_flask.mcp
from assistream_flask import Assistant, ConfigurationError, McpServer
from assistream_flask.platform.log_throttle import LogThrottle
from assistream_flask.runs.mcp_tools import McpTools
from assistream_flask.runs.tool_execution import ToolExecutions
from assistream_flask.web import doctor
from assistream_flask import ToolContext

def server():
    return McpServer("http://127.0.0.1:9/mcp", name="dice")

sys.path.insert(0, sys.argv[1])
try:
    server()
except ConfigurationError as error:
    print(error)
assistream_flask.mcp._check_client = lambda label: None
executions = ToolExecutions(LogThrottle())
found = McpTools(executions.loop, LogThrottle()).ask(
    Assistant("a", model="m", mcp=[server()]), ToolContext("", "", "", "", ""), nullcontext)
assert found.wait(20)
print(found.missing)
print(doctor._mcp_server(server(), dict))
executions.close()
"""


def test_a_module_of_the_app_s_own_in_the_client_s_place_is_refused_logged_and_found_by_the_doctor(
    tmp_path: Path,
) -> None:
    (tmp_path / "mcp.py").touch()
    command = [sys.executable, "-c", SHADOWED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    refused, missing, *finding = done.stdout.splitlines()
    assert f"{str(tmp_path / 'mcp.py')!r} stands before that: give it another name" in refused
    assert missing == "['dice']"
    assert "FAIL" in finding[0]
    assert "pip install" in " ".join(finding)
    assert "the MCP server dice cannot be asked for its tools" in done.stderr


def test_a_server_s_address_is_shown_without_what_may_be_a_key() -> None:
    assert repr(McpServer(URL + "?key=pa55word")) == f"McpServer({URL!r}, name='mcp_example_org')"
    assert McpServer("http://127.0.0.1:9/mcp").name == "127_0_0_1"


def test_names_of_two_servers_and_of_the_app_never_meet() -> None:
    @tool(name="dice__roll")
    def roll() -> str:
        """Roll."""
        return "4"

    one, two = McpServer(URL, name="dice"), McpServer(URL + "/2", name="dice")
    with pytest.raises(ConfigurationError, match="Assistant 'a': two MCP servers have the name 'dice'"):
        Assistant("a", model="m", mcp=[one, two])
    with pytest.raises(ConfigurationError, match="the tool 'dice__roll' has a name as those of the MCP server 'dice'"):
        Assistant("a", model="m", mcp=[one], tools=[roll])
    for given in (one, "dice", [URL]):
        with pytest.raises(ConfigurationError, match="mcp"):
            Assistant("a", model="m", mcp=given)  # type: ignore[arg-type]


# What a server can do


class Server:
    """Answers each method as ``answers`` says: with a result, with an error, or however a function likes."""

    def __init__(self, **answers: dict[str, Any] | Callable[[BaseHTTPRequestHandler, Any], None]) -> None:
        self.answers: dict[str, Any] = {
            "initialize": {
                "protocolVersion": "2025-11-25",
                "capabilities": {"tools": {}},
                "serverInfo": {"name": "fake", "version": "1"},
            },
            **{name.replace("__", "/"): answer for name, answer in answers.items()},
        }
        self.asked: list[tuple[str | None, str | None, Any]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.asked.append((body.get("method"), self.headers["X-Key"], body.get("params")))
                answer = outer.answers.get(body.get("method"))
                if "id" not in body or "method" not in body:
                    self.send_response(202)
                    self.end_headers()
                elif callable(answer):
                    answer(self, body)
                else:
                    told = {"error": {"code": -32601, "message": "no"}} if answer is None else {"result": answer}
                    send(self, {"jsonrpc": "2.0", "id": body["id"], **told})

            def do_GET(self) -> None:
                outer.asked.append(("GET", self.headers["X-Key"], None))
                send(self, {})

            def do_DELETE(self) -> None:
                outer.asked.append(("DELETE", self.headers["X-Key"], None))
                answer = outer.answers.get("DELETE")
                if callable(answer):
                    answer(self, None)
                else:
                    send(self, {})

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/mcp"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def send(handler: BaseHTTPRequestHandler, said: Any, status: int = 200, **headers: str) -> None:
    body = said if isinstance(said, bytes) else json.dumps(said).encode()
    handler.send_response(status)
    for name, value in {"Content_Type": "application/json", **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def endless(kind: str, piece: bytes) -> Any:
    """Give an answer that does not end."""

    def answer(handler: BaseHTTPRequestHandler, _: Any) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", kind)
        handler.end_headers()
        try:
            while True:
                handler.wfile.write(piece)
        except OSError:
            handler.close_connection = True

    return answer


def compressed(handler: BaseHTTPRequestHandler, _: Any) -> None:
    packer = zlib.compressobj(wbits=31)
    send(handler, packer.compress(b" " * 10_000_000) + packer.flush(), Content_Encoding="gzip")


def hung(handler: BaseHTTPRequestHandler, _: Any) -> None:
    handler.rfile.read(1)


def with_sessions(server: Server) -> None:
    """Have it keep sessions, which it is told the end of."""
    initialized = server.answers["initialize"]

    def begin(handler: BaseHTTPRequestHandler, body: Any) -> None:
        send(handler, {"jsonrpc": "2.0", "id": body["id"], "result": initialized}, Mcp_Session_Id="pa55word")

    server.answers["initialize"] = begin


class Dribble:
    """Answers with a header that does not end, a byte now and then. ``is_left`` once nobody reads it any more."""

    def __init__(self) -> None:
        self.is_left = threading.Event()

    def __call__(self, handler: BaseHTTPRequestHandler, _: Any) -> None:
        try:
            handler.wfile.write(b"HTTP/1.1 200 OK\r\nx: ")
            while True:
                handler.wfile.write(b"a")
                time.sleep(0.1)
        except OSError:
            handler.close_connection = True
            self.is_left.set()


def error(code: int, said: str) -> Any:
    def answer(handler: BaseHTTPRequestHandler, body: Any) -> None:
        send(handler, {"jsonrpc": "2.0", "id": body["id"], "error": {"code": code, "message": said}})

    return answer


NOTICE: Final = b'event: message\ndata: {"jsonrpc": "2.0", "method": "notifications/nothing", "params": {"a": 1}}\n\n'
QUESTION: Final = b'data: {"jsonrpc": "2.0", "id": 1, "method": "ping"}\n\n'
LOUD: Final = b'event: message\ndata: {"jsonrpc": "2.0", "method": "notifications/message", "params": 3}\n\n'
HOSTILE: Final = [
    (endless("application/json", b" " * 65_536), TOO_LARGE),
    (endless("text/event-stream", b"data: " + b"x" * 65_536), TOO_LARGE),
    (endless("text/event-stream", NOTICE * 200), TOO_LARGE),
    (endless("text/event-stream", LOUD * 200), UNKNOWN),
    (endless("text/event-stream", QUESTION * 200), TOO_LARGE),
    (endless("text/event-stream", b": \n" * 10_000), TOO_LARGE),
    (compressed, UNKNOWN),
    (hung, "Timed out after 4 seconds."),
    (error(-32602, "there is no such die"), REFUSED + "there is no such die"),
    (error(-32603, "Traceback: the key is pa55word"), UNKNOWN),
    (lambda handler, _: send(handler, b"{"), UNKNOWN),
    (lambda handler, _: send(handler, b"[" * 90_000), UNKNOWN),
    (lambda handler, _: send(handler, b"no", 401), UNKNOWN),
    (lambda handler, _: send(handler, b"no", 404), UNKNOWN),
    (lambda handler, _: send(handler, {"jsonrpc": "2.0", "id": 99, "result": {}}), "Timed out after 4 seconds."),
    (lambda handler, _: send(handler, b"<p>", Content_Type="text/html"), UNKNOWN),
    ({"content": "all of it"}, UNKNOWN),
    ({"content": [], "structuredContent": {"a": [{}] * 100_001}}, TOO_LARGE),
    ({"content": [{"type": "text", "text": "4"}], "isError": True}, "4"),
    ({"content": [{"type": "text", "text": "a \0"}]}, "a \ufffd"),
    ({"content": [{"type": "text", "text": "\ud800"}]}, UNKNOWN),
    ({"content": [], "structuredContent": {"a": [1]}}, '{"a":[1]}'),
    ({"content": []}, ""),
    (
        {
            "content": [
                {"type": "text", "text": "one"},
                {"type": "resource", "resource": {"uri": "x:y", "text": "two"}},
                {"type": "resource", "resource": {"uri": "x:y", "blob": "aGk=", "mimeType": "application/pdf"}},
                {"type": "resource_link", "name": "three", "uri": "https://example.org/3"},
                {"type": "audio", "data": "aGk=", "mimeType": "audio/wav"},
            ]
        },
        "one\ntwo\n[resource, application/pdf: not shown]\n[three: https://example.org/3]\n"
        "[audio, audio/wav: not shown]",
    ),
]


@pytest.fixture
def executions() -> Iterator[ToolExecutions]:
    made = ToolExecutions(LogThrottle())
    yield made
    made.close()


def named(*names: str, **more: Any) -> dict[str, Any]:
    return {"tools": [{"name": name, "inputSchema": {"type": "object"}, **more} for name in names]}


def equipped(tools: McpTools, *servers: McpServer, **options: Any) -> Equipment:
    assistant = Assistant("clerk", model="m", mcp=servers, **options)
    found = tools.ask(assistant, CONTEXT, nullcontext)
    assert found.wait(SECONDS)
    return found


@pytest.mark.parametrize(("answer", "told"), HOSTILE)
def test_whatever_a_server_answers_is_told_in_time_in_bounds_and_without_what_was_sent(
    answer: Any, told: str | tuple[str, ...], executions: ToolExecutions, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with Server(tools__list=named("roll"), tools__call=answer) as server:
        mine = McpServer(server.url, name="dice", headers={"X-Key": "pa55word"}, timeout=4)
        assistant = equipped(McpTools(executions.loop, LogThrottle()), mine).assistant()
        execution = executions.start(assistant.tools["dice__roll"], {"self": 1, "arguments": {}}, CONTEXT, nullcontext)
        assert execution.wait(SECONDS)
        assert execution.outcome.output in (told if isinstance(told, tuple) else (told,))
        [(_, key, params)] = [one for one in server.asked if one[0] == "tools/call"]
        assert (key, params["name"], params["arguments"]) == ("pa55word", "roll", {"self": 1, "arguments": {}})
    # Once for all that it sent, and nothing of the key.
    assert "pa55word" not in caplog.text.replace("the key is pa55word", "")
    assert len(caplog.records) <= 1
    # Nobody reads what a server has to say by itself.
    assert "GET" not in [method for method, *_ in server.asked]


def test_what_a_server_asks_by_itself_is_not_answered(executions: ToolExecutions) -> None:
    def chatty(handler: BaseHTTPRequestHandler, body: Any) -> None:
        result = {"content": [{"type": "text", "text": "4"}]}
        answer = {"jsonrpc": "2.0", "id": body["id"], "result": result}
        said = (QUESTION + NOTICE) * 50 + b"data: " + json.dumps(answer).encode() + b"\n\n"
        send(handler, said, Content_Type="text/event-stream")

    with Server(tools__list=named("roll"), tools__call=chatty) as server:
        mine = McpServer(server.url, name="dice", timeout=4)
        roll = equipped(McpTools(executions.loop, LogThrottle()), mine).assistant().tools["dice__roll"]
        execution = executions.start(roll, {}, CONTEXT, nullcontext)
        assert execution.wait(SECONDS)
        assert execution.outcome == Outcome("completed", "4")
        assert {method for method, *_ in server.asked} <= {
            *("server/discover", "initialize", "notifications/initialized", "tools/list", "tools/call")
        }


def test_a_redirect_elsewhere_is_not_followed(executions: ToolExecutions) -> None:
    with Server(tools__list=named("roll")) as other, Server() as server:
        for status in (301, 302, 303, 307, 308):
            server.answers["tools/list"] = lambda handler, _, at=status: send(handler, b"", at, Location=other.url)
            mine = McpServer(server.url, name=f"dice{status}", headers={"X-Key": "pa55word"})
            assert equipped(McpTools(executions.loop, LogThrottle()), mine).missing == [f"dice{status}"]
        assert other.asked == []


def test_a_list_is_told_within_bounds(executions: ToolExecutions, caplog: pytest.LogCaptureFixture) -> None:
    deep: dict[str, Any] = {"type": "object"}
    for _ in range(50):
        deep = {"type": "object", "properties": {"a": deep}}
    strict = {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    tools = [
        {"name": "roll", "description": "x" * 10_000, "inputSchema": {"type": "object"}},
        {"name": "a.b", "inputSchema": strict},
        {"name": "a/b", "inputSchema": strict},
        {"name": "n" * 60, "inputSchema": strict},
        {"name": "wide", "inputSchema": {"type": "object", "description": "x" * 20_000}},
        {"name": "deep", "inputSchema": deep},
    ]
    with Server(tools__list={"tools": tools}) as server:
        assistant = equipped(McpTools(executions.loop, LogThrottle()), McpServer(server.url, name="dice")).assistant()
    specs = {spec.name: spec for spec in assistant.specs}
    assert set(specs) == {"dice__roll", "dice__a_b", "dice__deep"}
    assert len(specs["dice__roll"].description) == 4_000
    assert (specs["dice__a_b"].parameters, specs["dice__a_b"].strict) == (strict, False)
    assert specs["dice__roll"].parameters == {"type": "object", "properties": {}}
    assert "tools that no model can be told of" in caplog.text


def page(handler: BaseHTTPRequestHandler, body: Any) -> None:
    at = int((body.get("params") or {}).get("cursor", 0))
    result = {**named(*(f"roll{at}_{one}" for one in range(10))), "nextCursor": str(at + 1)}
    send(handler, {"jsonrpc": "2.0", "id": body["id"], "result": result})


def test_tools_that_are_allowed_are_found_however_far_behind_and_no_further_is_asked(
    executions: ToolExecutions,
) -> None:
    with Server(tools__list=page) as server:
        mine = McpServer(server.url, name="dice", allowed=["roll1_3", "roll30_2"])
        found = equipped(McpTools(executions.loop, LogThrottle()), mine)
        assert list(found.assistant().tools) == ["dice__roll1_3", "dice__roll30_2"]
        assert sum(method == "tools/list" for method, *_ in server.asked) == 31


def test_a_list_without_end_is_cut(executions: ToolExecutions) -> None:
    with Server(tools__list=page) as server:
        found = equipped(McpTools(executions.loop, LogThrottle()), McpServer(server.url, name="dice"))
        assert len(found.assistant().tools) == mcp.MOST_TOOLS
        assert sum(method == "tools/list" for method, *_ in server.asked) <= 20


def test_a_list_is_asked_for_once_by_all_at_once_and_kept_for_its_time_by_headers(executions: ToolExecutions) -> None:
    keys = iter("aab")
    with Server(tools__list=named("roll", "add")) as server:
        tools = McpTools(executions.loop, LogThrottle())
        mine = McpServer(server.url, name="dice", allowed=["roll"], headers=lambda: {"X-Key": next(keys)})
        assistant = Assistant("clerk", model="m", mcp=[mine])
        both = [tools.ask(assistant, CONTEXT, nullcontext) for _ in range(2)]
        assert all(one.wait(SECONDS) and list(one.assistant().tools) == ["dice__roll"] for one in both)
        assert equipped(tools, mine).missing == []
        assert [key for method, key, _ in server.asked if method == "tools/list"] == ["a", "b"]
        short = McpServer(server.url, name="short", list_seconds=0.001)
        for _ in range(2):
            assert equipped(tools, short).missing == []
            time.sleep(0.01)
        assert sum(method == "tools/list" for method, *_ in server.asked) == 4


def test_a_run_goes_on_without_servers_that_cannot_be_asked_and_its_model_is_told(
    executions: ToolExecutions, caplog: pytest.LogCaptureFixture
) -> None:
    def no_headers() -> dict[str, str]:
        raise KeyError("no token")

    away = McpServer(f"http://127.0.0.1:{free_port()}/mcp", name="away")
    bad = McpServer(URL, name="bad", headers=no_headers)
    tools = McpTools(executions.loop, LogThrottle())
    with Server(tools__list=named("roll")) as server:
        dice = McpServer(server.url, name="dice")
        found = equipped(tools, away, dice, bad, instructions="Be kind.")
    assistant = found.assistant()
    assert found.missing == ["away", "bad"]
    assert list(assistant.tools) == ["dice__roll"]
    assert (assistant.instructions or "").startswith(
        "Be kind.\n\nThe tools of away, bad cannot be reached at the moment."
    )
    assert "the MCP server away cannot be asked for its tools" in caplog.text
    assert "headers= of the MCP server bad failed" in caplog.text
    # Those that the model server keeps itself would be replaced.
    kept = Assistant("asst_1", upstream="assistants", mcp=[away])
    assert tools.ask(kept, CONTEXT, nullcontext).assistant().instructions is None


def test_headers_are_asked_for_within_the_app_s_context_for_the_list_and_for_each_call(
    executions: ToolExecutions,
) -> None:
    app = flask.Flask("shop")

    def headers(context: ToolContext) -> dict[str, str]:
        return {"X-Key": f"{flask.current_app.name} {context.owner} {context.tool_call_id}"}

    with Server(tools__list=named("roll"), tools__call={"content": []}) as server:
        mine = McpServer(server.url, name="dice", headers=headers)
        tools, assistant = McpTools(executions.loop, LogThrottle()), Assistant("clerk", model="m", mcp=[mine])
        listing = ToolContext("thread_1", "run_1", "clerk", "ann", "")
        found = tools.ask(assistant, listing, app.app_context)
        assert found.wait(SECONDS)
        made = found.assistant().tools["dice__roll"]
        for _ in range(2):
            execution = executions.start(made, {}, CONTEXT, app.app_context)
            assert execution.wait(SECONDS)
            assert execution.outcome == Outcome("completed", "")
        keys = {(method, key) for method, key, _ in server.asked if str(method).startswith("tools/")}
    assert keys == {("tools/list", "shop ann"), ("tools/call", "shop ann call_1")}


def test_approval_is_asked_for_by_name_or_by_arguments(executions: ToolExecutions) -> None:
    with Server(tools__list=named("roll", "remove")) as server:
        tools = McpTools(executions.loop, LogThrottle())
        asking = McpServer(server.url, name="dice", approval=["remove"], allowed=["roll", "remove"], sequential=True)
        some = equipped(tools, asking).assistant().tools
        assert [one.approval for one in some.values()] == [False, True]
        assert all(one.sequential and one.kind == "server" and not one.idempotent for one in some.values())
        by = equipped(tools, McpServer(server.url, name="dice", approval=lambda arguments, _: "all" in arguments))
        approval = by.assistant().tools["dice__roll"].approval
        assert callable(approval)
        assert (approval({"all": 1}, CONTEXT), approval({}, CONTEXT)) == (True, False)


def test_what_the_app_logs_of_its_own_sessions_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    mcp_session.keep_quiet()
    mcp_session.keep_quiet()
    logging.getLogger("mcp.client.streamable_http").info("of the app")
    assert caplog.messages == ["of the app"]


def test_the_lists_that_a_worker_keeps_are_limited(executions: ToolExecutions) -> None:
    numbers = iter(range(1000))
    with Server(tools__list=named("roll")) as server:
        tools = McpTools(executions.loop, LogThrottle())
        mine = McpServer(server.url, name="dice", headers=lambda: {"X-Key": str(next(numbers))})
        # One after the other: so many sessions at once take a slow machine longer than a list may.
        for _ in range(210):
            assert tools.ask(Assistant("clerk", model="m", mcp=[mine]), CONTEXT, nullcontext).wait(SECONDS)
        assert len(tools._lists) <= 200


# Without types. The package mcp brings it.
DRAFT: Final[Any] = importlib.import_module("jsonschema").Draft202012Validator
FIT: Final[list[dict[str, Any]]] = [
    {"properties": {"a": {"type": ["string", "null"], "pattern": "^a+$", "minLength": 1}, "b": True}},
    {"properties": {"a": {"$ref": "#/$defs/b"}}, "$defs": {"b": {"type": "array", "items": {"$ref": "#"}}}},
    {"definitions": {"a/b": {"anyOf": [{}, {}]}}, "properties": {"a": {"$ref": "#/definitions/a~1b/anyOf/1"}}},
    {"properties": {"a": {"anyOf": [{"enum": ["a", 1]}, {"const": None}], "x-own": [3], "default": {"type": 3}}}},
    {"dependencies": {"a": ["b"], "b": {"type": "object"}}, "dependentRequired": {"a": ["b"]}, "required": ["a"]},
    {"additionalProperties": False, "patternProperties": {"^a": {}}, "$id": "https://example.org/a", "$anchor": "a"},
]
UNFIT: Final[list[dict[str, Any]]] = [
    {"type": "array"},
    {"type": ["object"]},
    {"properties": 5},
    {"properties": []},
    {"properties": {"a": 5}},
    {"properties": {"a": None}},
    {"properties": {"a": {"type": "foo"}}},
    {"properties": {"a": {"type": []}}},
    {"properties": {"a": {"items": [{"type": "string"}]}}},
    {"properties": {"a": {"exclusiveMinimum": True}}},
    {"properties": {"a": {"minLength": -1}}},
    {"properties": {"a": {"multipleOf": 0}}},
    {"properties": {"a": {"pattern": "("}}},
    {"properties": {"a": {"pattern": "a" * 1_001}}},
    {"properties": {"a": {"required": True}}},
    {"properties": {"a": {"enum": "ab"}}},
    {"properties": {"a": {"description": 3}}},
    {"properties": {"a": {"anyOf": []}}},
    {"patternProperties": {"[": {}}},
    {"required": ["a", "a"]},
    {"oneOf": []},
    {"properties": {"a": {"$ref": "https://example.org/a"}}},
    {"properties": {"a": {"$ref": "#/$defs/a"}}},
    {"properties": {"a": {"$ref": "#a"}}},
    {"properties": {"a": {"$id": "https://example.org/", "$ref": "#/b"}}},
    {"properties": {"a": {"$ref": "#/$defs/a"}}, "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
    {"properties": {"a": {"maximum": float("inf")}}},
]


def test_a_tool_whose_schema_a_model_server_would_refuse_is_left_out_of_its_list() -> None:
    server = McpServer(URL, name="dice")
    for given in FIT:
        schema = {"type": "object", **given}
        DRAFT.check_schema(schema)
        [one] = mcp_tools.told(server, [("roll", "", schema)]).tools
        assert one.spec().parameters == {"properties": {}, **schema}
    for given in UNFIT:
        found = mcp_tools.told(server, [("add", "", {"type": "object"}), ("roll", "", {"type": "object", **given})])
        assert [one.name for one in found.tools] == ["add"]
        assert found.left_out["roll"]


def test_the_doctor_and_the_log_say_which_tool_is_left_out_and_why(
    executions: ToolExecutions, caplog: pytest.LogCaptureFixture
) -> None:
    tools = named("roll")["tools"] + [{"name": "bad", "inputSchema": {"type": "object", "minProperties": -1}}]
    with Server(tools__list={"tools": tools}) as server:
        mine = McpServer(server.url, name="dice")
        assert list(equipped(McpTools(executions.loop, LogThrottle()), mine).assistant().tools) == ["dice__roll"]
        finding = doctor._mcp_server(mine, dict)
    why = "such as 'bad': its schema has a wrong minProperties"
    assert why in caplog.text
    assert finding.level == "warn"
    assert why in finding.text
    assert "allowed=" in finding.fix


def test_no_schema_is_let_through_that_the_metaschema_refuses() -> None:
    # Each keyword with each value, in the midst of a schema.
    values = [True, 1, -1, 1.5, "a", "(", "^a#", None, [], ["a"], ["a", "a"], [{}], [3], {}, {"a": {}}, {"(": {}}]
    values += [{"a": ["a"]}, {"a": 3}, {"a": True}, "string", ["string", "null"], [[]], {"a": ["a", "a"]}]
    keywords = {*tool_schema._RULES, *tool_schema._ONE}
    for keyword in keywords:
        for value in values:
            schema = {"type": "object", "properties": {"a": {keyword: value}}}
            try:
                tool_schema.check(schema)
            except UnfitError:
                continue
            DRAFT.check_schema(schema)
    # And none is forgotten.
    for name, one in importlib.import_module("jsonschema_specifications").REGISTRY.items():
        if name.startswith("https://json-schema.org/draft/2020-12/"):
            assert set(one.contents["properties"]) - keywords <= {"const", "default"}


def test_what_a_schema_combines_at_its_top_is_told_in_words() -> None:
    one_of = [{"required": ["a"]}, {"required": ["b"]}]
    schema = {"type": "object", "properties": {"a": {}, "b": {}}, "oneOf": one_of}
    server = McpServer(URL, name="dice")
    found = mcp_tools.told(server, [("roll", "Roll.", schema), ("add", "x" * 5_000, schema)])
    spec, cut = [one.spec() for one in found.tools]
    assert spec.parameters == {"type": "object", "properties": {"a": {}, "b": {}}}
    said = 'The arguments are also to be valid by this JSON schema: {"oneOf":[{"required":["a"]},{"required":["b"]}]}'
    assert spec.description == f"Roll.\n\n{said}"
    assert cut.description.endswith(f"x\n\n{said}")
    assert len(cut.description) == 4_000
    long = {**schema, "oneOf": [{"required": ["a" * 3_000]}]}
    assert "roll" in mcp_tools.told(server, [("roll", "", long)]).left_out


def test_of_a_list_no_more_is_kept_than_fits() -> None:
    schema = {"type": "object", "a": [[]] * 6_000}
    found = mcp_tools.told(McpServer(URL, name="dice"), [(f"t{one}", "", schema) for one in range(98)])
    assert 8 < len(found.tools) < 20
    assert sum(one.size for one in found.tools) <= 200_000
    assert len(found.tools) + len(found.left_out) == 98


def test_lists_that_are_over_are_dropped_and_all_together_are_limited(
    executions: ToolExecutions, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = iter(range(1000))
    with Server(tools__list=named("roll")) as server:
        tools = McpTools(executions.loop, LogThrottle())

        def ask(**options: Any) -> None:
            equipped(
                tools, McpServer(server.url, name="dice", headers=lambda: {"X-Key": str(next(numbers))}, **options)
            )

        ask(list_seconds=0.001)
        time.sleep(0.01)
        ask()
        assert len(tools._lists) == 1
        [one] = tools._lists.values()
        monkeypatch.setattr(mcp_tools, "_MOST_KEPT", 3 * one.size)
        for _ in range(5):
            ask()
        # The newest was not there yet when it was looked at.
        assert len(tools._lists) == 4


def test_a_list_that_is_asked_for_anew_is_among_the_newest(
    executions: ToolExecutions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mcp_tools, "_MOST_LISTS", 2)
    with Server(tools__list=named("roll")) as server:
        tools = McpTools(executions.loop, LogThrottle())
        mine, other = (McpServer(server.url, name=name) for name in ("dice", "cards"))
        equipped(tools, mine)
        equipped(tools, other)
        next(iter(tools._lists.values())).until = 0
        equipped(tools, mine)
        equipped(tools, McpServer(server.url, name="more"))
        assert [name for _, name, *_ in tools._lists] == ["dice", "more"]


def test_a_session_that_ends_badly_or_not_at_all_takes_nothing_from_what_it_answered(
    executions: ToolExecutions,
) -> None:
    answer = {"content": [{"type": "text", "text": "4"}]}
    for end in (lambda handler, _: send(handler, b"no", 500), Dribble()):
        with Server(tools__list=named("roll"), tools__call=answer, DELETE=end) as server:
            with_sessions(server)
            mine = McpServer(server.url, name="dice", timeout=4)
            roll = equipped(McpTools(executions.loop, LogThrottle()), mine).assistant().tools["dice__roll"]
            execution = executions.start(roll, {}, CONTEXT, nullcontext)
            assert execution.wait(SECONDS)
            assert execution.outcome == Outcome("completed", "4")
            assert not isinstance(end, Dribble) or end.is_left.wait(SECONDS)


def test_a_list_that_never_comes_is_over_in_its_time_however_the_server_draws_out_the_end(
    executions: ToolExecutions,
) -> None:
    end = Dribble()
    with Server(tools__list=hung, DELETE=end) as server:
        with_sessions(server)
        mine = McpServer(server.url, name="dice", timeout=1)
        assert equipped(McpTools(executions.loop, LogThrottle()), mine).missing == ["dice"]
        assert end.is_left.wait(SECONDS)


def test_a_list_that_nobody_settles_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    class Never:
        def submit(self, coroutine: Any, when_done: Any) -> None:
            coroutine.close()
            asked.append(when_done)

    tools, assistant = McpTools(Never(), LogThrottle()), Assistant("a", model="m", mcp=[McpServer(URL)])  # type: ignore[arg-type]
    for _ in range(2):
        tools.ask(assistant, CONTEXT, nullcontext)
    assert len(asked) == 1
    monkeypatch.setattr(mcp_tools, "_WAITED_SECONDS", -1.0)
    tools._lists.clear()
    for _ in range(2):
        tools.ask(assistant, CONTEXT, nullcontext)
    assert len(asked) == 3


def test_headers_that_never_come_hold_up_no_run_and_are_not_asked_for_without_end(
    executions: ToolExecutions, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    called: list[int] = []
    hangs, go_on = threading.Event(), threading.Event()

    def headers() -> dict[str, str]:
        called.append(1)
        if hangs.is_set():
            go_on.wait()
        return {}

    with Server(tools__list=named("roll"), tools__call={"content": []}) as server:
        tools = McpTools(executions.loop, LogThrottle())
        mine = McpServer(server.url, name="dice", headers=headers)
        plain = McpServer(server.url, name="plain", headers={"X-Key": "1"})
        roll = equipped(tools, mine).assistant().tools["dice__roll"]
        hangs.set()
        with monkeypatch.context() as patched:
            patched.setattr(mcp_tools, "_HEADERS_SECONDS", 0.1)
            patched.setattr(mcp_tools, "_MOST_LATE", 3)
            # The other server is not held up.
            for _ in range(2):
                assert equipped(tools, mine, plain).missing == ["dice"]
            for told in ("timed out", "busy"):
                execution = executions.start(roll, {}, CONTEXT, nullcontext, 0.3)
                assert execution.wait(SECONDS)
                assert execution.outcome.error == told
                wait_until(lambda: len(tools._late) == 3, SECONDS)
            assert equipped(tools, mine).missing == ["dice"]
            assert len(called) == 4
        assert "headers= of the MCP server dice failed" in caplog.text
        hangs.clear()
        go_on.set()
        wait_until(lambda: not tools._late, SECONDS)
        assert equipped(tools, mine).missing == []


PREPARED: Final = """
import sys
from flask import Flask
from assistream_flask import Assistant, McpServer, create_blueprint

for servers in ([], [McpServer("https://mcp.example.org/mcp")]):
    app = Flask("shop", instance_path=sys.argv[1])
    app.secret_key = "long enough for a test"
    clerk = Assistant("clerk", model="m", mcp=servers)
    app.register_blueprint(create_blueprint([clerk], owner=lambda: "ann"), url_prefix="/assistream")
    print("mcp" in sys.modules)
    assert app.test_client().get("/assistream/threads").status_code < 500
    print("mcp" in sys.modules)
"""


def test_the_client_is_imported_as_a_worker_is_made_that_needs_it(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PREPARED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["False", "False", "False", "True"], done.stderr


TRACED: Final = """
import json, sys
from contextlib import nullcontext
from opentelemetry import baggage, context, trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from assistream_flask import McpServer
from assistream_flask.platform import mcp_spans
from assistream_flask.platform.log_throttle import LogThrottle
from assistream_flask.runs.mcp_tools import McpTools
from assistream_flask.runs.tool_execution import ToolExecutions
from tests.unit.test_mcp import CONTEXT, Server, equipped, error, named

if sys.argv[1] == "renamed":
    mcp_spans._MODULE = "mcp.shared._nothing"
exporter, provider = InMemorySpanExporter(), TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(exporter))
trace.set_tracer_provider(provider)
context.attach(baggage.set_baggage("user.email", "ann@example.org"))
executions = ToolExecutions(LogThrottle())
with Server(tools__list=named("roll"), tools__call=error(-32602, "no patient Ann")) as server:
    with provider.get_tracer("app").start_as_current_span("app"):
        tools = McpTools(executions.loop, LogThrottle())
        roll = equipped(tools, McpServer(server.url, name="dice")).assistant().tools["dice__roll"]
        execution = executions.start(roll, {}, CONTEXT, nullcontext)
        assert execution.wait(20)
executions.close()
print(execution.outcome.error, [span.name for span in exporter.get_finished_spans()])
print(json.dumps(server.asked))
"""


@pytest.mark.parametrize(
    ("kind", "sampler"),
    [("as it is", "always_on"), ("as it is", "parentbased_always_on"), ("renamed", "parentbased_always_on")],
)
def test_a_session_makes_no_spans_and_tells_the_server_nothing_of_the_app_s(kind: str, sampler: str) -> None:
    env = {**os.environ, "OTEL_TRACES_SAMPLER": sampler, "ASSISTREAM_TRACING": "off"}
    command = [sys.executable, "-c", TRACED, kind]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=env)
    found, asked = done.stdout.splitlines()
    assert found == "refused ['app']", done.stderr
    assert [word for word in ("traceparent", "baggage", "ann") if word in asked] == []


def test_what_the_app_does_with_the_client_elsewhere_is_traced_as_before() -> None:
    mcp_spans.heed_suppression()
    found = importlib.import_module("mcp.shared._otel")._tracer
    mcp_spans.heed_suppression()
    assert importlib.import_module("mcp.shared._otel")._tracer is found
    made: list[str] = []

    @contextmanager
    def start(name: str) -> Iterator[None]:
        made.append(name)
        yield

    tracer = mcp_spans._Tracer(SimpleNamespace(start_as_current_span=start, start_span=made.append))
    with tracer.start_as_current_span("one"):
        tracer.start_span("two")
    assert made == ["one", "two"]


ENDS: Final = """
import sys, time
if sys.argv[1] == "gevent":
    from gevent import monkey; monkey.patch_all()
from contextlib import nullcontext
from assistream_flask import McpServer
from assistream_flask.platform.log_throttle import LogThrottle
from assistream_flask.runs import mcp_tools
from assistream_flask.runs.mcp_tools import McpTools
from assistream_flask.runs.tool_execution import ToolExecutions
from tests.unit.test_mcp import CONTEXT, Server, equipped, named

def headers(context):
    if threads:
        time.sleep(3600)
    return {}

threads = []
executions = ToolExecutions(LogThrottle())
with Server(tools__list=named("roll")) as server:
    mine = McpServer(server.url, name="dice", headers=headers)
    equipment = equipped(McpTools(executions.loop, LogThrottle()), mine)
    # The list takes longer where the machine is busy.
    mine.timeout = 0.3
    roll = equipment.assistant().tools["dice__roll"]
    threads.append("wait")
    execution = executions.start(roll, {}, CONTEXT, nullcontext)
    assert execution.wait(20)
    print(execution.outcome.output)
executions.close()
"""


@pytest.mark.parametrize("kind", ["gevent", "threads"])
def test_headers_that_never_come_fail_the_call_and_hold_up_no_end_of_the_process(kind: str) -> None:
    done = subprocess.run([sys.executable, "-c", ENDS, kind], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "Timed out after 0.3 seconds.\n"), done.stderr


def test_all_of_this_holds_under_gevent() -> None:
    passes_under_gevent(__file__, "not under_gevent and not hold_up_no_end")
