"""The helper and the example page in a real Chromium, against a real gunicorn."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Dialog, Page, Route, sync_playwright

from tests.conftest import wait_until
from tests.gunicorn_server import APP, ROOT, Gunicorn, answered, running
from tests.programs import BUFFERS, behind_nginx, free_port

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
ARGUMENTS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-sync"

pytestmark = pytest.mark.skipif(
    CHROMIUM is None and not os.environ.get("CI"), reason="no chromium: python3 run_tests.py installs it on Debian"
)

# What a page is: it keeps all that `set` got, to look at later.
PAGE = """
async () => {
  const helper = await import("/assistream/assistream.js");
  const arrays = [], seen = [];
  Object.assign(window, helper, { arrays, seen, set: (entries) => {
    if (arrays.includes(entries)) seen.push("the same array twice");
    if (arrays.length && entries.length === arrays.at(-1).length && entries.every((e, i) => e === arrays.at(-1)[i]))
      seen.push("nothing new");
    arrays.push(entries);
    seen.push(JSON.parse(JSON.stringify(entries)));
  }});
}
"""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=ARGUMENTS.split(),
            ignore_default_args=["--disable-back-forward-cache"],
        )
        yield browser
        browser.close()


@pytest.fixture
def context(chromium: Browser) -> Iterator[BrowserContext]:
    with contextlib.closing(chromium.new_context()) as context:
        yield context


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gunicorn]:
    with running(tmp_path_factory.mktemp("live")) as gunicorn:
        yield gunicorn


def open_page(context: BrowserContext, url: str) -> Page:
    page = context.new_page()
    page.goto(f"{url}/page")
    page.evaluate(PAGE)
    return page


def last(page: Page) -> list[Any]:
    """Give what `set` got last."""
    found: list[Any] = page.evaluate("seen.at(-1) ?? []")
    return found


def pause(page: Page, seconds: float) -> None:
    """Wait while the page's events go on; time.sleep would hold them up."""
    page.wait_for_timeout(seconds * 1000)


