"""What the helper costs a page: a long thread with answers coming in, in a real Chromium.

    python benchmarks/page.py                                a thread of 100 messages and one of 10,000
    python benchmarks/page.py --messages 1000                another length
    python benchmarks/page.py --streams 50 --rate 100        more answers at a time, more tokens a second in each
    python benchmarks/page.py --helper old.js                another version of the helper, to compare with
    python benchmarks/page.py --bare                         an EventSource alone: what Chromium itself costs

Needs the test dependencies (playwright) and a `chromium`. The server is a small one of its own, which speaks the three
routes that ``loadThread`` needs, in the frames of ``events.py`` and ``sse.py``: a write a token. The answers go on
from when the stream opens, so while older pages still load. `set` only stores the array: rendering is not our code.

A line is printed for the load (until ``loadThread`` resolves) and one for the seconds after it. *busy* is the CPU that
the page's main thread took, by the trace; *own* the part of it in which V8's sampling profiler found a frame of
assistream.js on the stack, or the garbage collector at work, whoever's garbage it was; both in percent of one core.
*task* is the longest task, in ms of CPU and by the clock; *frame* how many animation frames came more than 50 ms after
the one before, and the longest such time. *heap* is what is left in the end, in MiB. Profiler and trace cost a little
themselves. The page's thread has to be, word for word, the one that was sent, or the benchmark fails.

It needs two idle cores, one for the page and one for all else: what the clock says has the waits for a core in it. On a
busy machine, and as root, begin with `nice -n -15`.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from playwright.sync_api import Browser, Page, sync_playwright

from assistream_flask import events, sse
from assistream_flask.events import Event, dumps
from assistream_flask.types import ContentPart, Entry

HELPER = Path(__file__).resolve().parent.parent / "assistream_flask" / "static" / "assistream.js"
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]
WORDS = ["the", "a", "of", "and", "light", "sky", "blue", "wave", "that", "which", "is", "not", "more", "because"]
HEAD = "messages when   seconds deltas own µs/delta own% busy% task CPU clock frame>50 longest  sets heap"
PAGE = """<!doctype html><link rel=icon href=data:,>
<script type="module">
  import { loadThread } from "/p/assistream.js";
  let before;
  const frame = (now) => {
    const took = now - (before ?? now);
    before = now;
    state.longest = Math.max(state.longest, took);
    state.slow += took > 50;
    requestAnimationFrame(frame);
  };
  const set = (entries) => { state.sets++; state.entries = entries; };
  window.state = { entries: [] };
  window.begin = (mark) => {
    Object.assign(state, { sets: 0, longest: 0, slow: 0 });
    performance.mark(mark);
  };
  window.end = (mark) => {
    performance.mark(mark);
    const { sets, longest, slow } = state;
    return { sets, longest, slow };
  };
  window.load = async () => {
    requestAnimationFrame(frame);
    begin("load-begin");
    await loadThread("t", set);
    return end("load-end");
  };
  window.listen = () => {
    requestAnimationFrame(frame);
    begin("load-begin");
    new EventSource("/p/threads/t/events").addEventListener("thread.message.delta", () => {});
    return end("load-end");
  };
