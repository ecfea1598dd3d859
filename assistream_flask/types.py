"""The public objects: the JSON that routes answer with, event streams bring and the app's own code is given.

Each is a ``TypedDict``: a plain ``dict`` when the code runs, and a shape for type checkers, which tell of a key that is
not there. Where a docstring names an object of the Assistants API, it has that object's keys and their meaning, see
https://platform.openai.com/docs/api-reference/assistants; what differs is said. The same shapes are the schemas of
``docs/reference/openapi.yaml``, and a test holds the two to each other. Later releases may add keys and words; those
that are here stay. Times are whole seconds since 1970.

This module imports nothing but :mod:`typing`, so a client can use it without Flask and the OpenAI SDK.
"""

from typing import Any, Literal, NotRequired, Required, TypeAlias, TypedDict

__all__ = [
    "Annotation",
    "AnnotatedFile",
    "AssistantSummary",
    "ContentPart",
    "Deleted",
    "Entry",
    "ErrorBody",
    "ErrorDetails",
    "EventData",
    "FunctionCall",
    "FunctionCallDelta",
    "LastError",
    "Message",
    "MessageDelta",
    "MessageDeltaContent",
    "MessageIncompleteDetails",
    "PartDelta",
    "Ping",
    "ReasoningDetails",
    "ReasoningText",
    "RefusalDelta",
    "RefusalPart",
    "RequiredAction",
    "RequiredCall",
    "RequiredFunction",
    "Run",
    "RunIncompleteDetails",
    "Snapshot",
    "StartedRuns",
    "Step",
    "StepDelta",
    "StepDeltaDetails",
    "StepDetails",
    "SubmitToolOutputs",
    "TextContent",
    "TextContentDelta",
    "TextDelta",
    "TextPart",
    "Thread",
    "ToolCall",
    "ToolCallDelta",
    "ToolCallStatus",
    "ToolCallsDelta",
    "ToolCallsDetails",
    "Usage",
]

# Threads and messages


class Thread(TypedDict):
    """A conversation of one owner: the Assistants API's thread object, without ``tool_resources``."""

    id: str
    object: Literal["thread"]
    created_at: int
    metadata: dict[str, str]


class AnnotatedFile(TypedDict, total=False):
    """The file that an annotation is about: ``file_citation`` or ``file_path`` of the Assistants API's annotations."""

    file_id: str


class Annotation(TypedDict, total=False):
    """A citation in a text, as the model server sent it: these keys where it has them, and any others of its own. One
    with a URL that is neither ``http:`` nor ``https:`` is left out.

    ``type`` says what it is: ``file_citation`` and ``file_path`` (Assistants API, where ``text`` is what stands in the
    text for it), ``url_citation`` with ``url`` and ``title``, or ``file_citation`` with ``file_id`` and ``filename``
    (Responses API). ``start_index`` and ``end_index`` count characters of the text. ``index`` is the server's own.
    """

    type: str
    text: str
    file_citation: AnnotatedFile
    file_path: AnnotatedFile
    url: str
    title: str
    file_id: str
    filename: str
    index: int
    start_index: int
    end_index: int


class TextContent(TypedDict):
    """The ``text`` of a text part: what it says, and the citations in it."""

    value: str
    annotations: list[Annotation]


class TextPart(TypedDict):
    """A text in a message: the Assistants API's text content part."""

    type: Literal["text"]
    text: TextContent


class RefusalPart(TypedDict):
    """In what words a model refused: the Assistants API's refusal content part."""

    type: Literal["refusal"]
    refusal: str


ContentPart: TypeAlias = TextPart | RefusalPart
"""A part of a message, told apart by ``type``."""


class MessageIncompleteDetails(TypedDict):
    """Why a message is not whole: ``incomplete_details`` of the Assistants API's message object, which has no
    ``server_shutdown``: the server ended while the answer was under way."""

    reason: Literal["run_failed", "run_cancelled", "run_expired", "max_tokens", "content_filter", "server_shutdown"]


class Message(TypedDict):
    """What a user or an assistant said: the Assistants API's message object, without ``attachments``.

    ``content`` grows while ``status`` is ``in_progress``, and no part is ever taken away. ``assistant_id`` and
    ``run_id``, of the run that writes it, are ``None`` for a user's message, which is ``completed`` from the start.
    """

    id: str
    object: Literal["thread.message"]
    created_at: int
    thread_id: str
    role: Literal["user", "assistant"]
    status: Literal["in_progress", "completed", "incomplete"]
    content: list[ContentPart]
    assistant_id: str | None
    run_id: str | None
    completed_at: int | None
    incomplete_at: int | None
    incomplete_details: MessageIncompleteDetails | None
    metadata: dict[str, str]


