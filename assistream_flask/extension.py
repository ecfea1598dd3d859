"""What an app has of assistream: its assistants, a process's runtime, and commands and signals for its own code."""

from __future__ import annotations

import hashlib
import inspect
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any, Final, TypeVar

import openai
from blinker import NamedSignal, Namespace
from flask import Flask, current_app, has_request_context, session
from werkzeug.local import LocalProxy

from .assistants import Assistant, index
from .errors import ConfigurationError
from .events import Json
from .fast.chunk_reader import new_client
from .mcp import McpServer
from .platform import gunicorn
from .platform.log_throttle import LogThrottle
from .platform.once import PerProcess
from .runs import mcp_tools, values
from .runs.notifier import Kind, Notice
from .runs.run_list import RunList, RunWaiter
from .runs.runtime import Runtime, default_database
from .runs.service import OwnedThread, Service
from .runs.thread_history import RunRequest
from .settings import Settings
from .store.sql import Owner
from .tools import ToolContext
from .types import Entry, Run, Thread
from .upstream.as_given import as_given
from .upstream.items import Names

_log = logging.getLogger(__name__)

Assistants = Sequence[Assistant] | Callable[[], Sequence[Assistant]]
Client = openai.OpenAI | Callable[[], openai.OpenAI]
Adopt = Callable[[str, str], Assistant | None]
T = TypeVar("T")

EXTENSION: Final = "assistream"
SESSION_KEY: Final = "assistream_owner"
"""Where Flask's session has the caller's name, where the app gives none."""
_HOLDER_KEY: Final = "assistream_holder"
"""Where it has which of the app's users that name is."""

_SIGNALS: Final = Namespace()

message_created: NamedSignal = _SIGNALS.signal(
    "assistream.message_created",
    """Sent when a user's message was stored, with ``message``.""",
)
run_started: NamedSignal = _SIGNALS.signal(
    "assistream.run_started",
    """Sent when a run's turn came and the model is about to be asked, with ``run``. A run that is cancelled while it
    is queued ends without.""",
)
run_ended: NamedSignal = _SIGNALS.signal(
    "assistream.run_ended",
    """Sent when the end of a run was stored, with ``run`` and its whole ``message``. A run that is deleted with its
    thread has none.""",
)

tool_called: NamedSignal = _SIGNALS.signal(
    "assistream.tool_called",
    """Sent when the output of a tool that the app executes was stored, with ``run`` and ``call``, which says how it
    ended.""",
)


def _session_name() -> str | None:
    """Give the name that Flask's session has for the caller, ``None`` where it has none.

    Where the app has Flask-Login, the name is the user's who signs in first. For whoever comes after them in the same
    browser, signed in or not, another is made of it, which is the same when they come again.
    """
    name = session.get(SESSION_KEY)
    if not isinstance(name, str):
        return None
    user, holder = _signed_in(), session.get(_HOLDER_KEY)
    # Of the user no more than this: the cookie can be read by the next one.
    theirs = hashlib.sha256(f"{name} {user!r}".encode("utf-8", "surrogatepass")).hexdigest()[:32]
    if holder is None and user is not None:
        session[_HOLDER_KEY] = holder = theirs
    return name if holder in (None, theirs) else theirs


def _signed_in() -> str | None:
    """Give the id of Flask-Login's user, ``None`` where nobody is signed in or the app has no Flask-Login."""
    login = sys.modules.get("flask_login") if hasattr(current_app, "login_manager") else None
    user = getattr(login, "current_user", None)
    return str(user.get_id()) if user is not None and user.is_authenticated else None


