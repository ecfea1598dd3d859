"""One class a dialect: a generator of the steps of one answer, in the shapes of `openai.types`."""

from __future__ import annotations

import itertools
import math
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from ._replies import JSON, Reply, Request, dump, error_object, last, split

if TYPE_CHECKING:
    from ._server import OfflineServer

# Where the stream breaks of a response that goes on.
BREAK = b""
_BREAKING = ("cut", "ends_early", "stall", "malformed")

Step = float | bytes | tuple[str | None, Any]  # a pause, raw bytes, or an event's name and data


class Thread:
    """A thread of the Assistants dialect: the object, its messages in order, its runs."""

    def __init__(self, id: str, metadata: Any) -> None:
        self.data: JSON = {"id": id, "object": "thread", "created_at": int(time.time()),
                            "metadata": metadata or {}, "tool_resources": {}}  # fmt: skip
        self.messages: list[JSON] = []
        self.runs: dict[str, JSON] = {}

    def add(self, id: str, role: str, content: Any, **fields: Any) -> JSON:
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        message = {
            "id": id, "object": "thread.message", "created_at": int(time.time()), "thread_id": self.data["id"],
            "role": role, "status": "completed", "assistant_id": None, "run_id": None, "completed_at": None,
            "incomplete_at": None, "incomplete_details": None, "attachments": [], "metadata": {},
            "content": [
                {"type": "text", "text": {"value": part["text"], "annotations": []}}
                if part["type"] == "text" else part for part in parts
            ], **fields,
        }  # fmt: skip
        self.messages.append(message)
        return message


class Cut(Exception):
    """Break the connection here."""


class Over(Exception):
    """End the stream here, cleanly."""


