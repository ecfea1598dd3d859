"""What a model is told of a tool, what its arguments are validated to, and which tools are refused as they are made."""

from __future__ import annotations

import dataclasses
import datetime as dt
import enum
import functools
import json
import logging
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator
from typing_extensions import TypedDict

from assistream_flask import (
    Assistant,
    ConfigurationError,
    Tool,
    ToolArgumentsError,
    ToolContext,
    page_tool,
    tool,
)
from assistream_flask.events import Json

if TYPE_CHECKING:
    from decimal import Context as OnlyForTypes

CONTEXT = ToolContext("thread_1", "run_1", "clerk", "ann", "call_1")


class Address(BaseModel):
    model_config = ConfigDict(extra="forbid")
    street: str
    number: int


class Open(BaseModel):
    street: str


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


@dataclasses.dataclass
class Size:
    width: int
    height: int = 1


class Day(TypedDict):
    day: dt.date


class Tree(BaseModel):
    model_config = ConfigDict(extra="forbid")
    leaves: list[Tree]


def nothing() -> None:
    """Do nothing."""


def google(order_id: str, cents: int, context: ToolContext) -> dict[str, str]:
    """Pay an order back.

    Not more than was paid.

    Args:
        order_id: As printed
            on the receipt.
        cents (int): So much.
        context: Not told.

    Returns:
        What the bank says.
    """
    return {"order": order_id, "by": context.owner, "cents": str(cents)}


def numpy(order_id: str, cents: int) -> None:
    """Pay an order back.

    Parameters
    ----------
    order_id : str
        As printed.
    cents
        So much.

    Returns
    -------
    None
    """


def sphinx(order_id: str, cents: int) -> None:
    """Pay an order back.

    :param order_id: As printed.
    :param int cents: So much.
    :raises ValueError: never
    """


def annotated(count: Annotated[int, Field(description="How many", ge=1, le=9)]) -> None:
    """Count.

    Args:
        count: Not this.
    """


def optional(text: str, limit: int = 5, context: ToolContext | None = None) -> None:
    """Look."""


def nested(address: Address, colours: list[Colour], kind: Literal["a", "b"], at: dt.datetime | None) -> None:
    """Send."""


def loose(found: dict[str, int], way: Open) -> None:
    """Find."""


def keyword(*, size: Size, mark: uuid.UUID) -> None:
    """Tell a size."""


def whatever(value: Any) -> None:
    """Take it."""


async def coroutine(other: Optional[ToolContext], day: dt.date) -> None:  # noqa: UP045
    """Wait."""


def parameters(required: list[str], *, defs: Json | None = None, **properties: Json) -> Json:
    found: Json = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    return {**found, "$defs": defs} if defs else found


TEXT, NUMBER = {"type": "string"}, {"type": "integer"}
ADDRESS = {
    "type": "object",
    "title": "Address",
    "properties": {"street": TEXT, "number": NUMBER},
    "required": ["street", "number"],
    "additionalProperties": False,
}
COLOUR = {"type": "string", "enum": ["red", "blue"], "title": "Colour"}
PAID = parameters(
    ["order_id", "cents"],
    order_id={**TEXT, "description": "As printed."},
    cents={**NUMBER, "description": "So much."},
)


