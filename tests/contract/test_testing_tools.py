"""The offline server's function calls: as OpenAI sends them, as other servers do, and what it refuses of a history."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pydantic
import pytest
from openai.lib.responses_tool_runner import RegisteredFunction, ResponsesToolRunner
from openai.types.beta.threads import Run
from openai.types.beta.threads.runs import RunStep
from openai.types.chat import ChatCompletion
from openai.types.responses import Response

from assistream_flask.testing import FAULTS, HostedCall, OfflineServer, Reply, Request, ToolCall, scripted
from tests.conftest import quick_client
from tests.contract.test_testing import DIALECTS, Answer, ask, check, ends, text_of

KEY = "sk-very-secret"
CALLS = (ToolCall("lookup", {"query": "x y"}), ToolCall("refund", {"order": "A 1", "cents": 250}))
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"query": {"type": "string"}},
    "required": ["query"],
    "additionalProperties": False,
}
QUIRKS = [name for name in FAULTS if name.startswith("call_")]
ENCRYPTED: dict[str, Any] = {"include": ["reasoning.encrypted_content"], "store": False}


@pytest.fixture
def client(server: OfflineServer) -> Iterator[openai.OpenAI]:
    with quick_client(server, max_retries=0, timeout=10, api_key=KEY) as client:
        yield client


def tool(dialect: str, name: str = "lookup", *, strict: bool = True, **schema: Any) -> dict[str, Any]:
    function = {"name": name, "parameters": schema or SCHEMA, "strict": strict}
    return {"type": "function", **(function if dialect == "responses" else {"function": function})}


def told(dialect: str, answer: Answer) -> list[tuple[str, str, str]]:
    """Give the id, the name and the arguments of each call, as the deltas of a faithful stream tell them."""
    calls: dict[Any, list[str]] = {}
    for event, data in answer.frames:
        if dialect == "responses" and event == "response.output_item.added":
            item = data["item"]
            if item["type"] == "function_call":
                calls[item["id"]] = [item["call_id"], item["name"], item["arguments"]]
        elif dialect == "responses" and event == "response.function_call_arguments.delta":
            calls[data["item_id"]][2] += data["delta"]
        for part in parts(dialect, event, data):
            call = calls.setdefault(part["index"], ["", "", ""])
            function = part["function"]
            call[0] += part.get("id") or ""
            call[1] += function.get("name") or ""
            call[2] += function.get("arguments") or ""
    return [(id, name, arguments) for id, name, arguments in calls.values()]


def parts(dialect: str, event: str | None, data: Any) -> list[Any]:
    if dialect == "chat" and data != "[DONE]":
        return [part for choice in data["choices"] for part in choice["delta"].get("tool_calls") or ()]
    if event == "thread.run.step.delta":
        return [part for part in data["delta"]["step_details"]["tool_calls"] if part["type"] == "function"]
    return []


def whole(answer: Answer) -> dict[str, Any]:
    """Give the response that a stream ended with."""
    response: dict[str, Any] = answer.frames[-1][1]["response"]
    return response


def error(answer: Answer) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(answer.body)["error"]
    return found


# Calls


@pytest.mark.parametrize("dialect", DIALECTS)
def test_calls_are_streamed_one_after_another_as_the_sdks_own_types(server: OfflineServer, dialect: str) -> None:
    server.replies = Reply("I look.", reasoning="Hm.", calls=[*CALLS, ToolCall("noop", "", id="call_mine")])
    answer = ask(server, dialect)
    for event, data in answer.frames:
        check(dialect, event, data)
    assert text_of(dialect, answer.frames) == "I look."
    calls = told(dialect, answer)
    assert [call[1] for call in calls] == ["lookup", "refund", "noop"]
    assert [json.loads(call[2] or "null") for call in calls] == [CALLS[0].arguments, CALLS[1].arguments, None]
    assert len({call[0] for call in calls}) == 3
    assert calls[2][0] == "call_mine"
    assert ends(dialect, answer.frames) == {"responses": "completed", "chat": "tool_calls"}.get(
        dialect, "requires_action"
    )


@pytest.mark.parametrize("dialect", DIALECTS)
def test_calls_come_whole_where_the_answer_is_not_streamed(server: OfflineServer, dialect: str) -> None:
    server.replies = Reply("I look.", calls=CALLS)
    data = json.loads(ask(server, dialect, stream=False).body)
    if dialect == "responses":
        Response.model_validate(data, strict=True)
        found = [(item["name"], item["arguments"]) for item in data["output"] if item["type"] == "function_call"]
    elif dialect == "chat":
        ChatCompletion.model_validate(data, strict=True)
        functions = [call["function"] for call in data["choices"][0]["message"]["tool_calls"]]
        found = [(one["name"], one["arguments"]) for one in functions]
    else:
        Run.model_validate(data, strict=True)
        functions = [call["function"] for call in data["required_action"]["submit_tool_outputs"]["tool_calls"]]
        found = [(one["name"], one["arguments"]) for one in functions]
    assert found == [(call.name, call.text) for call in CALLS]


def test_a_response_with_calls_has_openais_events_in_openais_order(server: OfflineServer) -> None:
    server.replies = Reply("Hi.", calls=[ToolCall("lookup", "{}")], phase="commentary")
    frames = ask(server, "responses").frames
    assert [event for event, _ in frames if event is not None][-6:] == [
        "response.output_item.done",
        "response.output_item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
    ]
    added = next(data["item"] for event, data in frames[-5:] if event == "response.output_item.added")
    assert (added["arguments"], added["status"]) == ("", "in_progress")
    output = frames[-1][1]["response"]["output"]
    assert [item["type"] for item in output] == ["message", "function_call"]
    assert output[0]["phase"] == "commentary"


@pytest.mark.parametrize(
    ("fault", "dialect", "ending"),
    [("incomplete", "responses", "incomplete"), ("incomplete", "chat", "length"),
     ("incomplete", "assistants", "incomplete"), ("ends_early", "responses", None), ("ends_early", "chat", None),
     ("cut", "assistants", None)],
)  # fmt: skip
def test_an_answer_may_end_in_the_midst_of_arguments(
    server: OfflineServer, fault: str, dialect: str, ending: str | None
) -> None:
    call = ToolCall("lookup", {"query": "one two three four five six"})
    server.replies = Reply(calls=[call], fault=fault)
    answer = ask(server, dialect)
    [(_, name, arguments)] = told(dialect, answer)
    assert name == "lookup"
    assert call.text.startswith(arguments)
    assert 0 < len(arguments) < len(call.text)
    assert ends(dialect, answer.frames) == ending
    if dialect == "responses" and ending:
        assert whole(answer)["output"][0]["status"] == "incomplete"


@pytest.mark.parametrize("dialect", DIALECTS)
def test_tool_choice_none_gives_words_and_parallel_tool_calls_false_one_call(
    server: OfflineServer, dialect: str
) -> None:
    server.replies = Reply(calls=CALLS)
    tools = [tool(dialect)]
    assert len(told(dialect, ask(server, dialect, tools=tools))) == 2
    assert len(told(dialect, ask(server, dialect, tools=tools, parallel_tool_calls=False))) == 1
    for replies in (Reply(calls=CALLS), Reply(fault="function_call")):
        server.replies = replies
        answer = ask(server, dialect, tools=tools, tool_choice="none")
        assert told(dialect, answer) == []
        assert "offline assistant" in text_of(dialect, answer.frames)


# What other servers do


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("fault", QUIRKS)
def test_a_quirk_without_calls_of_its_own_calls_the_first_tool_and_answers_the_output(
    server: OfflineServer, dialect: str, fault: str
) -> None:
    server.replies = Reply("Done.", fault=fault)
    body = ask(server, dialect, tools=[tool(dialect, "weather")]).body.decode()
    assert "weather" in body
    assert "Done." not in body
    if dialect == "responses":
        call = {"type": "function_call", "call_id": "c", "name": "weather", "arguments": "{}"}
        output = {"type": "function_call_output", "call_id": "c", "output": "Sun"}
        history = [{"role": "user", "content": "Hi"}, call, output]
        assert text_of(dialect, ask(server, dialect, input=history).frames) == "Done."


def test_quirks_of_responses(server: OfflineServer) -> None:
    def asked(fault: str) -> Answer:
        server.replies = Reply(calls=CALLS, fault=fault)
        return ask(server, "responses")

    def of(answer: Answer, kind: str) -> list[Any]:
        return [data for event, data in answer.frames if event == f"response.{kind}"]

    bare = asked("call_no_ids")
    for data in of(bare, "function_call_arguments.delta") + of(bare, "function_call_arguments.done"):
        assert not {"item_id", "output_index"} & set(data)
    late = asked("call_late_name")
    assert [data["item"]["name"] for data in of(late, "output_item.added")] == ["", ""]
    assert [data["item"]["name"] for data in of(late, "output_item.done")] == ["lookup", "refund"]
    empty = asked("call_empty_final")
    assert [data["arguments"] for data in of(empty, "function_call_arguments.done")] == [call.text for call in CALLS]
    assert [item["arguments"] for item in whole(empty)["output"]] == ["", ""]
    first = asked("call_first_only")
    assert len(told("responses", first)) == 2
    assert [data["item"]["name"] for data in of(first, "output_item.done")] == ["lookup"]
    assert [item["name"] for item in whole(first)["output"]] == ["lookup"]
    one = asked("call_one_delta")
    assert of(one, "function_call_arguments.delta") == []
    assert [data["item"]["arguments"] for data in of(one, "output_item.added")] == [call.text for call in CALLS]
    half = asked("call_half")
    for item in whole(half)["output"]:
        assert item["status"] == "completed"
        with pytest.raises(json.JSONDecodeError):
            json.loads(item["arguments"])


def test_quirks_of_chat(server: OfflineServer) -> None:
    def asked(fault: str) -> tuple[list[Any], str | None]:
        server.replies = Reply(calls=CALLS, fault=fault)
        answer = ask(server, "chat")
        return [part for frame in answer.frames for part in parts("chat", *frame)], ends("chat", answer.frames)

    assert not any("id" in part for part in asked("call_no_ids")[0])
    indexed = asked("call_no_index")[0]
    assert not any("index" in part for part in indexed)
    assert len({part["id"] for part in indexed}) == 2
    late = [part for part in asked("call_late_name")[0] if part["index"] == 0]
    assert late[0]["function"]["name"] is None
    assert "id" not in late[0]
    assert (late[-1]["function"]["name"], "id" in late[-1]) == ("lookup", True)
    assert [part["function"]["arguments"] for part in asked("call_objects")[0]] == [call.arguments for call in CALLS]
    assert [part["function"]["arguments"] for part in asked("call_one_delta")[0]] == [call.text for call in CALLS]
    assert asked("call_no_finish")[1] is None
    assert asked("call_finish_stop")[1] == "stop"
    assert asked("function_call")[1] == "tool_calls"


# Hosted tools


SEARCH = HostedCall(
    "web_search", {"action": {"type": "search", "query": "x", "sources": [{"type": "url", "url": "u"}]}}
)
CODE = HostedCall("code_interpreter", {"code": "print(1)\n", "outputs": [{"type": "logs", "logs": "1"}]})


def test_hosted_calls_are_streamed_and_tell_more_where_it_is_asked_for(server: OfflineServer) -> None:
    kinds = ("file_search", "image_generation", "mcp")
    server.replies = Reply("Found.", reasoning="Hm.", calls=[SEARCH, CODE, *map(HostedCall, kinds), CALLS[0]])
    answer = ask(server, "responses")
    for event, data in answer.frames:
        check("responses", event, data)
    output = whole(answer)["output"]
    assert [item["type"] for item in output] == [
        "reasoning", "web_search_call", "code_interpreter_call", "file_search_call", "image_generation_call",
        "mcp_call", "message", "function_call",
    ]  # fmt: skip
    assert "sources" not in output[1]["action"]
    assert output[2]["outputs"] is None
    code = [data["delta"] for event, data in answer.frames if event == "response.code_interpreter_call_code.delta"]
    assert "".join(code) == "print(1)\n"
    include = ["web_search_call.action.sources", "code_interpreter_call.outputs"]
    output = whole(ask(server, "responses", include=include))["output"]
    assert output[1]["action"]["sources"] == [{"type": "url", "url": "u"}]
    assert output[2]["outputs"] == [{"type": "logs", "logs": "1"}]


def test_hosted_calls_are_in_other_dialects_what_these_have(server: OfflineServer) -> None:
    server.replies = Reply("Found.", calls=[SEARCH, CODE, HostedCall("file_search")])
    assert b"tool_calls" not in ask(server, "chat").body
    frames = ask(server, "assistants").frames
    for event, data in frames:
        check("assistants", event, data)
    ended = [data["step_details"] for event, data in frames if event == "thread.run.step.completed"]
    assert [one["type"] for one in ended] == ["tool_calls", "tool_calls", "message_creation"]
    assert ended[0]["tool_calls"][0]["code_interpreter"]["input"] == "print(1)\n"
    assert ends("assistants", frames) == "completed"
    with pytest.raises(ValueError, match=r"'nonsense'.*web_search"):
        HostedCall("nonsense")


# What is refused of the input of a response


USER = {"role": "user", "content": "Hi"}
CALL = {"type": "function_call", "call_id": "call_1", "name": "lookup", "arguments": "{}"}
OUTPUT = {"type": "function_call_output", "call_id": "call_1", "output": "x"}
SAID = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Yes."}]}
THOUGHT = {"type": "reasoning", "id": "rs_1", "summary": []}


@pytest.mark.parametrize(
    ("history", "status", "message"),
    [
        ([USER, CALL], 400, "No tool output found for function call call_1."),
        ([USER, CALL, SAID, USER], 400, "No tool output found for function call call_1."),
        ([USER, CALL, {**CALL, "call_id": "call_2"}, OUTPUT], 400, "No tool output found for function call call_2."),
        ([USER, OUTPUT], 400, "No tool call found for function call output with call_id call_1."),
        ([USER, OUTPUT, CALL], 400, "No tool call found for function call output with call_id call_1."),
        ([USER, CALL, OUTPUT, OUTPUT], 400, "No tool call found for function call output with call_id call_1."),
        (
            [USER, {**SAID, "id": "msg_1"}, {**SAID, "id": "msg_1"}],
            400,
            "Duplicate item found with id msg_1. Remove duplicate items from your input and try again.",
        ),
        (
            [USER, {**CALL, "id": "call_1"}, OUTPUT],
            400,
            "Invalid 'input[1].id': 'call_1'. Expected an ID that begins with 'fc'.",
        ),
        ([USER, {**SAID, "id": "x"}], 400, "Invalid 'input[1].id': 'x'. Expected an ID that begins with 'msg'."),
        ([USER, {**THOUGHT, "status": None}], 400, "Unknown parameter: 'input[1].status'."),
        ([USER, {**SAID, "tool_calls": []}], 400, "Unknown parameter: 'input[1].tool_calls'."),
        (
            [USER, {**CALL, "call_id": "c" * 65}, OUTPUT],
            400,
            "Invalid 'input[1].call_id': string too long. Expected a string with maximum length 64, but got a string "
            "with length 65 instead.",
        ),
        ([USER, {**CALL, "call_id": ""}, OUTPUT], 400, "Invalid 'input[1].call_id': empty string."),
        ([USER, {**CALL, "arguments": '{"a": '}, OUTPUT], 400, "Invalid 'input[1].arguments'"),
        ([USER, {**CALL, "arguments": ""}, OUTPUT], 400, "Invalid 'input[1].arguments'"),
        ([USER, {**CALL, "arguments": "[1]"}, OUTPUT], 400, "Invalid 'input[1].arguments'"),
        ([USER, {**CALL, "arguments": {}}, OUTPUT], 400, "Invalid type for 'input[1].arguments'"),
        ([USER, {"type": "function_call", "call_id": "c"}], 400, "Missing required parameter: 'input[1].name'."),
        (
            [USER, {"type": "reasoning", "summary": []}],
            400,
            "Missing required parameter: 'input[1].encrypted_content'.",
        ),
        (
            [USER, THOUGHT, SAID],
            404,
            "Item with id 'rs_1' not found. Items are not persisted when `store` is set to false. Try again with "
            "`store` set to true, or remove this item from your input.",
        ),
        ([USER, {"type": "item_reference", "id": "fc_1"}, OUTPUT], 404, "Item with id 'fc_1' not found."),
        ([USER, {"type": "image_generation_call", "id": "ig_1"}], 404, "Item with id 'ig_1' not found."),
        (
            [USER, {**THOUGHT, "encrypted_content": "gAAAAABnonsense=="}, SAID],
            400,
            "The encrypted content gAAA...se== could not be verified. Reason: Encrypted content could not be decrypted "
            "or parsed.",
        ),
    ],
)  # fmt: skip
def test_a_history_that_is_not_closed_is_refused_in_openais_words(
    server: OfflineServer, history: list[Any], status: int, message: str
) -> None:
    answer = ask(server, "responses", input=history, store=False)
    assert answer.status == status
    assert error(answer)["message"].startswith(message)
    assert error(answer)["type"] == "invalid_request_error"
    if "encrypted content" in message:
        assert error(answer)["code"] == "invalid_encrypted_content"


def turn(server: OfflineServer, reply: Reply, *history: Any, **more: Any) -> list[Any]:
    """Give the output items of a reply, with encrypted reasoning."""
    server.replies = reply
    answer = ask(server, "responses", input=[USER, *history], **{**ENCRYPTED, **more})
    assert answer.status == 200, answer.body
    output: list[Any] = whole(answer)["output"]
    return output


@pytest.mark.parametrize("without_ids", [False, True])
def test_a_closed_history_of_all_kinds_is_taken(server: OfflineServer, without_ids: bool) -> None:
    first = turn(server, Reply("I look.", reasoning="Hm.", calls=CALLS))
    outputs = [{**OUTPUT, "call_id": item["call_id"]} for item in first if item["type"] == "function_call"]
    second = turn(server, Reply("Done.", reasoning="So.", phase="final_answer"), *first, *outputs)
    history = [*first, *outputs, *second]
    if without_ids:
        history = [{name: value for name, value in item.items() if name != "id"} for item in history]
    assert turn(server, Reply("Fine."), *history, USER)[0]["content"][0]["text"] == "Fine."


def test_reasoning_and_what_followed_it_need_each_other(server: OfflineServer) -> None:
    thought, call = turn(server, Reply(reasoning="Hm.", calls=[CALLS[0]]))
    output = {**OUTPUT, "call_id": call["call_id"]}
    told = f"Item '{thought['id']}' of type 'reasoning' was provided without its required following item."
    for history in ([thought], [thought, USER], [thought, output], [call, thought, output]):
        assert error(ask(server, "responses", input=[USER, *history]))["message"] in (
            told,
            f"Item '{call['id']}' of type 'function_call' was provided without its required 'reasoning' item: "
            f"'{thought['id']}'.",
        )
    bare = {name: value for name, value in thought.items() if name != "id"}
    assert error(ask(server, "responses", input=[USER, bare]))["message"] == told
    alone = ask(server, "responses", input=[USER, call, output])
    assert error(alone)["message"] == (
        f"Item '{call['id']}' of type 'function_call' was provided without its required 'reasoning' item: "
        f"'{thought['id']}'."
    )
    del call["id"]
    assert ask(server, "responses", input=[USER, call, output]).status == 200


def test_encrypted_content_is_for_the_model_and_key_that_it_was_made_for_and_whole_at_the_end(
    server: OfflineServer, client: openai.OpenAI
) -> None:
    server.replies = Reply("Yes.", reasoning="Hm.")
    assert "encrypted_content" not in whole(ask(server, "responses"))["output"][0]
    frames = ask(server, "responses", **ENCRYPTED).frames
    [half, thought] = [data["item"] for event, data in frames if "item" in data and data["item"]["type"] == "reasoning"]
    assert ask(server, "responses", input=[USER, thought, SAID]).status == 200
    for item, model in ((half, "m"), (thought, "another")):
        answer = ask(server, "responses", input=[USER, item, SAID], model=model)
        assert error(answer)["code"] == "invalid_encrypted_content"
    with pytest.raises(openai.BadRequestError, match="could not be verified"):
        client.with_options(api_key="sk-other").responses.create(model="m", input=[USER, thought, SAID])  # type: ignore[list-item]
    # Another process of the same app has its own server.
    with OfflineServer("Fine.", delay=0) as other:
        assert ask(other, "responses", input=[USER, thought, SAID]).status == 200


def test_a_model_may_have_no_encrypted_content() -> None:
    with OfflineServer(Reply("Hi.", reasoning="Hm."), delay=0, encrypted_reasoning=False) as server:
        answer = ask(server, "responses", **ENCRYPTED)
        assert (answer.status, error(answer)["param"]) == (400, "include")
        assert error(answer)["message"] == "Encrypted content is not supported with this model."
        assert ask(server, "responses").status == 200


def test_items_of_a_stored_response_may_be_named_by_their_ids(server: OfflineServer) -> None:
    thought, call = turn(server, Reply(reasoning="Hm.", calls=[CALLS[0]]), include=[], store=True)
    named = [{"type": "item_reference", "id": item["id"]} for item in (thought, call)]
    output = {**OUTPUT, "call_id": call["call_id"]}
    assert ask(server, "responses", input=[USER, *named, output]).status == 200
    assert ask(server, "responses", input=[USER, thought, call, output]).status == 200


def test_a_strict_server_takes_no_ids_and_no_status() -> None:
    with OfflineServer("Hi.", delay=0, strict=True) as server:
        assert ask(server, "responses", input=[USER, CALL, OUTPUT]).status == 200
        for more in ({"id": "fc_1"}, {"status": "completed"}):
            answer = ask(server, "responses", input=[USER, {**CALL, **more}, OUTPUT])
            assert error(answer)["message"] == f"Unknown parameter: 'input[1].{next(iter(more))}'."


# What is refused of the messages of a chat


ASKED = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {"id": f"call_{n}", "type": "function", "function": {"name": "lookup", "arguments": "{}"}} for n in (1, 2)
    ],
}
ANSWERS = [{"role": "tool", "tool_call_id": f"call_{n}", "content": "x"} for n in (1, 2)]
UNANSWERED = (
    "An assistant message with 'tool_calls' must be followed by tool messages responding to each 'tool_call_id'. "
    "The following tool_call_ids did not have response messages: "
)


def one_call(**changed: Any) -> dict[str, Any]:
    call = ASKED["tool_calls"][0]  # type: ignore[index]
    return {**ASKED, "tool_calls": [{**call, **changed}]}  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([USER, ASKED], f"{UNANSWERED}call_1, call_2"),
        ([USER, ASKED, ANSWERS[0]], f"{UNANSWERED}call_2"),
        ([USER, ASKED, ANSWERS[0], USER, ANSWERS[1]], f"{UNANSWERED}call_2"),
        (
            [USER, ANSWERS[0]],
            "Invalid parameter: messages with role 'tool' must be a response to a preceeding message with "
            "'tool_calls'.",
        ),
        (
            [USER, ASKED, *ANSWERS, {**ANSWERS[0]}],
            "Invalid parameter: 'tool_call_id' of 'call_1' not found in 'tool_calls' of previous message.",
        ),
        ([USER, ASKED, {"role": "tool", "content": "x"}], "Missing required parameter: 'messages[2].tool_call_id'."),
        (
            [USER, one_call(id="c" * 41), ANSWERS[0]],
            "Invalid 'messages[1].tool_calls[0].id': string too long. Expected a string with maximum length 40, but "
            "got a string with length 41 instead.",
        ),
        ([USER, one_call(id=None)], "Missing required parameter: 'messages[1].tool_calls[0].id'."),
        (
            [USER, one_call(function={"name": "lookup", "arguments": {}})],
            "Invalid type for 'messages[1].tool_calls[0].function.arguments': expected a string, but got an object",
        ),
        (
            [USER, one_call(function={"name": "lookup", "arguments": "{"})],
            "Invalid 'messages[1].tool_calls[0].function.arguments'",
        ),
    ],
)  # fmt: skip
def test_a_chat_that_is_not_closed_is_refused_in_openais_words(
    server: OfflineServer, messages: list[Any], message: str
) -> None:
    answer = ask(server, "chat", messages=messages)
    assert answer.status == 400
    assert error(answer)["message"].startswith(message)
    assert ask(server, "chat", messages=[USER, ASKED, *ANSWERS, USER]).status == 200
    assert ask(server, "chat", messages=[USER, ASKED, *reversed(ANSWERS)]).status == 200


# What is refused of tools


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (
            {"type": "object", "properties": {}},
            "In context=(), 'additionalProperties' is required to be supplied and to be false.",
        ),
        (
            {**SCHEMA, "required": []},
            "In context=(), 'required' is required to be supplied and to be an array including every key in "
            "properties. Missing 'query'.",
        ),
        (
            {**SCHEMA, "properties": {"query": {"type": "string", "default": "x"}}},
            "In context=('properties', 'query'), 'default' is not permitted.",
        ),
        (
            {**SCHEMA, "properties": {"query": {"type": "array", "items": {"type": "object", "properties": {}}}}},
            "In context=('properties', 'query', 'items'), 'additionalProperties' is required to be supplied and to be "
            "false.",
        ),
        (
            {**SCHEMA, "properties": {"query": {"description": "Anything."}}},
            "In context=('properties', 'query'), schema must have a 'type' key.",
        ),
        (
            {**SCHEMA, "properties": {"query": {"$ref": "#/$defs/A", "description": "x"}}, "$defs": {"A": SCHEMA}},
            "context=('properties', 'query'), $ref cannot have keywords {'description'}.",
        ),
        ({"type": "string"}, "schema must be a JSON Schema of 'type: \"object\"', got 'type: \"string\"'."),
    ],
)  # fmt: skip
def test_a_strict_function_needs_a_strict_schema(
    server: OfflineServer, dialect: str, schema: dict[str, Any], message: str
) -> None:
    answer = ask(server, dialect, tools=[tool(dialect), tool(dialect, "other", **schema)])
    assert answer.status == 400
    assert error(answer) == {
        "message": f"Invalid schema for function 'other': {message}",
        "type": "invalid_request_error",
        "param": "tools[1].parameters" if dialect == "responses" else "tools[1].function.parameters",
        "code": "invalid_function_parameters",
    }
    if schema["type"] == "object":
        assert ask(server, dialect, tools=[tool(dialect, strict=False, **schema)]).status == 200


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_function_needs_a_name_that_openai_takes(server: OfflineServer, dialect: str) -> None:
    where = "tools[0]" if dialect == "responses" else "tools[0].function"
    for name, message in (
        ("look up", f"Invalid '{where}.name': string does not match pattern."),
        ("a" * 65, f"Invalid '{where}.name': string too long."),
        ("", f"Invalid '{where}.name': empty string."),
        (None, f"Missing required parameter: '{where}.name'."),
    ):
        answer = ask(server, dialect, tools=[tool(dialect, name)])  # type: ignore[arg-type]
        assert error(answer)["message"].startswith(message)
    assert (
        error(ask(server, dialect, tools=[{"name": "x"}]))["message"] == "Missing required parameter: 'tools[0].type'."
    )


@pytest.mark.parametrize("name", ["tool_choice", "parallel_tool_calls"])
def test_chat_takes_a_choice_of_tools_only_with_tools(server: OfflineServer, name: str) -> None:
    body: dict[str, Any] = {name: "none"}
    answer = ask(server, "chat", **body)
    assert (
        error(answer)["message"] == f"Invalid value for '{name}': '{name}' is only allowed when 'tools' are specified."
    )


# Runs of the Assistants API


def waiting(server: OfflineServer, client: openai.OpenAI, calls: Any = CALLS) -> Run:
    server.replies = [Reply("I look.", calls=calls), Reply("Done.")]
    run = client.beta.threads.create_and_run(
        assistant_id="asst_1", instructions="Be kind.", thread={"messages": [{"role": "user", "content": "Hi"}]}
    )
    assert run.status == "requires_action"
    return run


def outputs(run: Run) -> list[Any]:
    assert run.required_action is not None
    calls = run.required_action.submit_tool_outputs.tool_calls
    return [{"tool_call_id": call.id, "output": f"of {call.function.name}"} for call in calls]


def test_a_run_goes_on_when_all_outputs_are_there(server: OfflineServer, client: openai.OpenAI) -> None:
    run = waiting(server, client)
    place: dict[str, Any] = {"thread_id": run.thread_id, "run_id": run.id}
    with client.beta.threads.runs.submit_tool_outputs_stream(**place, tool_outputs=outputs(run)) as stream:
        events = [event.event for event in stream]
        assert stream.get_final_run().status == "completed"
    assert events == [
        "thread.run.step.completed",
        "thread.run.queued",
        "thread.run.in_progress",
        "thread.run.step.created",
        "thread.run.step.in_progress",
        "thread.message.created",
        "thread.message.in_progress",
        "thread.message.delta",
        "thread.message.completed",
        "thread.run.step.completed",
        "thread.run.completed",
    ]
    request = server.requests[-1]
    assert (request.dialect, request.instructions, request.model) == ("assistants", "Be kind.", "asst_1")
    assert request.messages[-2:] == [("tool", "of lookup"), ("tool", "of refund")]
    steps = list(client.beta.threads.runs.steps.list(thread_id=run.thread_id, run_id=run.id, order="asc"))
    assert [step.type for step in steps] == ["message_creation", "tool_calls", "message_creation"]
    for step in steps:
        RunStep.model_validate(step.model_dump(), strict=True)
    details = steps[1].model_dump()["step_details"]["tool_calls"]
    assert [call["function"]["output"] for call in details] == ["of lookup", "of refund"]


def test_the_sdks_handler_reads_the_calls_of_a_run(server: OfflineServer, client: openai.OpenAI) -> None:
    server.replies = [Reply(calls=CALLS), Reply("Done.")]
    with client.beta.threads.create_and_run_stream(assistant_id="asst_1") as stream:
        run = stream.get_final_run()
        [step] = stream.get_final_run_steps()
    assert [call["function"]["arguments"] for call in step.model_dump()["step_details"]["tool_calls"]] == [
        call.text for call in CALLS
    ]
    ended = client.beta.threads.runs.submit_tool_outputs_and_poll(
        thread_id=run.thread_id, run_id=run.id, tool_outputs=outputs(run)
    )
    assert ended.status == "completed"


def test_a_run_may_ask_again(server: OfflineServer, client: openai.OpenAI) -> None:
    run = waiting(server, client)
    server.replies = [Reply(calls=[ToolCall("again")]), Reply("Done.")]
    place: dict[str, Any] = {"thread_id": run.thread_id, "run_id": run.id}
    again = client.beta.threads.runs.submit_tool_outputs(**place, tool_outputs=outputs(run))
    assert again.status == "requires_action"
    ended = client.beta.threads.runs.submit_tool_outputs(**place, tool_outputs=outputs(again))
    assert ended.status == "completed"
    assert [text for role, text in server.requests[-1].messages if role == "tool"] == [
        "of lookup", "of refund", "of again",
    ]  # fmt: skip


def test_a_run_takes_all_outputs_at_once_and_only_once(server: OfflineServer, client: openai.OpenAI) -> None:
    run = waiting(server, client)
    runs, given = client.beta.threads.runs, outputs(run)
    place: dict[str, Any] = {"thread_id": run.thread_id, "run_id": run.id}
    ids = [one["tool_call_id"] for one in given]
    with pytest.raises(openai.BadRequestError) as caught:
        runs.submit_tool_outputs(**place, tool_outputs=given[:1])
    assert caught.value.body["message"] == f"Expected tool outputs for call_ids {ids}, got {ids[:1]}"  # type: ignore[index]

    def submit(_: int) -> str:
        try:
            return str(runs.submit_tool_outputs(**place, tool_outputs=given).status)
        except openai.BadRequestError as error:
            return str(error.body["message"])  # type: ignore[index]

    with ThreadPoolExecutor(4) as pool:
        found = sorted(pool.map(submit, range(4)))
    assert found.count("completed") == 1
    assert all("do not accept tool outputs." in one for one in found if one != "completed")
    assert submit(0) == 'Runs in status "completed" do not accept tool outputs.'


def test_a_run_still_waits_where_its_outputs_got_an_error(server: OfflineServer, client: openai.OpenAI) -> None:
    run = waiting(server, client)
    server.replies = [Reply(fault="429"), Reply("Done.", fault="cut"), Reply("Hi.")]
    runs = client.beta.threads.runs
    place: dict[str, Any] = {"thread_id": run.thread_id}
    with pytest.raises(openai.RateLimitError):
        runs.submit_tool_outputs(run.id, **place, tool_outputs=outputs(run))
    again = runs.retrieve(run.id, **place)
    assert (again.status, again.required_action) == ("requires_action", run.required_action)
    with pytest.raises(openai.APIConnectionError):
        runs.submit_tool_outputs(run.id, **place, tool_outputs=outputs(run))
    assert runs.retrieve(run.id, **place).status == "failed"
    assert runs.create(**place, assistant_id="asst_1").status == "completed"


def test_a_thread_takes_nothing_while_a_run_is_active(server: OfflineServer, client: openai.OpenAI) -> None:
    run = waiting(server, client)
    threads, id = client.beta.threads, run.thread_id
    with pytest.raises(openai.BadRequestError, match=f"Can't add messages to {id} while a run {run.id} is"):
        threads.messages.create(id, role="user", content="More")
    with pytest.raises(openai.BadRequestError, match=f"Thread {id} already has an active run {run.id}"):
        threads.runs.create(id, assistant_id="asst_1")
    assert threads.runs.cancel(run.id, thread_id=id).status == "cancelled"
    threads.messages.create(id, role="user", content="More")
    with pytest.raises(openai.BadRequestError, match='Runs in status "cancelled" do not accept tool outputs'):
        threads.runs.submit_tool_outputs(run.id, thread_id=id, tool_outputs=outputs(run))


def test_a_run_that_waits_too_long_expires() -> None:
    with OfflineServer(delay=0, run_seconds=0) as server, quick_client(server, max_retries=0) as client:
        run = waiting(server, client)
        assert client.beta.threads.runs.retrieve(run.id, thread_id=run.thread_id).status == "expired"
        with pytest.raises(openai.BadRequestError, match='Runs in status "expired" do not accept tool outputs'):
            client.beta.threads.runs.submit_tool_outputs(run.id, thread_id=run.thread_id, tool_outputs=outputs(run))
        client.beta.threads.messages.create(run.thread_id, role="user", content="More")


# Through the SDK


class Lookup(pydantic.BaseModel):
    query: str


def test_the_sdks_own_tool_runner_runs_on_it(server: OfflineServer, client: openai.OpenAI) -> None:
    asked: list[str] = []

    def lookup(arguments: Lookup) -> str:
        asked.append(arguments.query)
        return f"{arguments.query}!"

    def again(n: int) -> list[ToolCall]:
        return [ToolCall("Lookup", {"query": f"{n}{letter}"}) for letter in "ab"]

    for stream in (False, True):
        server.replies = [
            Reply("I look.", reasoning="Hm.", calls=again(1), phase="commentary"),
            Reply(reasoning="So.", calls=again(2)),
            Reply("Done.", reasoning="Good."),
        ]
        function = RegisteredFunction.from_tool(openai.pydantic_responses_function_tool(Lookup), execute=lookup)
        params: Any = {"model": "m", "input": [USER], **ENCRYPTED}
        answer = ResponsesToolRunner(functions=[function]).run(client, params, stream=stream)
        assert answer.output_text == "Done."
        assert sorted(asked) == ["1a", "1b", "2a", "2b"]
        asked.clear()
        assert [text for role, text in server.requests[-1].messages if role == "tool"] == ["1a!", "1b!", "2a!", "2b!"]


def test_the_sdks_chat_stream_reads_the_calls(server: OfflineServer, client: openai.OpenAI) -> None:
    server.replies = [Reply("I look.", calls=[ToolCall("Lookup", {"query": "x"})] * 2), Reply("Done.")]
    messages: list[Any] = [USER]
    tools = [openai.pydantic_function_tool(Lookup)]
    with client.chat.completions.stream(model="m", messages=messages, tools=tools) as stream:
        message = stream.get_final_completion().choices[0].message
    assert [call.function.parsed_arguments for call in message.tool_calls or ()] == [Lookup(query="x")] * 2
    messages.append(message.model_dump(include={"role", "content", "tool_calls"}))
    messages += [{"role": "tool", "tool_call_id": call.id, "content": "y"} for call in message.tool_calls or ()]
    for call in messages[1]["tool_calls"]:
        del call["function"]["parsed_arguments"]
    answer = client.chat.completions.create(model="m", messages=messages, tools=tools)
    assert answer.choices[0].message.content == "Done."


# The script


def request(text: str, *more: tuple[str, str], tools: dict[str, Any] | None = None) -> Request:
    made = Request("POST", "/", {}, {}, 0.0)
    made.messages = [("user", text), *more]
    made.tools = [{"name": name, "parameters": schema} for name, schema in (tools or {"lookup": SCHEMA}).items()]
    return made


def called(*args: Any, **more: Any) -> list[tuple[str, Any]]:
    calls = [call for call in scripted(request(*args, **more)).calls if isinstance(call, ToolCall)]
    return [(call.name, json.loads(call.text)) for call in calls]


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ('call lookup {"query": "x"}', [("lookup", {"query": "x"})]),
        (
            'Please:\ncall lookup {"query": "x"}\nCall refund',
            [("lookup", {"query": "x"}), ("refund", {"order": "", "cents": 1})],
        ),
        ("Look up the tide in Cuxhaven.", [("lookup", {"query": "the tide in Cuxhaven"})]),
        ('Refund order "A 17", 250 cents', [("refund", {"order": "A 17", "cents": 250})]),
        (
            "lookup Ada, and pick a date: 2026-12-24!",
            [("lookup", {"query": "Ada"}), ("pick_date", {"day": "2026-12-24", "kind": "b"})],
        ),
        ("Look up Ada, and look up Grace.", [("lookup", {"query": "Ada"}), ("lookup", {"query": "Grace"})]),
        ("Pick date a", [("pick_date", {"day": "2026-01-01", "kind": "a"})]),
        ('call nothing {"query": "x"}', []),
        ("Who was Ada Lovelace?", []),
        ("", []),
    ],
)  # fmt: skip
def test_the_script_calls_what_the_user_names(text: str, calls: list[Any]) -> None:
    tools: dict[str, Any] = {
        "lookup": SCHEMA,
        "refund": {"properties": {"order": {"type": "string"}, "cents": {"type": "integer"}}},
        "pick_date": {
            "properties": {
                "day": {"type": "string", "format": "date"},
                "kind": {"$ref": "#/$defs/Kind"},
                "note": {"type": "string"},
            },
            "required": ["day", "kind"],
            "$defs": {"Kind": {"anyOf": [{"type": "null"}, {"enum": ["b", "a"]}]}},
        },
    }
    assert called(text, tools=tools) == calls


def test_the_script_tells_the_outputs_and_calls_no_more() -> None:
    history = [("assistant", ""), ("tool", "The first."), ("tool", "The second.")]
    answer = scripted(request("call lookup\ncall lookup", *history))
    assert answer.calls == ()
    assert "“The first.”" in str(answer.text)
    assert "“The second.”" in str(answer.text)
    assert len(called("call lookup", ("tool", "Old."), ("user", "call lookup"))) == 1
    forced = request("call lookup", *history)
    forced.must_call = True
    assert len(scripted(forced).calls) == 1


@pytest.mark.parametrize("dialect", DIALECTS)
def test_the_script_speaks_tools_in_every_dialect(server: OfflineServer, dialect: str) -> None:
    tools, text = [tool(dialect), tool(dialect, "other")], "Look up Ada"
    asks: dict[str, Any] = {
        "responses": {"input": text},
        "chat": {"messages": [{"role": "user", "content": text}]},
        "assistants": {"thread": {"messages": [{"role": "user", "content": text}]}},
    }
    [(_, name, arguments)] = told(dialect, ask(server, dialect, **asks[dialect], tools=tools))
    assert (name, json.loads(arguments)) == ("lookup", {"query": "Ada"})
    named = {"type": "function", "name": "other"}
    choice = named if dialect == "responses" else {"type": "function", "function": {"name": "other"}}
    for forced in ("required", choice):
        found = told(dialect, ask(server, dialect, tools=tools, tool_choice=forced))
        assert [call[1] for call in found] == ["lookup" if forced == "required" else "other"]
    allowed: dict[str, Any] = {"type": "allowed_tools", "mode": "auto", "tools": [named]}
    if dialect == "chat":
        allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [choice]}}
    assert told(dialect, ask(server, dialect, **asks[dialect], tools=tools, tool_choice=allowed)) == []


def test_the_script_makes_its_calls_one_by_one_where_they_may_not_be_parallel(
    server: OfflineServer, client: openai.OpenAI
) -> None:
    tools: Any = [tool("responses")]
    history: list[Any] = [{"role": "user", "content": 'call lookup {"query": "a"}\ncall lookup {"query": "b"}'}]
    for query in "ab":
        answer = client.responses.create(model="m", input=history, tools=tools, parallel_tool_calls=False)
        [item] = answer.output
        assert item.type == "function_call"
        assert json.loads(item.arguments) == {"query": query}
        history += [item, {"type": "function_call_output", "call_id": item.call_id, "output": query.upper()}]
    answer = client.responses.create(model="m", input=history, tools=tools, parallel_tool_calls=False)
    assert "“A”" in answer.output_text
    assert "“B”" in answer.output_text
