"""The server: its life, its threads, what it remembers."""

from __future__ import annotations

import itertools
import socket
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self, cast

from ._answers import Thread
from ._background import Stored
from ._refusals import Refused
from ._replies import FAULTS, JSON, HostedCall, Replies, Reply, Request, ToolCall, last
from ._script import scripted
from ._wire import Handler

if TYPE_CHECKING:
    from types import TracebackType

    import openai


# As long as OpenAI promises for one in the background.
_KEPT_SECONDS = 600.0


class OfflineServer:
    """A scripted OpenAI on a loopback port; a context manager, or `start` and `close` it yourself.

    `replies` says what the requests that generate are answered with: a callable gets the `Request`; a list is
    used up in order; one `Reply` is for all. A string stands for `Reply(string)`; when the list is used up, or
    with None, `scripted` answers. It may be set anew at any time. `port=0` takes a free port. `delay` and
    `first_delay` are the seconds between tokens and before the first. `strict` refuses, as llama.cpp does, an
    assistant's turn in the history that is not ``{"type": "message", "role": "assistant", "content":
    [{"type": "output_text", ...}]}``, and, as others do, ``id`` and ``status`` of other items. Without
    `encrypted_reasoning` its models refuse to include ``reasoning.encrypted_content``. An Assistants run waits for tool
    outputs for `run_seconds`. A response in the background can be streamed again for `stream_window`
    seconds (OpenAI: five minutes). Of requests, threads and responses only the newest `keep` are kept, and of
    responses those that ended in the last ten minutes.
    """

    def __init__(
        self,
        replies: Replies = None,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        delay: float = 0.02,
        first_delay: float = 0.0,
        strict: bool = False,
        keep: int = 1000,
        stream_window: float = 300.0,
        encrypted_reasoning: bool = True,
        run_seconds: float = 600.0,
    ) -> None:
        self.host, self.port, self.delay, self.first_delay, self.strict = host, port, delay, first_delay, strict
        self.replies, self.stream_window = replies, stream_window
        self.encrypted_reasoning, self.run_seconds = encrypted_reasoning, run_seconds
        self._keep = keep
        self._arrived = threading.Condition()  # its lock guards all that follows
        self._requests: deque[Request] = deque(maxlen=keep)
        self._received = 0
        self._threads: OrderedDict[str, Thread] = OrderedDict()
        self._responses: OrderedDict[str, Stored] = OrderedDict()
        self._reasoned: OrderedDict[str, str] = OrderedDict()  # ids of items, and of the reasoning before them
        self._working: dict[Stored, threading.Thread] = {}
        self._connections: dict[socket.socket, threading.Thread] = {}
        self._ids = itertools.count(1)
        self._listener: socket.socket | None = None
        self._acceptor: threading.Thread | None = None
        self._closing = False

    # The life of the server

    def start(self) -> Self:
        """Listen and serve on daemon threads (greenlets once gevent has patched); a second call does nothing."""
        if self._listener is None:
            self._closing = False
            self._listener = socket.create_server((self.host, self.port), backlog=1024)
            self._acceptor = threading.Thread(target=self._accept, args=(self._listener,), daemon=True)
            self._acceptor.start()
        return self

    def close(self) -> None:
        """Stop at once, breaking off every open answer; no thread and no socket stays. May be called twice."""
        listener, acceptor = self._listener, self._acceptor
        if listener is None or acceptor is None:
            return
        self._closing = True
        try:  # a connection of our own ends the accept at once on every platform
            socket.create_connection(listener.getsockname()[:2], timeout=1).close()
        except OSError:
            pass
        acceptor.join(5)
        listener.close()
        with self._arrived:
            connections = list(self._connections.items())
            working = list(self._working.items())
        for connection, _ in connections:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
        for stored, _ in working:  # not before their streams are cut, for none of them ended
            stored.stop()
        for _, thread in [*connections, *working]:
            if thread is not threading.current_thread():
                thread.join(5)
        self._listener = self._acceptor = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, address = listener.accept()
            except OSError:
                if self._closing:
                    return
                time.sleep(0.05)  # out of files, say: try again
                continue
            if self._closing:
                connection.close()
                return
            thread = threading.Thread(target=self._serve, args=(connection, address), daemon=True)
            with self._arrived:
                self._connections[connection] = thread
            thread.start()

    def _serve(self, connection: socket.socket, address: Any) -> None:
        try:
            Handler(connection, address, cast(Any, self))
        except (OSError, ValueError):
            pass  # the client left, or close() shut the socket
        finally:
            with self._arrived:
                self._connections.pop(connection, None)
            connection.close()

    # What users ask it

    @property
    def base_url(self) -> str:
        """Give the URL that the SDK calls ``base_url`` and the environment ``OPENAI_BASE_URL``; it ends in ``/v1``."""
        if self._listener is None:
            raise RuntimeError("The offline server is not running: use it in a with block, or call start().")
        return f"http://{self.host}:{self._listener.getsockname()[1]}/v1"

    def client(self, **options: Any) -> openai.OpenAI:
        """Give the SDK's ordinary client for this server; `options` go to `openai.OpenAI`. Close it when done."""
        import openai

        return openai.OpenAI(**{"api_key": "sk-offline", "base_url": self.base_url, **options})

    @property
    def requests(self) -> list[Request]:
        """Give the requests so far, oldest first (a copy)."""
        with self._arrived:
            return list(self._requests)

    def wait_for(self, count: int, timeout: float = 5.0) -> list[Request]:
        """Wait until `count` requests have come since the server was made; `TimeoutError` when they don't."""
        with self._arrived:
            if not self._arrived.wait_for(lambda: self._received >= count, timeout):
                raise TimeoutError(f"Waited {timeout} s for {count} requests; {self._received} came.")
            return list(self._requests)

    # What the handlers ask it

    def _id(self, prefix: str) -> str:
        return f"{prefix}_{next(self._ids):032x}"

    def _record(self, request: Request) -> None:
        with self._arrived:
            self._requests.append(request)
            self._received += 1
            self._arrived.notify_all()

    def _new_thread(self, metadata: Any) -> Thread:
        thread = Thread(self._id("thread"), metadata)
        with self._arrived:
            self._threads[thread.data["id"]] = thread
            while len(self._threads) > self._keep:
                self._threads.popitem(last=False)
        return thread

    def _store(self, stored: Stored) -> None:
        """Keep it to be asked for, and answer it if it is one in the background."""
        with self._arrived:
            self._responses[stored.id] = stored
            while len(self._responses) > self._keep or self._stale(next(iter(self._responses.values()))):
                self._responses.popitem(last=False)
            if not stored.answer.background:
                return
            thread = threading.Thread(target=self._work, args=(stored,), daemon=True)
            self._working[stored] = thread
        thread.start()

    def _stored(self, id: str) -> Stored | None:
        with self._arrived:
            return self._responses.get(id)

    def _item(self, id: str) -> JSON | None:
        """Give the item of that id in a response that is kept."""
        with self._arrived:
            items = (item for one in self._responses.values() for item in one.answer.response["output"])
            return next((item for item in items if item["id"] == id), None)

    def _follow(self, id: str, reasoning: str) -> None:
        """Remember that the item goes with that reasoning."""
        with self._arrived:
            self._reasoned[id] = reasoning
            while len(self._reasoned) > self._keep:
                self._reasoned.popitem(last=False)

    def _reasoning_of(self, id: str) -> str | None:
        with self._arrived:
            return self._reasoned.get(id)

    def _again(self, key: str) -> Stored | None:
        """Give the response in the background that was asked for under the Idempotency-Key `key`."""
        with self._arrived:
            return next((one for one in self._responses.values() if key and one.key == key), None)

    def _forget(self, stored: Stored) -> None:
        with self._arrived:
            self._responses.pop(stored.id, None)

    def _stale(self, stored: Stored) -> bool:
        return stored.over_at is not None and time.monotonic() - stored.over_at > _KEPT_SECONDS

    def _work(self, stored: Stored) -> None:
        try:
            stored.generate()
        finally:
            stored.end()
            with self._arrived:
                del self._working[stored]

    def _reply(self, request: Request) -> Reply:
        with self._arrived:
            replies = self.replies
            if replies is not None and not callable(replies) and not isinstance(replies, (Reply, str, Iterator)):
                replies = self.replies = iter(replies)
            found = next(replies, None) if isinstance(replies, Iterator) else replies
        if callable(found):
            found = found(request)
        reply = found if isinstance(found, Reply) else Reply(found)
        name = request.model.removeprefix("asst_")
        if name.startswith("offline-"):
            fault = name.removeprefix("offline-")
            if fault not in FAULTS:
                known = ", ".join(f"offline-{known}" for known in FAULTS)
                message = f"The model `{request.model}` does not exist. These do: {known}."
                raise Refused(404, message, code="model_not_found")
            reply = replace(reply, fault=fault)
        reply = with_text(with_calls(reply, request), request)
        if not request.may_call_many:
            hosted, functions = parted(reply)
            reply = replace(reply, calls=[*hosted, *functions[:1]])
        return reply