</script>
"""


# The server


class Thread:
    """A thread in memory, whose last entries are answers that come in."""

    def __init__(self, messages: int, streams: int) -> None:
        self.words = random.Random(1)
        self.entries = [self._entry(at, at >= messages - streams) for at in range(messages)]
        self.running = self.entries[-streams:]
        self.at = {entry["message"]["id"]: at for at, entry in enumerate(self.entries)}
        self.offset = 1
        self.opened = 0
        self.stop, self.stopped, self.close = threading.Event(), threading.Event(), threading.Event()

    def _entry(self, at: int, running: bool) -> Entry:
        content: list[ContentPart] = [] if running else [events.text_part(" ".join(self.words.choices(WORDS, k=100)))]
        if not running and at % 2 == 0:
            return events.entry(events.message("t", "user", content))
        run = events.run("t", "tutor", "gpt")
        message = events.message("t", "assistant", content, assistant_id="tutor", run_id=run["id"])
        run |= {"message_id": message["id"], "status": "in_progress", "started_at": events.now()}
        if not running:
            message |= {"status": "completed", "completed_at": events.now()}
            run |= {"status": "completed", "completed_at": events.now()}
            run["usage"] = {"prompt_tokens": 400, "completion_tokens": 100, "total_tokens": 500}
        return events.entry(message, run)

    def page(self, limit: int, before: str | None) -> tuple[list[Entry], bool]:
        """Give the entries, and whether there are older ones."""
        end = self.at[before] if before else len(self.entries)
        return self.entries[max(0, end - limit) : end], end > limit

    def stream(self, rate: float) -> Iterator[bytes]:
        """Give a snapshot, the tokens as they come due until ``stop``, and nothing more until ``close``."""
        self.opened += 1
        yield sse.RETRY + self._frame(events.snapshot("t", *self.page(50, None)))
        start, sent = time.monotonic(), 0
        while not self.stop.is_set():
            due = int((time.monotonic() - start) * rate * len(self.running))
            for number in range(sent, due):
                entry = self.running[number % len(self.running)]
                event = events.text_delta(entry["message"], 0, f"{self.words.choice(WORDS)} ")
                events.apply(entry, event.name, event.data)
                self.offset += 1
                yield self._frame(event)
            sent = due
            time.sleep(0.001)
        self.stopped.set()
        self.close.wait()

    def _frame(self, event: Event) -> bytes:
        return sse.encode(event.name, dumps(event.data), f"epoch-{self.offset}")


def handler(thread: Thread, helper: Path, rate: float) -> type[BaseHTTPRequestHandler]:
    """Give what serves the page, the helper and the thread."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            url = urlsplit(self.path)
            query = {key: values[0] for key, values in parse_qs(url.query).items()}
            if url.path == "/":
                self._answer("text/html", PAGE.encode())
            elif url.path == "/p/assistream.js":
                self._answer("text/javascript", helper.read_bytes())
            elif url.path == "/p/threads/t/messages":
                place = f"epoch-{thread.offset}"
                data, more = thread.page(int(query["limit"]), query.get("before"))
                self._answer("application/json", dumps({"data": data, "has_more": more}).encode(), place)
            else:
                self.send_response(200)
                for name, value in sse.HEADERS.items():
                    self.send_header(name, value)
                self.send_header("Connection", "close")
                self.end_headers()
                for frame in thread.stream(rate):
                    self.wfile.write(frame)

        def _answer(self, kind: str, body: bytes, place: str = "") -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Last-Event-ID", place)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    return Handler


# The measurements


def own(profile: Any) -> float:
    """Give the part of the main thread's work, 0 to 1, with the helper on the stack or in the garbage collector."""
    nodes, took = {node["id"]: node for node in profile["nodes"]}, dict[int, int]()
    for id, micros in zip(profile["samples"], profile["timeDeltas"][1:], strict=False):
        took[id] = took.get(id, 0) + micros

    def count(node: Any, inside: bool) -> tuple[int, int]:
        frame = node["callFrame"]
        if frame["functionName"] == "(idle)":
            return 0, 0
        inside = inside or frame["url"].endswith("assistream.js") or frame["functionName"] == "(garbage collector)"
        mine = took.get(node["id"], 0)
        below = [count(nodes[child], inside) for child in node.get("children", ())]
        return mine * inside + sum(one for one, _ in below), mine + sum(one for _, one in below)

    ours, work = count(profile["nodes"][0], False)
    return ours / work


class Trace:
    """The tasks of the page's main thread, and its marks."""

    def __init__(self, raw: bytes) -> None:
        found = json.loads(raw)["traceEvents"]
        marks = [event for event in found if event["cat"] == "blink.user_timing"]
        self._marks = {event["name"]: float(event["ts"]) for event in marks}
        where = next((event["pid"], event["tid"]) for event in marks if event["name"] == "load-begin")
        self._tasks = [
            (float(event["ts"]), float(event["dur"]), float(event["tdur"]))
            for event in found
            # One that was under way when the trace ended has no end.
            if event["name"].endswith("RunTask") and (event["pid"], event["tid"]) == where and "tdur" in event
        ]

    def between(self, start: str, end: str) -> tuple[float, float, float, float]:
        """Give how long it was, the CPU of all tasks, and the longest by CPU and by the clock; in microseconds."""
        first, last = self._marks[start], self._marks[end]
        tasks = [(took, cpu) for at, took, cpu in self._tasks if at + took > first and at < last]
        return last - first, sum(cpu for _, cpu in tasks), max(cpu for _, cpu in tasks), max(took for took, _ in tasks)


