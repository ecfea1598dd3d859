"""One HTTP connection: reads and checks requests, sends answers, and sees when the client leaves."""

from __future__ import annotations

import itertools
import json
import math
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any, ClassVar, cast
from urllib.parse import parse_qs, urlsplit

from ._answers import Answer, Assistants, Chat, Cut, Responses, Run, Thread
from ._background import Stored
from ._refusals import Input, Refused, check_chat, check_tools, missing, unsealed
from ._replies import FAULTS, HTTP_FAULTS, JSON, Reply, Request, dump, error_object

if TYPE_CHECKING:
    from ._server import OfflineServer


class Left(Exception):
    """The client closed the connection before the answer's end."""


class Stopped(Exception):
    """The server is closing."""


def need(body: JSON, name: str, *types: type) -> Any:
    value = body.get(name)
    if value is None or value in ("", []):
        raise missing(name)
    if not isinstance(value, types):
        raise Refused(400, f"Invalid type for '{name}'.", param=name, code="invalid_type")
    return value


def read_messages(items: Any, param: str, parts: Mapping[str, tuple[str, ...]]) -> list[tuple[str, str]]:
    """Give the (role, text) of each message; `parts` names the content types that each role may have."""
    read: list[tuple[str, str]] = []
    for n, item in enumerate(items):
        where = f"{param}[{n}]"
        if not isinstance(item, dict):
            raise Refused(400, f"Invalid type for '{where}': expected an object.", param=where, code="invalid_type")
        if item.get("type") == "function_call_output":
            output = item.get("output")
            is_text = not isinstance(output, list)
            read.append(("tool", str(output) if is_text else read_content(output, f"{where}.output", _INPUT)))
        if item.get("type", "message") != "message":
            continue
        role, content = str(item.get("role")), item.get("content")
        if role not in parts:
            supported = ", ".join(f"'{role}'" for role in parts)
            message = f"Invalid value: '{role}'. Supported values are: {supported}."
            raise Refused(400, message, param=f"{where}.role", code="invalid_value")
        if content is None and item.get("tool_calls"):
            content = []
        read.append((role, read_content(content, f"{where}.content", parts[role])))
    return read