# Runs and their steps


class LastError(TypedDict):
    """Why a run failed, or that its model is still loading: ``last_error`` of the Assistants API's run object.

    ``code`` is for programs and stays; ``docs/reference/errors.md`` has them all. ``message`` is fit for users.
    """

    code: str
    message: str


class RunIncompleteDetails(TypedDict):
    """Why a run ended before its answer was whole: ``incomplete_details`` of the Assistants API's run object, whose
    ``max_completion_tokens`` is the message's ``max_tokens``."""

    reason: Literal["max_completion_tokens", "content_filter", "server_shutdown"]


class Usage(TypedDict):
    """Tokens as the model server counts them: ``usage`` of the Assistants API's run object."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class RequiredFunction(TypedDict):
    """What a model calls that waits for an answer: the name of a tool, and its arguments as JSON."""

    name: str
    arguments: str


class RequiredCall(TypedDict):
    """A tool call that waits: the Assistants API's, and what it ``needs``: a page's ``output``, or a person's
    ``approval``."""

    id: str
    type: Literal["function"]
    function: RequiredFunction
    needs: Literal["output", "approval"]


class SubmitToolOutputs(TypedDict):
    """The calls of a run that wait, in the order in which the model made them."""

    tool_calls: list[RequiredCall]


class RequiredAction(TypedDict):
    """What a run waits for: ``required_action`` of the Assistants API's run object. It has the calls that are not
    answered yet."""

    type: Literal["submit_tool_outputs"]
    submit_tool_outputs: SubmitToolOutputs


class Run(TypedDict):
    """One answer of one assistant, from its request to its end: the Assistants API's run object, without what only a
    request to a model has (``instructions``, ``tools`` and the like).

    ``message_id``, which that object has not, is the message that the run writes. ``completed_at`` is when it ended as
    ``completed``, ``incomplete`` or ``expired``. ``model`` is ``None`` where the assistant names none.
    ``required_action`` is there while ``status`` is ``requires_action``, and ``expires_at`` is when that is over.
    ``usage`` is the sum over all requests to the model. ``metadata`` has ``mcp_unavailable`` where the run has to do
    without MCP servers: their names, with commas between.
    """

    id: str
    object: Literal["thread.run"]
    thread_id: str
    assistant_id: str
    message_id: str
    status: Literal[
        "queued", "in_progress", "requires_action", "completed", "incomplete", "failed", "cancelled", "expired"
    ]
    required_action: RequiredAction | None
    expires_at: int | None
    last_error: LastError | None
    incomplete_details: RunIncompleteDetails | None
    usage: Usage | None
    model: str | None
    created_at: int
    started_at: int | None
    completed_at: int | None
    failed_at: int | None
    cancelled_at: int | None
    metadata: dict[str, str]


class ReasoningText(TypedDict):
    """The summary of a model's reasoning, or what it grew by."""

    text: str


class ReasoningDetails(TypedDict):
    """``step_details`` of a step of reasoning, which the Assistants API has not; in a delta, what it grew by."""

    type: Literal["reasoning"]
    reasoning: ReasoningText


class FunctionCall(TypedDict):
    """A function that a model calls: its name, its arguments as JSON, and what it gave, ``None`` until that is there.
    The Assistants API's."""

    name: str
    arguments: str
    output: str | None


ToolCallStatus: TypeAlias = Literal["in_progress", "requires_action", "completed", "failed", "denied", "interrupted"]
"""Where a tool call stands: it comes in, waits for its turn or is executed; it waits for a page or a person; it gave
its output; it gave none, for which the model has a sentence; a person did not allow it; it was cut off, or never
executed."""


class ToolCall(TypedDict):
    """A tool call in a step: the Assistants API's, which has neither ``status``, ``kind``, ``error`` nor times.

    ``type`` is ``function``, or the word of a tool that the model server executes itself, such as ``web_search``.
    ``kind`` is who executes it: the app, the page, or the model server (``hosted``). ``error`` says in a few words why
    there is no output of the tool itself. It is executed from ``started_at`` to ``completed_at``.
    """

    id: str
    type: str
    function: FunctionCall
    status: ToolCallStatus
    kind: Literal["server", "page", "hosted"]
    error: str | None
    started_at: int | None
    completed_at: int | None


class ToolCallsDetails(TypedDict):
    """``step_details`` of a step of tool calls: those of one answer of the model, in its order."""

    type: Literal["tool_calls"]
    tool_calls: list[ToolCall]


StepDetails: TypeAlias = ReasoningDetails | ToolCallsDetails
"""What a step did, told apart by ``type``."""