@pytest.mark.parametrize(
    ("function", "description", "schema", "strict"),
    [
        (nothing, "Do nothing.", parameters([]), True),
        (
            google,
            "Pay an order back.\n\nNot more than was paid.",
            parameters(
                ["order_id", "cents"],
                order_id={**TEXT, "description": "As printed on the receipt."},
                cents={**NUMBER, "description": "So much."},
            ),
            True,
        ),
        (numpy, "Pay an order back.", PAID, True),
        (sphinx, "Pay an order back.", PAID, True),
        (
            annotated,
            "Count.",
            parameters(["count"], count={**NUMBER, "minimum": 1, "maximum": 9, "description": "How many"}),
            True,
        ),
        (optional, "Look.", parameters(["text"], text=TEXT, limit={**NUMBER, "default": 5}), False),
        (
            nested,
            "Send.",
            parameters(
                ["address", "colours", "kind", "at"],
                address={"$ref": "#/$defs/Address"},
                colours={"type": "array", "items": {"$ref": "#/$defs/Colour"}},
                kind={"type": "string", "enum": ["a", "b"]},
                at={"anyOf": [{"type": "string", "format": "date-time"}, {"type": "null"}]},
                defs={"Address": ADDRESS, "Colour": COLOUR},
            ),
            True,
        ),
        (
            loose,
            "Find.",
            parameters(
                ["found", "way"],
                found={"type": "object", "additionalProperties": NUMBER},
                way={"$ref": "#/$defs/Open"},
                defs={
                    "Open": {"type": "object", "title": "Open", "properties": {"street": TEXT}, "required": ["street"]}
                },
            ),
            False,
        ),
        (
            keyword,
            "Tell a size.",
            parameters(
                ["size", "mark"],
                size={"$ref": "#/$defs/Size"},
                mark={"type": "string", "format": "uuid"},
                defs={
                    "Size": {
                        "type": "object",
                        "title": "Size",
                        "properties": {"width": NUMBER, "height": {**NUMBER, "default": 1}},
                        "required": ["width"],
                    }
                },
            ),
            False,
        ),
        (whatever, "Take it.", parameters(["value"], value={}), False),
        (coroutine, "Wait.", parameters(["day"], day={"type": "string", "format": "date"}), True),
    ],
    ids=lambda one: getattr(one, "__name__", ""),
)
def test_a_model_is_told_of_a_function_what_its_signature_and_docstring_say(
    function: Callable[..., Any], description: str, schema: Json, strict: bool
) -> None:
    made = tool(function)
    assert made.spec == (function.__name__, description, schema, strict)
    assert (made.kind, made.timeout, made.approval) == ("server", 30.0, False)


def test_options_stand_and_a_tool_can_still_be_called_like_its_function() -> None:
    def ask(arguments: Json, context: ToolContext) -> bool:
        return bool(arguments["cents"] > 100)

    made = tool(
        timeout=20, approval=ask, idempotent=True, sequential=True, thread=True, name="pay", description="Pay."
    )(google)
    assert (made.name, made.spec.description, made.timeout, made.approval) == ("pay", "Pay.", 20, ask)
    assert made.idempotent
    assert made.sequential
    assert made.thread
    assert made("7", 5, CONTEXT) == {"order": "7", "by": "ann", "cents": "5"}


def test_methods_and_wrapped_functions_are_tools() -> None:
    class Shop:
        def find(self, name: str) -> str:
            """Find."""
            return name

    @functools.wraps(google)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return google(*args, **kwargs)

    assert tool(Shop().find).spec.parameters == parameters(["name"], name=TEXT)
    assert tool(wrapped).spec == tool(google).spec


def test_annotations_may_name_what_is_defined_beside_the_tool() -> None:
    class Local(BaseModel):
        name: str

    @tool
    def find(local: Local, context: ToolContext) -> OnlyForTypes:
        """Find."""
        raise NotImplementedError

    (assistant,) = [Assistant("clerk", model="m", tools=[find])]
    assert assistant.specs[0].parameters["properties"] == {"local": {"$ref": "#/$defs/Local"}}
    assert find.keywords({"local": {"name": "x"}}, CONTEXT) == {"local": Local(name="x"), "context": CONTEXT}


def test_a_tool_without_a_description_is_told_of_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    def silent() -> None: ...

    with caplog.at_level(logging.WARNING):
        assert tool(silent).spec.description == ""
    assert caplog.messages == [
        "tool 'silent' has no description, by which a model knows when to call it: write a docstring"
    ]


# Arguments


def test_arguments_arrive_as_what_they_are_annotated_with() -> None:
    sent = {
        "address": {"street": "Main", "number": "7"},
        "colours": ["red"],
        "kind": "a",
        "at": "2026-01-02T03:04:05Z",
    }
    found = tool(nested).keywords(sent, CONTEXT)
    assert found == {
        "address": Address(street="Main", number=7),
        "colours": [Colour.RED],
        "kind": "a",
        "at": dt.datetime(2026, 1, 2, 3, 4, 5, tzinfo=dt.UTC),
    }
    mark = uuid.uuid4()
    assert tool(keyword).keywords({"size": {"width": 2}, "mark": str(mark)}, CONTEXT) == {
        "size": Size(2, 1),
        "mark": mark,
    }
    # What a tool has changed is no other call's.
    assert tool(optional).keywords({"text": "x"}, CONTEXT) == {"text": "x", "limit": 5, "context": CONTEXT}


