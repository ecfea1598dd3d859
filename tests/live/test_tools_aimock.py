"""A mock of OpenAI's API from the npm registry, which nobody here wrote: tools as others read the API's description."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from assistream_flask import Assistant, tool
from tests.conftest import KEY, Caller, MakeApp, text
from tests.model_servers import Aimock, aimock

ONE, TWO = "Who wrote Ulysses?", "Who wrote Emma, and who Faust?"
# An answer is found by the last user's words, and by what the calls of this turn gave.
FIXTURES: list[dict[str, Any]] = [
    {
        "match": {"userMessage": ONE, "hasToolResult": False},
        "response": {
            "content": "Let me look that up.",
            "toolCalls": [{"name": "lookup", "arguments": {"query": "Ulysses"}}],
        },
    },
    {"match": {"userMessage": ONE, "toolResultContains": "found Ulysses"}, "response": {"content": "James Joyce."}},
    {
        "match": {"userMessage": TWO, "hasToolResult": False},
        "response": {
            "toolCalls": [{"name": "lookup", "arguments": {"query": one}} for one in ("Emma", "Faust")],
        },
    },
    {"match": {"userMessage": TWO, "toolResultContains": "found Faust"}, "response": {"content": "Austen and Goethe."}},
]


@pytest.fixture(scope="module")
def mock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Aimock]:
    with aimock(tmp_path_factory.mktemp("aimock"), FIXTURES) as server:
        yield server


@pytest.mark.parametrize("dialect", ["responses", "chat"])
def test_another_s_mock_server_hears_what_its_calls_gave_each_once(
    make_app: MakeApp, mock: Aimock, dialect: str
) -> None:
    called: list[str] = []
    both = threading.Barrier(2)

    @tool
    def lookup(query: str) -> str:
        """Look something up."""
        called.append(query)
        if query != "Ulysses":
            # Two calls of one answer are executed at the same time.
            both.wait(10)
        return f"found {query}"

    http_client = openai.DefaultHttpxClient(verify=False)
    with openai.OpenAI(base_url=mock.base_url, api_key=KEY, http_client=http_client, max_retries=0) as client:
        before = len(mock.journal())
        caller = Caller(make_app([Assistant("clerk", model="m", upstream=dialect, tools=[lookup])], client=client))
        for question in (ONE, TWO):
            caller.run("clerk", content=question)
            caller.wait()
    _, one, _, two = caller.entries()
    assert [(entry["run"]["status"], entry["run"]["last_error"]) for entry in (one, two)] == [("completed", None)] * 2
    assert [text(one), text(two)] == ["Let me look that up.James Joyce.", "Austen and Goethe."]
    found = [
        [
            (call["function"]["arguments"], call["function"]["output"], call["status"])
            for step in entry["steps"]
            for call in step["step_details"]["tool_calls"]
        ]
        for entry in (one, two)
    ]
    queries = [["Ulysses"], ["Emma", "Faust"]]
    assert found == [[(f'{{"query":"{q}"}}', f"found {q}", "completed") for q in several] for several in queries]
    assert sorted(called) == ["Emma", "Faust", "Ulysses"]
    asked = mock.journal()[before:]
    paths = {"responses": "/v1/responses", "chat": "/v1/chat/completions"}
    assert [(one["path"], one["response"]["status"]) for one in asked] == [(paths[dialect], 200)] * 4
    # Each call has its output in the history of all that is asked after it, and only one.
    for request, calls in zip(asked, (0, 1, 1, 3), strict=True):
        messages = request["body"]["messages"]
        made = [call["id"] for message in messages for call in message.get("tool_calls") or ()]
        answered = [message["tool_call_id"] for message in messages if message["role"] == "tool"]
        assert len(made) == calls, json.dumps(messages)
        assert sorted(made) == sorted(answered)
