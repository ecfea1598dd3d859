"""Functions that a model may call: the app's own, and the page's."""

from __future__ import annotations

import inspect
import json
import logging
import math
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeVar, overload

from pydantic import TypeAdapter, ValidationError
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaWarningKind
from pydantic_core import to_jsonable_python

from .errors import ConfigurationError
from .events import Json, dumps
from .upstream.protocol import ToolSpec

_log = logging.getLogger(__name__)

Approval = bool | Callable[[Json, "ToolContext"], bool]
T = TypeVar("T")

_NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
_PROBLEMS: Final = 5
"""So many things that are wrong with arguments a model is told of."""
_ECHO: Final = 100
_NO_PARAMETERS: Final[Json] = {"type": "object", "properties": {}, "required": [], "additionalProperties": False}
# What OpenAI's strict mode takes for sure.
_STRICT: Final = frozenset(
    {
        "type",
        "properties",
        "required",
        "additionalProperties",
        "items",
        "enum",
        "const",
        "anyOf",
        "$ref",
        "$defs",
        "description",
        "title",
        "format",
        "multipleOf",
        "maximum",
        "exclusiveMaximum",
        "minimum",
        "exclusiveMinimum",
        "minItems",
        "maxItems",
    }
)
_FORMATS: Final = (None, "date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid")


class ToolArgumentsError(Exception):
    """Arguments that a tool cannot be called with; what it says is short, and for the model to read. A tool may raise
    it too, for what only the tool knows."""


class ToolFailedError(Exception):
    """What became of a call that another server failed: ``said`` is for the model to read, ``why`` says it in a few
    words. Its cause is for the log."""

    def __init__(self, said: str, why: str) -> None:
        super().__init__(why)
        self.said, self.why = said, why


@dataclass(frozen=True)
class ToolContext:
    """What a tool may know of its call: ids, and the name of the thread's owner. A parameter that is annotated with it
    is given one, and is not in the schema."""

    thread_id: str
    run_id: str
    assistant_id: str
    owner: str
    tool_call_id: str