def wait(page: Page, true: Callable[[], object], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, last(page)
        pause(page, 0.05)


# A headless browser takes all its tabs for visible; this makes one as hidden as its scripts can tell.
HIDEABLE = """
let hidden = false;
Object.defineProperty(document, "hidden", { get: () => hidden });
Object.defineProperty(document, "visibilityState", { get: () => hidden ? "hidden" : "visible" });
const frame = window.requestAnimationFrame;
window.requestAnimationFrame = (fn) => frame(() => hidden || fn());
window.hide = (on) => {
  hidden = on;
  document.dispatchEvent(new Event("visibilitychange", { bubbles: true }));
};
"""


def over(entries: list[Any], count: int) -> bool:
    statuses = [entry["run"]["status"] for entry in entries if entry["run"]]
    return len(entries) == count and all(one in ("completed", "incomplete", "failed", "cancelled") for one in statuses)


def agree(page: Page, live: Gunicorn, thread: str, count: int, seconds: float = 30) -> list[Any]:
    """Check that the page comes to the state that the store has, and stays there."""
    wait(page, lambda: over(last(page), count), seconds)
    pause(page, 0.3)
    entries = live.entries(f"/assistream/threads/{thread}")
    assert last(page) == entries
    return entries


def check_states(states: list[Any]) -> None:
    """Each state follows from the one before: new, nothing lost, texts only grow, the order stays."""
    assert "the same array twice" not in states
    assert "nothing new" not in states
    texts: dict[str, str] = {}
    order: list[str] = []
    for state in states:
        ids = [entry["message"]["id"] for entry in state]
        assert ids[: len(order)] == order
        assert len(set(ids)) == len(ids)
        order = ids
        for entry in state:
            text = "".join(part["text"]["value"] for part in entry["message"]["content"])
            assert text.startswith(texts.get(entry["message"]["id"], ""))
            texts[entry["message"]["id"]] = text


def test_set_sees_each_of_the_five_functions_grow_token_by_token(context: BrowserContext, live: Gunicorn) -> None:
    page = open_page(context, live.url)
    thread = page.evaluate("createThread({ title: 'five' })")
    assert page.evaluate("id => loadThread(id, set)", thread) == []
    entry = page.evaluate("id => addMessage(id, 'One')", thread)
    assert entry["message"]["content"][0]["text"]["value"] == "One"
    wait(page, lambda: len(last(page)) == 1)
    run = page.evaluate("id => run(id, 'responses', set)", thread)
    assert run["status"] == "completed"
    run = page.evaluate("id => addMessageAndRun(id, 'Two', 'chat', set)", thread)
    assert run["status"] == "completed"
    runs = page.evaluate("id => addMessageAndRuns(id, 'Three', ['assistants', 'responses'], set)", thread)
    assert [run["assistant_id"] for run in runs] == ["assistants", "responses"]
    runs = page.evaluate(
        "id => addMessageAndRuns(id, 'Four', ['chat', 'responses'], set, {mode: 'sequential'})", thread
    )
    assert [run["status"] for run in runs] == ["completed", "completed"]
    entries = agree(page, live, thread, 10)
    states = page.evaluate("seen")
    check_states(states)
    assert len(states) > 50
    first, second = entries[8], entries[9]
    assert first["run"]["completed_at"] <= second["run"]["started_at"]
    assert page.evaluate("text(arrays.at(-1)[3])") == entries[3]["message"]["content"][0]["text"]["value"]


def test_the_minified_helper_does_the_same(context: BrowserContext, live: Gunicorn) -> None:
    page = context.new_page()
    page.goto(f"{live.url}/page")
    page.evaluate(PAGE.replace("assistream.js", "assistream.min.js"))
    thread = page.evaluate("createThread()")
    runs = page.evaluate("id => addMessageAndRuns(id, 'Hi', ['responses', 'chat'], set)", thread)
    assert [run["status"] for run in runs] == ["completed", "completed"]
    page.evaluate("id => loadThread(id, set)", thread)
    agree(page, live, thread, 3)
    check_states(page.evaluate("seen"))


def test_unchanged_entries_keep_their_identity(context: BrowserContext, live: Gunicorn) -> None:
    page = open_page(context, live.url)
    same = page.evaluate("""async () => {
      const id = await createThread();
      await loadThread(id, set);
      await addMessageAndRun(id, "One", "responses", set);
      const [one, two] = arrays.at(-1);
      await addMessageAndRun(id, "Two", "responses", set);
      return arrays.at(-1)[0] === one && arrays.at(-1)[1] === two;
    }""")
    assert same


def test_a_failed_run_rejects_with_its_code_and_runs(context: BrowserContext, live: Gunicorn) -> None:
    page = open_page(context, live.url)
    found = page.evaluate("""async () => {
      const id = await createThread();
      const error = await addMessageAndRuns(id, "Hi", ["responses-500", "chat"], set).catch((error) => error);
      return [id, error.code, error.message, error.runs.map((run) => run.status)];
    }""")
    assert found[1] == "upstream_error"
    assert found[3] == ["failed", "completed"]
    agree(page, live, found[0], 3)


def test_an_abort_cancels_the_run_and_keeps_what_was_said(context: BrowserContext, live: Gunicorn) -> None:
    page = open_page(context, live.url)
    thread = page.evaluate("createThread()")
    name = page.evaluate(
        """async (id) => {
      const stop = new AbortController();
      const { signal } = stop;
      const running = addMessageAndRun(id, "Hi", "responses", set, { signal }).catch((error) => error.name);
      while (!arrays.length || text(arrays.at(-1)[1] ?? arrays.at(-1)[0]).length < 20)
        await new Promise((resolve) => setTimeout(resolve, 20));
      stop.abort();
      return running;
    }""",
        thread,
    )
    assert name == "AbortError"
    _, entry = agree(page, live, thread, 2)
    assert entry["run"]["status"] == "cancelled"
    assert entry["message"]["content"][0]["text"]["value"]


def test_threads_and_assistants_are_listed_runs_cancelled_and_threads_deleted(
    context: BrowserContext, live: Gunicorn
) -> None:
    page = open_page(context, live.url)
    threads = [page.evaluate("title => createThread({ title })", title) for title in ("one", "two", "three")]
    first = page.evaluate("listThreads({ limit: 2 })")
    assert [thread["metadata"]["title"] for thread in first["data"]] == ["three", "two"]
    assert first["has_more"]
    older = page.evaluate("before => listThreads({ limit: 1, before })", first["data"][1]["id"])
    assert [thread["id"] for thread in older["data"]] == threads[:1]
    assistants = page.evaluate("listAssistants()")
    assert {"id": "chat", "name": "chat", "description": ""} in assistants
    page.evaluate(
        """id => {
          loadThread(id, set);
          window.ended = addMessageAndRun(id, "Hi", "responses", set).then((run) => run.status);
        }""",
        threads[0],
    )
    wait(page, lambda: len(last(page)) == 2 and last(page)[1]["message"]["content"])
    # Another tab's stop.
    other = open_page(context, live.url)
    other.evaluate("([id, run]) => cancelRun(id, run)", [threads[0], last(page)[1]["run"]["id"]])
    assert page.evaluate("ended") == "cancelled"
    agree(page, live, threads[0], 2)
    assert other.evaluate("id => deleteThread(id)", threads[0]) is None
    wait(page, lambda: last(page) == [])
    assert other.evaluate("id => deleteThread(id).catch((error) => error.code)", threads[0]) == "thread_not_found"


def test_a_reload_in_mid_answer_shows_the_whole(context: BrowserContext, live: Gunicorn) -> None:
    page = open_page(context, live.url)
    thread = page.evaluate("createThread()")
    page.evaluate("id => { addMessageAndRuns(id, 'Hi', ['responses', 'chat'], set) }", thread)
    for _ in range(3):
        pause(page, 0.4)
        page.reload()
        page.evaluate(PAGE)
        page.evaluate("id => loadThread(id, set)", thread)
    entries = agree(page, live, thread, 3)
    check_states(page.evaluate("seen"))
    assert [entry["run"]["status"] for entry in entries[1:]] == ["completed", "completed"]


def test_a_second_tab_shows_the_same(context: BrowserContext, live: Gunicorn) -> None:
    first, second = open_page(context, live.url), open_page(context, live.url)
    thread = first.evaluate("createThread()")
    second.evaluate("id => loadThread(id, set)", thread)
    first.evaluate("id => addMessageAndRuns(id, 'From the first', ['responses', 'chat'], set)", thread)
    second.evaluate("id => addMessageAndRun(id, 'From the second', 'assistants', set)", thread)
    first.evaluate("id => loadThread(id, set)", thread)
    for page in (first, second):
        agree(page, live, thread, 5)
        check_states(page.evaluate("seen"))
    assert len(second.evaluate("seen")) > 30


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_server_restart_in_mid_answer_loses_and_doubles_nothing(
    context: BrowserContext, tmp_path: Path, how: signal.Signals
) -> None:
    with running(tmp_path, delay=0.05, flush_seconds=0.2, drain_seconds=1) as live:
        page = open_page(context, live.url)
        thread = page.evaluate("createThread()")
        page.evaluate(
            """id => {
              loadThread(id, set);
              window.ended = addMessageAndRun(id, "Hi", "responses", set).then(() => "", (error) => error.code);
            }""",
            thread,
        )
        wait(page, lambda: len(page.evaluate("seen")) > 8)
        live.stop(how)
        live.start()
        _, entry = agree(page, live, thread, 2, 60)
        if how == signal.SIGTERM:
            # A killed process loses what it had not stored yet, so there the text goes back to that.
            check_states(page.evaluate("seen"))
        cut = {signal.SIGTERM: ("incomplete", ""), signal.SIGKILL: ("failed", "worker_lost")}
        assert (entry["run"]["status"], page.evaluate("ended")) == cut[how]
        # A message sent while the server is down arrives once it is back, once.
        live.stop()
        page.evaluate("id => { addMessage(id, 'Are you there?') }", thread)
        pause(page, 1)
        live.start()
        agree(page, live, thread, 3, 60)


class Cable:
    """A TCP relay that can be cut, as a network can."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._ends: list[socket.socket] = []
        self._up = True
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                if not self._up:
                    near.close()
                    continue
                far = socket.create_connection(("127.0.0.1", self._to))
                self._ends += [near, far]
                for source, target in ((near, far), (far, near)):
                    threading.Thread(target=self._carry, args=[source, target], daemon=True).start()

    @staticmethod
    def _carry(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        """Break all connections, at whatever byte they are."""
        ends, self._ends = self._ends, []
        for end in ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def down(self) -> None:
        self._up = False
        self.cut()

    def up(self) -> None:
        self._up = True

    def close(self) -> None:
        self.down()
        self._listener.close()


def test_cuts_and_time_offline_lose_and_double_nothing(context: BrowserContext, tmp_path: Path) -> None:
    with running(tmp_path, delay=0.04) as live, contextlib.closing(Cable(live.port)) as cable:
        page = open_page(context, cable.url)
        thread = page.evaluate("createThread()")
        page.evaluate("id => loadThread(id, set)", thread)
        page.evaluate(
            "id => { window.ended = addMessageAndRuns(id, 'Hi', ['responses', 'chat'], set).then(r => r.length) }",
            thread,
        )
        for _ in range(6):
            pause(page, 0.25)
            cable.cut()
        cable.down()
        context.set_offline(True)
        page.evaluate("id => { addMessage(id, 'Written offline') }", thread)
        pause(page, float(os.environ.get("OFFLINE_SECONDS", "4")))
        context.set_offline(False)
        cable.up()
        agree(page, live, thread, 4, 60)
        check_states(page.evaluate("seen"))
        assert page.evaluate("ended") == 2


def test_a_command_with_a_signal_that_hangs_is_sent_again_after_a_minute_and_stored_once(
    context: BrowserContext, live: Gunicorn
) -> None:
    page = context.new_page()
    page.clock.install()
    page.goto(f"{live.url}/page")
    page.evaluate(PAGE)
    thread = page.evaluate("createThread()")
    held: list[Route] = []
    keys: list[str] = []

    def hold(route: Route) -> None:
        keys.append(route.request.headers["idempotency-key"])
        if held:
            route.continue_()
        else:
            held.append(route)

    page.route("**/messages", hold)
    page.evaluate(
        "id => { addMessage(id, 'Once', { signal: new AbortController().signal }).then(e => { window.sent = e }) }",
        thread,
    )
    wait(page, lambda: held)
    page.clock.fast_forward(61_000)

    def sent() -> object:
        # The wait before the next try.
        page.clock.run_for(500)
        return page.evaluate("window.sent?.message.id")

    wait(page, sent)
    assert [entry["message"]["id"] for entry in live.entries(f"/assistream/threads/{thread}")] == [sent()]
    assert len(keys) == 2
    assert len(set(keys)) == 1


def test_a_hidden_tab_keeps_receiving(context: BrowserContext, live: Gunicorn) -> None:
    page = open_page(context, live.url)
    page.evaluate(HIDEABLE)
    page.evaluate("hide(true)")
    thread = page.evaluate("createThread()")
    page.evaluate("id => addMessageAndRun(id, 'Hi', 'responses', set)", thread)
    agree(page, live, thread, 2)
    assert len(page.evaluate("seen")) > 5


def test_a_thread_longer_than_a_page_comes_whole(context: BrowserContext, live: Gunicorn) -> None:
    thread = live.thread()
    for number in range(270):
        live.request("POST", f"{thread}/messages", {"content": f"Message {number}"})
    page = open_page(context, live.url)
    first = page.evaluate("id => loadThread(id, set).then(() => seen[0])", thread.rpartition("/")[2])
    assert [entry["message"]["content"][0]["text"]["value"] for entry in first] == [f"Message {n}" for n in range(270)]


def test_seven_tabs_over_http_1_do_not_hang_the_app(context: BrowserContext, live: Gunicorn) -> None:
    context.add_init_script(HIDEABLE)
    thread = live.thread().rpartition("/")[2]
    pages: list[Page] = []
    warned: list[str] = []
    context.on("console", lambda message: warned.append(message.text) if message.type == "warning" else None)
    for _ in range(7):
        for page in pages:
            page.evaluate("hide(true)")
        pages.append(open_page(context, live.url))
        pages[-1].evaluate(
            "id => { window.states = []; return loadThread(id, set, {onstate: (now) => states.push(now)}) }", thread
        )
    last_page, first = pages[-1], pages[0]
    states = "states.at(-1)"
    wait(last_page, lambda: [page.evaluate(states) for page in pages] == ["paused"] * 3 + ["live"] * 4)
    assert len(warned) == 3
    assert "HTTP/2" in warned[0]
    assert live.get("/asked") is not None
    # One that let go still learns how the run ended that it waits for.
    ended = first.evaluate("id => addMessageAndRun(id, 'Hi', 'responses').then((run) => run.status)", thread)
    assert ended == "completed"
    agree(last_page, live, thread, 2)
    last_page.evaluate("hide(true)")
    last_page.evaluate("id => addMessageAndRun(id, 'And?', 'chat')", thread)
    first.evaluate("hide(false)")
    agree(first, live, thread, 4)
    assert first.evaluate(states) == "live"
    wait(first, lambda: [page.evaluate(states) for page in pages].count("live") == 4)
    for page in pages[3:6]:
        page.close()
    for page in pages[1:3]:
        wait(page, lambda page=page: page.evaluate(states) == "live")  # type: ignore[misc]


def test_the_back_button_brings_the_page_back_as_it_was_and_goes_on(context: BrowserContext, live: Gunicorn) -> None:
    page = open_page(context, live.url)
    thread = live.thread()
    page.evaluate("id => { window.kept = true; return loadThread(id, set) }", thread.rpartition("/")[2])
    page.goto(f"{live.url}/asked")
    live.run(thread, "responses")
    page.go_back(wait_until="commit")
    assert page.evaluate("window.kept"), "the browser did not keep the page"
    agree(page, live, thread.rpartition("/")[2], 2)
    check_states(page.evaluate("seen"))


def test_behind_a_proxy_that_buffers_the_page_asks_and_says_so(
    context: BrowserContext, live: Gunicorn, tmp_path: Path
) -> None:
    with behind_nginx(tmp_path, live.url, BUFFERS) as url:
        page = open_page(context, url)
        warned: list[str] = []
        page.on("console", lambda message: warned.append(message.text) if message.type == "warning" else None)
        thread = page.evaluate("createThread()")
        loaded = page.evaluate(
            "id => { window.states = []; return loadThread(id, set, {onstate: (now) => states.push(now)}) }", thread
        )
        assert loaded == []
        assert page.evaluate("states") == ["connecting", "polling"]
        (text,) = warned
        assert "proxy_buffering off" in text
        runs = page.evaluate("id => addMessageAndRuns(id, 'Hi', ['responses', 'chat'], set)", thread)
        assert [run["status"] for run in runs] == ["completed", "completed"]
        agree(page, live, thread, 3)
        check_states(page.evaluate("seen"))


def test_a_session_that_ended_is_told_and_the_page_goes_on_after_signing_in_again(
    context: BrowserContext, tmp_path: Path
) -> None:
    app = APP.replace('owner=lambda: "me"', 'owner=lambda: request.cookies.get("user")')
    app = app.replace("import Flask, jsonify", "import Flask, jsonify, request")
    with running(tmp_path, app=app) as live, contextlib.closing(Cable(live.port)) as cable:
        user: Any = {"name": "user", "value": "7", "url": cable.url}
        context.add_cookies([user])
        page = open_page(context, cable.url)
        thread = page.evaluate("createThread()")
        page.evaluate(
            "id => { window.states = []; return loadThread(id, set, {onstate: (now) => states.push(now)}) }", thread
        )
        page.evaluate("id => addMessage(id, 'One')", thread)
        context.clear_cookies()
        cable.cut()
        wait(page, lambda: page.evaluate("states.at(-1)") == "unauthenticated")
        assert (
            page.evaluate("id => addMessage(id, 'Refused').catch((error) => error.code)", thread) == "unauthenticated"
        )
        assert page.evaluate("id => loadThread(id, () => {}).then((entries) => entries.length)", thread) == 1
        context.add_cookies([user])
        page.evaluate("id => addMessage(id, 'Two')", thread)
        wait(page, lambda: len(last(page)) == 2)
        wait(page, lambda: page.evaluate("states.at(-1)") == "live")


# The example page


@contextlib.contextmanager
def started(folder: Path, app: str) -> Iterator[str]:
    """Give an app of this repository as its users start it, in a folder of its own, and its URL."""
    port = free_port()
    for name in ("example_app", "wsgi.py", "gunicorn.conf.py"):
        (folder / name).symlink_to(ROOT / name)
    # A copy: its database is in it.
    shutil.copytree(ROOT / "examples", folder / "examples", ignore=shutil.ignore_patterns("instance", "__pycache__"))
    url = f"http://127.0.0.1:{port}"
    env = {key: value for key, value in os.environ.items() if not key.startswith("OPENAI_")}
    env |= {"BIND": f"127.0.0.1:{port}", "ASSISTREAM_DATABASE_URL": f"sqlite:///{folder / 'page.sqlite3'}"}
    with open(folder / "log", "wb") as log:
        command = [sys.executable, "-m", "gunicorn", "--no-control-socket", app]
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log)
    end = time.monotonic() + 20
    while True:
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port), 1).close()
            break
        assert time.monotonic() < end, (folder / "log").read_text()
        time.sleep(0.05)
    yield url
    process.terminate()
    process.wait(40)


# Each context of the browser is another user of these.


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("example")
    with started(folder, "wsgi:app") as url:
        yield url
    assert (folder / "log").read_text().count("No OPENAI_API_KEY") == 1


@pytest.fixture(scope="module")
def minimal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with started(tmp_path_factory.mktemp("minimal"), "examples.minimal.app:app") as url:
        yield url


def watched(context: BrowserContext) -> tuple[Page, list[str]]:
    """Give a page, and the errors that its console gets."""
    page, errors = context.new_page(), list[str]()

    def note(message: ConsoleMessage) -> None:
        if message.type == "error":
            errors.append(message.text)

    page.on("console", note)
    page.on("pageerror", lambda error: errors.append(str(error)))
    return page, errors


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 360)])
def test_the_page_streams_two_assistants_by_keyboard_alone(
    chromium: Browser, example: str, scheme: Any, width: int
) -> None:
    with contextlib.closing(
        chromium.new_context(color_scheme=scheme, viewport={"width": width, "height": 800})
    ) as context:
        page, errors = watched(context)
        page.goto(example)
        for name in ("Tutor", "Critic"):
            chip = page.get_by_role("checkbox", name=name)
            chip.wait_for()
            if not chip.is_checked():
                chip.focus()
                page.keyboard.press("Space")
        page.get_by_role("textbox").first.focus()
        page.keyboard.type("Why is the sky blue?")
        page.keyboard.press("Enter")
        page.get_by_role("article", name="Critic").get_by_text("Two doubts and a compliment").wait_for()
        page.get_by_role("article", name="Tutor").get_by_text("Let us take it step by step").wait_for()
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        page.reload()
        for name in ("Tutor", "Critic"):
            page.get_by_role("article", name=name).get_by_text("I am the offline assistant").wait_for()
        assert errors == []
        assert "sk-" not in page.content()


@pytest.mark.parametrize("late", ["assistream.js", "assistants"])
def test_what_is_sent_before_the_page_is_ready_is_sent_when_it_is(
    context: BrowserContext, example: str, late: str
) -> None:
    page, errors = watched(context)
    held = list[Route]()
    page.route(f"**/assistream/{late}", lambda route: held.append(route))
    page.goto(example, wait_until="domcontentloaded")
    page.get_by_role("textbox").first.fill("Hello")
    page.keyboard.press("Enter")
    wait(page, lambda: held)
    pause(page, 0.2)
    for route in held:
        route.continue_()
    page.get_by_role("article", name="You").get_by_text("Hello", exact=True).wait_for()
    page.get_by_role("article", name="Tutor").get_by_text("I am the offline assistant").wait_for()
    assert page.get_by_role("textbox").first.input_value() == ""
    assert errors == []


def test_the_page_shows_model_text_as_text_and_keeps_a_strict_policy(context: BrowserContext, example: str) -> None:
    page, errors = watched(context)
    response = page.goto(example)
    assert response is not None
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    page.get_by_role("textbox").first.fill(
        "<img src=x onerror=\"document.title='owned'\"> <script>document.title='owned'</script>"
    )
    page.keyboard.press("Enter")
    page.get_by_role("article", name="Tutor").get_by_text("I am the offline assistant").wait_for()
    assert page.title() != "owned"
    assert page.locator("main img, main script").count() == 0
    assert errors == []


def test_a_conversation_is_listed_and_deleted(context: BrowserContext, example: str) -> None:
    page, errors = watched(context)
    page.goto(example)
    page.get_by_role("checkbox", name="Tutor").wait_for()
    page.get_by_role("textbox").first.fill("Tell me at length")
    page.keyboard.press("Enter")
    tutor = page.get_by_role("article", name="Tutor")
    tutor.wait_for()
    conversation = page.get_by_role("link", name="Tell me at length")
    conversation.wait_for()
    page.get_by_role("button", name="Delete “Tell me at length”").click()
    page.get_by_role("button", name="Delete", exact=True).click()
    conversation.wait_for(state="detached")
    page.get_by_text("Conversations appear here.").wait_for()
    tutor.wait_for(state="detached")
    assert page.locator("#title").text_content() == "New chat"
    assert errors == []


def compose(page: Page, text: str) -> None:
    """Type as with an input method: the text is underlined, and not there for good yet."""
    session = page.context.new_cdp_session(page)
    session.send("Input.imeSetComposition", {"text": text, "selectionStart": len(text), "selectionEnd": len(text)})


def test_enter_belongs_to_an_input_method_that_composes(context: BrowserContext, example: str) -> None:
    page, errors = watched(context)
    page.goto(example)
    box = page.get_by_role("textbox").first
    page.get_by_role("checkbox", name="Tutor").wait_for()
    box.focus()
    compose(page, "にほん")
    page.keyboard.press("Enter")
    # Safari's: the composition is over for the script, the key is the input method's all the same.
    page.evaluate("""() => document.activeElement.dispatchEvent(
      new KeyboardEvent("keydown", { key: "Enter", keyCode: 229, bubbles: true, cancelable: true }))""")
    pause(page, 0.3)
    assert page.get_by_role("article", name="You").count() == 0
    assert "にほん" in box.input_value()
    box.fill("日本")
    page.keyboard.press("Enter")
    page.get_by_role("article", name="You").get_by_text("日本", exact=True).wait_for()
    assert errors == []


@pytest.mark.parametrize(
    ("typed", "title"),
    [
        ("a" * 79 + "😀 and more", "a" * 79),
        ("a" * 78 + "😀 and more", "a" * 78 + "😀"),
        ("a" * 72 + "👩‍👩‍👧‍👦 and more", "a" * 72),
        ("Ha\0lf \ud83d of one\nsecond line", "Half \ufffd of one"),
    ],
)
def test_a_title_ends_where_a_character_does_and_what_cannot_be_stored_is_not_sent(
    context: BrowserContext, example: str, typed: str, title: str
) -> None:
    page, errors = watched(context)
    page.goto(example)
    page.get_by_role("checkbox", name="Tutor").wait_for()
    page.evaluate(
        """text => {
      const box = document.querySelector("textarea");
      box.value = JSON.parse(text);
      box.dispatchEvent(new Event("input", { bubbles: true }));
      box.focus();
    }""",
        json.dumps(typed),
    )
    page.keyboard.press("Enter")
    page.get_by_role("article", name="Tutor").get_by_text("I am the offline assistant").wait_for()
    assert page.locator("#threads .name").first.text_content() == title
    shown = page.get_by_role("article", name="You").text_content()
    assert shown == typed.replace("\0", "").replace("\ud83d", "\ufffd")
    assert errors == []


def reply(text: str, **run: Any) -> dict[str, Any]:
    """Give an entry of the tutor's, whose run is as ``run`` says."""
    run = {"id": "run_1", "status": "completed", "last_error": None, "created_at": 1, "assistant_id": "tutor", **run}
    done = run["status"] not in ("queued", "in_progress")
    message = {
        "id": "msg_2",
        "role": "assistant",
        "assistant_id": "tutor",
        "run_id": "run_1",
        "content": [{"type": "text", "text": {"value": text, "annotations": []}}] if text else [],
        "status": ("completed" if run["status"] == "completed" else "incomplete") if done else "in_progress",
        "incomplete_details": {"reason": f"run_{run['status']}"} if run["status"] in ("failed", "cancelled") else None,
    }
    return {"assistant_id": "tutor", "message": message, "run": run, "steps": []}


def show(page: Page, example: str, entry: dict[str, Any]) -> None:
    """Open the example page with a thread of a question and ``entry``."""
    asked = [{"type": "text", "text": {"value": "Why?", "annotations": []}}]
    message = {"id": "msg_1", "role": "user", "status": "completed", "content": asked, "run_id": None}
    data = {"data": [{"assistant_id": None, "message": message, "run": None, "steps": []}, entry], "has_more": False}
    body = f"retry: 60000\nid: e-1\nevent: thread.snapshot\ndata: {json.dumps(data)}\n\n"
    page.route("**/threads/*/events*", lambda route: route.fulfill(content_type="text/event-stream", body=body))
    page.goto(f"{example}#thread_1")
    page.get_by_role("article", name="Tutor").wait_for()


def test_lists_keep_their_paragraphs_and_tables_their_escaped_pipes(context: BrowserContext, example: str) -> None:
    page, errors = watched(context)
    text = "1. One\n\n   more of one\n2. Two\n\n| a | b |\n|---|---|\n| x \\| y | `p\\|q` |\n\n- שלום"
    show(page, example, reply(text))
    items = page.locator(".md ol > li")
    assert items.first.locator("p").all_text_contents() == ["One", "more of one"]
    assert items.nth(1).inner_html() == "Two"
    assert page.locator(".md th").all_text_contents() == ["a", "b"]
    assert page.locator(".md td").all_text_contents() == ["x | y", "p|q"]
    assert page.locator(".md td code").text_content() == "p|q"
    assert page.locator(".md ul").evaluate("list => getComputedStyle(list).direction") == "rtl"
    assert page.locator(".md ol").evaluate("list => getComputedStyle(list).direction") == "ltr"
    for place in (".words", "textarea", "#title"):
        assert page.locator(place).first.get_attribute("dir") == "auto"
    assert errors == []


def test_a_run_says_what_it_waits_for(context: BrowserContext, example: str) -> None:
    page, errors = watched(context)
    waits = {"code": "model_loading", "message": "The model is loading."}
    show(page, example, reply("", status="in_progress", last_error=waits))
    assert page.locator(".status").text_content() == "Waiting"
    page.get_by_text("The model is loading.").wait_for()
    assert not page.get_by_role("button", name="Retry").is_visible()
    assert errors == []


def test_stop_cancels_a_run_that_this_page_did_not_start(context: BrowserContext, example: str) -> None:
    page, errors = watched(context)
    show(page, example, reply("Half of", status="in_progress"))
    cancelled: list[str] = []

    def cancel(route: Route) -> None:
        cancelled.append(route.request.url)
        run = reply("", status="cancelled")["run"]
        route.fulfill(status=202, content_type="application/json", body=json.dumps(run))

    page.route("**/cancel", cancel)
    page.get_by_role("button", name="Stop").click()
    wait(page, lambda: cancelled)
    assert cancelled == [f"{example}/assistream/threads/thread_1/runs/run_1/cancel"]
    assert errors == []


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (
            {"status": "failed", "last_error": {"code": "empty_answer", "message": "The model gave no text."}},
            "The model gave no text.",
        ),
        ({"status": "incomplete"}, "The answer ended before its first word."),
    ],
)
def test_an_answer_without_text_can_be_tried_again(
    context: BrowserContext, example: str, run: dict[str, Any], said: str
) -> None:
    page, errors = watched(context)
    show(page, example, reply("", **run))
    page.get_by_text(said).wait_for()
    assert page.get_by_role("button", name="Retry").is_visible()
    assert errors == []


