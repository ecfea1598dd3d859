"""A real llama.cpp, whose model calls a tool of the app's by itself: what no scripted server can show."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import openai
import pytest

from assistream_flask import Assistant, tool
from tests.conftest import KEY, Caller, MakeApp, text
from tests.model_servers import llama


def _turn(question: str, query: str) -> str:
    return (
        f"<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        f'<tool_call>\n{{"name": "lookup", "arguments": {{"query": "{query}"}}}}\n</tool_call>'
    )


# A model of 135 million weights does what it has done before. So the instructions go on with turns of the model's own
# format: told the same in words, it calls in one of five tries, so in none on another processor.
INSTRUCTIONS = "Answer each question with one call of lookup." + "".join(
    [_turn("Who wrote Emma?", "Emma"), _turn("How far is the moon?", "moon")]
)
FOUND = "Ulysses is a novel by James Joyce."
# What each dialect calls the same.
MOST = {"responses": "max_output_tokens", "chat": "max_tokens"}


class Asked(NamedTuple):
    """A request that llama.cpp answered."""

    body: dict[str, Any]
    status: int

    @property
    def history(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.body.get("input") or self.body["messages"]
        return found


@pytest.fixture(scope="module")
def llama_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with llama(tmp_path_factory.mktemp("llama")) as url:
        yield url


@pytest.fixture
def asked() -> list[Asked]:
    return []


@pytest.fixture
def client(llama_url: str, asked: list[Asked]) -> Iterator[openai.OpenAI]:
    def note(response: Any) -> None:
        asked.append(Asked(json.loads(response.request.content), response.status_code))

    http_client = openai.DefaultHttpxClient(verify=False, event_hooks={"response": [note]})
    with openai.OpenAI(base_url=llama_url, api_key=KEY, http_client=http_client, max_retries=0) as client:
        yield client


@pytest.mark.parametrize("choice", ["auto", "required"])
@pytest.mark.parametrize("dialect", ["responses", "chat"])
def test_a_real_model_calls_a_function_and_goes_on_with_what_it_gave(
    make_app: MakeApp, client: openai.OpenAI, asked: list[Asked], dialect: str, choice: str
) -> None:
    called: list[str] = []

    @tool
    def lookup(query: str) -> str:
        """Look something up.

        Args:
            query: What, in a word.
        """
        called.append(query)
        return FOUND

    # One round: so small a model would go on calling, as in its examples. With the temperature 0 the likeliest word is
    # taken; which one that is may depend on what of the prompt was computed before, so all of it is computed anew.
    clerk = Assistant(
        "clerk",
        model="smollm2",
        upstream=dialect,
        instructions=INSTRUCTIONS,
        tools=[lookup],
        max_rounds=1,
        temperature=0,
        tool_choice=choice,
        parallel_tool_calls=False,
        extra_body={"seed": 1, "cache_prompt": False, MOST[dialect]: 32},
    )
    caller = Caller(make_app([clerk], client=client))
    caller.run("clerk", content="Who wrote Ulysses?")
    [_, entry] = caller.wait(60)
    run = entry["run"]
    assert (run["status"], run["last_error"]) in [("completed", None), ("incomplete", None)]
    [step] = [one for one in entry["steps"] if one["type"] == "tool_calls"]
    [call] = step["step_details"]["tool_calls"]
    print(choice, dialect, json.dumps(call), json.dumps(text(entry)))
    assert (step["status"], call["status"], call["kind"], call["error"]) == ("completed", "completed", "server", None)
    assert (call["function"]["name"], call["function"]["output"]) == ("lookup", FOUND)
    # Once, with what the model itself wrote.
    assert called == [json.loads(call["function"]["arguments"])["query"]]
    # The history with the call and its output was taken, and answered with words.
    assert [one.status for one in asked] == [200, 200]
    assert asked[0].body["tool_choice"] == choice
    assert FOUND in [one.get("output") or one.get("content") for one in asked[1].history]
    last = entry["message"]["content"][-1]
    assert last["text"]["value"].strip()
    # The thread is not stuck either.
    caller.run("clerk", content="Who wrote Emma?")
    assert caller.wait(60)[-1]["run"]["last_error"] is None
    assert {one.status for one in asked} == {200}