def test_checked_arguments_are_json_with_defaults_and_are_validated_to_the_same() -> None:
    assert tool(optional).checked({"text": "x"}) == {"text": "x", "limit": 5}
    assert tool(google).checked({"order_id": "7", "cents": "5"}) == {"order_id": "7", "cents": 5}
    sent = {"address": {"street": "Main", "number": "7"}, "colours": ["red"], "kind": "a", "at": None}
    assert tool(nested).checked(sent) == {**sent, "address": {"street": "Main", "number": 7}}
    assert page_tool("pick", "Pick.", Day).checked({"day": "2026-01-02"}) == {"day": "2026-01-02"}
    assert page_tool("pick", "Pick.", Size).checked({"width": "3"}) == {"width": 3, "height": 1}


def test_checked_arguments_stay_as_they_came_where_they_would_be_validated_to_something_else() -> None:
    def more(count: Annotated[int, BeforeValidator(lambda value: value + 1)]) -> None:
        """Count."""

    made = tool(more)
    assert made.checked({"count": 1}) == {"count": 1}
    assert made.keywords({"count": 1}, CONTEXT) == {"count": 2}


def told(made: Tool, arguments: Any) -> str:
    with pytest.raises(ToolArgumentsError) as caught:
        made.checked(arguments)
    return str(caught.value)


def test_what_is_wrong_with_arguments_is_told_in_a_few_lines_without_all_that_was_sent() -> None:
    assert told(tool(google), {"order_id": 7, "more": 1}) == (
        "The arguments are not valid:\n"
        "- order_id: Input should be a valid string, got 7\n"
        "- cents: is required\n"
        "- more: is not known"
    )
    assert told(tool(nested), {"address": {"street": "x"}, "colours": ["red", "x" * 1000], "kind": 1, "at": "y"}) == (
        "The arguments are not valid:\n"
        "- address.number: is required\n"
        f"- colours.1: Input should be 'red' or 'blue', got '{'x' * 98}…\n"
        "- kind: Input should be 'a' or 'b', got 1\n"
        "- at: Input should be a valid datetime or date, input is too short, got 'y'"
    )
    many = told(tool(google), {f"n{number}": 1 for number in range(50)})
    assert len(many.splitlines()) == 7
    assert many.endswith("- and 47 more")
    assert told(tool(google), [1]) == "The arguments are not valid: give a JSON object."
    assert "\0" not in told(tool(google), {"order_id": "x", "cents": "\0"})
    assert "http" not in told(tool(google), {})


def test_a_validator_that_breaks_is_told_as_an_error_of_the_arguments_with_its_cause() -> None:
    class Broken(BaseModel):
        name: str

        @field_validator("name")
        @classmethod
        def look(cls, name: str) -> str:
            return {"a": "b"}[name]

    with pytest.raises(ToolArgumentsError, match=r"^The arguments are not valid\.$") as caught:
        page_tool("look", "Look.", Broken).checked({"name": "x"})
    assert isinstance(caught.value.__cause__, KeyError)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["red", "2026-01-01"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)
NAMES = st.sampled_from(
    ["order_id", "cents", "text", "address", "colours", "kind", "at", "found", "way", "size", "mark", "value", "day"]
)
TOOLS = [tool(one) for one in (google, optional, nested, loose, keyword, whatever, coroutine)]


@given(st.sampled_from(TOOLS), st.dictionaries(NAMES | st.text(max_size=5), VALUES, max_size=6) | VALUES)
def test_whatever_json_a_model_sends_is_validated_or_refused_for_it_to_read(made: Tool, arguments: Any) -> None:
    try:
        found = made.checked(arguments)
    except ToolArgumentsError as error:
        said = str(error)
    else:
        json.dumps(found)
        assert made.keywords(found, CONTEXT) == made.keywords(arguments, CONTEXT)
        return
    assert len(said.splitlines()) <= 7
    assert len(said.encode()) < 10_000


def test_arguments_that_are_nested_without_end_are_refused() -> None:
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    assert told(tool(whatever), {"value": deep}) == "The arguments are not valid."
    # Freed level by level.
    while deep:
        deep = deep.pop()


# Page tools


