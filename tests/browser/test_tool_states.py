"""What `set` sees of tool calls, state by state, in a page that is loaded again in the middle and in a second tab.

``pytest -s`` prints what each page saw.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from playwright.sync_api import Browser, BrowserContext, Page

from tests.browser.test_browser import chromium as chromium
from tests.browser.test_browser import context as context
from tests.browser.test_browser import wait
from tests.gunicorn_server import Gunicorn, running

# Each server tool notes that it was executed, and waits for a file, which is how the test says when it may end.
APP = """
import json, os, time
from pathlib import Path
from flask import Flask
from assistream_flask import Assistant, create_blueprint, page_tool, tool
from assistream_flask.testing import OfflineServer

app = Flask(__name__)
app.config.update(SECRET_KEY="only for tests", **json.loads(os.environ["APP_CONFIG"]))
folder = Path("gates")
folder.mkdir(exist_ok=True)

@tool
def lookup(query: str) -> str:
    \"\"\"Look something up.\"\"\"
    with (folder / "executed").open("a") as file:
        file.write(query + "\\n")
    while not (folder / query).exists():
        time.sleep(0.02)
    return "found " + query

@tool(approval=True)
def book(what: str) -> str:
    \"\"\"Book something.\"\"\"
    with (folder / "executed").open("a") as file:
        file.write("booked " + what + "\\n")
    return "booked " + what

pick = page_tool("pick", "Ask the page for a day.")
clerk = Assistant("clerk", model="m", tools=[lookup, book, pick])
client = lambda: OfflineServer(delay=0.02).start().client()
app.register_blueprint(create_blueprint([clerk], client=client, owner=lambda: "me"), url_prefix="/assistream")

@app.get("/page")
def page():
    return "<!doctype html><title>test</title>"
