"""What a command does, for whoever gives it: the routes, and an app's own code in a view, a job or a shell."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from .. import events
from ..errors import NotFoundError, RequestError
from ..store.sql import (
    Owner,
    StoredAnswer,
    TooManyMessagesError,
    TooManyRunsError,
    TooManyThreadsError,
    thread_object,
)
from ..types import Run, Thread
from . import values
from .runner import Started
from .runtime import Runtime
from .snapshot import Page
from .thread_history import RunRequest
from .tool_answers import ToolAnswer, no_run

FindAssistants = Callable[[Owner, Sequence[str]], Sequence[RunRequest | None]]
"""Finds assistants by their ids for one who asks them: for each what runs it, ``None`` where there is none."""
MakeAnswer = Callable[[Started], StoredAnswer | None]
"""Gives what to store for a request's Idempotency-Key, together with what the request starts."""
KeepRun = Callable[[Run], StoredAnswer | None]
"""The same, of a request that changes a run."""


class RunCommand(NamedTuple):
    """A message, or runs, or both, checked and not begun yet."""

    content: str | None
    asked: Sequence[RunRequest]
    mode: str


def no_thread() -> NotFoundError:
    """Make the error for a thread that is not there, and for another's alike: that it exists is not told."""
    return NotFoundError("thread_not_found", "There is no such thread, or it is not yours.")


def _keep_nothing(run: Run) -> None:
    return None


def _nothing_to_remember(started: Started) -> None:
    return None


class Service:
    """The commands of one worker process. Each takes the owner for whom it is done; none knows of a request.

    ``address`` is where they come from, where that is limited; the app's own code comes from nowhere.

    Every method raises SQLAlchemy's errors where the database is away, and
    :class:`.LogUnavailableError` where it needs the event log and that is.
    """

    def __init__(self, runtime: Runtime, find: FindAssistants, address: str | None = None) -> None:
        self.runtime, self._find, self._address = runtime, find, address

    def new_thread(self, metadata: object) -> Thread:
        """Make a thread object, and store nothing. Raises :class:`RequestError` for metadata beyond the limits."""
        values_of = {"id": events.new_id("thread"), "created_at": events.now(), "metadata": values.metadata(metadata)}
        return thread_object(values_of)

    def create_thread(self, owner: Owner, thread: Thread, answer: StoredAnswer | None = None) -> Thread:
        """Store what :meth:`new_thread` made as ``owner``'s; give it. Raises :class:`.AnsweredBefore`, and
        :class:`RequestError` where the owner has as many as they may keep."""
        most = self.runtime.settings.max_threads
        try:
            self.runtime.store.create_thread(owner, thread, answer, max_threads=most)
        except TooManyThreadsError:
            raise RequestError(
                403, "too_many_threads", f"You may keep {most} threads, and have as many. Delete one you don't need."
            ) from None
        return thread

    def threads(self, owner: Owner, limit: int, before: str | None) -> tuple[list[Thread], bool]:
        """Give ``owner``'s threads that are older than the thread ``before``, newest first, and whether there are
        more. Raises :class:`RequestError` for a ``limit`` beyond 1 to 200, :class:`NotFoundError` where ``before`` is
        none of them."""
        found = self.runtime.store.threads(self._met(owner), values.limit(limit), _an_id(before))
        if found is None:
            raise NotFoundError("thread_not_found", "'before' must be the id of one of your threads.")
        return found

    def open(self, owner: Owner | None, thread_id: str) -> OwnedThread:
        """Give ``owner``'s thread, for all that is done with it. Raises :class:`NotFoundError` where there is none, or
        it is another's, or nobody asks."""
        if not (owner and values.ID.fullmatch(thread_id) and self.runtime.store.owns(self._met(owner), thread_id)):
            raise no_thread()
        return OwnedThread(self.runtime, self._find, owner, thread_id, self._address)

    def delete_owner(self, owner: Owner) -> None:
        """Delete all that is stored of ``owner``: threads with their messages and runs, which are stopped, the events
        in their logs, and the answers that are remembered for Idempotency-Keys."""
        store = self.runtime.store
        self._met(owner)
        while True:
            found = store.threads(owner, values.MOST_ENTRIES, None)
            threads = found[0] if found else []
            if not threads:
                break
            for thread in threads:
                self.runtime.runner.delete(thread["id"])
        store.forget_owner(owner)

    def _met(self, owner: Owner) -> Owner:
        """Give ``owner``, who has what an earlier release stored under their hash alone."""
        former = values.former_name(owner.name)
        if former is not None:
            self.runtime.store.rename_owner(Owner(owner.scope, former), owner)
        return owner