def test_the_page_says_that_the_user_is_signed_out_and_goes_on_when_they_are_back(
    context: BrowserContext, example: str
) -> None:
    with contextlib.closing(Cable(int(example.rpartition(":")[2]))) as cable:
        page = context.new_page()
        page.goto(cable.url)
        page.get_by_role("checkbox", name="Tutor").wait_for()
        page.get_by_role("textbox").first.fill("Hello")
        page.keyboard.press("Enter")
        page.get_by_role("article", name="Tutor").get_by_text("I am the offline assistant").wait_for()
        refused = json.dumps({"error": {"type": "t", "code": "unauthenticated", "message": "Sign in first."}})

        def refuse(route: Route) -> None:
            route.fulfill(status=401, content_type="application/json", body=refused)

        page.route("**/threads/**", refuse)
        cable.cut()
        page.get_by_text("You are signed out.").wait_for()
        page.get_by_role("article", name="Tutor").get_by_text("I am the offline assistant").wait_for()
        page.unroute("**/threads/**", refuse)
        page.evaluate("dispatchEvent(new Event('online'))")
        page.get_by_text("You are signed out.").wait_for(state="detached")


# The example page's tools


def ask_astronomer(page: Page, example: str, words: str) -> None:
    """Open the example page, and ask the assistant that has tools."""
    page.goto(example)
    page.get_by_role("checkbox", name="Astronomer").wait_for()
    for chip in page.get_by_role("checkbox").all():
        chip.set_checked(chip.get_attribute("value") == "astronomer", force=True)
    page.locator("#text").focus()
    page.keyboard.type(words)
    page.keyboard.press("Enter")