"""

# What a page is: it notes the states of the first run that `set` saw, and its tool waits until it is let go.
PAGE = """
async (thread) => {
  const helper = await import("/assistream/assistream.js");
  const states = [], executed = [];
  let letGo;
  const gate = new Promise((resolve) => { letGo = resolve; });
  const set = (entries) => {
    window.entries = entries;
    const found = entries.find(({ run }) => run);
    if (!found) return;
    const { run, steps } = found;
    const calls = steps.flatMap(({ step_details }) => step_details.tool_calls ?? []);
    const needs = run.required_action?.submit_tool_outputs.tool_calls.map((call) => call.needs) ?? [];
    const state = JSON.stringify([run.status, calls.map(({ status }) => status), needs]);
    if (state !== states.at(-1)) states.push(state);
  };
  const pick = async (_, { call }) => {
    executed.push(call.id);
    await gate;
    return "Monday";
  };
  Object.assign(window, helper, { states, executed, letGo, thread, seen: states });
  await helper.loadThread(thread, set, { tools: { pick } });
}
"""


class State(NamedTuple):
    """What is seen of a run at a time: its status, those of its calls, and what it waits for."""

    run: str
    calls: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()

    def __str__(self) -> str:
        return " ".join([self.run, *(f"[{', '.join(one)}]" for one in (self.calls, self.needs) if one)])


def calling(*calls: str) -> State:
    return State("in_progress", calls)


QUEUED, ASKING, CALLING = State("queued"), State("in_progress"), calling("in_progress")
APPROVAL = State("requires_action", ("requires_action",), ("approval",))
OUTPUT = State("requires_action", ("requires_action",), ("output",))
# A call may be seen to wait for an answer before its run is, and one that was answered before the run goes on.
BEGUN = [QUEUED, ASKING, CALLING, calling("requires_action")]


def ended(call: str, run: str = "completed") -> State:
    return State(run, (call,))


def answered(waiting: State, *calls: str) -> list[State]:
    """Give the path of a run that goes on: its call is what it was answered to be, then whatever else."""
    first = calls[0]
    return [
        *BEGUN,
        waiting,
        waiting._replace(calls=(first,)),
        State("queued", (first,)),
        *map(calling, calls),
        ended(calls[-1]),
    ]


def closed(waiting: State, run: str) -> list[State]:
    """Give the path of a run that nobody answered, as far as pages may see it."""
    return [*BEGUN, waiting, waiting._replace(calls=("interrupted",)), ended("interrupted", run)]


class Tabs(NamedTuple):
    """The page that asks, the second one, and what the test may do with them."""

    gunicorn: Gunicorn
    folder: Path
    page: Page
    other: Page
    thread: str
    # Of the first run, and of its first call.
    run: str
    call: str

    def open_gate(self, name: str) -> None:
        (self.folder / "gates" / name).touch()

    def both_see(self, state: State) -> None:
        for tab in (self.page, self.other):
            wait(tab, lambda tab=tab: state in saw(tab))  # type: ignore[misc]

    def act(self, tab: Page, name: str, *arguments: Any) -> None:
        """Have a tab call a function of the helper for the call that waits."""
        tab.evaluate("([name, ...more]) => window[name](...more)", [name, self.thread, self.run, self.call, *arguments])


def saw(tab: Page) -> list[State]:
    """Give the states that `set` saw since the tab was loaded, without those that only repeat the one before."""
    found = [json.loads(one) for one in tab.evaluate("states")]
    return [State(run, tuple(calls), tuple(needs)) for run, calls, needs in found]


def one_after_the_other(tabs: Tabs) -> None:
    tabs.open_gate("Ada")
    tabs.both_see(calling("completed", "in_progress"))
    tabs.open_gate("Emma")


def let_go(tabs: Tabs) -> None:
    for tab in (tabs.page, tabs.other):
        tab.evaluate("letGo()")


def say_never_mind(tabs: Tabs) -> None:
    tabs.other.evaluate("async () => { await addMessageAndRun(thread, 'Never mind.', 'clerk'); }")


class Scenario(NamedTuple):
    """What is asked for, the state in the middle, what happens then, and all states in their order.

    Frames hold several events, so a page may miss states, but not ``middle`` nor the last. What came of the call is
    ``output``, and ``executed`` what the app noted.
    """

    content: str
    middle: State
    then: Callable[[Tabs], object]
    path: Sequence[State]
    output: str
    executed: Sequence[str] = ()


SCENARIOS = {
    "a server tool": Scenario(
        'call lookup {"query": "Ada"}',
        CALLING,
        lambda tabs: tabs.open_gate("Ada"),
        [QUEUED, ASKING, CALLING, calling("completed"), ended("completed")],
        "found Ada",
        ["Ada"],
    ),
    "two in parallel": Scenario(
        'call lookup {"query": "Ada"}\ncall lookup {"query": "Emma"}',
        calling("in_progress", "in_progress"),
        one_after_the_other,
        [
            *(QUEUED, ASKING, CALLING),
            *(calling(*both) for both in [("in_progress",) * 2, ("completed", "in_progress"), ("completed",) * 2]),
            State("completed", ("completed", "completed")),
        ],
        "found Ada",
        ["Ada", "Emma"],
    ),
    "a page tool": Scenario(
        "call pick {}",
        OUTPUT,
        let_go,
        answered(OUTPUT, "completed"),
        "Monday",
    ),
    "approved": Scenario(
        'call book {"what": "Saturn"}',
        APPROVAL,
        lambda tabs: tabs.act(tabs.other, "approve"),
        answered(APPROVAL, "in_progress", "completed"),
        "booked Saturn",
        ["booked Saturn"],
    ),
    "edited": Scenario(
        'call book {"what": "Saturn"}',
        APPROVAL,
        lambda tabs: tabs.act(tabs.page, "approve", {"arguments": {"what": "Titan"}}),
        answered(APPROVAL, "in_progress", "completed"),
        "booked Titan",
        ["booked Titan"],
    ),
    "denied": Scenario(
        'call book {"what": "Saturn"}',
        APPROVAL,
        lambda tabs: tabs.act(tabs.page, "deny", {"reason": "Too cold."}),
        answered(APPROVAL, "denied"),
        "The user did not allow this. Too cold.",
    ),
    "expired": Scenario(
        'call book {"what": "Saturn"}',
        APPROVAL,
        lambda _: None,
        closed(APPROVAL, "expired"),
        "Nobody answered in time.",
    ),
    "a page tool expired": Scenario(
        "call pick {}",
        OUTPUT,
        lambda _: None,
        closed(OUTPUT, "expired"),
        "Nobody answered in time.",
    ),
    "superseded by a new message": Scenario(
        'call book {"what": "Saturn"}',
        APPROVAL,
        say_never_mind,
        closed(APPROVAL, "cancelled"),
        "The user went on without answering.",
    ),
}


@pytest.fixture(scope="module")
def patient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Gunicorn, Path]]:
    folder = tmp_path_factory.mktemp("patient")
    with running(folder, app=APP) as gunicorn:
        yield gunicorn, folder


@pytest.fixture(scope="module")
def hasty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Gunicorn, Path]]:
    folder = tmp_path_factory.mktemp("hasty")
    # Long enough for a page to be loaded twice by a busy machine.
    with running(folder, app=APP, action_seconds=12) as gunicorn:
        yield gunicorn, folder


def open_tab(context: BrowserContext, gunicorn: Gunicorn, thread: str) -> Page:
    tab = context.new_page()
    tab.goto(f"{gunicorn.url}/page")
    tab.evaluate(PAGE, thread)
    return tab


def is_path(found: Sequence[State], path: Sequence[State]) -> bool:
    """Tell whether all of ``found`` is in ``path``, in its order."""
    left = iter(path)
    return all(state in left for state in found)


def middle_of(
    context: BrowserContext, gunicorn: Gunicorn, folder: Path, scenario: Scenario
) -> tuple[Tabs, list[State]]:
    """Give the page that asked and was loaded again, and a second tab, and what the page saw before."""
    for gate in (folder / "gates").iterdir():
        gate.unlink()
    thread = gunicorn.thread().rpartition("/")[2]
    page = open_tab(context, gunicorn, thread)
    page.evaluate("(content) => { addMessageAndRun(thread, content, 'clerk').catch(() => {}); }", scenario.content)
    wait(page, lambda: scenario.middle in saw(page))
    if scenario.middle == OUTPUT:
        # It goes in the midst of its function, and whoever is next begins anew.
        wait(page, lambda: page.evaluate("executed.length"))
    first = saw(page)
    page.reload()
    page.evaluate(PAGE, thread)
    other = open_tab(context, gunicorn, thread)
    run = next(entry["run"]["id"] for entry in page.evaluate("entries") if entry["run"])
    call = page.evaluate("parts(entries[1]).find(({ type }) => type === 'tool_call').call.id")
    tabs = Tabs(gunicorn, folder, page, other, thread, run, call)
    tabs.both_see(scenario.middle)
    return tabs, first


@pytest.mark.parametrize("name", SCENARIOS)
def test_set_sees_the_states_of_a_call_in_order_through_a_reload_and_in_a_second_tab(
    context: BrowserContext, request: pytest.FixtureRequest, name: str
) -> None:
    scenario = SCENARIOS[name]
    gunicorn, folder = request.getfixturevalue("hasty" if "expired" in name else "patient")
    tabs, first = middle_of(context, gunicorn, folder, scenario)
    scenario.then(tabs)
    tabs.both_see(scenario.path[-1])
    print(f"\n{name}")
    for who, seen in (("page", first), ("loaded again", saw(tabs.page)), ("second tab", saw(tabs.other))):
        print(f"  {who}: {' → '.join(map(str, seen))}")
        assert is_path(seen, scenario.path)
        assert scenario.middle in seen

    # Whatever is shown beside the run, both show the same, which is what is stored.
    def agree() -> bool:
        stored = gunicorn.entries(f"/assistream/threads/{tabs.thread}")
        over = all(entry["run"] is None or entry["run"]["completed_at"] or entry is stored[1] for entry in stored)
        return over and all(tab.evaluate("entries") == stored for tab in (tabs.page, tabs.other))

    wait(tabs.page, agree)
    call = tabs.page.evaluate("parts(entries[1]).find(({ type }) => type === 'tool_call').call")
    assert call["function"]["output"] == scenario.output
    # Of the two pages that are there, which both could.
    executed = [call for tab in (tabs.page, tabs.other) for call in tab.evaluate("executed")]
    assert executed == ([tabs.call] if scenario.middle == OUTPUT else [])
    noted = folder / "gates" / "executed"
    assert sorted(noted.read_text().splitlines() if noted.exists() else []) == sorted(scenario.executed)


def test_of_twenty_tabs_on_five_devices_one_executes_a_call(chromium: Browser, patient: tuple[Gunicorn, Path]) -> None:
    gunicorn, _ = patient
    thread = gunicorn.thread().rpartition("/")[2]
    with contextlib.ExitStack() as stack:
        devices = [stack.enter_context(contextlib.closing(chromium.new_context())) for _ in range(5)]
        # Each has as many streams as a browser opens over HTTP/1.1.
        tabs = [open_tab(device, gunicorn, thread) for device in devices for _ in range(4)]
        tabs[0].evaluate("() => { addMessageAndRun(thread, 'call pick {}', 'clerk').catch(() => {}); }")
        for tab in tabs:
            wait(tab, lambda tab=tab: OUTPUT in saw(tab))  # type: ignore[misc]
        wait(tabs[0], lambda: any(tab.evaluate("executed.length") for tab in tabs))
        for tab in tabs:
            tab.evaluate("letGo()")
        for tab in tabs:
            wait(tab, lambda tab=tab: ended("completed") in saw(tab))  # type: ignore[misc]
        [call] = [call for tab in tabs for call in tab.evaluate("executed")]
        stored = gunicorn.entries(f"/assistream/threads/{thread}")
        assert [step["tool_calls"][0]["id"] for step in [stored[1]["steps"][0]["step_details"]]] == [call]
        for tab in tabs:
            wait(tab, lambda tab=tab: tab.evaluate("entries") == stored)  # type: ignore[misc]