@dataclass(frozen=True)
class Tool:
    """A function that a model may call: made by :func:`tool` and :func:`page_tool`. Called like the function, a
    server's tool does what that does.

    ``kind`` is who executes it: the app (``server``) or the page, which the options of a server's tool say nothing of.
    """

    spec: ToolSpec
    kind: Literal["server", "page"]
    function: Callable[..., Any] | None = None
    timeout: float = 30.0
    approval: Approval = False
    idempotent: bool = False
    sequential: bool = False
    thread: bool = False
    # None where a page's arguments are told by a JSON schema, which is for the model and the page.
    adapter: TypeAdapter[Any] | None = field(default=None, repr=False)
    contexts: Sequence[str] = field(default=(), repr=False)

    @property
    def name(self) -> str:
        """Give the name that the model calls it by."""
        return self.spec.name

    def checked(self, arguments: Json) -> Json:
        """Give the arguments as JSON with what they are validated to. Raises :class:`ToolArgumentsError`.

        Where that would not be validated to the same once more, they are given as they came.
        """
        values = self._validated(arguments)
        try:
            found: Json = to_jsonable_python(values, by_alias=True, round_trip=True)
            return found if self._validated(found) == values else arguments
        except Exception:
            return arguments

    def keywords(self, arguments: Json, context: ToolContext) -> dict[str, Any]:
        """Give what the function is to be called with. Raises :class:`ToolArgumentsError`."""
        return {**self._validated(arguments), **dict.fromkeys(self.contexts, context)}

    def _validated(self, arguments: Json) -> Any:
        if not isinstance(arguments, dict):
            raise ToolArgumentsError("The arguments are not valid: give a JSON object.")
        if self.adapter is None:
            return arguments
        try:
            return self.adapter.validate_json(dumps(arguments))
        except ValidationError as error:
            raise ToolArgumentsError(_told(error)) from None
        except Exception as error:
            # Of a validator of the app's, or of arguments that are nested too deep.
            raise ToolArgumentsError("The arguments are not valid.") from error

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function itself: nothing is validated or timed."""
        if self.function is None:
            raise TypeError(f"{self.name} is executed by the page: it cannot be called here")
        return self.function(*args, **kwargs)


def _told(error: ValidationError) -> str:
    """Say what is wrong with arguments, in a few lines that a model can do something with."""
    problems = error.errors(include_url=False, include_context=False)
    lines = ["The arguments are not valid:"]
    for problem in problems[:_PROBLEMS]:
        kind, said = problem["type"], problem["msg"]
        if kind.startswith("missing"):
            said = "is required"
        elif kind == "unexpected_keyword_argument":
            said = "is not known"
        else:
            said = f"{_line(said, 2 * _ECHO)}, got {_line(repr(problem['input']), _ECHO)}"
        lines.append(f"- {_line('.'.join(map(str, problem['loc'])), _ECHO)}: {said}")
    if len(problems) > _PROBLEMS:
        lines.append(f"- and {len(problems) - _PROBLEMS} more")
    return "\n".join(lines)


def _line(text: str, most: int) -> str:
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if len(text) <= most else text[: most - 1] + "…"


# Server tools


@overload
def tool(function: Callable[..., Any], /) -> Tool: ...


@overload
def tool(
    *,
    name: str | None = None,
    description: str | None = None,
    timeout: float = 30.0,
    approval: Approval = False,
    idempotent: bool = False,
    sequential: bool = False,
    thread: bool = False,
) -> Callable[[Callable[..., Any]], Tool]: ...


def tool(function: Callable[..., Any] | None = None, /, **options: Any) -> Tool | Callable[[Callable[..., Any]], Tool]:
    """Make a function of the app's a tool, as ``@tool`` or ``@tool(timeout=20, ...)``.

    What the model is told of it comes from its signature and docstring. A plain function in ``Assistant(tools=[...])``
    becomes one by itself.

    - ``name`` and ``description``: instead of the function's name and what its docstring begins with.
    - ``timeout``: so many seconds it may take.
    - ``approval``: whether a person must approve of a call before it is executed: ``True``, or a callable that takes
      the arguments and a :class:`ToolContext` and says so.
    - ``idempotent``: it may be executed once more where a worker ended in the midst of it.
    - ``sequential``: no other call of the run is executed beside it.
    - ``thread``: it computes, or blocks without gevent's knowing, and gets a thread of its own.

    Raises :class:`ConfigurationError` for what no model could be told, or what could not be called.
    """
    if function is None:
        return lambda given: _server_tool(given, **options)
    return _server_tool(function, **options)


def _server_tool(
    function: Callable[..., Any],
    *,
    name: str | None = None,
    description: str | None = None,
    timeout: float = 30.0,
    approval: Approval = False,
    idempotent: bool = False,
    sequential: bool = False,
    thread: bool = False,
) -> Tool:
    _check_function(function)
    name = function.__name__ if name is None else name
    _check_name(name, description)
    label = f"tool {name!r}"
    check_seconds(label, "timeout", timeout)
    check_approval(label, approval)
    for option, value in (("idempotent", idempotent), ("sequential", sequential), ("thread", thread)):
        if not isinstance(value, bool):
            raise ConfigurationError(f"tool {name!r}: {option}={value!r}: use True or False")
    if thread and inspect.iscoroutinefunction(function):
        raise ConfigurationError(f"tool {name!r}: thread=True is for a plain function: remove it, or the async")
    record, contexts = _recorder(name, function)
    adapter, schema = _adapted(name, record)
    documented, arguments = _documented(function)
    for argument, said in arguments.items():
        if argument in schema["properties"]:
            schema["properties"][argument].setdefault("description", said)
    spec = _spec(name, documented if description is None else description, schema)
    return Tool(spec, "server", function, timeout, approval, idempotent, sequential, thread, adapter, contexts)


def _check_function(function: object) -> None:
    if not (inspect.isfunction(function) or inspect.ismethod(function)):
        raise ConfigurationError(f"tool: got {function!r}: give a function that is defined with def or async def")
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise ConfigurationError(f"tool {function.__name__!r} is a generator: return the whole output, without yield")


def _check_name(name: object, description: object) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigurationError(
            f"tool name {name!r}: use 1 to 64 letters of English, digits, _ or -, such as with name="
        )
    if description is not None and not isinstance(description, str):
        raise ConfigurationError(f"tool {name!r}: description={description!r}: give a text")


def check_seconds(label: str, option: str, value: object) -> None:
    """Raise :class:`ConfigurationError`, which begins with ``label``, where ``value`` cannot limit a time."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ConfigurationError(f"{label}: {option}={value!r}: give a number of seconds above 0")


def check_approval(label: str, approval: object) -> None:
    """Raise :class:`ConfigurationError`, which begins with ``label``, where ``approval`` is none."""
    if isinstance(approval, bool):
        return
    fix = "use True, False or a callable that takes (arguments, context) and gives True where a person is to be asked"
    if not callable(approval) or inspect.iscoroutinefunction(approval):
        raise ConfigurationError(f"{label}: approval={approval!r}: {fix}")
    try:
        inspect.signature(approval).bind(None, None)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"{label}: approval= cannot be called ({error}): {fix}") from None


