"""What a command does, for whoever gives it: the routes, and an app's own code in a view, a job or a shell."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from .. import events
from ..errors import NotFoundError, RequestError
from ..store.sql import Owner, StoredAnswer, TooManyRunsError, thread_object
from ..types import Run, Thread
from . import values
from .runner import Started
from .runtime import Runtime
from .snapshot import Page
from .thread_history import RunRequest

FindAssistants = Callable[[Owner, Sequence[str]], Sequence[RunRequest | None]]
"""Finds assistants by their ids for one who asks them: for each what runs it, ``None`` where there is none."""
MakeAnswer = Callable[[Started], StoredAnswer | None]
"""Gives what to store for a request's Idempotency-Key, together with what the request starts."""


class RunCommand(NamedTuple):
    """A message, or runs, or both, checked and not begun yet."""

    content: str | None
    asked: Sequence[RunRequest]
    mode: str


def no_thread() -> NotFoundError:
    """Make the error for a thread that is not there, and for another's alike: that it exists is not told."""
    return NotFoundError("thread_not_found", "There is no such thread, or it is not yours.")


def _nothing_to_remember(started: Started) -> None:
    return None


class Service:
    """The commands of one worker process. Each takes the owner for whom it is done; none knows of a request.

    Every method raises SQLAlchemy's errors where the database is away, and
    :class:`.LogUnavailableError` where it needs the event log and that is.
    """

    def __init__(self, runtime: Runtime, find: FindAssistants) -> None:
        self.runtime, self._find = runtime, find

    def new_thread(self, metadata: object) -> Thread:
        """Make a thread object, and store nothing. Raises :class:`RequestError` for metadata beyond the limits."""
        values_of = {"id": events.new_id("thread"), "created_at": events.now(), "metadata": values.metadata(metadata)}
        return thread_object(values_of)

    def create_thread(self, owner: Owner, thread: Thread, answer: StoredAnswer | None = None) -> Thread:
        """Store what :meth:`new_thread` made as ``owner``'s; give it. Raises :class:`.AnsweredBefore`."""
        self.runtime.store.create_thread(owner, thread, answer)
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
        return OwnedThread(self.runtime, self._find, owner, thread_id)

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

    def __init__(self, runtime: Runtime, find: FindAssistants, owner: Owner, thread_id: str) -> None:
        self._runtime, self._find, self.owner, self.id = runtime, find, owner, thread_id

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

        Raises :class:`.AnsweredBefore`; :class:`RequestError` where the owner has as many runs as allowed;
        :class:`NotFoundError` where the thread was deleted just now.
        """
        message = None
        if command.content is not None:
            self._runtime.budget.take(self.owner, len(command.content.encode()))
            message = events.message(self.id, "user", [events.text_part(command.content)])
        try:
            started = self._runtime.runner.submit(self.owner, self.id, message, command.asked, command.mode, answer)
        except TooManyRunsError:
            raise RequestError(
                429,
                "too_many_runs",
                f"You may have {self._runtime.settings.max_runs} answers waiting or under way. Wait for one to end.",
                retry_after=5,
            ) from None
        if started is None:
            raise no_thread()
        return started

    def cancel(self, run_id: str) -> Run:
        """Cancel a run that is not over, whichever worker has it; give it as it is then. Raises
        :class:`NotFoundError`."""
        run = self._runtime.runner.cancel(self.id, run_id) if values.ID.fullmatch(run_id) else None
        if run is None:
            raise NotFoundError("run_not_found", "There is no such run in this thread.")
        return run

    def delete(self) -> None:
        """Delete the thread with all that is in it, stopping its runs."""
        self._runtime.runner.delete(self.id)


def _an_id(text: str | None) -> str | None:
    return text if text is None or values.ID.fullmatch(text) else "none"
