"""Servers that answer few requests at once, each in a thread: streams never take all of them, and who waits is told."""

from __future__ import annotations

import http.client
import json
import os
import re
import sys
import urllib.error
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from assistream_flask.platform import threaded
from tests.conftest import at_once, wait_until
from tests.gunicorn_server import APP, ROOT, Gunicorn, running
from tests.programs import listening

# How each is started with so many threads.
COMMANDS: dict[str, Callable[[int, int], list[str]]] = {
    "waitress": lambda port, threads: [
        "-m",
        "waitress",
        f"--listen=127.0.0.1:{port}",
        f"--threads={threads}",
        "live_app:app",
    ],
    "uWSGI": lambda port, threads: [
        *("-c", "import pyuwsgi, sys; pyuwsgi.run(sys.argv[1:])", "--http-socket", f"127.0.0.1:{port}", "--need-app"),
        *("--die-on-term", "--enable-threads", "--threads", str(threads), "--module", "live_app:app"),
    ],
    "Werkzeug": lambda port, threads: ["-m", "flask", "--app", "live_app", "run", "-p", str(port), "--without-threads"],
}
SERVERS = ["waitress", "uWSGI", "gunicorn's gthread worker"]


class Serve:
    """Serves the app of :mod:`tests.gunicorn_server` in a folder."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._folder, self._monkeypatch = folder, monkeypatch

    def log(self) -> str:
        return "".join(path.read_text() for path in self._folder.glob("*.log"))

    def by(self, name: str, threads: int, delay: float = 0.02, **settings: Any) -> AbstractContextManager[Gunicorn]:
        """Give a caller of the app, which the server of that name serves."""
        if name not in COMMANDS:
            options = ["--threads", str(threads)]
            return running(self._folder, delay=delay, worker_class="gthread", options=options, **settings)
        caller = Gunicorn(self._folder, delay=delay, **settings)
        return self.run(caller, COMMANDS[name](caller.port, threads))

    @contextmanager
    def run(self, caller: Gunicorn, command: list[str]) -> Iterator[Gunicorn]:
        """Have Python run a command that serves the caller's app."""
        for variable in ("APP_CONFIG", "APP_DELAY"):
            self._monkeypatch.setenv(variable, caller.env[variable])
        self._monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(self._folder), str(ROOT), *sys.path)))
        with listening(self._folder, caller.port, sys.executable, *command):
            yield caller


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Serve:
    return Serve(tmp_path, monkeypatch)


class Viewer:
    """One who asked for a stream: how that was answered, and what came first."""

    def __init__(self, live: Gunicorn, path: str) -> None:
        self._line = http.client.HTTPConnection("127.0.0.1", live.port, timeout=30)
        self._line.request("GET", path)
        self.answer = self._line.getresponse()
        self.status = self.answer.status
        self.error: Any = json.load(self.answer)["error"] if self.status >= 400 else None

    def leave(self) -> None:
        self.answer.close()
        self._line.close()


def crowd(live: Gunicorn, path: str, count: int) -> list[Viewer]:
    """Give so many who come at once."""
    found = at_once(count, lambda _: Viewer(live, path))
    assert all(isinstance(one, Viewer) for one in found)
    return found


@pytest.mark.parametrize("wanted", [0, 50], ids=["by itself", "more wanted"])
@pytest.mark.parametrize("name", SERVERS)
def test_streams_leave_a_thread_to_commands_and_who_finds_no_room_is_told_so(
    serve: Serve, name: str, wanted: int
) -> None:
    with serve.by(name, 4, heartbeat_seconds=0.3, worker_streams=wanted) as live, ExitStack() as leaving:
        path = live.thread()
        viewers = [Viewer(live, f"{path}/events") for _ in range(3)]
        for one in viewers:
            leaving.callback(one.leave)
        assert [one.status for one in viewers] == [200] * 3
        late = Viewer(live, f"{path}/events")
        assert (late.status, late.answer.headers["Retry-After"]) == (503, "5")
        assert late.error["code"] == "server_full"
        assert re.match("The server answers 4 requests at once, .* --worker-class gevent.$", late.error["message"])
        late.leave()
        # Each is answered, and seen by who views.
        message = live.request("POST", f"{path}/messages", {"content": "Is there room?"})["message"]
        assert live.entries(path)[-1]["message"]["id"] == message["id"]
        for one in viewers:
            assert any(message["id"].encode() in line for line in one.answer)
        (warning,) = re.findall(rf"{name} answers 4 requests at once, and .* at most (\d) may be streams", serve.log())
        assert warning == "3"
        viewers[0].leave()

        def has_room() -> bool:
            again = Viewer(live, f"{path}/events")
            leaving.callback(again.leave)
            return again.status == 200

        wait_until(has_room, 30)


@pytest.mark.parametrize("name", SERVERS)
def test_of_a_crowd_that_comes_at_once_never_so_many_get_in_that_commands_wait(serve: Serve, name: str) -> None:
    with serve.by(name, 4, heartbeat_seconds=0.3) as live:
        path = live.thread()
        for _ in range(5):
            viewers = crowd(live, f"{path}/events", 12)
            found = Counter(one.status for one in viewers)
            assert set(found) <= {200, 503}
            assert found[200] <= 3
            live.request("POST", f"{path}/messages", {"content": "Is there room?"})
            for one in viewers:
                one.leave()


@pytest.mark.parametrize("name", [*SERVERS, "Werkzeug"])
def test_a_server_that_answers_one_request_at_a_time_is_refused_with_the_fix(serve: Serve, name: str) -> None:
    with serve.by(name, 1) as live:
        with pytest.raises(urllib.error.HTTPError) as told:
            live.thread()
        assert told.value.code == 500
        error = json.load(told.value)["error"]
        assert error["code"] == "sync_worker"
        assert f"{name} answers one request at a time" in error["message"]
        assert error["message"].endswith("or run gunicorn with --worker-class gevent.")
        assert live.get("/page", parse=False).startswith(b"<!doctype html>")


def test_of_a_server_that_has_other_names_for_it_nothing_is_assumed() -> None:
    class Channel:
        def check_client_disconnected(self) -> bool:
            return False

    for environ in ({"waitress.client_disconnected": Channel().check_client_disconnected}, {"uwsgi.version": b"3"}, {}):
        assert threaded.server(environ) is None
        assert threaded.unfit(environ) is None


def test_a_reload_of_who_develops_does_not_wait_for_answers_and_keeps_what_they_said(
    serve: Serve, tmp_path: Path
) -> None:
    caller = Gunicorn(tmp_path, delay=1, drain_seconds=600)
    with serve.run(caller, ["-m", "flask", "--app", "live_app", "run", "-p", str(caller.port), "--debug"]) as live:
        thread, before = live.thread(), live.get("/pid")
        live.run(thread, "responses")
        wait_until(lambda: live.entries(thread)[-1]["message"]["content"], 30)
        (tmp_path / "live_app.py").write_text(APP + "\n# Another line.\n")

        def after() -> int:
            try:
                return int(live.get("/pid"))
            except OSError:
                return 0

        # Long before the answer is whole, and ten minutes before it would be waited for no more.
        wait_until(lambda: after() not in (0, before), 60)
        entry = live.settled(thread)[-1]
        assert entry["run"]["status"] == "incomplete"
        assert entry["run"]["incomplete_details"] == {"reason": "server_shutdown"}
        assert entry["message"]["content"][0]["text"]["value"]