def _recorder(name: str, function: Callable[..., Any]) -> tuple[Callable[..., dict[str, Any]], list[str]]:
    """Give a function of the same parameters that gives what it is called with, and the parameters that take a
    :class:`ToolContext`, which it lacks."""

    def record(**given: Any) -> dict[str, Any]:
        return given

    parameters = list(inspect.signature(function).parameters.values())
    for one in parameters:
        _check_parameter(name, one)
    # Without that of what it gives, which may be imported for type checkers only.
    record.__annotations__ = {one.name: one.annotation for one in parameters}
    record.__annotations__ = hints = _hints(name, function, record)
    contexts = [parameter for parameter, hint in hints.items() if _is_context(hint)]
    keywords = [
        one.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[one.name])
        for one in parameters
        if one.name not in contexts
    ]
    for parameter in contexts:
        del hints[parameter]
    record.__signature__ = inspect.Signature(keywords)  # type: ignore[attr-defined]
    return record, contexts


def _check_parameter(name: str, parameter: inspect.Parameter) -> None:
    at = f"tool {name!r}: parameter {parameter.name!r}"
    if parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
        raise ConfigurationError(f"{at} takes any number of arguments: name each, such as one that is a list or a dict")
    if parameter.kind is inspect.Parameter.POSITIONAL_ONLY:
        raise ConfigurationError(f"{at} cannot be given by its name: move or remove the / in the signature")
    if parameter.annotation is inspect.Parameter.empty:
        raise ConfigurationError(f"{at} has no annotation: write its type, such as {parameter.name}: str")


def _hints(name: str, function: Callable[..., Any], record: Callable[..., Any]) -> dict[str, Any]:
    """Give the types of the parameters, also where annotations are texts. Those may name what is defined beside the
    tool in a function, such as the one that makes the app."""
    around = getattr(inspect.unwrap(function), "__globals__", {})
    missing: Exception | None = None
    for names in _scopes():
        try:
            return typing.get_type_hints(record, around, names, include_extras=True)
        except Exception as error:
            missing = missing or error
    raise ConfigurationError(
        f"tool {name!r}: an annotation cannot be read ({missing}): import what it names where the program runs, not "
        "for type checkers only"
    )


def _scopes() -> Iterator[dict[str, Any]]:
    yield {}
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_globals is not globals() and frame.f_locals is not frame.f_globals:
            yield frame.f_locals
        frame = frame.f_back


def _is_context(hint: object) -> bool:
    if typing.get_origin(hint) in (typing.Annotated, typing.Union, types.UnionType):
        return any(_is_context(one) for one in typing.get_args(hint))
    return hint is ToolContext


def _documented(function: Callable[..., Any]) -> tuple[str, dict[str, str]]:
    """Give what a docstring, in any of the usual styles, says of the function, and of its parameters."""
    text = inspect.getdoc(function)
    if not text:
        return "", {}
    # It takes long to import, for who has no tools.
    import griffe

    # What a docstring does wrong is for a linter to say.
    quiet = {"warnings": False}
    sections = griffe.Docstring(text).parse(
        "auto",
        style_order=["sphinx", "google", "numpy"],
        default="google",
        per_style_options={"google": quiet, "numpy": quiet, "sphinx": quiet},
    )
    said: list[str] = []
    arguments: dict[str, str] = {}
    for section in sections:
        if section.kind is griffe.DocstringSectionKind.text:
            said.append(section.value)
        elif section.kind is griffe.DocstringSectionKind.parameters:
            arguments |= {one.name: " ".join(one.description.split()) for one in section.value if one.description}
    return "\n\n".join(said).strip(), arguments


# Page tools


def page_tool(name: str, description: str, parameters: Any = None) -> Tool:
    """Make a tool that the page executes, which answers with an output.

    ``parameters`` are a pydantic model, a dataclass or a ``TypedDict``, each the class itself; a JSON schema of an
    object; or ``None`` for a tool without arguments. Arguments that don't validate never reach the page; a JSON schema
    is for the model and the page, and only that they are an object is held here. A page may take as long as a person
    does: until ``ASSISTREAM_ACTION_SECONDS``. Raises :class:`ConfigurationError` for what no model could be told.
    """
    _check_name(name, description)
    adapter: TypeAdapter[Any] | None = None
    if parameters is None:
        schema: Json = json.loads(dumps(_NO_PARAMETERS))
    elif isinstance(parameters, Mapping):
        schema = copied(f"tool {name!r}: parameters", parameters)
    elif isinstance(parameters, type) or typing.is_typeddict(parameters):
        adapter, schema = _adapted(name, parameters)
    else:
        raise ConfigurationError(
            f"tool {name!r}: parameters={parameters!r}: give a class of pydantic's, a dataclass, a TypedDict, or a "
            "JSON schema of an object"
        )
    if schema.get("type") != "object" or not isinstance(schema.setdefault("properties", {}), dict):
        raise ConfigurationError(
            f"tool {name!r}: its parameters are no object: give "
            '{"type": "object", "properties": {...}}, or a class with fields'
        )
    return Tool(_spec(name, description, schema), "page", adapter=adapter)