def test_a_page_tool_takes_no_limit_of_time_which_nobody_would_keep() -> None:
    with pytest.raises(TypeError, match="timeout"):
        page_tool("pick", "Pick.", timeout=20)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("given", "schema", "strict"),
    [
        (None, parameters([]), True),
        (Address, ADDRESS, True),
        (Open, {"type": "object", "title": "Open", "properties": {"street": TEXT}, "required": ["street"]}, False),
        (
            Tree,
            {
                **(
                    tree := {
                        "type": "object",
                        "title": "Tree",
                        "properties": {"leaves": {"type": "array", "items": {"$ref": "#/$defs/Tree"}}},
                        "required": ["leaves"],
                        "additionalProperties": False,
                    }
                ),
                "$defs": {"Tree": tree},
            },
            True,
        ),
        ({"type": "object"}, {"type": "object", "properties": {}}, False),
        (ADDRESS, ADDRESS, True),
        (
            parameters(["a"], a={"type": ["string", "null"], "minLength": 1}),
            parameters(["a"], a={"type": ["string", "null"], "minLength": 1}),
            False,
        ),
    ],
)
def test_the_arguments_of_a_page_tool_are_a_class_or_a_schema_or_none(given: Any, schema: Json, strict: bool) -> None:
    made = page_tool("pick", "Asks for it.", given)
    assert made.spec == ("pick", "Asks for it.", schema, strict)
    assert made.kind == "page"
    with pytest.raises(TypeError, match="pick is executed by the page"):
        made()


def test_a_schema_of_the_apps_is_copied_and_not_held() -> None:
    schema: Json = {"type": "object", "properties": {"a": {"type": "string"}}}
    made = page_tool("pick", "Ask.", schema)
    schema["properties"].clear()
    assert made.spec.parameters["properties"] == {"a": {"type": "string"}}
    assert made.checked({"a": 5}) == {"a": 5}
    assert told(made, "a") == "The arguments are not valid: give a JSON object."


# Refusals


class Opaque:
    """Nothing that a model could make."""


def unannotated(name) -> None:  # type: ignore[no-untyped-def]
    """Look."""


def any_number(*names: str) -> None:
    """Look."""


def any_name(**names: str) -> None:
    """Look."""


def positional(name: str, /) -> None:
    """Look."""


def no_json(name: Any = Opaque()) -> None:  # noqa: B008
    """Look."""


def opaque(thing: Opaque) -> None:
    """Look."""


def uncallable(call: Callable[[], None]) -> None:
    """Look."""


def unknown(name: OnlyForTypes) -> None:
    """Look."""


def generator(name: str) -> Iterator[str]:
    """Look."""
    yield name


async def async_generator(name: str) -> AsyncIterator[str]:
    """Look."""
    yield name


