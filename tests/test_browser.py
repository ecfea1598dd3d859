"""The helper and the example page in a real Chromium, against a real gunicorn."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, Route, sync_playwright

from tests.live import ROOT, Gunicorn, running

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
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS.split())
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
    """What `set` got last."""
    found: list[Any] = page.evaluate("seen.at(-1) ?? []")
    return found


def pause(page: Page, seconds: float) -> None:
    """Waits while the page's events go on; time.sleep would hold them up."""
    page.wait_for_timeout(seconds * 1000)


def wait(page: Page, true: Callable[[], object], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, last(page)
        pause(page, 0.05)


def over(entries: list[Any], count: int) -> bool:
    statuses = [entry["run"]["status"] for entry in entries if entry["run"]]
    return len(entries) == count and all(one in ("completed", "incomplete", "failed", "cancelled") for one in statuses)


def agree(page: Page, live: Gunicorn, thread: str, count: int, seconds: float = 30) -> list[Any]:
    """The page comes to the state that the store has, and stays there."""
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
        """Breaks all connections, at whatever byte they are."""
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


def test_a_hidden_tab_keeps_receiving(context: BrowserContext, live: Gunicorn) -> None:
    page = open_page(context, live.url)
    page.evaluate("""() => {
      for (const [key, value] of [["hidden", true], ["visibilityState", "hidden"]])
        Object.defineProperty(document, key, { get: () => value });
      window.requestAnimationFrame = () => 0;
      document.dispatchEvent(new Event("visibilitychange", { bubbles: true }));
    }""")
    thread = page.evaluate("createThread()")
    page.evaluate("id => addMessageAndRun(id, 'Hi', 'responses', set)", thread)
    agree(page, live, thread, 2)
    assert len(page.evaluate("seen")) > 20


def test_a_thread_longer_than_a_page_comes_whole(context: BrowserContext, live: Gunicorn) -> None:
    thread = live.thread()
    for number in range(270):
        live.request("POST", f"{thread}/messages", {"content": f"Message {number}"})
    page = open_page(context, live.url)
    first = page.evaluate("id => loadThread(id, set).then(() => seen[0])", thread.rpartition("/")[2])
    assert [entry["message"]["content"][0]["text"]["value"] for entry in first] == [f"Message {n}" for n in range(270)]


# The example page


@pytest.fixture
def example(tmp_path: Path) -> Iterator[str]:
    """The example app as its users start it, in a folder of its own; gives its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name in ("example_app", "wsgi.py", "gunicorn.conf.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    url = f"http://127.0.0.1:{port}"
    env = {key: value for key, value in os.environ.items() if not key.startswith("OPENAI_")}
    env |= {"BIND": f"127.0.0.1:{port}", "ASSISTREAM_DATABASE_URL": f"sqlite:///{tmp_path / 'page.sqlite3'}"}
    with open(tmp_path / "log", "wb") as log:
        command = [sys.executable, "-m", "gunicorn", "--no-control-socket", "wsgi:app"]
        process = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=log, stderr=log)
    end = time.monotonic() + 20
    while True:
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port), 1).close()
            break
        assert time.monotonic() < end, (tmp_path / "log").read_text()
        time.sleep(0.05)
    yield url
    process.terminate()
    process.wait(40)
    assert (tmp_path / "log").read_text().count("No OPENAI_API_KEY") == 1


def watched(context: BrowserContext) -> tuple[Page, list[str]]:
    """A page, and the errors that its console gets."""
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


# The README's examples

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


def example_code(language: str) -> str:
    found = re.search(rf"^```{language}\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert found
    return found[1]


def test_the_page_of_the_readme_shows_a_question_and_its_answer(context: BrowserContext, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("<!doctype html><link rel=icon href=data:,>" + example_code("html"))
    with running(tmp_path, app=EXAMPLE_APP) as live:
        page, errors = watched(context)
        page.goto(f"{live.url}/page")
        page.locator("input").fill("Why?")
        page.wait_for_function("!!location.hash")
        page.keyboard.press("Enter")
        page.get_by_text("You: Why?").wait_for()
        page.get_by_text("I am the offline assistant").wait_for()
        assert errors == []


@pytest.mark.parametrize(("name", "language"), [("React", "jsx"), ("Vue", "js")])
def test_the_snippet_of_the_readme_runs(context: BrowserContext, tmp_path: Path, name: str, language: str) -> None:
    esbuild = ROOT / "node_modules" / ".bin" / "esbuild"
    if not esbuild.exists() and not os.environ.get("CI"):
        pytest.skip("no esbuild: python3 run_tests.py installs it")
    (tmp_path / "example.jsx").write_text(example_code(language))
    (tmp_path / "entry.js").write_text(ENTRY[name])
    (tmp_path / "page.html").write_text(
        '<!doctype html><link rel=icon href=data:,><script type="module" src="/static/bundle.js"></script>'
    )
    (tmp_path / "node_modules").symlink_to(ROOT / "node_modules")
    options = ["--bundle", "--format=esm", "--jsx=automatic", "--external:/assistream/*", "--outfile=bundle.js"]
    options += ["--alias:vue=vue/dist/vue.esm-bundler.js", '--define:process.env.NODE_ENV="production"']
    subprocess.run([esbuild, "entry.js", *options], cwd=tmp_path, check=True, capture_output=True)
    with running(tmp_path, app=EXAMPLE_APP) as live:
        page, errors = watched(context)
        thread = live.thread().rpartition("/")[2]
        page.goto(f"{live.url}/page#{thread}")
        page.locator("input").fill("Why?")
        page.keyboard.press("Enter")
        page.get_by_text("You: Why?").wait_for()
        for number in (0, 1):
            page.get_by_text("I am the offline assistant").nth(number).wait_for()
        entries = live.settled(f"/assistream/threads/{thread}")
        assert [entry["assistant_id"] for entry in entries] == [None, "tutor", "critic"]
        assert errors == []