def answered_times(page: Page, times: int = 1) -> None:
    page.locator(".md").get_by_text("I am the offline assistant").nth(times - 1).wait_for()


def cards(page: Page) -> list[list[str]]:
    """Give what each card says: the tool, its arguments, its state and its output."""
    parts = ("h4", ".arguments", ".state", ".output pre")
    return [[card.locator(part).text_content() or "" for part in parts] for card in page.locator(".tool").all()]


def second_tab(page: Page) -> tuple[Page, list[str]]:
    other, errors = watched(page.context)
    other.goto(page.url)
    other.locator(".tool").first.wait_for()
    return other, errors


def tab_back_to(page: Page, name: str) -> None:
    """Press Shift+Tab until the focus is on what is called so."""
    for _ in range(40):
        page.keyboard.press("Shift+Tab")
        if page.evaluate("document.activeElement.textContent") == name:
            return
    raise AssertionError(f"{name} is not reached")


def focus(page: Page) -> str:
    found: str = page.evaluate("document.activeElement.id || document.activeElement.className")
    return found


@pytest.mark.parametrize(
    ("words", "names"), [("Look up Saturn.", ["Saturn"]), ("Look up Saturn, and look up Titan.", ["Saturn", "Titan"])]
)
def test_what_a_server_tool_gave_is_shown_in_its_place_after_a_reload_and_in_a_second_tab(
    context: BrowserContext, example: str, words: str, names: list[str]
) -> None:
    page, errors = watched(context)
    ask_astronomer(page, example, words)
    page.locator(".tool").first.wait_for()
    page.reload()
    other, others = second_tab(page)
    for tab in (page, other):
        answered_times(tab)
        found = cards(tab)
        assert [one[:3] for one in found] == [["look_up", f'{{ "name": "{name}" }}', "Done"] for name in names]
        for name, (*_, output) in zip(names, found, strict=True):
            assert json.loads(output)[0]["name"] == name
        order = tab.locator(".parts").evaluate("parts => [...parts.children].map((part) => part.className)")
        assert order == ["reasoning", *["tool"] * len(names), "md"]
        assert not tab.locator(".output pre").first.is_visible()
        tab.locator(".output summary").first.click()
        assert tab.locator(".output pre").first.is_visible()
    assert errors + others == []


