"""One class a dialect: a generator of the steps of one answer, in the shapes of `openai.types`."""

from __future__ import annotations

import itertools
import json
import math
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, cast

from ._refusals import sealed
from ._replies import HOSTED, JSON, HostedCall, Reply, Request, ToolCall, dump, error_object, split

if TYPE_CHECKING:
    from ._server import OfflineServer

# Where the stream breaks of a response that goes on.
BREAK = b""
_BREAKING = ("cut", "ends_early", "stall", "malformed")

Step = float | bytes | tuple[str | None, Any]  # a pause, raw bytes, or an event's name and data


@dataclass(eq=False)
class Called:
    """A call of an answer, told apart from another that says the same: of a function, the one of that index, or else of
    a hosted tool."""

    id: str = ""
    name: str = ""
    index: int = 0
    hosted: HostedCall | None = None


Kind = str | Called  # what a token is of: reasoning, text, refusal, or a call
Entry = tuple[Kind, str]


class Run:
    """A run of the Assistants dialect: the object and its steps in order."""

    def __init__(self, data: JSON, seconds: float) -> None:
        self.data, self.steps, self._deadline = data, list[JSON](), time.monotonic() + seconds

    @property
    def active(self) -> bool:
        """Tell whether it is under way."""
        self.expire()
        return self.data["status"] in ("queued", "in_progress", "requires_action", "cancelling")

    def expire(self) -> None:
        """End it where it waited too long for tool outputs."""
        if self.data["status"] == "requires_action" and time.monotonic() >= self._deadline:
            self.end("expired")

    def end(self, status: str) -> None:
        """End it, and what of it is under way, where nobody works on it."""
        self.data.update({"status": status, "required_action": None})
        for step in self.steps:
            if step["status"] == "in_progress":
                step.update({"status": status, f"{status}_at": int(time.time())})

    @property
    def outputs(self) -> list[str]:
        """Give the outputs of its functions so far."""
        steps = [step["step_details"].get("tool_calls", []) for step in self.steps]
        return [call["function"]["output"] for calls in steps for call in calls if "function" in call]


class Thread:
    """A thread of the Assistants dialect: the object, its messages in order, its runs."""

    def __init__(self, id: str, metadata: Any) -> None:
        self.data: JSON = {"id": id, "object": "thread", "created_at": int(time.time()),
                            "metadata": metadata or {}, "tool_resources": {}}  # fmt: skip
        self.messages: list[JSON] = []
        self.runs: dict[str, Run] = {}

    @property
    def active_run(self) -> str | None:
        return next((id for id, run in self.runs.items() if run.active), None)

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


def planned(server: OfflineServer, reply: Reply, hosted_tools: frozenset[str]) -> list[Entry]:
    """Give what a reply is told as, token by token."""
    kinds: list[tuple[Kind, str]] = [("reasoning", reply.reasoning)]
    for one in reply.calls:
        if not isinstance(one, HostedCall) or one.type not in hosted_tools:
            continue
        text = str(hosted_fields(one).get(HOSTED[one.type][2][0], ""))
        kinds.append((Called(hosted=one), text))
    kinds += [("text", reply.text or ""), ("refusal", reply.refusal)]
    for n, call in enumerate(call for call in reply.calls if isinstance(call, ToolCall)):
        kinds.append((Called(call.id or server._id("call"), call.name, n), call.text))
    # A call is told also where nothing of it is streamed.
    return [(kind, token) for kind, text in kinds for token in split(text) or [""] * isinstance(kind, Called)]