class Answer:
    """One answer, in no dialect yet."""

    broken = b'data: {"choices": [{"delta": {"content": "half a wo\n\n'
    without: ClassVar[tuple[str, ...]] = ()  # what "missing_fields" leaves out
    skipped: ClassVar[str] = "(?!)"  # events that it leaves out
    unknown: ClassVar[tuple[tuple[str | None, Any], ...]] = ()  # what "unknown_events" puts in

    def __init__(self, server: OfflineServer, request: Request, reply: Reply, limit: int | None) -> None:
        self.server, self.request, self.reply, self.body = server, request, reply, request.body
        self.fault, self.model, self.created = reply.fault, request.model or "offline", int(time.time())
        self.delay = server.delay if reply.delay is None else reply.delay
        self.first_delay = server.first_delay if reply.first_delay is None else reply.first_delay
        kinds = {"reasoning": reply.reasoning, "text": reply.text or "", "refusal": reply.refusal}
        plan = [(kind, token) for kind, text in kinds.items() for token in split(text)]
        self.call: tuple[str, str] | None = None
        self.short: str | None = None
        if self.fault == "function_call":
            plan, self.call = [], self._call()
        elif self.fault in ("incomplete", "content_filter"):
            plan, self.short = plan[: (len(plan) + 1) // 2], self.fault.replace("incomplete", "length")
        elif limit is not None and len(plan) > limit:
            plan, self.short = plan[:limit], "length"
        elif self.fault and not plan:
            plan = [("text", "")]  # a place for the fault to happen at
        self.plan, self.middle = plan, (len(plan) - 1) // 2
        words = [request.instructions, *(text for _, text in request.messages)]
        counted = sum(len(split(text)) for text in words), len(plan)
        self.usage = reply.usage or counted
        stream_options = self.body.get("stream_options") or {}
        self.obfuscate = stream_options.get("include_obfuscation", True)

    def _call(self) -> tuple[str, str]:
        tools = [tool for tool in self.body.get("tools") or [] if tool.get("type") == "function"]
        name = (tools[0].get("name") or tools[0]["function"]["name"]) if tools else "lookup"
        return name, dump({"query": last(self.request, "user")[:80]}).decode()

    def message(self, text: str = "The server had an error while answering the key {key}.") -> str:
        return text.format(key=self.request.key)

    def run(self) -> Iterator[Step]:
        try:
            if self.fault == "error_first":
                yield self.error(nested=True)
            else:
                yield from self.steps()
        except Over:
            pass

    def pause(self, n: int) -> float:
        return float(self.delay if n else self.first_delay)

    def after(self, n: int) -> Iterator[Step]:
        """Give what goes wrong after token `n`."""
        if n != self.middle:
            return
        if self.fault == "cut":
            raise Cut
        if self.fault == "ends_early":
            raise Over
        if self.fault == "stall":
            yield math.inf
        if self.fault == "malformed":
            yield self.broken
        if self.fault in ("error_nested", "error_flat"):
            yield self.error(nested=self.fault == "error_nested")
            raise Over
        if self.fault == "response_failed":
            yield from self.failed()
            raise Over

    def obfuscation(self, delta: str) -> JSON:
        return {"obfuscation": "offlineoffline.."[: 16 - len(delta) % 16]} if self.obfuscate else {}

    def cancelled(self) -> bool:
        return False

    def steps(self) -> Iterator[Step]:
        raise NotImplementedError

    def failed(self) -> Iterator[Step]:
        yield self.error(nested=True)

    def error(self, nested: bool) -> tuple[str | None, Any]:
        error = error_object(self.message(), "server_error", "server_error")
        return "error", {"type": "error", "error": error} if nested else {**error, "type": "error"}

    def result(self) -> JSON:
        """Give the body that an unstreamed request gets, once the steps are through."""
        raise NotImplementedError

    def encoded(self) -> Iterator[float | bytes]:
        """Give the steps as bytes on the wire, with the faults that concern only frames."""
        number = 0
        for step in self.run():
            if isinstance(step, (float, bytes)):
                yield step
                continue
            event, data = step
            if self.fault == "missing_fields":
                if re.search(self.skipped, event or ""):
                    continue
                event, data = self.bare(event, data)
            frame = b"data: " + (data.encode() if isinstance(data, str) else dump(data)) + b"\n\n"
            if event:
                frame = f"event: {event}\n".encode() + frame
            if self.fault == "unknown_events":
                # The SDK takes a comment with a blank line of its own for an event once an id was seen, and fails.
                noise = [b": a comment\n\n", b": keepalive\n", b"retry: 3000\n", b"id: offline-%d\n" % number]
                surprise, more = self.unknown[number // 3 % len(self.unknown)]
                strange = (f"event: {surprise}\n" if surprise else "").encode() + b"data: " + dump(more) + b"\n\n"
                frame = noise[0 if number == 0 else 1 + number % 3] + (strange if number % 3 == 0 else b"") + frame
            number += 1
            yield frame.replace(b"\n", b"\r\n") if self.fault == "crlf" else frame

    def bare(self, event: str | None, data: Any) -> tuple[str | None, Any]:
        def strip(value: Any) -> Any:
            if isinstance(value, dict):
                return {k: strip(v) for k, v in value.items() if v is not None and k not in self.without}
            return [strip(item) for item in value] if isinstance(value, list) else value

        return event, strip(data)


class Responses(Answer):
    broken = b'event: response.output_text.delta\ndata: {"type": "response.output_text.delta", "delta": "half a wo\n\n'
    without = ("sequence_number", "output_index", "content_index", "summary_index", "item_id", "logprobs",
               "obfuscation")  # fmt: skip
    skipped = r"\.done$|in_progress$"
    unknown = (
        ("response.surprise.delta", {"type": "response.surprise.delta", "delta": "never to be shown"}),
        ("keepalive", {"type": "keepalive", "sequence_number": 0}),
    )

    def __init__(self, server: OfflineServer, request: Request, reply: Reply) -> None:
        super().__init__(server, request, reply, request.body.get("max_output_tokens"))
        self.numbers, self.number = itertools.count(), -1
        self.background = bool(self.body.get("background"))
        status = "queued" if self.background else "in_progress"
        body, ask = self.body, self.body.get
        self.response: JSON = {
            "id": server._id("resp"), "object": "response", "created_at": self.created, "status": status,
            "background": self.background, "completed_at": None, "error": None, "incomplete_details": None,
            "instructions": ask("instructions"), "max_output_tokens": ask("max_output_tokens"),
            "max_tool_calls": None, "model": self.model, "output": [],
            "parallel_tool_calls": body.get("parallel_tool_calls", True), "previous_response_id": None,
            "prompt_cache_key": None, "reasoning": {"effort": None, "summary": None}, "safety_identifier": None,
            "service_tier": "default", "store": body.get("store", True), "temperature": body.get("temperature", 1.0),
            "text": {"format": {"type": "text"}, "verbosity": "medium"}, "tool_choice": ask("tool_choice") or "auto",
            "tools": ask("tools") or [], "top_logprobs": 0, "top_p": body.get("top_p", 1.0),
            "truncation": "disabled", "usage": None, "user": None, "metadata": ask("metadata") or {},
        }  # fmt: skip

    def next_number(self) -> int:
        self.number = next(self.numbers)
        return self.number

    def event(self, type: str, **fields: Any) -> tuple[str, JSON]:
        return type, {"type": type, "sequence_number": self.next_number(), **fields}

    @property
    def breaks(self) -> str | None:
        """Give the fault that concerns only the first stream of a response in the background."""
        return self.fault if self.background and self.fault in _BREAKING else None

    def after(self, n: int) -> Iterator[Step]:
        if not self.breaks:
            yield from super().after(n)
        elif n == self.middle:
            yield BREAK

    def error(self, nested: bool) -> tuple[str | None, Any]:
        event, data = super().error(nested)
        return event, {**data, "sequence_number": self.next_number()}

    def bare(self, event: str | None, data: Any) -> tuple[str | None, Any]:
        return None, super().bare(event, data)[1]

    def result(self) -> JSON:
        return self.response

    def end(self, status: str, **fields: Any) -> tuple[str, JSON]:
        asked, made = self.usage
        reasoning = sum(kind == "reasoning" for kind, _ in self.plan)
        usage = {
            "input_tokens": asked, "input_tokens_details": {"cache_write_tokens": 0, "cached_tokens": 0},
            "output_tokens": made, "output_tokens_details": {"reasoning_tokens": reasoning},
            "total_tokens": asked + made,
        }  # fmt: skip
        self.response.update({"status": status, "usage": usage, **fields})
        if status == "completed":
            self.response["completed_at"] = int(time.time())
        return self.event(f"response.{status}", response=self.response)

    def failed(self) -> Iterator[Step]:
        yield self.end("failed", usage=None, error={"code": "server_error", "message": self.message()})

    def steps(self) -> Iterator[Step]:
        yield self.event("response.created", response=self.response)
        if self.background:
            yield self.event("response.queued", response=self.response)
            self.response["status"] = "in_progress"
        yield self.event("response.in_progress", response=self.response)
        if self.call:
            yield from self.function_call(*self.call)
        yield from self.items()
        if self.short:
            reason = "max_output_tokens" if self.short == "length" else self.short
            yield self.end("incomplete", incomplete_details={"reason": reason})
        else:
            yield self.end("completed")
        if self.fault == "missing_fields":
            yield None, "[DONE]"

    def items(self) -> Iterator[Step]:
        """Give the plan's reasoning and messages; what follows upon one of a kind is one part."""
        output, texts, n = self.response["output"], dict.fromkeys(("reasoning", "text", "refusal"), ""), 0
        item: JSON = {}
        for kind, group in itertools.groupby(self.plan, lambda entry: entry[0]):
            summary = kind == "reasoning"
            if summary or item.get("type") != "message":
                item = {"id": self.server._id("rs"), "type": "reasoning", "summary": []} if summary else {
                    "id": self.server._id("msg"), "type": "message", "status": "in_progress", "role": "assistant",
                    "content": [],
                }  # fmt: skip
                output.append(item)
                yield self.event("response.output_item.added", output_index=len(output) - 1, item=item)
            parts: list[JSON] = item["summary" if summary else "content"]
            place = {"item_id": item["id"], "output_index": len(output) - 1}
            place["summary_index" if summary else "content_index"] = len(parts)
            shapes: dict[str, tuple[str, str, JSON, JSON]] = {
                "reasoning": ("reasoning_summary_text", "text", {}, {"type": "summary_text"}),
                "text": ("output_text", "text", {"logprobs": []},
                         {"type": "output_text", "annotations": [], "logprobs": []}),
                "refusal": ("refusal", "refusal", {}, {"type": "refusal"}),
            }  # fmt: skip
            name, key, extra, part = shapes[kind]
            part_name = "reasoning_summary_part" if summary else "content_part"
            part[key] = ""
            yield self.event(f"response.{part_name}.added", **place, part=part)
            parts.append(part)
            for _, token in group:
                yield self.pause(n)
                texts[kind] += token
                part[key] = texts[kind]
                more = {**extra, **self.obfuscation(token)}
                yield self.event(f"response.{name}.delta", **place, delta=token, **more)
                yield from self.after(n)
                n += 1
            if kind == "text":
                for m, note in enumerate(self.reply.annotations):
                    added = "response.output_text.annotation.added"
                    yield self.event(added, **place, annotation_index=m, annotation=note)
                part["annotations"] = list(self.reply.annotations)
            yield self.event(f"response.{name}.done", **place, **{key: texts[kind]}, **extra)
            yield self.event(f"response.{part_name}.done", **place, part=part)
            # A refusal in the same message is still to come when this was its text.
            if summary or n == len(self.plan):
                if not summary:
                    item["status"] = "incomplete" if self.short else "completed"
                yield self.event("response.output_item.done", output_index=len(output) - 1, item=item)

    def function_call(self, name: str, arguments: str) -> Iterator[Step]:
        item = {"id": self.server._id("fc"), "type": "function_call", "status": "in_progress", "arguments": "",
                "call_id": self.server._id("call"), "name": name}  # fmt: skip
        self.response["output"].append(item)
        yield self.event("response.output_item.added", output_index=0, item=item)
        for n, token in enumerate(split(arguments)):
            yield self.pause(n)
            place = {"item_id": item["id"], "output_index": 0}
            more = self.obfuscation(token)
            yield self.event("response.function_call_arguments.delta", **place, delta=token, **more)
        item.update(arguments=arguments, status="completed")
        yield self.event("response.function_call_arguments.done", **place, arguments=arguments)
        yield self.event("response.output_item.done", output_index=0, item=item)


class Chat(Answer):
    without = ("id", "object", "created", "system_fingerprint", "service_tier", "obfuscation", "index", "role")
    unknown = (
        (None, {"id": "x", "object": "chat.completion.surprise", "created": 0, "model": "x", "choices": []}),
        (None, {"choices": [{"index": 0, "delta": {"surprise": "never to be shown"}, "finish_reason": None}]}),
    )

    def __init__(self, server: OfflineServer, request: Request, reply: Reply) -> None:
        limit = request.body.get("max_completion_tokens") or request.body.get("max_tokens")
        super().__init__(server, request, reply, limit)
        self.id = server._id("chatcmpl")
        self.include_usage = (self.body.get("stream_options") or {}).get("include_usage", False)
        asked, made = self.usage
        self.counted = {"prompt_tokens": asked, "completion_tokens": made, "total_tokens": asked + made}
        self.finish = "tool_calls" if self.call else self.short or "stop"
        self.notes = [{"type": "url_citation", **note} for note in reply.annotations]
        self.calls: list[JSON] = [
            {"id": server._id("call"), "type": "function", "function": {"name": name, "arguments": arguments}}
            for name, arguments in [self.call or ("", "")] if self.call
        ]  # fmt: skip

    def envelope(self, object: str, choices: list[JSON]) -> JSON:
        return {"id": self.id, "object": object, "created": self.created, "model": self.model,
                "service_tier": "default", "system_fingerprint": "fp_offline", "choices": choices}  # fmt: skip

    def chunk(self, delta: JSON, finish: str | None = None, token: str = "") -> tuple[None, JSON]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        data = self.envelope("chat.completion.chunk", [choice])
        return None, {**data, **({"usage": None} if self.include_usage else {}), **self.obfuscation(token)}

    def error(self, nested: bool) -> tuple[str | None, Any]:
        data = super().error(nested)[1]
        return None, {"error": data["error"]} if nested else {**data, "object": "error"}

    def steps(self) -> Iterator[Step]:
        yield self.chunk({"role": "assistant", "content": None if self.calls else "", "refusal": None})
        for call in self.calls:
            function = {"name": call["function"]["name"], "arguments": ""}
            yield self.chunk({"tool_calls": [{**call, "index": 0, "function": function}]})
            for n, token in enumerate(split(call["function"]["arguments"])):
                yield self.pause(n)
                yield self.chunk({"tool_calls": [{"index": 0, "function": {"arguments": token}}]}, token=token)
        for n, (kind, token) in enumerate(self.plan):
            yield self.pause(n)
            key = {"reasoning": "reasoning_content", "text": "content"}.get(kind, kind)
            yield self.chunk({key: token}, token=token)
            yield from self.after(n)
        if self.notes:
            yield self.chunk({"annotations": self.notes})
        yield self.chunk({}, self.finish)
        if self.include_usage:
            yield None, {**self.envelope("chat.completion.chunk", []), "usage": self.counted}
        yield None, "[DONE]"

    def result(self) -> JSON:
        texts = {kind: "".join(token for this, token in self.plan if this == kind)
                 for kind in ("text", "refusal", "reasoning")}  # fmt: skip
        message: JSON = {"role": "assistant", "content": texts["text"] or None, "refusal": texts["refusal"] or None,
                          "annotations": self.notes}  # fmt: skip
        if texts["reasoning"]:
            message["reasoning_content"] = texts["reasoning"]
        if self.calls:
            message["tool_calls"] = self.calls
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": self.finish}
        return {**self.envelope("chat.completion", [choice]), "usage": self.counted}


class Assistants(Answer):
    broken = b'event: thread.message.delta\ndata: {"object": "thread.message.delta", "delta": {"content": [{"ind\n\n'
    skipped = r"step|queued$|in_progress$"
    unknown = (
        ("thread.surprise.delta", {"object": "thread.surprise.delta", "delta": "never to be shown"}),
        ("keepalive", {}),
    )
    without = ("object", "created_at", "metadata")

    def __init__(self, server: OfflineServer, request: Request, reply: Reply, thread: Thread, new: bool) -> None:
        # The dialect has no place for a reasoning summary.
        super().__init__(server, request, replace(reply, reasoning=""), request.body.get("max_completion_tokens"))
        self.thread, self.new, body = thread, new, self.body
        self.data: JSON = {
            "id": server._id("run"), "object": "thread.run", "created_at": self.created, "status": "queued",
            "assistant_id": body["assistant_id"], "thread_id": thread.data["id"], "started_at": None,
            "expires_at": self.created + 600, "cancelled_at": None, "failed_at": None, "completed_at": None,
            "required_action": None, "last_error": None, "incomplete_details": None, "usage": None,
            "model": self.model, "instructions": request.instructions, "tools": body.get("tools") or [],
            "metadata": body.get("metadata") or {}, "temperature": 1.0, "top_p": 1.0, "max_prompt_tokens": None,
            "max_completion_tokens": body.get("max_completion_tokens"), "response_format": "auto",
            "truncation_strategy": {"type": "auto", "last_messages": None}, "tool_choice": "auto",
            "parallel_tool_calls": True,
        }  # fmt: skip
        thread.runs[self.data["id"]] = self.data

    def result(self) -> JSON:
        return self.data

    def cancelled(self) -> bool:
        return bool(self.data["status"] == "cancelling")

    def error(self, nested: bool) -> tuple[str | None, Any]:
        error = error_object(self.message(), "server_error", "server_error")
        return "error", {"error": error} if nested else error

    def event(self, status: str, **fields: Any) -> tuple[str, JSON]:
        self.data.update({"status": status, **fields})
        return f"thread.run.{status}", self.data

    def failed(self) -> Iterator[Step]:
        error = {"code": "server_error", "message": self.message()}
        yield self.event("failed", last_error=error, failed_at=int(time.time()))
        yield "done", "[DONE]"

    def run(self) -> Iterator[Step]:
        try:
            yield from super().run()
        finally:
            if self.data["status"] in ("queued", "in_progress", "cancelling"):
                self.data["status"] = "failed"  # a fault or a client that left ended it

    def steps(self) -> Iterator[Step]:
        if self.new:
            yield "thread.created", self.thread.data
        yield "thread.run.created", self.data
        yield self.event("queued")
        yield self.event("in_progress", started_at=int(time.time()))
        asked, made = self.usage
        usage = {"prompt_tokens": asked, "completion_tokens": made, "total_tokens": asked + made}
        message_id, kind = self.server._id("msg"), "tool_calls" if self.call else "message_creation"
        step: JSON = {
            "id": self.server._id("step"), "object": "thread.run.step", "created_at": int(time.time()),
            "run_id": self.data["id"], "assistant_id": self.data["assistant_id"], "metadata": {}, "usage": None,
            "thread_id": self.data["thread_id"], "type": kind, "status": "in_progress", "cancelled_at": None,
            "completed_at": None, "expired_at": None, "failed_at": None, "last_error": None,
            "step_details": {"type": kind, kind: [] if self.call else {"message_id": message_id}},
        }  # fmt: skip
        yield "thread.run.step.created", step
        yield "thread.run.step.in_progress", step
        if self.call:
            name, arguments = self.call
            call = {"id": self.server._id("call"), "type": "function"}
            for n, token in enumerate(split(arguments)):
                yield self.pause(n)
                part = {"index": 0, **call, "function": {"name": name, "arguments": token, "output": None}}
                delta = {"step_details": {"type": kind, kind: [part]}}
                yield "thread.run.step.delta", {"id": step["id"], "object": "thread.run.step.delta", "delta": delta}
            outputs = {"tool_calls": [{**call, "function": {"name": name, "arguments": arguments}}]}
            action = {"type": "submit_tool_outputs", "submit_tool_outputs": outputs}
            yield self.event("requires_action", required_action=action)
            yield "done", "[DONE]"
            return
        names = {"assistant_id": self.data["assistant_id"], "run_id": self.data["id"]}
        message = self.thread.add(message_id, "assistant", [], status="in_progress", **names)
        yield "thread.message.created", message
        yield "thread.message.in_progress", message
        content: list[JSON] = message["content"]
        for n, (kind, token) in enumerate(self.plan):
            yield self.pause(n)
            if self.cancelled():
                break
            if not content or content[-1]["type"] != kind:
                content.append({"type": kind, kind: {"value": "", "annotations": []} if kind == "text" else ""})
            if kind == "text":
                content[-1]["text"]["value"] += token
            else:
                content[-1][kind] += token
            yield self.delta(message_id, len(content) - 1, kind, {"value": token} if kind == "text" else token)
            yield from self.after(n)
        if self.reply.annotations and content:
            content[0]["text"]["annotations"] = list(self.reply.annotations)
            notes = [{"index": m, **note} for m, note in enumerate(self.reply.annotations)]
            yield self.delta(message_id, 0, "text", {"annotations": notes})
        now, status = int(time.time()), "completed"
        if self.cancelled() or self.short:
            reason = "run_cancelled" if self.cancelled() else "max_tokens" if self.short == "length" else self.short
            status = "cancelled" if self.cancelled() else "incomplete"
            message.update(status="incomplete", incomplete_at=now, incomplete_details={"reason": reason})
            yield "thread.message.incomplete", message
        else:
            message.update(status="completed", completed_at=now)
            yield "thread.message.completed", message
        ended = "cancelled" if status == "cancelled" else "completed"
        step.update({"status": ended, f"{ended}_at": now, "usage": usage})
        yield f"thread.run.step.{ended}", step
        details = {"reason": "max_completion_tokens" if self.short == "length" else None} if self.short else None
        times = {f"{status}_at": now} if status != "incomplete" else {}
        yield self.event(status, usage=usage, incomplete_details=details, **times)
        yield "done", "[DONE]"

    def delta(self, id: str, index: int, kind: str, value: Any) -> tuple[str, JSON]:
        content = [{"index": index, "type": kind, kind: value}]
        return "thread.message.delta", {"id": id, "object": "thread.message.delta", "delta": {"content": content}}