def test_a_day_is_chosen_in_whichever_tab_and_the_others_say_so(context: BrowserContext, example: str) -> None:
    page, errors = watched(context)
    ask_astronomer(page, example, "Pick a date for the telescope.")
    page.get_by_label("Choose a day for the telescope").wait_for()
    page.reload()
    other, others = second_tab(page)
    page.get_by_label("Choose a day for the telescope").wait_for()
    other.get_by_label("Choose a day for the telescope").fill("2027-01-05")
    other.get_by_label("Choose a day for the telescope").press("Enter")
    for tab in (page, other):
        answered_times(tab)
        assert [one[0::2] for one in cards(tab)] == [["pick_date", "Done"]]
        assert json.loads(cards(tab)[0][3]) == {"day": "2027-01-05"}
        assert tab.locator(".question").count() == 0
    assert page.locator(".tool .note").text_content() == "It was answered elsewhere."
    assert other.locator(".tool .note").text_content() == ""
    assert focus(other) == "text"
    assert errors + others == []


def test_what_the_page_does_by_itself_one_of_two_tabs_does(context: BrowserContext, example: str) -> None:
    sent: list[str] = []
    context.on("request", lambda request: sent.append(request.url.rpartition("/")[2]))
    page, errors = watched(context)
    ask_astronomer(page, example, "Look up Titan.")
    answered_times(page)
    other, others = second_tab(page)
    page.locator("#text").fill("Set the theme to dark")
    page.locator("#text").press("Enter")
    for tab in (page, other):
        answered_times(tab, 2)
        assert cards(tab)[1] == ["set_theme", '{ "scheme": "dark" }', "Done", "The page is dark now."]
        tab.locator(":root[data-theme=dark]").wait_for()
    assert sent.count("submit_tool_outputs") == 1
    # Of two that claim one is refused, which a console tells as an error.
    assert [error for error in errors + others if "409" not in error] == []


BOOK = 'Book the telescope for "Saturn" on 2027-01-05'


def asked_to_book(context: BrowserContext, example: str) -> tuple[Page, Page, list[str], list[str]]:
    """Give two tabs that ask whether the telescope may be booked; the first was loaded again meanwhile."""
    page, errors = watched(context)
    ask_astronomer(page, example, BOOK)
    page.get_by_role("button", name="Approve").wait_for()
    wait(page, lambda: focus(page) == "tool")
    assert page.locator("#live").text_content() == "Astronomer asks: book_telescope."
    page.reload()
    page.get_by_role("button", name="Approve").wait_for()
    other, others = second_tab(page)
    other.get_by_role("button", name="Approve").wait_for()
    page.bring_to_front()
    page.locator("#text").focus()
    return page, other, errors, others


def ended(tab: Page, state: str, output: str) -> None:
    tab.locator(".tool").get_by_text(state, exact=True).wait_for()
    answered_times(tab)
    assert output in (tab.locator(".tool").text_content() or "")
    assert tab.locator(".question").count() == 0