class Answer:
    """One answer, in no dialect yet: `plan` has its tokens in order, and `at` says how many of them are told."""

    broken = b'data: {"choices": [{"delta": {"content": "half a wo\n\n'
    without: ClassVar[tuple[str, ...]] = ()  # what "missing_fields" leaves out
    skipped: ClassVar[str] = "(?!)"  # events that it leaves out
    unknown: ClassVar[tuple[tuple[str | None, Any], ...]] = ()  # what "unknown_events" puts in
    hosted_tools: ClassVar[frozenset[str]] = frozenset()  # those that the dialect has

    def __init__(self, server: OfflineServer, request: Request, reply: Reply, limit: int | None) -> None:
        self.server, self.request, self.reply, self.body = server, request, reply, request.body
        self.fault, self.model, self.created = reply.fault, request.model or "offline", int(time.time())
        self.delay = server.delay if reply.delay is None else reply.delay
        self.first_delay = server.first_delay if reply.first_delay is None else reply.first_delay
        plan = planned(server, reply, self.hosted_tools)
        self.short: str | None = None
        if self.fault in ("incomplete", "content_filter"):
            plan, self.short = plan[: (len(plan) + 1) // 2], self.fault.replace("incomplete", "length")
        elif limit is not None and len(plan) > limit:
            plan, self.short = plan[:limit], "length"
        elif self.fault and not plan:
            plan = [("text", "")]  # a place for the fault to happen at
        self.plan, self.middle, self.at = plan, (len(plan) - 1) // 2, 0
        words = [request.instructions, *(text for _, text in request.messages)]
        counted = sum(len(split(text)) for text in words), len(plan)
        self.usage = reply.usage or counted
        stream_options = self.body.get("stream_options") or {}
        self.obfuscate = stream_options.get("include_obfuscation", True)

    def told(self, kind: Kind) -> str:
        """Give what of a text or a call the plan has."""
        return "".join(token for this, token in self.plan if this == kind)

    @property
    def called(self) -> list[Called]:
        """Give the calls of functions that the plan has at least the beginning of."""
        return [kind for kind in dict.fromkeys(kind for kind, _ in self.plan)
                if isinstance(kind, Called) and kind.hosted is None]  # fmt: skip

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

    def pause(self) -> float:
        return float(self.delay if self.at else self.first_delay)

    def after(self) -> Iterator[Step]:
        """Give what goes wrong after a token."""
        self.at += 1
        if self.at - 1 != self.middle:
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
    hosted_tools = frozenset(HOSTED)
    unknown = (
        ("response.surprise.delta", {"type": "response.surprise.delta", "delta": "never to be shown"}),
        ("keepalive", {"type": "keepalive", "sequence_number": 0}),
    )

    def __init__(self, server: OfflineServer, request: Request, reply: Reply) -> None:
        super().__init__(server, request, reply, request.body.get("max_output_tokens"))
        self.numbers, self.number = itertools.count(), -1
        self.background = bool(self.body.get("background"))
        self.include = frozenset(self.body.get("include") or ())
        self.thought: str | None = None
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

    def after(self) -> Iterator[Step]:
        if not self.breaks:
            yield from super().after()
            return
        self.at += 1
        if self.at - 1 == self.middle:
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
        yield from self.items()
        if self.short:
            reason = "max_output_tokens" if self.short == "length" else self.short
            yield self.end("incomplete", incomplete_details={"reason": reason})
        else:
            yield self.end("completed")
        if self.fault == "missing_fields":
            yield None, "[DONE]"

    def items(self) -> Iterator[Step]:
        """Give the plan's items: the reasoning, a message with text and refusal, and each call."""
        for of, entries in itertools.groupby(self.plan, item_of):
            if isinstance(of, str):
                yield from self.written(of, list(entries))
            elif of.hosted is not None:
                yield from self.hosted_call(of.hosted, [token for _, token in entries])
            else:
                yield from self.function_call(of, [token for _, token in entries])
        if self.quirk == "call_first_only":
            output = self.response["output"]
            self.response["output"] = [item for item in output if item not in self.function_items(output)[1:]]

    @property
    def quirk(self) -> str | None:
        """Give the fault where it can be one of events."""
        return self.fault if self.body.get("stream") else None

    @property
    def state(self) -> str:
        """Give the status of an item that is told as far as it is: the last one of half an answer is not whole."""
        return "incomplete" if self.short and self.at == len(self.plan) else "completed"

    def function_items(self, output: list[JSON]) -> list[JSON]:
        return [item for item in output if item["type"] == "function_call"]

    def begin(self, prefix: str, **fields: Any) -> tuple[JSON, JSON]:
        """Give a new item of the output, and the fields that say where events are of it."""
        output, item = self.response["output"], {"id": self.server._id(prefix), **fields}
        if self.thought is not None:
            self.server._follow(item["id"], self.thought)
        self.thought = item["id"] if prefix == "rs" else None
        output.append(item)
        return item, {"item_id": item["id"], "output_index": len(output) - 1}

    def added(self, item: JSON, **changed: Any) -> Step:
        return self.event("response.output_item.added", output_index=len(self.response["output"]) - 1,
                          item={**item, **changed})  # fmt: skip

    def done(self, item: JSON) -> Step:
        at = self.response["output"].index(item)
        return self.event("response.output_item.done", output_index=at, item=item)

    def written(self, of: str, entries: list[Entry]) -> Iterator[Step]:
        """Give the reasoning or the message; what follows upon one of a kind is one part."""
        if of == "reasoning":
            item, place = self.begin("rs", type="reasoning", summary=[])
            if "reasoning.encrypted_content" in self.include:
                item["encrypted_content"] = sealed(item["id"], self.model, self.request.key)
                # OpenAI's is not whole before the end either.
                yield self.added(item, encrypted_content=item["encrypted_content"][:40])
            else:
                yield self.added(item)
        else:
            phase = {"phase": self.reply.phase} if self.reply.phase else {}
            fields = {"type": "message", "status": "in_progress", "role": "assistant", "content": list[JSON](), **phase}
            item, place = self.begin("msg", **fields)
            yield self.added(item)
        for kind, group in itertools.groupby(entries, lambda entry: entry[0]):
            yield from self.part(item, place, str(kind), [token for _, token in group])
        if of == "message":
            item["status"] = self.state
        yield self.done(item)

    def part(self, item: JSON, place: JSON, kind: str, tokens: list[str]) -> Iterator[Step]:
        parts: list[JSON] = item["summary" if kind == "reasoning" else "content"]
        place = {**place, "summary_index" if kind == "reasoning" else "content_index": len(parts)}
        shapes: dict[str, tuple[str, str, JSON, JSON]] = {
            "reasoning": ("reasoning_summary_text", "text", {}, {"type": "summary_text"}),
            "text": ("output_text", "text", {"logprobs": []},
                     {"type": "output_text", "annotations": [], "logprobs": []}),
            "refusal": ("refusal", "refusal", {}, {"type": "refusal"}),
        }  # fmt: skip
        name, key, extra, part = shapes[kind]
        part_name = "reasoning_summary_part" if kind == "reasoning" else "content_part"
        part[key] = ""
        yield self.event(f"response.{part_name}.added", **place, part=part)
        parts.append(part)
        for token in tokens:
            yield self.pause()
            part[key] += token
            more = {**extra, **self.obfuscation(token)}
            yield self.event(f"response.{name}.delta", **place, delta=token, **more)
            yield from self.after()
        if kind == "text":
            for m, note in enumerate(self.reply.annotations):
                added = "response.output_text.annotation.added"
                yield self.event(added, **place, annotation_index=m, annotation=note)
            part["annotations"] = list(self.reply.annotations)
        yield self.event(f"response.{name}.done", **place, **{key: part[key]}, **extra)
        yield self.event(f"response.{part_name}.done", **place, part=part)

    def function_call(self, call: Called, tokens: list[str]) -> Iterator[Step]:
        quirk, fields = self.quirk, {"arguments": "", "call_id": call.id, "name": call.name}
        item, place = self.begin("fc", type="function_call", status="in_progress", **fields)
        changed: JSON = {"name": ""} if quirk == "call_late_name" else {}
        if quirk == "call_one_delta":
            changed = {"arguments": "".join(tokens), "status": "completed"}
        yield self.added(item, **changed)
        if quirk == "call_no_ids":
            place = {}
        for token in tokens:
            yield self.pause()
            item["arguments"] += token
            if quirk != "call_one_delta":
                event = "response.function_call_arguments.delta"
                yield self.event(event, **place, delta=token, **self.obfuscation(token))
            yield from self.after()
        item["status"] = self.state
        if quirk == "call_first_only" and call.index:
            return
        if quirk != "call_one_delta":
            yield self.event("response.function_call_arguments.done", **place, arguments=item["arguments"])
        if quirk == "call_empty_final":
            item["arguments"] = ""
        yield self.done(item)

    def hosted_call(self, call: HostedCall, tokens: list[str]) -> Iterator[Step]:
        prefix, working, (key, event), (where, include) = HOSTED[call.type]
        kind = f"{call.type}_call"
        item, place = self.begin(prefix, type=kind, status="in_progress", **hosted_fields(call))
        if where and include not in self.include:
            leave_out(item, where)
        yield self.added(item, **({key: ""} if key else {}))
        yield self.event(f"response.{kind}.in_progress", **place)
        for token in tokens:
            yield self.pause()
            if key:
                yield self.event(f"response.{event}.delta", **place, delta=token, **self.obfuscation(token))
            yield from self.after()
        if key:
            yield self.event(f"response.{event}.done", **place, **{key: item[key]})
        if working:
            yield self.event(f"response.{kind}.{working}", **place)
        item["status"] = self.state
        yield self.event(f"response.{kind}.completed", **place)
        yield self.done(item)


def as_object(arguments: str) -> Any:
    """Give arguments as an object where they are one."""
    try:
        return json.loads(arguments)
    except ValueError:
        return arguments


def item_of(entry: Entry) -> Kind:
    """Give what groups a plan's tokens to items: a text and a refusal are one message."""
    return "message" if entry[0] in ("text", "refusal") else entry[0]


def hosted_fields(call: HostedCall) -> JSON:
    """Give the fields of a hosted tool's item: those of the call, and what the API always has."""
    fields: dict[str, JSON] = {
        "web_search": {"action": {"type": "search", "query": "", "queries": []}},
        "file_search": {"queries": [], "results": None},
        "code_interpreter": {"code": "", "container_id": "cntr_offline", "outputs": None},
        "image_generation": {"result": None},
        "mcp": {"name": "lookup", "server_label": "offline", "arguments": "{}", "output": None, "error": None},
    }
    return {**fields[call.type], **call.fields}


def leave_out(item: JSON, where: str) -> None:
    """Take out of an item what it has only where it is asked for."""
    *within, name = where.split(".")
    for key in within:
        item[key] = item = dict(item[key])
    if within:
        item.pop(name, None)
    else:
        item[name] = None


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
        self.finish: str | None = self.short or ("tool_calls" if self.called else "stop")
        if self.called and self.fault == "call_finish_stop":
            self.finish = "stop"
        self.notes = [{"type": "url_citation", **note} for note in reply.annotations]

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
        content = None if self.called and not self.told("text") else ""
        yield self.chunk({"role": "assistant", "content": content, "refusal": None})
        for kind, group in itertools.groupby(self.plan, lambda entry: entry[0]):
            if isinstance(kind, Called):
                yield from self.function_call(kind, [token for _, token in group])
                continue
            key = {"reasoning": "reasoning_content", "text": "content"}.get(kind, kind)
            for _, token in group:
                yield self.pause()
                yield self.chunk({key: token}, token=token)
                yield from self.after()
        if self.fault == "call_one_delta":
            yield self.chunk({"tool_calls": [{"index": m, **call} for m, call in enumerate(self.tool_calls())]})
        if self.notes:
            yield self.chunk({"annotations": self.notes})
        if not (self.called and self.fault == "call_no_finish"):
            yield self.chunk({}, self.finish)
        if self.include_usage:
            yield None, {**self.envelope("chat.completion.chunk", []), "usage": self.counted}
        yield None, "[DONE]"

    def tool_calls(self) -> list[JSON]:
        """Give the calls of functions, whole."""
        found: list[JSON] = []
        for call in self.called:
            arguments: Any = self.told(call)
            if self.fault == "call_objects":
                arguments = as_object(arguments)
            found.append({"type": "function", "function": {"name": call.name, "arguments": arguments}})
            if self.fault != "call_no_ids":
                found[-1] = {"id": call.id, **found[-1]}
        return found

    def function_call(self, call: Called, tokens: list[str]) -> Iterator[Step]:
        id, name = call.id, call.name
        is_late, is_whole = self.fault == "call_late_name", self.fault in ("call_one_delta", "call_objects")
        named: JSON = {} if self.fault == "call_no_ids" or is_late else {"id": id}
        place: JSON = {"index": call.index}
        if self.fault == "call_no_index":
            place = {"id": id}
        if not is_whole:
            function = {"name": None if is_late else name, "arguments": ""}
            yield self.chunk({"tool_calls": [{**place, **named, "type": "function", "function": function}]})
        for token in tokens:
            yield self.pause()
            if not is_whole:
                yield self.chunk({"tool_calls": [{**place, "function": {"arguments": token}}]}, token=token)
            yield from self.after()
        if is_late:
            yield self.chunk({"tool_calls": [{**place, "id": id, "function": {"name": name}}]})
        if self.fault == "call_objects":
            yield self.chunk({"tool_calls": [{**place, **self.tool_calls()[call.index]}]})

    def result(self) -> JSON:
        message: JSON = {"role": "assistant", "content": self.told("text") or None,
                         "refusal": self.told("refusal") or None, "annotations": self.notes}  # fmt: skip
        if reasoning := self.told("reasoning"):
            message["reasoning_content"] = reasoning
        if self.called:
            message["tool_calls"] = self.tool_calls()
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
    hosted_tools = frozenset({"file_search", "code_interpreter"})

    def __init__(
        self, server: OfflineServer, request: Request, reply: Reply, thread: Thread, *, new: bool, run: Run | None
    ) -> None:
        asked = run.data if run is not None else request.body
        # The dialect has no place for a reasoning summary.
        super().__init__(server, request, replace(reply, reasoning=""), asked.get("max_completion_tokens"))
        self.thread, self.new, self.goes_on = thread, new, run is not None
        self.run_object = run or self.new_run(request.body)
        self.data = self.run_object.data
        asked_tokens, made = self.usage
        self.counted = {"prompt_tokens": asked_tokens, "completion_tokens": made, "total_tokens": asked_tokens + made}

    def new_run(self, body: JSON) -> Run:
        data: JSON = {
            "id": self.server._id("run"), "object": "thread.run", "created_at": self.created, "status": "queued",
            "assistant_id": body["assistant_id"], "thread_id": self.thread.data["id"], "started_at": None,
            "expires_at": self.created + int(self.server.run_seconds), "cancelled_at": None, "failed_at": None,
            "completed_at": None, "required_action": None, "last_error": None, "incomplete_details": None,
            "usage": None, "model": self.model, "instructions": self.request.instructions,
            "tools": body.get("tools") or [], "metadata": body.get("metadata") or {}, "temperature": 1.0,
            "top_p": 1.0, "max_prompt_tokens": None, "max_completion_tokens": body.get("max_completion_tokens"),
            "response_format": "auto", "truncation_strategy": {"type": "auto", "last_messages": None},
            "tool_choice": body.get("tool_choice") or "auto",
            "parallel_tool_calls": body.get("parallel_tool_calls", True),
        }  # fmt: skip
        run = self.thread.runs[data["id"]] = Run(data, self.server.run_seconds)
        return run

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
                self.run_object.end("failed")  # a fault or a client that left ended it

    def steps(self) -> Iterator[Step]:
        if self.new:
            yield "thread.created", self.thread.data
        if self.goes_on:
            yield "thread.run.step.completed", self.run_object.steps[-1]
        else:
            yield "thread.run.created", self.data
        yield self.event("queued")
        yield self.event("in_progress", started_at=self.data["started_at"] or int(time.time()))
        for of, entries in itertools.groupby(self.plan, self.step_of) if self.plan else [("message", iter(()))]:
            told = self.message_step if of == "message" else self.functions_step if of == "calls" else self.hosted_step
            yield from told(list(entries))
            if self.cancelled():
                break
        yield self.ended()
        yield "done", "[DONE]"

    def step_of(self, entry: Entry) -> Kind:
        kind = entry[0]
        return "calls" if isinstance(kind, Called) and kind.hosted is None else item_of(entry)

    def ended(self) -> tuple[str, JSON]:
        """Give the event that says how the run ended, or that it waits."""
        now, usage = int(time.time()), self.counted
        if self.cancelled():
            return self.event("cancelled", usage=usage, cancelled_at=now)
        if self.short:
            reason = "max_completion_tokens" if self.short == "length" else None
            return self.event("incomplete", usage=usage, incomplete_details={"reason": reason})
        if self.called:
            action = {"type": "submit_tool_outputs", "submit_tool_outputs": {"tool_calls": self.required()}}
            return self.event("requires_action", required_action=action)
        return self.event("completed", usage=usage, completed_at=now)

    def step(self, kind: str, details: Any) -> JSON:
        """Give a new step of the run."""
        step: JSON = {
            "id": self.server._id("step"), "object": "thread.run.step", "created_at": int(time.time()),
            "run_id": self.data["id"], "assistant_id": self.data["assistant_id"], "metadata": {}, "usage": None,
            "thread_id": self.data["thread_id"], "type": kind, "status": "in_progress", "cancelled_at": None,
            "completed_at": None, "expired_at": None, "failed_at": None, "last_error": None,
            "step_details": {"type": kind, kind: details},
        }  # fmt: skip
        self.run_object.steps.append(step)
        return step

    def step_ended(self, step: JSON) -> tuple[str, JSON]:
        status = "cancelled" if self.cancelled() else "completed"
        step.update({"status": status, f"{status}_at": int(time.time()), "usage": self.counted})
        return f"thread.run.step.{status}", step

    def message_step(self, entries: list[Entry]) -> Iterator[Step]:
        message_id = self.server._id("msg")
        step = self.step("message_creation", {"message_id": message_id})
        yield "thread.run.step.created", step
        yield "thread.run.step.in_progress", step
        names = {"assistant_id": self.data["assistant_id"], "run_id": self.data["id"]}
        message = self.thread.add(message_id, "assistant", [], status="in_progress", **names)
        yield "thread.message.created", message
        yield "thread.message.in_progress", message
        content: list[JSON] = message["content"]
        for entry, token in entries:
            kind = str(entry)
            yield self.pause()
            if self.cancelled():
                break
            if not content or content[-1]["type"] != kind:
                content.append({"type": kind, kind: {"value": "", "annotations": []} if kind == "text" else ""})
            if kind == "text":
                content[-1]["text"]["value"] += token
            else:
                content[-1][kind] += token
            value: Any = {"value": token} if kind == "text" else token
            yield self.delta(message_id, len(content) - 1, kind, value)
            yield from self.after()
        if self.reply.annotations and content:
            content[0]["text"]["annotations"] = list(self.reply.annotations)
            notes = [{"index": m, **note} for m, note in enumerate(self.reply.annotations)]
            yield self.delta(message_id, 0, "text", {"annotations": notes})
        yield self.message_ended(message)
        yield self.step_ended(step)

    def message_ended(self, message: JSON) -> tuple[str, JSON]:
        now = int(time.time())
        if self.cancelled() or (self.short and self.at == len(self.plan)):
            reason = "run_cancelled" if self.cancelled() else "max_tokens" if self.short == "length" else self.short
            message.update(status="incomplete", incomplete_at=now, incomplete_details={"reason": reason})
            return "thread.message.incomplete", message
        message.update(status="completed", completed_at=now)
        return "thread.message.completed", message

    def required(self) -> list[JSON]:
        """Give the calls of functions, whole."""
        return [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": self.told(call)}}
            for call in self.called
        ]

    def functions_step(self, entries: list[Entry]) -> Iterator[Step]:
        """Give the step of the functions' calls, which stays open until their outputs come."""
        step = self.step("tool_calls", [])
        yield "thread.run.step.created", step
        yield "thread.run.step.in_progress", step
        calls: list[JSON] = step["step_details"]["tool_calls"]
        for called, token in entries:
            assert isinstance(called, Called)
            at = {"index": called.index, "type": "function"}
            if called.index == len(calls):
                function = {"name": called.name, "arguments": "", "output": None}
                calls.append({"id": called.id, "type": "function", "function": function})
                yield self.calls_delta(step, {**at, **calls[-1]})
            yield self.pause()
            if self.cancelled():
                break
            calls[-1]["function"]["arguments"] += token
            yield self.calls_delta(step, {**at, "function": {"arguments": token}})
            yield from self.after()
        if self.cancelled():
            yield self.step_ended(step)
        elif self.short:
            step.update({"status": "failed", "failed_at": int(time.time())})
            yield "thread.run.step.failed", step

    def hosted_step(self, entries: list[Entry]) -> Iterator[Step]:
        step = self.step("tool_calls", [])
        yield "thread.run.step.created", step
        yield "thread.run.step.in_progress", step
        call = cast(Called, entries[0][0]).hosted
        assert call is not None
        is_code, type = call.type == "code_interpreter", call.type
        whole: JSON = {"id": self.server._id("call"), "type": type}
        whole[type] = {"input": "", "outputs": []} if is_code else {"results": call.fields.get("results") or []}
        step["step_details"]["tool_calls"].append(whole)
        yield self.calls_delta(step, {"index": 0, **whole})
        for _, token in entries:
            yield self.pause()
            if is_code:
                whole[type]["input"] += token
                yield self.calls_delta(step, {"index": 0, "type": type, type: {"input": token}})
            yield from self.after()
        if is_code:
            whole[type]["outputs"] = list(call.fields.get("outputs") or [])
            numbered = [{"index": m, **output} for m, output in enumerate(whole[type]["outputs"])]
            yield self.calls_delta(step, {"index": 0, "type": type, type: {"outputs": numbered}})
        yield self.step_ended(step)

    def calls_delta(self, step: JSON, call: JSON) -> tuple[str, JSON]:
        delta = {"step_details": {"type": "tool_calls", "tool_calls": [call]}}
        return "thread.run.step.delta", {"id": step["id"], "object": "thread.run.step.delta", "delta": delta}

    def delta(self, id: str, index: int, kind: str, value: Any) -> tuple[str, JSON]:
        content = [{"index": index, "type": kind, kind: value}]
        return "thread.message.delta", {"id": id, "object": "thread.message.delta", "delta": {"content": content}}