class _Signals:
    """Sends an app's signals, one receiver after another: what one raises is logged, and the next has its turn."""

    def __init__(self, app: Flask, throttle: LogThrottle) -> None:
        self._app, self._throttle = app, throttle
        self._signals: dict[Kind, NamedSignal] = {
            "message_created": message_created,
            "run_started": run_started,
            "run_ended": run_ended,
            "tool_called": tool_called,
        }

    def wants(self, kind: Kind) -> bool:
        """Tell whether the app has a receiver for it."""
        return bool(self._signals[kind].has_receivers_for(self._app))

    def hear(self, notice: Notice) -> None:
        """Send the signal, within the app's context."""
        signal = self._signals[notice.kind]
        values_of = {"owner": notice.owner.name, "blueprint": notice.owner.scope, **notice.objects}
        with self._app.app_context():
            for receiver in [] if signal.is_muted else list(signal.receivers_for(self._app)):
                try:
                    receiver(self._app, **values_of)
                except Exception as error:
                    self._throttle.error(_log, error, "a receiver of the signal %s failed", notice.kind)


_ASYNC: Final = (
    "client= is an openai.AsyncOpenAI, and answers are read without asyncio: give an openai.OpenAI, or a callable "
    "that makes one"
)


def _check_callable(name: str, given: object, count: int, or_else: str = "") -> None:
    """Raise :class:`ConfigurationError` where what create_blueprint was ``given`` can't be called with so many
    arguments, which would else fail each request."""
    fix = f"give {or_else}a callable that takes " + (f"{count} arguments" if count else "no argument")
    if not callable(given):
        raise ConfigurationError(f"create_blueprint({name}=...) got {type(given).__name__}: {fix}")
    if inspect.iscoroutinefunction(given):
        raise ConfigurationError(f"create_blueprint({name}=...) got an async function, which nobody awaits: {fix}")
    try:
        signature = inspect.signature(given)
    # A proxy asks what it stands for, which may be anything, or nothing yet.
    except Exception:
        return
    try:
        signature.bind(*[None] * count)
    except TypeError as error:
        raise ConfigurationError(f"create_blueprint({name}=...) cannot be called ({error}): {fix}") from None


def _check_given(assistants: object, owner: object, client: object, adopt: object, read: str) -> None:
    """Raise :class:`ConfigurationError` for what create_blueprint was given and cannot work."""
    if callable(assistants) or not hasattr(assistants, "__iter__"):
        _check_callable("assistants", assistants, 0, "a list, or ")
    if isinstance(owner, LocalProxy):
        raise ConfigurationError(
            "create_blueprint(owner=...) got a proxy, such as current_user: give a callable, such as "
            "lambda: current_user.get_id()"
        )
    if owner is not None:
        _check_callable("owner", owner, 0)
    if adopt is not None:
        _check_callable("adopt", adopt, 2)
    if isinstance(client, openai.AsyncOpenAI) or client is openai.AsyncOpenAI:
        raise ConfigurationError(_ASYNC)
    if client is not None and not isinstance(client, openai.OpenAI):
        _check_callable("client", client, 0, "an openai.OpenAI, or ")
    if read not in ("bytes", "sdk"):
        raise ConfigurationError(f'create_blueprint(read={read!r}): give "bytes" or "sdk"')
    if read == "sdk" and isinstance(client, openai.OpenAI):
        # What it refuses is told now.
        as_given(client)