def test_a_call_is_approved_for_the_thread_by_keyboard_alone(context: BrowserContext, example: str) -> None:
    page, other, errors, others = asked_to_book(context, example)
    tab_back_to(page, "Approve")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    assert page.get_by_label("Always in this thread").is_checked()
    page.keyboard.press("Enter")
    assert page.get_by_role("button", name="Approve").is_enabled()
    tab_back_to(page, "Approve")
    page.keyboard.press("Enter")
    for tab in (page, other):
        ended(tab, "Done", "Booked: Saturn, in the night of 2027-01-05.")
    assert focus(page) == "text"
    page.keyboard.type('Book the telescope for "Titan" on 2027-01-06')
    page.keyboard.press("Enter")
    answered_times(page, 2)
    assert [one[2] for one in cards(page)] == ["Done", "Done"]
    assert errors + others == []


def test_a_call_is_approved_with_other_arguments_by_keyboard_alone(context: BrowserContext, example: str) -> None:
    page, other, errors, others = asked_to_book(context, example)
    tab_back_to(page, "Edit")
    page.keyboard.press("Enter")
    for typed, said in (
        ("{", "This is no JSON."),
        ("[]", "The arguments are a JSON object"),
        ('{"target": "Titan", "night": "never"}', "night"),
    ):
        page.keyboard.press("Control+A")
        page.keyboard.type(typed)
        page.keyboard.press("Enter")
        page.locator(".wrong").get_by_text(said).wait_for()
        wait(page, lambda: page.evaluate("document.activeElement.tagName") == "TEXTAREA")
    page.keyboard.press("Control+A")
    page.keyboard.type('{"target": "Titan", "night": "2027-01-07"}')
    page.keyboard.press("Enter")
    for tab in (page, other):
        ended(tab, "Done", "Booked: Titan, in the night of 2027-01-07.")
        assert '"Titan"' in cards(tab)[0][1]
    assert focus(page) == "text"
    assert [error for error in errors if "400" not in error] + others == []


def test_a_call_is_denied_with_a_reason_by_keyboard_alone(context: BrowserContext, example: str) -> None:
    page, other, errors, others = asked_to_book(context, example)
    tab_back_to(page, "Deny")
    page.keyboard.press("Enter")
    page.keyboard.type("Too c")
    # It leaves the box, and cancels no run.
    page.keyboard.press("Escape")
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.textContent") == "Deny"
    page.keyboard.press("Enter")
    page.keyboard.type("old.")
    page.keyboard.press("Enter")
    for tab in (page, other):
        ended(tab, "Denied", "The user did not allow this. Too cold.")
    assert focus(page) == "text"
    assert errors + others == []


def test_a_message_closes_the_question_in_every_tab(context: BrowserContext, example: str) -> None:
    page, other, errors, others = asked_to_book(context, example)
    other.locator("#text").fill("Never mind.")
    other.locator("#text").press("Enter")
    for tab in (page, other):
        ended(tab, "Not answered", "The user went on without answering.")
    page.reload()
    ended(page, "Not answered", "The user went on without answering.")
    assert errors + others == []


def test_who_answers_second_is_told_what_was_decided(context: BrowserContext, example: str) -> None:
    page, other, errors, others = asked_to_book(context, example)
    held: list[Route] = []
    page.route("**/approvals", lambda route: held.append(route))
    page.get_by_role("button", name="Approve").click()
    wait(page, lambda: held)
    other.get_by_role("button", name="Deny").click()
    other.get_by_role("button", name="Deny").click()
    ended(other, "Denied", "The user did not allow this.")
    held[0].continue_()
    page.get_by_text("It was answered elsewhere: denied.", exact=True).first.wait_for()
    ended(page, "Denied", "It was answered elsewhere: denied.")
    assert [error for error in errors if "409" not in error] + others == []


def test_a_question_takes_no_focus_from_who_types(context: BrowserContext, example: str) -> None:
    page, errors = watched(context)
    ask_astronomer(page, example, BOOK)
    page.get_by_role("article", name="You").wait_for()
    wait(page, lambda: page.locator("#text").input_value() == "" and page.locator("#text").is_editable())
    page.keyboard.type("And then")
    page.get_by_role("button", name="Approve").wait_for()
    pause(page, 0.2)
    page.keyboard.type(" what?")
    assert focus(page) == "text"
    assert page.locator("#text").input_value() == "And then what?"
    assert errors == []


def call_of(number: int, status: str, arguments: str = "{}", **more: Any) -> dict[str, Any]:
    """Give a call as a step has it."""
    output, name = more.pop("output", None), more.pop("name", "look_up")
    function = {"name": name, "arguments": arguments, "output": output}
    call = {"id": f"call_{number}", "type": "function", "function": function, "status": status, "kind": "server"}
    return {**call, "error": None, "started_at": None, "completed_at": None, **more}


def with_calls(*calls: dict[str, Any], **run: Any) -> dict[str, Any]:
    """Give an entry with a step of these calls."""
    details = {"type": "tool_calls", "tool_calls": calls}
    step = {"id": "step_1", "type": "tool_calls", "status": "in_progress", "content_index": 0, "step_details": details}
    return {**reply("", **run), "steps": [step]}


def test_a_card_says_where_its_call_stands(context: BrowserContext, example: str) -> None:
    page, errors = watched(context)
    calls = [
        call_of(1, "in_progress", '{"name": "Sat'),
        call_of(2, "in_progress", '{"name":"Saturn"}'),
        call_of(3, "in_progress", started_at=2),
        call_of(4, "completed", output="It is one.", started_at=2, completed_at=5),
        call_of(5, "failed", output="Timed out after 30 seconds.", error="timed out", started_at=2, completed_at=32),
        call_of(6, "denied", output="The user did not allow this.", completed_at=3),
        call_of(7, "interrupted", output="Its result is not known.", error="not known", started_at=2, completed_at=3),
        {"id": "call_8", "type": "web_search", "web_search": {}, "kind": "hosted", "status": "completed"},
    ]
    show(page, example, with_calls(*calls, status="in_progress"))
    assert page.locator(".status").text_content() == "Using tools"
    assert [one[1:3] for one in cards(page)] == [
        ['{"name": "Sat', "Coming in"],
        ['{ "name": "Saturn" }', "Starting"],
        ["{}", "Running"],
        ["{}", "Done"],
        ["{}", "Failed"],
        ["{}", "Denied"],
        ["{}", "Interrupted"],
        ["", "Done"],
    ]
    assert [one for one in page.locator(".took").all_text_contents() if one] == ["3 s", "30 s", "1 s"]
    assert [one for one in page.locator(".tool .why").all_text_contents() if one] == [
        "Timed out after 30 seconds.",
        "The user did not allow this.",
        "Its result is not known.",
    ]
    assert errors == []


def test_what_waits_is_asked_by_whom_it_waits_for(context: BrowserContext, example: str) -> None:
    page, errors = watched(context)
    calls = [
        call_of(1, "requires_action", name="book_telescope"),
        call_of(2, "requires_action", name="pick_date", kind="page"),
        call_of(3, "requires_action", name="set_theme", kind="page"),
        call_of(4, "in_progress"),
    ]
    needs = ("approval", "output", "output")
    waiting = [{**call, "needs": one} for call, one in zip(calls, needs, strict=False)]
    # The page is to execute the third: not in this test.
    page.route("**/claim", lambda route: None)
    action = {"type": "submit_tool_outputs", "submit_tool_outputs": {"tool_calls": waiting}}
    show(page, example, with_calls(*calls, status="requires_action", required_action=action))
    states = ["Needs approval", "Waits for you", "Waits for an open tab", "Waits for the other answers"]
    assert [one[2] for one in cards(page)] == states
    assert [card.locator(".question").count() for card in page.locator(".tool").all()] == [1, 1, 0, 0]
    assert page.locator(".status").text_content() == "Waits for an answer"
    assert page.get_by_role("button", name="Stop").is_visible()
    assert page.locator("#live").text_content() == "Tutor asks: book_telescope. Tutor asks: pick_date."
    assert errors == []