def copied(what: str, given: Mapping[str, Any]) -> Json:
    """Give a copy of what is to be sent as JSON. Raises :class:`ConfigurationError`, which begins with ``what``."""
    try:
        found: Json = json.loads(dumps(dict(given)))
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigurationError(
            f"{what} cannot be sent as JSON ({error}): give texts, numbers, lists, dicts"
        ) from None
    return found


# Schemas


class _Schema(GenerateJsonSchema):
    """Makes schemas without the titles of fields, which say their names once more and are paid for."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def emit_warning(self, kind: JsonSchemaWarningKind, detail: str) -> None:
        if kind == "non-serializable-default":
            raise ConfigurationError(f"{detail.split(';')[0]}: give a default that is JSON, such as None")
        super().emit_warning(kind, detail)


def _adapted(name: str, given: Any) -> tuple[TypeAdapter[Any], Json]:
    """Give what validates arguments for a function or a class, and their JSON schema."""
    try:
        adapter = TypeAdapter(given)
        schema: Json = adapter.json_schema(schema_generator=_Schema)
    except Exception as error:
        # The rest of what pydantic says is where to read more.
        said = (str(error).strip() or repr(error)).splitlines()[0]
        raise ConfigurationError(
            f"tool {name!r}: its arguments cannot be told to a model: {said}; use str, int, float, bool, list, dict, "
            "Literal, enums, dataclasses, or models of pydantic"
        ) from error
    # That of a class which has itself within it is only a name.
    if found := re.fullmatch(r"#/\$defs/([^/]+)", schema.get("$ref", "")):
        schema = {**schema["$defs"][found[1]], "$defs": schema["$defs"]}
    return adapter, schema


def _spec(name: str, description: str, schema: Json) -> ToolSpec:
    if not description.strip():
        _log.warning("tool %r has no description, by which a model knows when to call it: write a docstring", name)
    if schema.get("additionalProperties") is False:
        # Strict mode wants it even where there is none.
        schema.setdefault("required", [])
    return ToolSpec(name, description.strip(), schema, is_strict(schema))


def is_strict(schema: object) -> bool:
    """Tell whether OpenAI's strict mode takes a schema, which it refuses the whole request for otherwise."""
    if not isinstance(schema, dict) or not schema.keys() <= _STRICT or schema.get("format") not in _FORMATS:
        return False
    if "$ref" in schema:
        return len(schema) == 1
    properties, kinds = schema.get("properties", {}), schema.get("type", ())
    if not kinds and "anyOf" not in schema:
        return False
    if "object" in kinds:
        is_closed = schema.get("additionalProperties") is False
        if not is_closed or set(schema.get("required", ())) != set(properties):
            return False
    if "array" in kinds and "items" not in schema:
        return False
    inner = [*properties.values(), *schema.get("$defs", {}).values(), *schema.get("anyOf", ())]
    return all(map(is_strict, [*inner, *([schema["items"]] if "items" in schema else [])]))


# What an assistant is given


def sorted_out(given: object) -> tuple[dict[str, Tool], list[Json]]:
    """Give the functions of ``Assistant(tools=...)`` by name, and what the model server is to execute itself. Raises
    :class:`ConfigurationError`."""
    if isinstance(given, str | Mapping) or not isinstance(given, Sequence):
        raise ConfigurationError(f"tools={given!r}: give a list")
    tools: dict[str, Tool] = {}
    hosted: list[Json] = []
    for one in given:
        if isinstance(one, Mapping):
            hosted.append(_hosted(one))
            continue
        made = one if isinstance(one, Tool) else _server_tool(one)
        if made.name in tools:
            raise ConfigurationError(f"two tools have the name {made.name!r}; give one another with @tool(name=...)")
        tools[made.name] = made
    return tools, hosted


def _hosted(given: Mapping[str, Any]) -> Json:
    kind = given.get("type")
    if kind == "function":
        raise ConfigurationError(
            'tools has a dict of type "function": give the Python function itself, which is called then, or '
            "page_tool(...) for one that the page executes"
        )
    if not isinstance(kind, str) or not kind:
        raise ConfigurationError(
            f'tools has {given!r}: give a function, or a tool of the model server such as {{"type": "web_search"}}'
        )
    return copied(f"tools: {kind}", given)