class Registration:
    """One blueprint as it is registered in an app: its assistants, owner and client."""

    def __init__(
        self,
        assistants: Assistants,
        owner: Callable[[], str | None] | None,
        client: Client | None,
        adopt: Adopt | None,
        read: str = "bytes",
    ) -> None:
        _check_given(assistants, owner, client, adopt, read)
        self._is_as_given = read == "sdk"
        self._assistants = assistants
        self._adopt = adopt
        self.owner = owner
        self._client: Client | None = client
        self._made = PerProcess(self._make)
        self.app: Flask
        if not callable(assistants):
            index(assistants)

    def caller(self) -> str | None:
        """Give the name of the current request's caller, ``None`` for nobody."""
        if self.owner is None:
            return _session_name()
        named = self.owner()
        try:
            name = values.owner_name(named)
        except ValueError as error:
            raise ConfigurationError(f"owner= gave {error}") from None
        if isinstance(named, str) and named.startswith(values.HASHED):
            raise ConfigurationError(
                f"owner= gave a name that begins with {values.HASHED!r}, as names do that are too long to be stored: "
                "give ids of the app's own that begin otherwise"
            )
        return name

    def assistants(self) -> dict[str, Assistant]:
        """Give the assistants of the current request."""
        return index(self._assistants() if callable(self._assistants) else self._assistants)

    def client(self) -> openai.OpenAI:
        """Give the client, made when it is first needed: in the worker, never before a fork."""
        found = self._client if isinstance(self._client, openai.OpenAI) else self._made.get()
        return as_given(found) if self._is_as_given else found

    def mcp_servers(self) -> list[tuple[McpServer, Callable[[], dict[str, str]]]]:
        """Give the MCP servers of the assistants that are known without a request, and what gives their headers as of
        no run."""
        known = {} if callable(self._assistants) else index(self._assistants)
        found = {(one.url, one.name): (one, of) for of in known.values() for one in of.mcp}
        return [(one, partial(self._headers, one, ToolContext("", "", of.id, "", ""))) for one, of in found.values()]

    def _headers(self, server: McpServer, context: ToolContext) -> dict[str, str]:
        with self.app.app_context():
            return server.headers(context)

    def _make(self) -> openai.OpenAI:
        if self._client is None or isinstance(self._client, openai.OpenAI):
            made = new_client()
            return made.with_options(max_retries=0) if self._is_as_given else made
        with self.app.app_context():
            made = self._client()
        if isinstance(made, openai.AsyncOpenAI):
            raise ConfigurationError(_ASYNC)
        return made

    def listed(self, owner: Owner, assistant_ids: Sequence[str]) -> list[RunRequest | None]:
        """Find assistants for the caller of a route: those of the current request, and no other."""
        known = self.assistants()
        names = {one.id: one.name for one in known.values()}
        return [self._asked(known[one], names) if one in known else None for one in assistant_ids]

    def known(self, owner: Owner, assistant_ids: Sequence[str]) -> list[RunRequest | None]:
        """Find assistants for the app's own code: those of the list, then those that ``adopt`` gives for ``owner``.

        A callable that gives the list of a request is asked in a request only. Raises :class:`ConfigurationError`
        where there is no request, and no ``adopt`` either.
        """
        by_request = callable(self._assistants)
        if by_request and self._adopt is None and not has_request_context():
            raise ConfigurationError(
                "the list of assistants is a callable, which is for requests, and here is none: "
                "pass create_blueprint(..., adopt=lambda assistant_id, owner: ...), which gives an Assistant by its id"
            )
        listed = self.assistants() if not by_request or has_request_context() else {}
        return self._found(owner.name, assistant_ids, listed)

    def adopted(self, owner: str, assistant_id: str) -> RunRequest | None:
        """Give what the runner needs for a run without a request, of a thread of ``owner``; ``None`` where nobody
        knows the assistant."""
        listed = {} if callable(self._assistants) else index(self._assistants)
        return self._found(owner, [assistant_id], listed)[0]

    def _found(
        self, owner: str, assistant_ids: Sequence[str], listed: Mapping[str, Assistant]
    ) -> list[RunRequest | None]:
        @cache
        def find(assistant_id: str) -> Assistant | None:
            return listed.get(assistant_id) or self._ask_app(assistant_id, owner)

        names = _Found(find)
        return [None if (found := find(one)) is None else self._asked(found, names) for one in assistant_ids]

    def _ask_app(self, assistant_id: str, owner: str) -> Assistant | None:
        if self._adopt is None:
            return None
        try:
            with self.app.app_context():
                found = self._adopt(assistant_id, owner)
            if found is None or (isinstance(found, Assistant) and found.id == assistant_id):
                return found
            _log.error("adopt(%r, ...) gave %r: it must give the Assistant of that id, or None", assistant_id, found)
        except Exception:
            _log.exception("adopt(%r, ...) failed", assistant_id)
        return None

    def _asked(self, assistant: Assistant, names: Names) -> RunRequest:
        shorten = assistant.max_history
        if not callable(shorten):
            return RunRequest(assistant, self.client, names, within=self.app.app_context)

        def in_context(messages: list[Json]) -> Sequence[Mapping[str, Any]]:
            with self.app.app_context():
                return shorten(messages)

        return RunRequest(assistant, self.client, names, in_context, self.app.app_context)