def parted(reply: Reply) -> tuple[list[HostedCall], list[ToolCall]]:
    """Give the calls of hosted tools, and those of functions."""
    hosted = [call for call in reply.calls if isinstance(call, HostedCall)]
    return hosted, [call for call in reply.calls if isinstance(call, ToolCall)]


def with_calls(reply: Reply, request: Request) -> Reply:
    """Give the reply with the calls of its fault; with none of functions where the request does not allow them."""
    hosted, functions = parted(reply)
    if reply.fault is not None and reply.fault.startswith(("call_", "function_call")):
        if not functions and request.messages and request.messages[-1][0] == "tool":
            return replace(reply, fault=None)
        if not functions and request.may_call:
            name = request.tools[0]["name"] if request.tools else "lookup"
            made = ToolCall(name, {"query": last(request, "user")[:80]})
            functions = [made] * (2 if reply.fault in ("call_first_only", "call_one_delta") else 1)
            reply = replace(reply, text="", reasoning="", refusal="")
        if reply.fault == "call_half":
            functions = [replace(call, arguments=call.text[: len(call.text) // 2]) for call in functions]
    return replace(reply, calls=[*hosted, *functions] if request.may_call else hosted)


def with_text(reply: Reply, request: Request) -> Reply:
    """Give the reply with a text or calls, where it says nothing itself."""
    if reply.text is not None or reply.refusal or parted(reply)[1]:
        return reply
    made = scripted(request)
    return replace(reply, text=made.text, calls=[*reply.calls, *made.calls])
