"""An MCP server of the package ``mcp`` in a process of its own, over streamable HTTP, with a deadline.

``python -m tests.mcp_server PORT`` serves; with ``legacy`` behind it, as when the protocol had sessions.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from mcp.server.mcpserver import Context, MCPServer
from mcp.server.transport_security import TransportSecuritySettings
from mcp.types import ImageContent, TextContent

from tests.programs import free_port

ROOT = Path(__file__).resolve().parent.parent


class McpProgram:
    """The server, which may be killed and started again on its port. ``made`` has a line for each call that it was
    asked for, and ``asked`` one for each request: its method, and what its headers have of a key."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.port, self._folder, self._options = free_port(), folder, options
        self.url = f"http://127.0.0.1:{self.port}/mcp"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it listens."""
        env = {**os.environ, "MCP_FOLDER": str(self._folder), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "tests.mcp_server", str(self.port), *self._options]
        with (self._folder / "mcp.log").open("ab") as log:
            self._process = subprocess.Popen(command, env=env, stdout=log, stderr=log, cwd=ROOT)
        end = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                assert self._process.poll() is None, (self._folder / "mcp.log").read_text()
                assert time.monotonic() < end
                time.sleep(0.05)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Kill it, or send another signal."""
        assert self._process is not None
        self._process.send_signal(number)
        if number == signal.SIGKILL:
            self._process.wait(20)

    def close(self) -> None:
        """End it where it runs."""
        if self._process is not None and self._process.poll() is None:
            self.kill(signal.SIGCONT)
            self.kill()

    @property
    def made(self) -> list[str]:
        """Give the calls that it was asked for."""
        return self._lines("made")

    @property
    def asked(self) -> list[dict[str, Any]]:
        """Give the requests."""
        return [json.loads(line) for line in self._lines("asked")]

    def _lines(self, name: str) -> list[str]:
        path = self._folder / name
        return path.read_text().splitlines() if path.exists() else []


@contextmanager
def mcp_server(folder: Path, *options: str) -> Iterator[McpProgram]:
    """Serve until it is left."""
    folder.mkdir(exist_ok=True)
    program = McpProgram(folder, *options)
    program.start()
    try:
        yield program
    finally:
        program.close()


# Within that process


def note(name: str, line: str) -> None:
    file = os.open(Path(os.environ["MCP_FOLDER"]) / name, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, f"{line}\n".encode())
    os.close(file)


def add(first: int, second: int) -> int:
    """Add two numbers."""
    note("made", f"add {first} {second}")
    return first + second


def remove(path: str) -> str:
    """Remove a file."""
    note("made", f"remove {path}")
    return f"{path} is removed"


async def slow(seconds: float) -> str:
    """Take so long."""
    note("made", f"slow {seconds}")
    await asyncio.sleep(seconds)
    return "slept"


def fail() -> str:
    """Fail."""
    raise ValueError("there is no such die")


def much(characters: int) -> str:
    """Give so much."""
    return "x" * characters


def who(ctx: Context[Any, Any]) -> str:
    """Give who asks."""
    request: Any = ctx.request_context.request
    return str(request.headers.get("x-person", "nobody"))


def draw() -> list[Any]:
    """Draw."""
    return [TextContent(type="text", text="A die:"), ImageContent(type="image", data="aGk=", mime_type="image/png")]


class Noting:
    """An ASGI app that notes each request, and has another one answer."""

    def __init__(self, inner: Any, *, is_legacy: bool) -> None:
        self._inner, self._is_legacy = inner, is_legacy

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._inner(scope, receive, send)
            return
        messages: list[Any] = []
        while not messages or messages[-1].get("more_body"):
            messages.append(await receive())
        body = b"".join(message.get("body", b"") for message in messages)
        method = json.loads(body).get("method") if body else None
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        asked = {"http": scope["method"], "method": method, "authorization": headers.get("authorization")}
        note("asked", json.dumps(asked))
        if self._is_legacy and method == "server/discover":
            await send({"type": "http.response.start", "status": 400, "headers": []})
            await send({"type": "http.response.body", "body": b"what?"})
            return

        async def again() -> Any:
            return messages.pop(0) if messages else await receive()

        await self._inner(scope, again, send)


def app(*, is_legacy: bool) -> Any:
    server = MCPServer("dice")
    for function in (add, remove, slow, fail, much, who):
        server.tool()(function)
    server.tool(structured_output=False)(draw)
    open_to_all = TransportSecuritySettings(enable_dns_rebinding_protection=False)
    return Noting(server.streamable_http_app(transport_security=open_to_all), is_legacy=is_legacy)


def main() -> None:
    uvicorn.run(app(is_legacy="legacy" in sys.argv), host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")


if __name__ == "__main__":
    main()