def test_what_nobody_answered_says_so_and_nothing_of_a_call_becomes_html(context: BrowserContext, example: str) -> None:
    page, errors = watched(context)
    evil = "<img src=x onerror=\"document.title='owned'\">"
    told = f"Nobody answered in time. {evil}"
    call = call_of(1, "interrupted", f'{{"a": "{evil}', name=evil, output=told, error="expired", completed_at=2)
    show(page, example, with_calls(call, status="expired"))
    assert cards(page) == [[evil, f'{{"a": "{evil}', "Expired", ""]]
    assert page.locator(".tool .why").text_content() == told
    assert page.locator(".status").text_content() == "Expired"
    assert page.locator("main img").count() == 0
    assert page.title() != "owned"
    assert errors == []


# The minimal page


def test_the_minimal_page_has_fewer_than_60_lines() -> None:
    assert len((ROOT / "examples" / "minimal" / "index.html").read_text().splitlines()) < 60


def test_the_minimal_page_asks_shows_the_answer_as_it_grows_and_keeps_it(context: BrowserContext, minimal: str) -> None:
    page, errors = watched(context)
    page.goto(minimal)
    page.get_by_role("textbox").fill("Why?")
    page.keyboard.press("Enter")
    page.get_by_role("listitem").filter(has_text=re.compile("^You")).get_by_text("Why?").wait_for()
    assert page.get_by_role("textbox").input_value() == ""
    answer = page.get_by_role("listitem").filter(has_text="tutor")
    answer.get_by_text("I am the offline assistant").wait_for()
    page.get_by_role("button", name="Ask").wait_for()
    said = answer.text_content()
    page.reload()
    answer.get_by_text("I am the offline assistant").wait_for()
    assert answer.text_content() == said
    assert page.get_by_role("alert").text_content() == ""
    assert errors == []


def test_the_minimal_page_stops_an_answer(context: BrowserContext, minimal: str) -> None:
    page, errors = watched(context)
    page.goto(minimal)
    # The page's own, as the answer could be over before this process has seen its beginning.
    page.evaluate("""() => {
      const stop = new MutationObserver(() => {
        if (!(document.querySelectorAll("li")[1]?.textContent.length > 20)) return;
        stop.disconnect();
        document.querySelector("button").click();
      });
      stop.observe(document.querySelector("ol"), { childList: true });
    }""")
    page.get_by_role("textbox").fill("Why?")
    page.keyboard.press("Enter")
    answer = page.get_by_role("listitem").filter(has_text="tutor")
    answer.wait_for()
    page.get_by_role("button", name="Ask").wait_for()
    # Longer than the whole answer takes.
    pause(page, 4)
    assert "I am the offline assistant" not in (answer.text_content() or "")
    assert page.get_by_role("textbox").input_value() == ""
    assert errors == []


def test_the_minimal_page_gives_back_what_was_not_sent(context: BrowserContext, minimal: str) -> None:
    page = context.new_page()
    refused = json.dumps({"error": {"type": "t", "code": "invalid_value", "message": "That cannot be sent."}})
    page.route("**/runs", lambda route: route.fulfill(status=400, content_type="application/json", body=refused))
    page.goto(minimal)
    page.get_by_role("textbox").fill("Why?")
    page.keyboard.press("Enter")
    page.get_by_role("alert").get_by_text("That cannot be sent.").wait_for()
    assert page.get_by_role("textbox").input_value() == "Why?"


# The docs' examples

ENTRY = {
    "React": """
      import { createRoot } from "react-dom/client";
      import { createElement } from "react";
      import { Thread } from "./example.jsx";
      createRoot(document.body).render(createElement(Thread, { id: location.hash.slice(1) }));
    """,
    "Vue": """
      import { createApp } from "vue";
      import { Thread } from "./example.jsx";
      createApp(Thread, { id: location.hash.slice(1) }).mount(document.body);
    """,
}
EXAMPLE_APP = """
from flask import Flask
from assistream_flask import Assistant, create_blueprint
from assistream_flask.testing import OfflineServer

app = Flask(__name__, static_folder=".", static_url_path="/static")
app.config.update(SECRET_KEY="only for tests", ASSISTREAM_DATABASE_URL="sqlite:///" + app.root_path + "/e.sqlite3")
app.register_blueprint(
    create_blueprint([Assistant("tutor", model="m"), Assistant("critic", model="m")],
                     client=lambda: OfflineServer().start().client(), owner=lambda: "me"),
    url_prefix="/assistream",
)

@app.get("/page")
def page():
    return app.send_static_file("page.html")
"""


class Shown(NamedTuple):
    """An app that shows ``page.html`` in ``folder``."""

    folder: Path
    live: Gunicorn


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shown]:
    folder = tmp_path_factory.mktemp("shown")
    (folder / "node_modules").symlink_to(ROOT / "node_modules")
    (folder / "page.html").write_text("<!doctype html>")
    with running(folder, app=EXAMPLE_APP) as live:
        yield Shown(folder, live)


def example_code(language: str, page: str = "README.md", number: int = 0) -> str:
    found = re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    return str(found[number])


def test_the_page_of_the_readme_shows_a_question_and_its_answer(context: BrowserContext, shown: Shown) -> None:
    (shown.folder / "page.html").write_text("<!doctype html><link rel=icon href=data:,>" + example_code("html"))
    page, errors = watched(context)
    page.goto(f"{shown.live.url}/page")
    page.locator("input").fill("Why?")
    page.wait_for_function("!!location.hash")
    page.keyboard.press("Enter")
    page.get_by_text("You: Why?").wait_for()
    page.get_by_text("I am the offline assistant").wait_for()
    assert errors == []


@pytest.mark.parametrize("which", ["the README's", "the tutorial's", "the minimal one"])
def test_a_page_takes_no_question_before_it_can_ask_it(context: BrowserContext, shown: Shown, which: str) -> None:
    html = {
        "the README's": example_code("html"),
        "the tutorial's": example_code("html", TUTORIAL),
        "the minimal one": (ROOT / "examples/minimal/index.html").read_text(),
    }[which]
    (shown.folder / "page.html").write_text("<!doctype html><link rel=icon href=data:,>" + html)
    page, errors = watched(context)
    held: list[Route] = []
    page.route("**/assistream.js", lambda route: held.append(route))
    page.goto(f"{shown.live.url}/page", wait_until="commit")
    wait(page, lambda: held)
    page.locator("form").wait_for(state="attached")
    assert page.locator("form").is_hidden()
    held[0].continue_()
    page.locator("input").fill("Why?")
    page.keyboard.press("Enter")
    page.get_by_text("I am the offline assistant").wait_for()
    assert "question=" not in page.url
    assert errors == []


def test_the_page_of_the_readme_works_under_the_policy_that_it_names(context: BrowserContext, tmp_path: Path) -> None:
    html = example_code("html").replace("<script ", '<script nonce="n" ')
    (tmp_path / "page.html").write_text("<!doctype html><link rel=icon href=data:,>" + html)
    policy = "default-src 'none'; img-src data:; script-src 'nonce-n'; connect-src 'self'"
    app = EXAMPLE_APP.replace(
        'app.send_static_file("page.html")',
        f'app.send_static_file("page.html"), {{"Content-Security-Policy": "{policy}"}}',
    )
    with running(tmp_path, app=app) as live:
        page, errors = watched(context)
        page.goto(f"{live.url}/page")
        page.locator("input").fill("Why?")
        wait(page, lambda: "#" in page.url)
        page.keyboard.press("Enter")
        page.get_by_text("I am the offline assistant").wait_for()
        assert errors == []