class Step(TypedDict):
    """What a run did besides its message: the Assistants API's run step object. Its ``type`` is ``tool_calls``, or, for
    the summary of the model's reasoning, ``reasoning``, which that API has not.

    ``content_index`` is how many parts of the message stood before it.
    """

    id: str
    object: Literal["thread.run.step"]
    run_id: str
    thread_id: str
    assistant_id: str
    type: Literal["reasoning", "tool_calls"]
    status: Literal["in_progress", "completed", "failed", "cancelled"]
    created_at: int
    completed_at: int | None
    content_index: int
    step_details: StepDetails


class Entry(TypedDict):
    """What a page renders, which is assistream's own: a message, who speaks (``None``: the user), and for an assistant
    the run that writes it, with its steps."""

    assistant_id: str | None
    message: Message
    run: Run | None
    steps: list[Step]


# The data of events


class AssistantSummary(TypedDict):
    """What any caller may know of an assistant."""

    id: str
    name: str
    description: str


class StartedRuns(TypedDict):
    """What one POST stored: the user's message, where there is one, and the runs in the order of their assistants."""

    message: Entry | None
    runs: list[Run]


class Snapshot(TypedDict):
    """Data of ``thread.snapshot``, which is assistream's own: the newest entries of the thread in their order, and
    whether there are older ones. With the events after it, it is the whole state."""

    thread_id: str
    data: list[Entry]
    has_more: bool


class TextContentDelta(TypedDict, total=False):
    """What a text part grew by: characters for its end, or annotations."""

    value: str
    annotations: list[Annotation]


class TextDelta(TypedDict):
    """What the text part ``index`` grew by, which begins where it is not there yet."""

    index: int
    type: Literal["text"]
    text: TextContentDelta


class RefusalDelta(TypedDict):
    """What the refusal part ``index`` grew by, which begins where it is not there yet."""

    index: int
    type: Literal["refusal"]
    refusal: str


PartDelta: TypeAlias = TextDelta | RefusalDelta
"""What a part of a message grew by, told apart by ``type``."""


class MessageDeltaContent(TypedDict):
    """The ``delta`` of a message."""

    content: list[PartDelta]


class MessageDelta(TypedDict):
    """Data of ``thread.message.delta``: the Assistants API's message delta object. ``id`` is the message's."""

    id: str
    object: Literal["thread.message.delta"]
    delta: MessageDeltaContent


class FunctionCallDelta(TypedDict, total=False):
    """What is new of a called function: its name, characters for the end of its arguments, its output."""

    name: str
    arguments: str
    output: str | None


class ToolCallDelta(TypedDict, total=False):
    """What is new of the tool call ``index`` of a step: characters for the end of its arguments, and the present value
    of whatever else there is. One that is not there yet begins, and has all keys."""

    index: Required[int]
    id: str
    type: str
    function: FunctionCallDelta
    status: ToolCallStatus
    kind: Literal["server", "page", "hosted"]
    error: str | None
    started_at: int | None
    completed_at: int | None


class ToolCallsDelta(TypedDict):
    """What the tool calls of a step grew by."""

    type: Literal["tool_calls"]
    tool_calls: list[ToolCallDelta]


class StepDeltaDetails(TypedDict):
    """The ``delta`` of a step."""

    step_details: ReasoningDetails | ToolCallsDelta


class StepDelta(TypedDict):
    """Data of ``thread.run.step.delta``: the Assistants API's run step delta object, with the run's id. ``id`` is the
    step's."""

    id: str
    object: Literal["thread.run.step.delta"]
    run_id: str
    delta: StepDeltaDetails


class Deleted(TypedDict):
    """Data of ``thread.deleted``: the thread is gone. What the Assistants API answers to the deletion of a thread."""

    id: str
    object: Literal["thread.deleted"]
    deleted: Literal[True]


class Ping(TypedDict):
    """Data of ``ping``, which is empty: the stream is alive, though nothing happens."""


EventData: TypeAlias = Snapshot | Message | MessageDelta | Run | Step | StepDelta | Deleted | Ping
"""Data of any event but ``done``, whose data is ``[DONE]`` and no JSON."""


# Errors


class ErrorDetails(TypedDict):
    """The ``error`` of a refused request, as OpenAI's own.

    ``type`` is a word of theirs such as ``invalid_request_error``. ``code`` is for programs and stays. ``message`` is
    for people, states the fix, and may change. ``decision`` is there where a tool call was answered before: how.
    """

    type: str
    code: str
    message: str
    decision: NotRequired[dict[str, Any]]


class ErrorBody(TypedDict):
    """The body of every answer that refuses a request, as OpenAI's own."""

    error: ErrorDetails
