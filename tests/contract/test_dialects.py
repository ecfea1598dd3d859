"""What every dialect keeps to, whichever there are; and that a new one is a class and a line."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import openai
import pytest

import assistream_flask
from assistream_flask import Assistant, ConfigurationError
from assistream_flask.events import Json
from assistream_flask.testing import OfflineServer, Reply
from assistream_flask.upstream import answer_stream, event_reader
from assistream_flask.upstream.deltas import Delta, End, Failed, Source, Text
from assistream_flask.upstream.dialects import DIALECTS
from assistream_flask.upstream.items import Turn
from assistream_flask.upstream.protocol import UNREAD, Dialect, ModelRequest, Reading, Translator
from tests.conftest import Caller, MakeApp, quick_client, text

TURNS = (Turn("user", "Hi"), Turn("assistant", "Hello."), Turn("user", "Count."))
PACKAGE = Path(assistream_flask.__file__).parent
everyone = pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS)


@pytest.fixture
def client(server: OfflineServer) -> Iterator[openai.OpenAI]:
    with quick_client(server, max_retries=0) as client:
        yield client


def asked(dialect: Dialect, **changed: Any) -> ModelRequest:
    request = ModelRequest("asst_1", "m", "Be kind.", {}, False, TURNS, 5)
    return request._replace(**changed)


def events_of(dialect: Dialect, client: openai.OpenAI) -> list[tuple[str, Json]]:
    stream = dialect.create(client, asked(dialect))
    try:
        return [event for batch in event_reader.read(stream) for event in batch]
    finally:
        event_reader.close(stream)


def told(translator: Translator, events: Sequence[tuple[str, Json]]) -> list[Delta]:
    return [part for kind, data in events for part in translator.feed(kind, data)]


def said(parts: Sequence[Delta]) -> str:
    return "".join(part.value for part in parts if isinstance(part, Text))


@everyone
def test_it_is_found_by_its_name_which_is_what_an_assistant_takes(dialect: Dialect) -> None:
    assert DIALECTS[dialect.name] is dialect
    assert Assistant("a", upstream=dialect.name, model="m").upstream == dialect.name


@everyone
def test_an_assistant_needs_a_model_where_the_dialect_does(dialect: Dialect) -> None:
    if dialect.needs_model:
        with pytest.raises(ConfigurationError, match="add model="):
            Assistant("a", upstream=dialect.name)
    else:
        assert Assistant("a", upstream=dialect.name).model is None


@everyone
def test_an_assistant_answers_in_the_background_where_the_dialect_can_resume(dialect: Dialect) -> None:
    if dialect.can_resume:
        assert Assistant("a", upstream=dialect.name, model="m", background=True).background
    else:
        with pytest.raises(ConfigurationError, match='needs upstream="responses", not'):
            Assistant("a", upstream=dialect.name, model="m", background=True)


@everyone
def test_a_request_has_the_turns_the_instructions_and_the_arguments_of_the_app(
    dialect: Dialect, client: openai.OpenAI, server: OfflineServer
) -> None:
    dialect.create(client, asked(dialect, arguments={"temperature": 0.5})).close()
    sent = server.requests[0].body
    assert sent["stream"] is True
    assert sent["temperature"] == 0.5
    assert sent["model"] == "m"
    for word in ("Hi", "Hello.", "Count.", "Be kind."):
        assert word in str(sent), word


@everyone
def test_an_answer_becomes_its_text_and_one_end_at_last(
    dialect: Dialect, client: openai.OpenAI, server: OfflineServer
) -> None:
    server.replies = Reply("one two three", usage=(1, 2))
    parts = told(dialect.translator(), events_of(dialect, client))
    assert said(parts) == "one two three"
    assert [part for part in parts if isinstance(part, End | Failed)] == [parts[-1]]
    assert parts[-1] == End(None, {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3})


@everyone
def test_texts_in_one_step_are_those_that_single_events_give(
    dialect: Dialect, client: openai.OpenAI, server: OfflineServer
) -> None:
    server.replies = Reply("one two three four")
    events = events_of(dialect, client)
    single, joined = dialect.translator(), dialect.translator()
    for at, event in enumerate(events):
        one = single.feed(*event)
        several = joined.texts([event])
        assert said(one) == said(joined.feed(*event) if several is None else several), at


@everyone
def test_translators_share_nothing(dialect: Dialect, client: openai.OpenAI) -> None:
    events = events_of(dialect, client)
    first, second = dialect.translator(), dialect.translator()
    half = len(events) // 2
    before = told(first, events[:half])
    assert told(second, events) == before + told(first, events[half:])


@everyone
def test_what_is_not_known_is_ignored_and_settles_nothing(dialect: Dialect) -> None:
    translator = dialect.translator()
    assert told(translator, [("an.event.of.tomorrow", {"type": "an.event.of.tomorrow"}), ("", {}), ("ping", {})]) == []
    assert translator.settled() is None
    assert translator.texts([("an.event.of.tomorrow", {})]) is None


@everyone
def test_its_events_are_recognised_by_it_alone(dialect: Dialect, client: openai.OpenAI) -> None:
    by = [{one.name for one in DIALECTS.values() if one.recognises(*event)} for event in events_of(dialect, client)]
    assert {dialect.name} in by
    # The in-band mark of the end is nobody's.
    assert [names for names in by if names not in ({dialect.name}, set())] == []


# A fourth


class Letters:
    """A dialect whose events have a letter each."""

    name: ClassVar[str] = "letters"
    needs_model: ClassVar[bool] = False
    can_resume: ClassVar[bool] = False

    def keywords(self) -> frozenset[str] | None:
        return None

    def create(self, client: openai.OpenAI, request: ModelRequest) -> Any:
        return iter([{"type": "letter", "letter": letter} for letter in request.turns[-1].text] + [{"type": "last"}])

    def instead(self, client: openai.OpenAI, request: ModelRequest, error: openai.APIStatusError) -> None:
        return None

    def learner(self, client: openai.OpenAI, request: ModelRequest) -> None:
        return None

    def translator(self, reading: Reading = UNREAD, start: int = 0) -> Translator:
        return LettersTranslator()

    def recognises(self, kind: str, data: Mapping[str, Any]) -> bool:
        return kind == "letter"


class LettersTranslator:
    joins: ClassVar[bool] = False
    source: Source | None = None

    def feed(self, kind: str, data: Json) -> list[Delta]:
        if kind == "last":
            return [End(None, None)]
        return [Text(0, data["letter"].upper())] if kind == "letter" else []

    def texts(self, batch: Sequence[tuple[str, Json]]) -> list[Delta] | None:
        return None

    def settled(self) -> End | Failed | None:
        return None


def test_a_new_dialect_is_a_class_and_a_line(make_app: MakeApp, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DIALECTS, "letters", Letters())
    caller = Caller(make_app([Assistant("speller", upstream="letters")]))
    (run_id,) = caller.run("speller", content="abc")
    caller.wait()
    assert text(caller.entry(run_id)) == "ABC"
    parts = [part for batch in answer_stream.translate(Letters().create(None, asked(Letters()))) for part in batch]  # type: ignore[arg-type]
    assert said(parts) == "COUNT."


def test_no_module_knows_which_dialects_there_are_but_the_one_that_lists_them() -> None:
    names = {type(dialect).__module__.rpartition(".")[2] for dialect in DIALECTS.values()}
    knows: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level and path.parts[-2] != "testing":
                tail = (node.module or "").rpartition(".")[2]
                found = names & {tail, *(alias.name for alias in node.names)}
                if found:
                    knows.setdefault(path.stem, set()).update(found)
    # Background responses are those of the Responses API.
    assert knows == {"dialects": names, "background": {"responses"}}


def test_nobody_asks_a_translator_what_it_is() -> None:
    classes = {type(dialect.translator()).__name__ for dialect in DIALECTS.values()}
    classes |= {type(dialect).__name__ for dialect in DIALECTS.values()} | {"Translator", "Dialect"}
    asks = [
        f"{path}:{node.lineno}"
        for path in PACKAGE.rglob("*.py")
        # The offline server has dialects of its own.
        if path.parent.name != "testing"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "type")
        if classes & {word for argument in node.args for word in ast.unparse(argument).replace(".", " ").split()}
    ]
    assert asks == []