def difference(page: Page, entries: list[Entry]) -> str:
    """Say where the page's thread is another than ``entries``: nowhere, if all is well."""
    shown = json.loads(page.evaluate("JSON.stringify(state.entries)"))
    if len(shown) != len(entries):
        return f"the page has {len(shown)} of {len(entries)} entries"
    return next((f"{one} is not {two}" for one, two in zip(shown, entries, strict=True) if one != two), "")


def measure(browser: Browser, options: argparse.Namespace, messages: int) -> None:
    """Do one round and prints it. Raises ``SystemExit`` when the page has not what was sent."""
    thread = Thread(messages, options.streams)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(thread, options.helper, options.rate))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    page = browser.new_page()
    errors = list[str]()
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(f"http://127.0.0.1:{server.server_port}/")
    page.wait_for_function("!!window.load")
    tools = page.context.new_cdp_session(page)
    for domain in ("Performance", "Profiler", "HeapProfiler"):
        tools.send(f"{domain}.enable")
    tools.send("Profiler.setSamplingInterval", {"interval": 250})
    browser.start_tracing(page=page, categories=["toplevel", "blink.user_timing"])
    tools.send("Profiler.start")
    seen = [page.evaluate("listen()" if options.bare else "load()")]
    offsets = [1, thread.offset]
    parts = [own(tools.send("Profiler.stop")["profile"])]
    page.wait_for_timeout(1000)
    tools.send("Profiler.start")
    page.evaluate("begin('steady-begin')")
    offsets.append(thread.offset)
    page.wait_for_timeout(1000 * options.seconds)
    seen.append(page.evaluate("end('steady-end')"))
    offsets.append(thread.offset)
    parts.append(own(tools.send("Profiler.stop")["profile"]))
    trace = Trace(browser.stop_tracing())
    thread.stop.set()
    thread.stopped.wait(10)
    until = time.monotonic() + 10
    while (found := difference(page, thread.entries)) and time.monotonic() < until and not options.bare:
        page.wait_for_timeout(200)
    tools.send("HeapProfiler.collectGarbage")
    heap = {one["name"]: one["value"] for one in tools.send("Performance.getMetrics")["metrics"]}["JSHeapUsedSize"]
    page.close()
    thread.close.set()
    server.shutdown()
    server.server_close()
    if not options.bare and (found or errors or thread.opened != 1):
        raise SystemExit(f"{found}; {errors}; the stream was opened {thread.opened} times")
    for at, when in enumerate(("load", "steady")):
        length, busy, cpu, clock = trace.between(f"{when}-begin", f"{when}-end")
        deltas = offsets[2 * at + 1] - offsets[2 * at]
        each = f"{parts[at] * busy / deltas:12.1f}" if when == "steady" else f"{'-':>12}"
        print(
            f"{messages:8} {when:6} {length / 1e6:7.1f} {deltas:6} {each}",
            f"{100 * parts[at] * busy / length:4.1f} {100 * busy / length:5.1f} {cpu / 1e3:8.1f} {clock / 1e3:5.1f}",
            f"{seen[at]['slow']:8} {seen[at]['longest']:7.1f} {seen[at]['sets']:5} {heap / 2**20:4.1f}",
        )


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, nargs="+", default=[100, 10_000])
    parser.add_argument("--streams", type=int, default=20)
    parser.add_argument("--rate", type=float, default=50, help="tokens a second in each stream")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--helper", type=Path, default=HELPER)
    parser.add_argument("--bare", action="store_true")
    options = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    print(f"{options.streams} answers at {options.rate:g} tokens/s")
    print(HEAD)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        for messages in options.messages:
            measure(browser, options, messages)
        browser.close()


if __name__ == "__main__":
    main()