class _Found:
    """Names of assistants, of those that are asked for."""

    def __init__(self, find: Callable[[str], Assistant | None]) -> None:
        self._find = find

    def get(self, assistant_id: str, otherwise: str, /) -> str:
        found = self._find(assistant_id)
        return otherwise if found is None else found.name


class Page(list[T]):
    """Some of many threads or entries. ``has_more`` says whether there are older ones: ask for those with
    ``before=`` the id of the oldest thread here, or of the oldest entry's message."""

    def __init__(self, data: Sequence[T], has_more: bool) -> None:
        super().__init__(data)
        self.has_more = has_more


class Commands:
    """What an app's own code does with the threads of one blueprint, in a view, a job or a shell.

    Each command is done for an ``owner``, whose name is what the routes know a caller by: what ``owner=`` of
    ``create_blueprint`` gives, or, without that, the random id in Flask's session. So what a job stores for a user is
    in that user's page, and the other way round; :meth:`caller` gives the name in a view. Nobody else is asked: it is
    for the app's code to do for a user what that user may do.

    Objects are those of the routes. Every method may raise :class:`RequestError`, which says what to change, for a
    value that no route would take, and :class:`NotFoundError`, one of those, for a thread, message, run or assistant
    that there is not or that is another's; SQLAlchemy's errors where the database is away, and ``LogUnavailableError``
    where the event log is.
    """

    def __init__(
        self, runtime: Callable[[], Runtime], parts: Mapping[str, Registration], scope: str | None = None
    ) -> None:
        self._runtime_of, self._parts, self._scope = runtime, parts, scope

    def caller(self) -> str | None:
        """Name the caller of the current request as the blueprint's routes do, ``None`` for nobody.

        Without ``owner=`` a visitor has a name from the first thread on, or the first list of them.
        """
        return self._parts[self._name()].caller()

    def create_thread(self, *, owner: str, metadata: dict[str, str] | None = None) -> Thread:
        """Store a new thread of ``owner``; give it: ``{"id", "object", "created_at", "metadata"}``.

        ``metadata`` has at most 16 pairs, keys of up to 64 characters and values of up to 512.
        """
        service, who = self._open(owner)
        return service.create_thread(who, service.new_thread(metadata))

    def threads(self, *, owner: str, limit: int = 50, before: str | None = None) -> Page[Thread]:
        """Give ``owner``'s threads, newest first: at most ``limit`` (1 to 200), those older than the thread
        ``before``."""
        service, who = self._open(owner)
        return Page(*service.threads(who, limit, before))

    def thread(self, thread_id: str, *, owner: str) -> Thread:
        """Give a thread."""
        return self._thread(thread_id, owner).as_object()

    def messages(self, thread_id: str, *, owner: str, limit: int = 50, before: str | None = None) -> Page[Entry]:
        """Give the newest entries of a thread in the order in which they were said: at most ``limit`` (1 to 200),
        fewer where they are long, those older than the message ``before``; :attr:`Page.has_more` says whether there are
        others. An entry is ``{"assistant_id", "message", "run", "steps"}``."""
        data, has_more, _ = self._thread(thread_id, owner).messages(limit, before)
        return Page(data, has_more)

    def add_message(self, thread_id: str, content: str, *, owner: str) -> Entry:
        """Store a message of the user's and have nobody answer it; give its entry."""
        thread = self._thread(thread_id, owner)
        entry = thread.start(thread.message(content)).message
        assert entry is not None
        return entry

    def run(
        self,
        thread_id: str,
        assistant_ids: Sequence[str],
        *,
        owner: str,
        content: str | None = None,
        mode: str = "parallel",
    ) -> RunList:
        """Have assistants answer, a message of the user's first where there is ``content``; give the runs at once.

        The runs belong to the thread, like those that a page starts: viewers see them grow, and they wait for those
        that were asked for before. ``runs.wait(timeout)`` gives them ended. ``mode`` is ``"parallel"``, where all see
        the thread up to the user's message, or ``"sequential"``, where each sees the answers before its own too.

        This process is what runs them. Where it ends first, they have ``ASSISTREAM_DRAIN_SECONDS``; a job waits for
        its runs. Without a request, an assistant that is in no list is asked of ``adopt=`` (see ``create_blueprint``).
        """
        thread = self._thread(thread_id, owner)
        ids = assistant_ids if isinstance(assistant_ids, str) else list(assistant_ids)
        started = thread.start(thread.runs(ids, content, mode))
        return RunList(started.runs, started.message, RunWaiter(self._runtime_of(), thread_id).wait)

    def cancel(self, thread_id: str, run_id: str, *, owner: str) -> Run:
        """Cancel a run, whichever worker has it; give it as it is then. One that is over stays as it is, one of
        another worker's is cancelled soon after."""
        return self._thread(thread_id, owner).cancel(run_id)

    def submit_tool_outputs(self, thread_id: str, run_id: str, outputs: Mapping[str, str], *, owner: str) -> Run:
        """Answer tool calls of a run that wait for an output, by their ids, all or none; give the run as it is then.
        The last answer has the run go on. Raises :class:`RequestError` with ``already_answered`` for a call that was
        answered before."""
        given = [{"tool_call_id": call_id, "output": output} for call_id, output in outputs.items()]
        return self._thread(thread_id, owner).submit_tool_outputs(run_id, given)

    def approve(
        self,
        thread_id: str,
        run_id: str,
        call_id: str,
        *,
        owner: str,
        arguments: Mapping[str, Any] | None = None,
        remember: bool = False,
    ) -> Run:
        """Allow a tool call that waits for that, with other ``arguments`` where they are given; give the run as it is
        then. ``remember`` allows its tool for the rest of the thread. Raises as :meth:`submit_tool_outputs` does."""
        given = {"tool_call_id": call_id, "approve": True, "remember": remember}
        if arguments is not None:
            given["arguments"] = dict(arguments)
        return self._thread(thread_id, owner).decide(run_id, [given])

    def deny(self, thread_id: str, run_id: str, call_id: str, *, owner: str, reason: str | None = None) -> Run:
        """Do not allow a tool call that waits for that, for a ``reason`` that the model is told; give the run as it is
        then. Raises as :meth:`submit_tool_outputs` does."""
        return self._thread(thread_id, owner).decide(
            run_id, [{"tool_call_id": call_id, "approve": False, "reason": reason}]
        )

    def delete_thread(self, thread_id: str, *, owner: str) -> None:
        """Delete a thread with all that is in it, stopping its runs; its viewers are told."""
        self._thread(thread_id, owner).delete()

    def delete_owner(self, owner: str) -> None:
        """Delete all that is stored of a user: threads, messages and runs, which are stopped, their events in the log,
        and what is remembered of requests for their Idempotency-Keys.

        What the app's own tables, its server's logs and a model server keep is not of this. A user who is not signed
        out can begin anew meanwhile: sign out first. What is left where this raises goes when it is called again.
        """
        service, who = self._open(owner)
        service.delete_owner(who)

    def _thread(self, thread_id: str, owner: str) -> OwnedThread:
        service, who = self._open(owner)
        return service.open(who, thread_id)

    def _open(self, owner: str) -> tuple[Service, Owner]:
        scope = self._name()
        try:
            name = values.owner_name(owner)
        except ValueError as error:
            raise values.invalid(f"'owner' is {error}.") from None
        if name is None:
            raise values.invalid("'owner' must be the name of a user, as owner= of create_blueprint gives it.")
        return Service(self._runtime_of(), self._parts[scope].known), Owner(scope, name)

    def _name(self) -> str:
        if self._scope is not None:
            return self._scope
        if len(self._parts) > 1:
            names = ", ".join(map(repr, self._parts))
            raise ConfigurationError(
                f"this app has several blueprints of assistream, which share nothing: {names}. "
                "Say which: current_assistream.blueprint(name)"
            )
        return next(iter(self._parts))