def bundle(folder: Path, name: str, language: str) -> None:
    """Make a page of a snippet of the guide to pages."""
    esbuild = ROOT / "node_modules" / ".bin" / "esbuild"
    if not esbuild.exists() and not os.environ.get("CI"):
        pytest.skip("no esbuild: python3 run_tests.py installs it")
    # The last of each: Vue's stands behind the stop button's.
    (folder / "example.jsx").write_text(example_code(language, "docs/guides/page.md", -1))
    (folder / "entry.js").write_text(ENTRY[name])
    (folder / "page.html").write_text(
        '<!doctype html><link rel=icon href=data:,><script type="module" src="/static/bundle.js"></script>'
    )
    options = ["--bundle", "--format=esm", "--jsx=automatic", "--external:/assistream/*", "--outfile=bundle.js"]
    options += ["--alias:vue=vue/dist/vue.esm-bundler.js", '--define:process.env.NODE_ENV="production"']
    subprocess.run([esbuild, "entry.js", *options], cwd=folder, check=True, capture_output=True)


SNIPPETS = pytest.mark.parametrize(("name", "language"), [("React", "jsx"), ("Vue", "js")])


@SNIPPETS
def test_the_snippet_of_the_docs_runs_and_leaves_alone_what_is_typed_during_the_answer(
    context: BrowserContext, shown: Shown, name: str, language: str
) -> None:
    bundle(shown.folder, name, language)
    live = shown.live
    page, errors = watched(context)
    thread = live.thread().rpartition("/")[2]
    page.goto(f"{live.url}/page#{thread}")
    page.locator("input").fill("Why?")
    page.keyboard.press("Enter")
    page.get_by_text("You: Why?").wait_for()
    assert page.locator("input").input_value() == ""
    page.keyboard.type("And how?")
    for number in (0, 1):
        page.get_by_text("I am the offline assistant").nth(number).wait_for()
    entries = live.settled(f"/assistream/threads/{thread}")
    pause(page, 0.5)
    assert page.locator("input").input_value() == "And how?"
    assert [entry["assistant_id"] for entry in entries] == [None, "tutor", "critic"]
    assert errors == []


@SNIPPETS
def test_the_snippet_of_the_docs_gives_back_what_was_not_sent(
    context: BrowserContext, shown: Shown, name: str, language: str
) -> None:
    bundle(shown.folder, name, language)
    refused = json.dumps({"error": {"type": "t", "code": "invalid_value", "message": "No."}})
    page = context.new_page()
    told: list[str] = []

    def close(dialog: Dialog) -> None:
        told.append(dialog.message)
        dialog.accept()

    page.on("dialog", close)
    page.route("**/runs", lambda route: route.fulfill(status=400, content_type="application/json", body=refused))
    page.goto(f"{shown.live.url}/page#{shown.live.thread().rpartition('/')[2]}")
    page.locator("input").fill("Why?")
    page.keyboard.press("Enter")
    wait(page, lambda: told)
    wait(page, lambda: page.locator("input").input_value() == "Why?")


def test_the_stop_button_of_the_docs_cancels_the_answer(context: BrowserContext, shown: Shown) -> None:
    stop = example_code("js", "docs/guides/page.md")
    (shown.folder / "page.html").write_text(
        f"""<!doctype html><link rel=icon href=data:,><script type="module">
        import {{ addMessageAndRuns, createThread }} from "/assistream/assistream.js";
        {stop}
        window.thread = await createThread();
        window.done = ask(window.thread, "Why?", (entries) => {{
          if (entries[1]?.message.content.length) stop();
        }}).then(() => true);
        </script>"""
    )
    page, errors = watched(context)
    page.goto(f"{shown.live.url}/page")
    page.wait_for_function("window.done")
    assert page.evaluate("window.done")
    _, entry = shown.live.settled(f"/assistream/threads/{page.evaluate('window.thread')}")
    assert entry["run"]["status"] == "cancelled"
    assert errors == []


TUTORIAL = "docs/tutorial/first-app.md"


def commands(page: str) -> list[str]:
    """Give all commands of a page, in order."""
    blocks = re.findall(r"^```sh\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def test_the_tutorial_leads_to_an_app_with_two_assistants_and_one_that_fails(
    context: BrowserContext, tmp_path: Path
) -> None:
    wsgi, two, three = (example_code("python", TUTORIAL, number) for number in range(3))
    one = wsgi[wsgi.index("assistants = [") : wsgi.index("\n]") + 3]
    assert one[:-2] in two
    assert two[:-2] in three
    html, (both, all_three) = example_code("html", TUTORIAL), (example_code("js", TUTORIAL, n) for n in range(2))
    ask = next(line for line in html.splitlines(keepends=True) if "addMessageAndRuns(id" in line)
    # What it has the reader install is what runs here already; the ports are others, as those may be taken.
    _, _, install, model_server, export, app, *_ = commands(TUTORIAL)
    assert "pip install" in install
    ports = {"9000": str(free_port()), "8000": str(free_port())}
    variables = dict(re.findall(r"(OPENAI_\w+)=(\S+)", export.replace("9000", ports["9000"])))
    assert set(variables) == {"OPENAI_BASE_URL", "OPENAI_API_KEY"}

    def start(command: str) -> subprocess.Popen[bytes]:
        words = [re.sub("9000|8000", lambda port: ports[port[0]], word) for word in command.split()]
        program = Path(sys.executable).with_name(Path(words[0]).name)
        with (tmp_path / "log").open("ab") as log:
            return subprocess.Popen(
                [program, *words[1:]], cwd=tmp_path, env={**os.environ, **variables}, stdout=log, stderr=log
            )

    def reached(port: str) -> bool:
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", int(port)), timeout=1).close()
            return True
        return False

    (tmp_path / "wsgi.py").write_text(wsgi)
    (tmp_path / "static").mkdir()
    (tmp_path / "static/index.html").write_text(html)
    processes = [start(model_server), start(app)]
    try:
        wait_until(lambda: all(map(reached, ports.values())), 60)
        page, errors = watched(context)
        dialogs: list[str] = []

        def close(dialog: Dialog) -> None:
            dialogs.append(dialog.message)
            dialog.accept()

        page.on("dialog", close)
        page.goto(f"http://127.0.0.1:{ports['8000']}/")
        wait(page, lambda: "#thread_" in page.url)
        page.locator("input").fill("Why?")
        page.keyboard.press("Enter")
        page.get_by_text("You: Why?").wait_for()
        page.get_by_text(re.compile("tutor: .*I am the offline assistant", re.DOTALL)).wait_for()
        # The page goes on where it was, and the app takes what was changed.
        (tmp_path / "static/index.html").write_text(html.replace(ask, all_three))
        assert both.strip() in all_three.replace(', "unlucky"', "")
        (tmp_path / "wsgi.py").write_text(wsgi.replace(one, three))
        found: list[str] = []

        def taken() -> bool:
            with contextlib.suppress(OSError, urllib.error.HTTPError):
                url = f"http://127.0.0.1:{ports['8000']}/assistream/assistants"
                found[:] = [one["id"] for one in json.loads(answered(url))["data"]]
            return found == ["tutor", "critic", "unlucky"]

        wait_until(taken, 60)
        page.reload()
        page.get_by_text("You: Why?").wait_for()
        page.locator("input").fill("And how?")
        page.keyboard.press("Enter")
        page.get_by_text(re.compile("critic: .*I am the offline assistant", re.DOTALL)).wait_for()
        page.get_by_text(re.compile("unlucky: .*broke in mid-answer", re.DOTALL)).wait_for()
        page.get_by_text(re.compile("tutor: .*Turn 2.*I am the offline assistant", re.DOTALL)).wait_for()
        wait(page, lambda: dialogs)
        assert "broke in mid-answer" in dialogs[0]
        # It has no icon, and the app was away while it took what was changed.
        assert [error for error in errors if not error.startswith("Failed to load resource")] == []
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(40)