class OwnedThread:
    """A thread, and its owner, who may do all of this with it. Made by :meth:`Service.open` only, so that nothing is
    done without a look at whose it is."""

    def __init__(
        self, runtime: Runtime, find: FindAssistants, owner: Owner, thread_id: str, address: str | None
    ) -> None:
        self._runtime, self._find, self.owner, self.id, self._address = runtime, find, owner, thread_id, address

    def as_object(self) -> Thread:
        """Give the public thread object. Raises :class:`NotFoundError` where it was deleted just now."""
        found = self._runtime.store.thread(self.id)
        if found is None:
            raise no_thread()
        return found

    def messages(self, limit: int, before: str | None) -> Page:
        """Give a page of entries in order, older than the message ``before``, whether there are older ones, and the
        place in the log as of which it is exact. Raises as :meth:`Service.threads` does."""
        found = self._runtime.runner.page(self.id, values.limit(limit), _an_id(before))
        if found is None:
            raise NotFoundError("message_not_found", "'before' must be the id of a message of this thread.")
        return found

    def message(self, content: object) -> RunCommand:
        """Check a user's message that nobody is to answer. Raises :class:`RequestError`."""
        return RunCommand(values.content(content, self._runtime.settings.max_message_chars), [], "parallel")

    def runs(self, assistant_ids: object, content: object, mode: object) -> RunCommand:
        """Check what is to be run, and a user's message before it (``None`` for none). Raises :class:`RequestError`,
        :class:`NotFoundError` for an assistant that there is not."""
        settings = self._runtime.settings
        text = None if content is None else values.content(content, settings.max_message_chars)
        how = values.mode(mode)
        ids = values.assistant_ids(assistant_ids, min(settings.max_assistants, settings.max_runs))
        asked: list[RunRequest] = []
        for assistant_id, found in zip(ids, self._find(self.owner, ids), strict=True):
            if found is None:
                raise NotFoundError(
                    "assistant_not_found",
                    f"There is no assistant {assistant_id[:64]!r}. GET /assistants lists them.",
                )
            asked.append(found)
        return RunCommand(text, asked, how)

    def start(self, command: RunCommand, answer: MakeAnswer = _nothing_to_remember) -> Started:
        """Store the message and the runs, and begin those as soon as the thread is free.

        Raises :class:`.AnsweredBefore`; :class:`RequestError` where the owner, or the address, has as many runs as
        allowed, or the thread as many messages;
        :class:`NotFoundError` where the thread was deleted just now.
        """
        message, runner = None, self._runtime.runner
        if command.content is not None:
            self._runtime.budget.take(self.owner, len(command.content.encode()))
            message = events.message(self.id, "user", [events.text_part(command.content)])
        try:
            with runner.active.room(self._address, len(command.asked), self._runtime.settings.address_runs):
                started = runner.submit(
                    self.owner, self.id, message, command.asked, command.mode, answer, self._address
                )
        except TooManyMessagesError:
            most = self._runtime.settings.max_messages
            raise RequestError(
                403, "too_many_messages", f"A thread may have {most} messages, answers included. Begin a new thread."
            ) from None
        except TooManyRunsError as error:
            settings = self._runtime.settings
            said = f"You may have {settings.max_runs} answers waiting or under way. Wait for one to end."
            if error.with_parked:
                said = (
                    f"You may have {settings.max_questions} answers that wait for you, beside those under way. Answer "
                    "what one asks, or cancel it."
                )
            # Who is asked something has to do that first.
            raise RequestError(429, "too_many_runs", said, retry_after=60 if error.with_parked else 5) from None
        if started is None:
            raise no_thread()
        return started

    def cancel(self, run_id: str) -> Run:
        """Cancel a run that is not over, whichever worker has it; give it as it is then. Raises
        :class:`NotFoundError`."""
        run = self._runtime.runner.cancel(self.id, run_id) if values.ID.fullmatch(run_id) else None
        if run is None:
            raise no_run()
        return run

    def submit_tool_outputs(self, run_id: str, outputs: object, keep: KeepRun = _keep_nothing) -> Run:
        """Answer calls of a run that wait for a page's output; give the run as it is then. Raises
        :class:`RequestError`, :class:`NotFoundError`."""
        given = values.tool_outputs(outputs, self._runtime.settings.max_message_chars)
        self._runtime.budget.take(self.owner, sum(len(output.encode()) for _, output in given))
        return self._answer(run_id, [ToolAnswer(call_id, "output", output) for call_id, output in given], keep)

    def decide(self, run_id: str, approvals: object, keep: KeepRun = _keep_nothing) -> Run:
        """Allow, or do not allow, calls of a run that wait for that; give the run as it is then. Raises
        :class:`RequestError`, :class:`NotFoundError`."""
        return self._answer(
            run_id,
            [
                ToolAnswer(
                    one["tool_call_id"],
                    "approval",
                    approve=one["approve"],
                    reason=one.get("reason"),
                    arguments=one.get("arguments"),
                    remember=one["approve"] and one.get("remember", False),
                )
                for one in values.approvals(approvals)
            ],
            keep,
        )

    def claim_tool_call(self, run_id: str, call_id: str, holder: object, release: object) -> tuple[float, float]:
        """Have the page that is called ``holder`` be the one that executes a call, or with ``release`` no longer; give
        until when, in seconds since 1970, and for how many seconds. Raises :class:`RequestError`,
        :class:`NotFoundError`."""
        name = values.holder(holder)
        if not isinstance(release, bool):
            raise values.invalid("'release' must be true or false.")
        if not values.ID.fullmatch(run_id) or not values.CALL_ID.fullmatch(call_id):
            raise NotFoundError("tool_call_not_found", "There is no such call in this thread.")
        seconds = 0.0 if release else self._runtime.settings.claim_seconds
        return self._runtime.runner.answers.hold(self.id, run_id, call_id, name, seconds), seconds

    def _answer(self, run_id: str, answers: Sequence[ToolAnswer], keep: KeepRun) -> Run:
        def find(assistant_id: str) -> RunRequest | None:
            return self._find(self.owner, [assistant_id])[0]

        if not values.ID.fullmatch(run_id):
            raise no_run()
        return self._runtime.runner.answers.answer(self.owner, self.id, run_id, answers, find, keep, self._address)

    def delete(self) -> None:
        """Delete the thread with all that is in it, stopping its runs."""
        self._runtime.runner.delete(self.id)


def _an_id(text: str | None) -> str | None:
    return text if text is None or values.ID.fullmatch(text) else "none"