class Assistream(Commands):
    """An app's assistream: the commands, where it has one blueprint, and what its processes have.

    ``app.extensions["assistream"]`` is it from the first blueprint on; :data:`current_assistream` is the current app's.
    """

    def __init__(self, app: Flask) -> None:
        self._app = app
        self.parts: dict[str, Registration] = {}
        super().__init__(self.runtime, self.parts)
        # Here and not in the runtime, which may be what cannot be made.
        self.throttle = LogThrottle()
        self._runtimes = PerProcess(self._make)
        self.patched = gunicorn.patched()
        # As it was at registration: errors are answered with it too, and what can fail may be why.
        self.slow_seconds = Settings.slow_seconds
        self._begun = 0
        self._warned: set[str] = set()

    def blueprint(self, name: str) -> Commands:
        """Give the commands of the blueprint that is registered under ``name``, for an app that has several. Raises
        :class:`ConfigurationError` where there is none."""
        if name not in self.parts:
            names = ", ".join(map(repr, self.parts))
            raise ConfigurationError(f"this app has no blueprint {name!r} of assistream; it has {names}")
        return Commands(self.runtime, self.parts, name)

    def warn_once(self, log: logging.Logger, message: str, *arguments: Any) -> None:
        """Have the log say, once a process, what stays as it is until the operator changes it."""
        if message not in self._warned:
            self._warned.add(message)
            log.warning(message, *arguments)

    def settings(self) -> Settings:
        """Read the app's settings, with a database where it names none."""
        config = dict(self._app.config)
        if not config.get("ASSISTREAM_DATABASE_URL"):
            config["ASSISTREAM_DATABASE_URL"] = default_database(self._app.instance_path)
        return Settings.read(config)

    def runtime(self) -> Runtime:
        """Give the present process's runtime."""
        return self._runtimes.get()

    def _make(self) -> Runtime:
        if any(part.mcp_servers() for part in self.parts.values()):
            mcp_tools.prepare()
        runtime = Runtime(self.settings(), self._adopt, self.throttle, _Signals(self._app, self.throttle))
        runtime.start()
        return runtime

    def begin(self) -> None:
        """Have a gunicorn worker make its runtime once it has booted: what other workers left is not to wait for a
        request. Elsewhere the first request, or command, makes it. Idempotent."""
        if self._begun != os.getpid():
            self._begun = os.getpid()
            gunicorn.when_booted(self._runtimes.get)

    def _adopt(self, owner: Owner, assistant_id: str) -> RunRequest | None:
        part = self.parts.get(owner.scope)
        return None if part is None else part.adopted(owner.name, assistant_id)

    def close(self) -> None:
        """End the present process's runtime: streams at once, runs as the settings say."""
        runtime = self._runtimes.pop()
        if runtime is not None:
            runtime.stop()


def register(app: Flask, name: str, part: Registration) -> Assistream:
    """Add a blueprint, as it is registered under ``name``, to what ``app`` has; give all of that."""
    found: Assistream = app.extensions.setdefault(EXTENSION, Assistream(app))
    found.parts[name] = part
    part.app = app
    return found


def _current() -> Assistream:
    found: Assistream | None = current_app.extensions.get(EXTENSION)
    if found is None:
        raise ConfigurationError(
            "this app has no assistream: app.register_blueprint(create_blueprint([...])) comes before"
        )
    return found


current_assistream: Assistream = LocalProxy(_current)  # type: ignore[assignment]
"""The current app's :class:`Assistream`, in any app context: in a view, or in a job within ``app.app_context()``.
Without such a context it raises Flask's ``RuntimeError``."""