def read_content(content: Any, param: str, kinds: tuple[str, ...]) -> str:
    """Give the text of a message's content; `kinds` are the types that its parts may have."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise Refused(400, f"Invalid type for '{param}'.", param=param, code="invalid_type")
    texts: list[str] = []
    for m, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else part
        if kind not in kinds:
            supported = ", ".join(f"'{kind}'" for kind in kinds)
            message = f"Invalid value: '{kind}'. Supported values are: {supported}."
            raise Refused(400, message, param=f"{param}[{m}].type", code="invalid_value")
        texts.append(str(part.get("text") or part.get("refusal") or ""))
    return "\n".join(texts)


_INPUT = ("input_text", "input_image", "input_file")
_RESPONSES_PARTS = {"user": _INPUT, "system": _INPUT, "developer": _INPUT, "assistant": ("output_text", "refusal")}
_CHAT_PARTS = {
    "user": ("text", "image_url", "input_audio", "file"), "assistant": ("text", "refusal"),
    "system": ("text",), "developer": ("text",), "tool": ("text",),
}  # fmt: skip
_ASSISTANTS_PARTS = dict.fromkeys(("user", "assistant"), ("text", "image_file", "image_url"))
_SYSTEM = ("system", "developer")


class Handler(BaseHTTPRequestHandler):
    """One connection: its requests one after another."""

    protocol_version = "HTTP/1.1"
    server_version, sys_version = "offline-openai", ""
    disable_nagle_algorithm = True
    routes: ClassVar[tuple[tuple[str, str, str], ...]] = (
        ("POST", r"/v1/responses", "on_responses"),
        ("GET", r"/v1/responses/([^/]+)", "on_response_get"),
        ("POST", r"/v1/responses/([^/]+)/cancel", "on_response_cancel"),
        ("POST", r"/v1/chat/completions", "on_chat"),
        ("GET", r"/v1/models", "on_models"),
        ("POST", r"/v1/threads", "on_thread_create"),
        ("POST", r"/v1/threads/runs", "on_run_create"),
        ("GET", r"/v1/threads/([^/]+)", "on_thread_get"),
        ("GET", r"/v1/threads/([^/]+)/messages", "on_message_list"),
        ("POST", r"/v1/threads/([^/]+)/messages", "on_message_create"),
        ("POST", r"/v1/threads/([^/]+)/runs", "on_run_create"),
        ("GET", r"/v1/threads/([^/]+)/runs/([^/]+)", "on_run_get"),
        ("POST", r"/v1/threads/([^/]+)/runs/([^/]+)/cancel", "on_run_cancel"),
        ("POST", r"/v1/threads/([^/]+)/runs/([^/]+)/submit_tool_outputs", "on_run_submit"),
        ("GET", r"/v1/threads/([^/]+)/runs/([^/]+)/steps", "on_step_list"),
    )

    @property
    def offline(self) -> OfflineServer:
        return cast("OfflineServer", self.server)

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        self.close_connection = self.recorded = True  # what is no HTTP is no request
        self.answer(int(code), {"error": error_object(message or "Bad request.", "invalid_request_error")})

    def handle_any(self) -> None:
        length = self.headers.get("Content-Length", "0")
        if not length.isdecimal() or self.headers.get("Transfer-Encoding"):
            self.send_error(411, "Send the body with a Content-Length.")
            return
        raw = self.rfile.read(int(length))
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.headers_sent = self.recorded = False
        request = self.request_ = Request(self.command, self.path, headers, None, time.monotonic())
        try:
            try:
                request.body = json.loads(raw) if raw else None
            except ValueError:
                raise Refused(400, "We could not parse the JSON body of your request.") from None
            self.route(urlsplit(self.path).path)
        except Refused as refused:
            self.answer(refused.status, {"error": refused.error})
        except (Left, OSError):
            self.close_connection = True
            if not self.offline._closing:
                request.closed_at = time.monotonic()
        except (Stopped, Cut):
            self.close_connection = True
        except Exception as error:  # a script of the user's that fails must show
            if self.headers_sent:
                self.close_connection = True
            else:
                self.answer(500, {"error": error_object(f"The offline server failed: {error!r}", "server_error")})
        finally:
            self.record()
            request._done.set()

    do_GET = do_POST = do_DELETE = do_PUT = do_PATCH = handle_any

    def route(self, path: str) -> None:
        allowed = False
        for method, pattern, name in self.routes:
            if match := re.fullmatch(pattern, path):
                if method == self.command:
                    if method == "POST" and not isinstance(self.request_.body, dict):
                        if self.request_.body is not None or not name.endswith(("thread_create", "_cancel")):
                            raise Refused(400, "Send a JSON object as the body.")
                        self.request_.body = {}
                    getattr(self, name)(*match.groups())
                    return
                allowed = True
        if allowed:
            raise Refused(405, f"Not allowed to {self.command} on {path}.", code="method_not_supported")
        raise Refused(404, f"Invalid URL ({self.command} {path})", code="unknown_url")

    def record(self) -> None:
        """Keep the request, once all is known of it, and before the client can know that it came."""
        if not self.recorded:
            self.recorded = True
            self.offline._record(self.request_)

    def end_headers(self) -> None:
        self.headers_sent = True
        self.send_header("x-request-id", self.offline._id("req"))
        if self.close_connection:
            self.send_header("Connection", "close")
        super().end_headers()

    def answer(self, status: int, body: JSON, headers: Mapping[str, str] | None = None) -> None:
        self.send_body(status, dump(body), headers)

    def send_body(self, status: int, data: bytes, headers: Mapping[str, str] | None = None, cut: bool = False) -> None:
        self.record()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            raise Cut

    def pause(self, seconds: float, until: Callable[[], bool]) -> None:
        """Wait, and notice at once when the client leaves."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and not until():
            left = min(left, 0.05)
            self.connection.settimeout(left)
            try:
                peeked = self.connection.recv(1, socket.MSG_PEEK)
            except TimeoutError:
                peeked = None
            finally:
                self.connection.settimeout(None)
            if self.offline._closing:
                raise Stopped
            if peeked == b"":
                raise Left
            if peeked:
                time.sleep(left)  # the next request is here already

    def generate(self, make: Callable[[Reply], Answer]) -> None:
        self.record()
        reply = self.offline._reply(self.request_)
        if reply.fault in HTTP_FAULTS:
            status, kind, code, text = HTTP_FAULTS[reply.fault]
            error = error_object(text.format(key=self.request_.key), kind, code)
            self.answer(status, {"error": error}, {"Retry-After": "1"} if status == 429 else None)
            return
        answer = make(reply)
        stored, queued = None, b""
        if isinstance(answer, Responses) and self.request_.body.get("store") is not False:
            stored = Stored(answer)
            queued = stored.body()
            self.offline._store(stored)
        if reply.fault == "stall_headers":
            self.pause(math.inf, lambda: False)
        streamed = self.request_.body.get("stream")
        if stored is not None and stored.answer.background:
            if streamed:
                self.stream(stored.follow(-1, stored.answer.breaks), answer)
            else:
                self.send_body(200, queued)
            return
        try:
            if streamed:
                self.stream(answer.encoded(), answer)
            else:
                self.whole(answer)
        finally:
            if stored is not None and stored.going_on:
                self.offline._forget(stored)

    def stream(self, steps: Iterator[float | bytes], answer: Answer) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Cache-Control", "no-cache")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        sizes = itertools.cycle((1, 2, 3, 5, 7))
        try:
            for step in steps:
                if isinstance(step, float):
                    self.pause(step, answer.cancelled)
                    continue
                while step:
                    size = next(sizes) if answer.fault == "tiny_chunks" else len(step)
                    piece, step = step[:size], step[size:]
                    self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
        finally:
            cast(Any, steps).close()
        try:
            self.wfile.write(b"0\r\n\r\n")
        except OSError:
            self.close_connection = True  # it had all it wanted

    def whole(self, answer: Answer) -> None:
        fault = answer.fault or ""
        if fault.startswith("error_") or (fault == "response_failed" and isinstance(answer, Chat)):
            self.answer(500, {"error": error_object(answer.message(), "server_error", "server_error")})
            return
        try:
            for step in answer.run():
                if isinstance(step, float):
                    self.pause(step, answer.cancelled)
        except Cut:
            pass
        data = dump(answer.result())
        if fault == "malformed":
            data = data[: len(data) // 2]
        self.send_body(200, data, cut=fault in ("cut", "ends_early"))

    def asked(self, dialect: str, instructions: list[Any], messages: list[tuple[str, str]], model: Any) -> Request:
        request = self.request_
        texts = [text for text in instructions if text] + [text for role, text in messages if role in _SYSTEM]
        request.dialect, request.model, request.instructions = dialect, str(model), "\n".join(map(str, texts))
        request.messages = [(role, text) for role, text in messages if role not in _SYSTEM]
        check_tools(request.body, dialect)
        self.offer(request, request.body)
        if not isinstance(request.body.get("stream", False), (bool, type(None))):
            raise Refused(400, "Invalid type for 'stream'.", param="stream", code="invalid_type")
        return request

    def offer(self, request: Request, body: JSON) -> None:
        """Fill in what the model may call."""
        tools, choice = body.get("tools") or [], body.get("tool_choice")
        request.tools = [tool.get("function") or tool for tool in tools if tool["type"] == "function"]
        request.may_call, request.must_call = choice != "none", choice == "required"
        request.may_call_many = body.get("parallel_tool_calls") is not False
        if isinstance(choice, dict):
            allowed = choice.get("allowed_tools") or choice
            named = [(one.get("function") or one).get("name") for one in allowed.get("tools") or [choice]]
            request.tools = [tool for tool in request.tools if tool["name"] in named]
            request.must_call = allowed.get("mode", "required") == "required"
        if not request.may_call:
            request.tools = []

    def on_responses(self) -> None:
        body = self.request_.body
        model, items = need(body, "model", str), need(body, "input", str, list)
        items = [{"role": "user", "content": items}] if isinstance(items, str) else items
        messages = read_messages(items, "input", _RESPONSES_PARTS)
        if self.offline.strict:
            for item in items:
                typed = item.get("type") == "message" and isinstance(item.get("content"), list)
                if item.get("role") == "assistant" and not typed:
                    raise Refused(400, "item['content'] is not an array, or 'type' is missing")
        if "reasoning.encrypted_content" in (body.get("include") or ()) and not self.offline.encrypted_reasoning:
            raise Refused(400, "Encrypted content is not supported with this model.", param="include")
        Input(
            items,
            known=self.offline._item,
            required=self.offline._reasoning_of,
            opened=lambda content: unsealed(content, model, self.request_.key),
            strict=self.offline.strict,
        ).check()
        if body.get("background") and body.get("store") is False:
            raise Refused(400, "Background mode requires 'store' to be true.", param="store")
        request = self.asked("responses", [body.get("instructions")], messages, model)
        stored = self.offline._again(request.headers.get("idempotency-key", "")) if body.get("background") else None
        if stored is not None:
            self.again(stored)
            return
        self.generate(lambda reply: Responses(self.offline, request, reply))

    def again(self, stored: Stored) -> None:
        self.record()
        if self.request_.body.get("stream"):
            self.stream(stored.follow(-1, None), stored.answer)
        else:
            self.send_body(200, stored.body())

    def response_of(self, id: str) -> Stored:
        stored = self.offline._stored(id)
        if stored is None:
            raise Refused(404, f"Response with id '{id}' not found.")
        return stored

    def on_response_get(self, id: str) -> None:
        stored, asked = self.response_of(id), parse_qs(urlsplit(self.path).query)
        if asked.get("stream") != ["true"]:
            self.send_body(200, stored.body())
            return
        after = asked.get("starting_after", ["-1"])[-1]
        if not re.fullmatch(r"-1|\d{1,9}", after):
            raise Refused(400, "Invalid type for 'starting_after'.", param="starting_after", code="invalid_type")
        if not stored.answer.background or not stored.streamed:
            raise Refused(400, "This response can not be streamed: create it with background=true and stream=true.")
        if time.monotonic() - stored.made_at >= self.offline.stream_window:
            minutes = f"{self.offline.stream_window / 60:g} minutes"
            raise Refused(400, f"This response can no longer be streamed because it is more than {minutes} old.")
        self.record()
        self.stream(stored.follow(int(after), None), stored.answer)

    def on_response_cancel(self, id: str) -> None:
        stored = self.response_of(id)
        if not stored.answer.background:
            raise Refused(400, "Cannot cancel a synchronous response.")
        stored.cancel()
        if stored.status != "cancelled":
            raise Refused(400, f"Cannot cancel a {stored.status} response.")
        self.send_body(200, stored.body())

    def on_chat(self) -> None:
        body = self.request_.body
        model = need(body, "model", str)
        messages = read_messages(need(body, "messages", list), "messages", _CHAT_PARTS)
        check_chat(body["messages"])
        if body.get("stream_options") and not body.get("stream"):
            message = "The 'stream_options' parameter is only allowed when 'stream' is enabled."
            raise Refused(400, message, param="stream_options")
        request = self.asked("chat", [], messages, model)
        self.generate(lambda reply: Chat(self.offline, request, reply))

    def on_models(self) -> None:
        names = ["offline", *(f"offline-{fault}" for fault in FAULTS)]
        data = [{"id": name, "object": "model", "created": 0, "owned_by": "offline"} for name in names]
        self.answer(200, {"object": "list", "data": data})

    # Assistants v2

    def thread(self, id: str) -> Thread:
        try:
            return self.offline._threads[id]
        except KeyError:
            raise Refused(404, f"No thread found with id '{id}'.") from None

    def run_of(self, id: str, run_id: str) -> Run:
        try:
            run = self.thread(id).runs[run_id]
        except KeyError:
            raise Refused(404, f"No run found with id '{run_id}'.") from None
        run.expire()
        return run

    def add_messages(self, thread: Thread, items: Any) -> None:
        if not isinstance(items, list):
            raise Refused(400, "Invalid type for 'messages'.", param="messages", code="invalid_type")
        read_messages(items, "messages", _ASSISTANTS_PARTS)
        if items and (active := thread.active_run):
            raise Refused(400, f"Can't add messages to {thread.data['id']} while a run {active} is active.")
        for item in items:
            metadata = item.get("metadata") or {}
            thread.add(self.offline._id("msg"), item["role"], item["content"], metadata=metadata)

    def new_thread(self, body: JSON) -> Thread:
        thread = self.offline._new_thread(body.get("metadata"))
        self.add_messages(thread, body.get("messages") or [])
        return thread

    def on_thread_create(self) -> None:
        self.answer(200, self.new_thread(self.request_.body).data)

    def on_thread_get(self, id: str) -> None:
        self.answer(200, self.thread(id).data)

    def on_message_create(self, id: str) -> None:
        thread = self.thread(id)
        self.add_messages(thread, [self.request_.body])
        self.answer(200, thread.messages[-1])

    def on_message_list(self, id: str) -> None:
        self.answer_list(self.thread(id).messages)

    def answer_list(self, items: Sequence[JSON]) -> None:
        data = [*items]
        if parse_qs(urlsplit(self.path).query).get("order") != ["asc"]:
            data.reverse()
        first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
        page = {"object": "list", "data": data, "first_id": first, "last_id": last, "has_more": False}
        self.answer(200, page)

    def on_run_create(self, id: str | None = None) -> None:
        body = self.request_.body
        assistant_id = need(body, "assistant_id", str)
        thread = self.new_thread(body.get("thread") or {}) if id is None else self.thread(id)
        self.add_messages(thread, body.get("additional_messages") or [])
        if active := thread.active_run:
            raise Refused(400, f"Thread {thread.data['id']} already has an active run {active}.")
        told = [body.get("instructions"), body.get("additional_instructions")]
        request = self.asked("assistants", told, self.said(thread), body.get("model") or assistant_id)
        self.generate(lambda reply: Assistants(self.offline, request, reply, thread, new=id is None, run=None))

    def said(self, thread: Thread) -> list[tuple[str, str]]:
        return [
            (message["role"], "\n".join(part["text"]["value"] for part in message["content"] if "text" in part))
            for message in thread.messages
        ]

    def on_run_get(self, id: str, run_id: str) -> None:
        self.answer(200, self.run_of(id, run_id).data)

    def on_step_list(self, id: str, run_id: str) -> None:
        self.answer_list(self.run_of(id, run_id).steps)

    def on_run_cancel(self, id: str, run_id: str) -> None:
        run = self.run_of(id, run_id)
        if not run.active:
            raise Refused(400, f"Cannot cancel run with status '{run.data['status']}'.")
        if run.data["status"] == "requires_action":
            run.end("cancelled")
        else:
            run.data["status"] = "cancelling"
        self.answer(200, run.data)

    def on_run_submit(self, id: str, run_id: str) -> None:
        thread, run = self.thread(id), self.run_of(id, run_id)
        given = need(self.request_.body, "tool_outputs", list)
        for n, one in enumerate(given):
            if not isinstance(one, dict) or not isinstance(one.get("tool_call_id"), str):
                raise missing(f"tool_outputs[{n}].tool_call_id")
        with self.offline._arrived:  # of two requests, one goes on
            waited_for = run.data["required_action"]
            self.submit(run, {one["tool_call_id"]: str(one.get("output") or "") for one in given})
        messages = [*self.said(thread), *(("tool", output) for output in run.outputs)]
        request = self.asked("assistants", [run.data["instructions"]], messages, run.data["model"])
        self.offer(request, run.data)
        try:
            self.generate(lambda reply: Assistants(self.offline, request, reply, thread, new=False, run=run))
        finally:
            if run.data["status"] == "queued":  # an error came before it went on
                run.data.update({"status": "requires_action", "required_action": waited_for})
                run.steps[-1].update({"status": "in_progress", "completed_at": None})

    def submit(self, run: Run, outputs: Mapping[str, str]) -> None:
        """Fill in the outputs of the calls that the run waits for: all of them, and no others."""
        if run.data["status"] != "requires_action":
            raise Refused(400, f'Runs in status "{run.data["status"]}" do not accept tool outputs.')
        step = run.steps[-1]
        calls = step["step_details"]["tool_calls"]
        wanted = [call["id"] for call in calls]
        if sorted(wanted) != sorted(outputs):
            raise Refused(400, f"Expected tool outputs for call_ids {wanted}, got {[*outputs]}")
        for call in calls:
            call["function"]["output"] = outputs[call["id"]]
        step.update({"status": "completed", "completed_at": int(time.time())})
        run.data.update({"status": "queued", "required_action": None})