async def ask(arguments: Json, context: ToolContext) -> bool:
    return True


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: tool(unannotated), "parameter 'name' has no annotation: write its type, such as name: str"),
        (lambda: tool(any_number), "parameter 'names' takes any number of arguments: name each"),
        (lambda: tool(any_name), "parameter 'names' takes any number of arguments: name each"),
        (lambda: tool(positional), "parameter 'name' cannot be given by its name: move or remove the /"),
        (lambda: tool(no_json), "is not JSON serializable: give a default that is JSON, such as None"),
        (lambda: tool(opaque), "tool 'opaque': its arguments cannot be told to a model: Unable to generate"),
        (lambda: tool(uncallable), "tool 'uncallable': its arguments cannot be told to a model"),
        (lambda: tool(unknown), "an annotation cannot be read (name 'OnlyForTypes' is not defined): import"),
        (lambda: tool(generator), "tool 'generator' is a generator: return the whole output, without yield"),
        (lambda: tool(async_generator), "is a generator: return the whole output"),
        (lambda: tool(functools.partial(google, "7")), "give a function that is defined with def or async def"),
        (lambda: tool(Opaque), "give a function that is defined with def or async def"),
        (lambda: tool(name="pay it")(google), "tool name 'pay it': use 1 to 64 letters of English, digits, _ or -"),
        (lambda: tool(name="x" * 65)(google), "use 1 to 64 letters"),
        (lambda: tool(name="é")(google), "use 1 to 64 letters"),
        (lambda: tool(lambda: None), "tool name '<lambda>': use 1 to 64 letters"),
        (lambda: tool(description=5)(google), "tool 'google': description=5: give a text"),  # type: ignore[call-overload]
        (lambda: tool(timeout=0)(google), "tool 'google': timeout=0: give a number of seconds above 0"),
        (lambda: tool(timeout=-1)(google), "give a number of seconds above 0"),
        (lambda: tool(timeout=float("inf"))(google), "give a number of seconds above 0"),
        (lambda: tool(timeout=True)(google), "give a number of seconds above 0"),
        (lambda: tool(timeout="5")(google), "give a number of seconds above 0"),  # type: ignore[call-overload]
        (lambda: tool(approval="yes")(google), "approval='yes': use True, False or a callable"),  # type: ignore[call-overload]
        (lambda: tool(approval=lambda: True)(google), "approval= cannot be called (too many positional"),  # type: ignore[arg-type,misc]
        (lambda: tool(approval=ask)(google), "use True, False or a callable that takes (arguments, context)"),  # type: ignore[arg-type]
        (lambda: tool(thread=1)(google), "tool 'google': thread=1: use True or False"),  # type: ignore[call-overload]
        (lambda: tool(thread=True)(coroutine), "thread=True is for a plain function: remove it, or the async"),
        (lambda: page_tool("pick it", "Pick."), "tool name 'pick it': use 1 to 64 letters"),
        (lambda: page_tool("pick", "Pick.", {"type": "string"}), "its parameters are no object"),
        (lambda: page_tool("pick", "Pick.", {}), "its parameters are no object"),
        (lambda: page_tool("pick", "Pick.", int), "its parameters are no object"),
        (lambda: page_tool("pick", "Pick.", Colour), "its parameters are no object"),
        (lambda: page_tool("pick", "Pick.", Opaque), "its arguments cannot be told to a model"),
        (lambda: page_tool("pick", "Pick.", ["day"]), "parameters=['day']: give a class of pydantic's"),
        (lambda: page_tool("pick", "Pick.", {"type": "object", "x": Opaque()}), "parameters cannot be sent as JSON"),
    ],
)
def test_a_tool_that_cannot_work_is_refused_with_what_to_do(make: Callable[[], Tool], says: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        make()
    assert says in str(caught.value)


# What an assistant is given


def test_an_assistant_has_functions_by_name_and_the_rest_as_the_model_server_takes_it() -> None:
    hosted: Json = {"type": "file_search", "vector_store_ids": ["vs_1"]}
    pick = page_tool("pick", "Pick.")
    found = Assistant(
        "clerk",
        model="m",
        tools=[nothing, tool(name="pay")(google), hosted, coroutine, pick],
        max_rounds=3,
        max_tool_seconds=9,
        tool_choice="auto",
        parallel_tool_calls=False,
        background=True,
    )
    hosted["vector_store_ids"].clear()
    assert list(found.tools) == ["nothing", "pay", "coroutine", "pick"]
    assert [one.name for one in found.specs] == list(found.tools)
    assert found.tools["pick"] is pick
    assert found.hosted == [{"type": "file_search", "vector_store_ids": ["vs_1"]}]
    assert (found.max_rounds, found.max_tool_seconds) == (3, 9)
    assert found.arguments == {"tool_choice": "auto", "parallel_tool_calls": False}
    plain = Assistant("clerk", model="m")
    assert (plain.tools, plain.hosted, plain.max_rounds, plain.max_tool_seconds) == ({}, [], 10, 120.0)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"tools": [google, tool(name="google")(nothing)]}, "two tools have the name 'google'; give one another"),
        ({"tools": google}, "give a list"),
        ({"tools": {"type": "web_search"}}, "give a list"),
        ({"tools": "web_search"}, "give a list"),
        ({"tools": ["web_search"]}, "give a function that is defined with def"),
        ({"tools": [{"type": "function", "name": "f"}]}, "give the Python function itself, which is called then"),
        ({"tools": [{"name": "f"}]}, 'such as {"type": "web_search"}'),
        ({"tools": [{"type": 5}]}, 'such as {"type": "web_search"}'),
        ({"tools": [{"type": "mcp", "headers": Opaque()}]}, "tools: mcp cannot be sent as JSON"),
        ({"tools": [unannotated]}, "parameter 'name' has no annotation"),
        ({"functions": [{"name": "f"}]}, "give tools=[...] the Python functions, not functions="),
        ({"max_rounds": 0}, "max_rounds=0: give a number from 1 on"),
        ({"max_rounds": True}, "max_rounds=True: give a number from 1 on"),
        ({"max_rounds": 1.5}, "max_rounds=1.5: give a number from 1 on"),
        ({"max_tool_seconds": 0}, "max_tool_seconds=0: give a number of seconds above 0"),
        ({"max_tool_seconds": "9"}, "max_tool_seconds='9': give a number of seconds above 0"),
        ({"max_round": 5}, "write max_rounds="),
    ],
)
def test_an_assistant_whose_tools_cannot_work_is_refused_with_what_to_do(given: Json, says: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^Assistant 'clerk': ") as caught:
        Assistant("clerk", model="m", **given)
    assert says in str(caught.value)
