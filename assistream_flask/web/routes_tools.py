"""The routes of tool calls that wait: their outputs, what people decide of them, and which page executes one."""

from __future__ import annotations

from flask import Response

from ..runs.service import OwnedThread
from .answers import json_answer, read_body
from .auth import Call
from .idempotency import answered


def submit_tool_outputs(call: Call, thread: OwnedThread, run_id: str) -> Response:
    """``POST /threads/<id>/runs/<id>/submit_tool_outputs``: give what the page's functions gave."""
    outputs = read_body(call.runtime, ["tool_outputs"], ["tool_outputs"])["tool_outputs"]
    return json_answer(answered(call, thread, lambda keep: thread.submit_tool_outputs(run_id, outputs, keep)))


def approvals(call: Call, thread: OwnedThread, run_id: str) -> Response:
    """``POST /threads/<id>/runs/<id>/approvals``: allow tool calls, or do not."""
    decided = read_body(call.runtime, ["approvals"], ["approvals"])["approvals"]
    return json_answer(answered(call, thread, lambda keep: thread.decide(run_id, decided, keep)))


def claim(call: Call, thread: OwnedThread, run_id: str, call_id: str) -> Response:
    """``POST /threads/<id>/runs/<id>/tool_calls/<id>/claim``: be the page that executes a call, or no longer."""
    body = read_body(call.runtime, ["holder", "release"], ["holder"])
    until, seconds = thread.claim_tool_call(run_id, call_id, body["holder"], body.get("release", False))
    return json_answer({"until": until, "seconds": seconds})
