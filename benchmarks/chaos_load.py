"""The people of `chaos.py`: viewers that are cut and come back, and those who talk, cancel and delete."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from pydantic_core import from_json

from assistream_flask.events import TERMINAL

from .chaos_checks import Held, Ledger, View, count, misfit, oddity, says
from .chaos_servers import LASTING, PLAIN, question

Json = dict[str, Any]
BROKEN: Final = (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, TimeoutError, ValueError)
"""What a request raises whose connection breaks."""
_ANSWERS_SECONDS: Final = (1, 3, 6, 12, 25, 40)
PATIENCE_SECONDS: Final = 60.0
"""What is to settle settles in so long, once it could."""


class Answer(NamedTuple):
    """What a request was answered with."""

    status: int
    head: dict[str, str]
    data: Any


@dataclass
class World:
    """What all of them share. ``kinds`` are those of chaos that are done."""

    ports: Sequence[int]
    ledger: Ledger
    kinds: frozenset[str]
    viewers: int
    longest: float
    """No answer takes more seconds."""
    heartbeat: float
    until: float
    """When the chaos ends, and nobody says anything new, in Unix time."""


async def read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    """Read a head; give its status and its headers."""
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    pairs = (line.partition(": ") for line in lines[1:] if line)
    return int(lines[0].split()[1]), {name.lower(): value for name, _, value in pairs}


async def ask(
    port: int,
    method: str,
    path: str,
    body: object = None,
    key: str = "",
    seconds: float = 30,
    source: str = "127.0.0.1",
    more: str = "",
) -> Answer:
    """One request, from the address ``source``, with ``more`` lines in its head. Raises one of :data:`BROKEN`."""
    async with asyncio.timeout(seconds):
        reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(source, 0))
        try:
            data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
            head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n"
            head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n"
            head += (f"Idempotency-Key: {key}\r\n" if key else "") + more
            writer.write(f"{head}\r\n".encode() + data)
            status, headers = await read_head(reader)
            found = await reader.read()
            if len(found) < int(headers.get("content-length", 0)):
                raise ConnectionError("the answer was cut")
        finally:
            writer.close()
    with contextlib.suppress(ValueError):
        return Answer(status, headers, from_json(found))
    return Answer(status, headers, None)


class Caller:
    """Sends commands to any of the ports, as the helper does: again until there is an answer, under one key."""

    def __init__(self, world: World, choose: random.Random) -> None:
        self._world, self._choose = world, choose

    async def command(self, method: str, path: str, body: object = None, key: str = "") -> Answer | None:
        """Give the answer, ``None`` after minutes without one."""
        began = time.time()
        while time.time() < max(began + 240, self._world.until + PATIENCE_SECONDS):
            found = await self.once(method, path, body, key)
            if found is not None and found.status not in (429, 500, 503):
                return found
            await asyncio.sleep(0.3 + self._choose.random())
        return None

    async def once(self, method: str, path: str, body: object = None, key: str = "") -> Answer | None:
        """One try; ``None`` where the connection broke."""
        ledger = self._world.ledger
        try:
            found = await ask(self._choose.choice(self._world.ports), method, "/assistream" + path, body, key)
        except BROKEN:
            ledger.counts["requests that broke"] += 1
            return None
        if "x-worker" in found.head:
            ledger.pids[found.head["x-worker"]] = int(found.head["x-pid"])
        ledger.counts[f"answers: {found.status}"] += 1
        if found.status == 500 or found.status > 503:
            ledger.violate(f"answered {found.status}", path, "", f"{method}: {found.data}")
        return found


class Viewer:
    """Follows a thread, is cut and comes back, until :meth:`stop`."""

    def __init__(self, world: World, thread: str, number: int, choose: random.Random) -> None:
        self._world, self._thread, self._choose = world, thread, choose
        self._name = f"viewer {number}"
        self.deleting = False
        self.view = View(self._report, world.ledger.words.get)
        self._stopped = False
        self._task = asyncio.create_task(self._follow())

    async def stop(self) -> None:
        """Leave."""
        self._stopped = True
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        self._world.ledger.counts["events seen"] += self.view.seen
        self._world.ledger.counts["snapshots"] += self.view.snapshots

    def _report(self, kind: str, run: str, detail: str) -> None:
        ledger = self._world.ledger
        why = ledger.told(kind, run)
        if why is None:
            ledger.violate(kind, self._thread, run, detail, self._name)
        else:
            ledger.log(f"{kind}: {self._thread} {run} {detail}: {why}")
            ledger.excused[f"{kind}: {why}"] += 1

    async def _follow(self) -> None:
        counts = self._world.ledger.counts
        while not self._stopped and not self.view.gone:
            with contextlib.suppress(*BROKEN):
                await self._connect()
            counts["streams that ended"] += 1
            await asyncio.sleep(0.25 + self._choose.random() / 4)

    async def _connect(self) -> None:
        path = f"/assistream/threads/{self._thread}/events"
        head = ""
        if self.view.last and self._choose.random() < 0.5:
            head = f"Last-Event-ID: {self.view.last}\r\n"
        elif self.view.last:
            path += f"?last_event_id={self.view.last}"
        is_slow = "slow" in self._world.kinds and self._choose.random() < 0.1
        async with asyncio.timeout(20):
            reader, writer = await _opened(self._choose.choice(self._world.ports), is_slow)
            writer.write(f"GET {path} HTTP/1.1\r\nHost: chaos\r\nAccept: text/event-stream\r\n{head}\r\n".encode())
        try:
            async with asyncio.timeout(20):
                status, _ = await read_head(reader)
            if status == 200:
                await self._read(reader, is_slow)
            else:
                self._refused(status)
                await asyncio.sleep(0.5 + self._choose.random())
        finally:
            writer.transport.abort()

    def _refused(self, status: int) -> None:
        self._world.ledger.counts[f"streams refused: {status}"] += 1
        if status == 404 and self.deleting:
            self.view.gone = True
        elif status not in (429, 503):
            self._report(f"a stream answered {status}", "", "")

    async def _read(self, reader: asyncio.StreamReader, is_slow: bool) -> None:
        cuts = "cut" in self._world.kinds
        # Some leave at once, most after a while.
        leaves = time.monotonic() + (self._choose.expovariate(1 / 15) if cuts else 1e9)
        rest = b""
        async for data in read_chunks(reader, 3 * self._world.heartbeat):
            *frames, rest = (rest + data).split(b"\n\n")
            for frame in frames:
                self._take(frame)
            if time.monotonic() > leaves:
                self._world.ledger.counts["chaos: cut"] += 1
                return
            if is_slow and self._choose.random() < 0.2:
                is_slow = False
                self._world.ledger.counts["chaos: slow"] += 1
                await asyncio.sleep(self._choose.uniform(3, 15))

    def _take(self, frame: bytes) -> None:
        name, id, data = fields_of(frame)
        if name and data and name != "ping":
            self.view.see(name, id, from_json(data))


def fields_of(frame: bytes) -> tuple[str, str | None, bytes]:
    """Give an event's name, its id and its data."""
    name, id, data = "", None, b""
    for line in frame.split(b"\n"):
        if line.startswith(b"event: "):
            name = line[7:].decode()
        elif line.startswith(b"id: "):
            id = line[4:].decode()
        elif line.startswith(b"data: "):
            data = line[6:]
    return name, id, data


async def _opened(port: int, is_slow: bool) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    if not is_slow:
        return await asyncio.open_connection("127.0.0.1", port)
    # So little that the server feels it when nothing is taken.
    peer = socket.socket()
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    peer.setblocking(False)
    await asyncio.get_running_loop().sock_connect(peer, ("127.0.0.1", port))
    return await asyncio.open_connection(sock=peer, limit=1024)


async def read_chunks(reader: asyncio.StreamReader, silence: float) -> AsyncIterator[bytes]:
    """Give what a chunked body brings; raises ``TimeoutError`` when nothing comes for so many seconds."""
    while True:
        async with asyncio.timeout(silence):
            size = int(await reader.readuntil(b"\r\n"), 16)
            data = await reader.readexactly(size + 2)
        if not size:
            return
        yield data[:-2]


@dataclass
class _Talk:
    """What is known of one thread."""

    id: str
    number: int
    tokens: dict[str, str] = field(default_factory=dict)
    """The message's id by its token; empty where the answer to the POST never came."""
    seconds: float = 0.0
    """How long all answers take one after another."""
    cancels: int = 0


class Conversation:
    """A thread: its questions, its viewers, and whether all of it is as it must be in the end."""

    def __init__(self, world: World, number: int, seed: str) -> None:
        self._world, self._choose = world, random.Random(f"{seed} {number}")
        self._caller = Caller(world, self._choose)
        self._number = number
        self._viewers: list[Viewer] = []
        self._beside: set[asyncio.Task[None]] = set()
        self._odd: set[str] = set()
        self.entries: list[Json] | None = None
        self.is_deleted = False
        self.talk: _Talk

    async def hold(self) -> None:
        """From the thread's creation until it is settled, or deleted."""
        made = await self._caller.command("POST", "/threads", {}, key=f"thread-{self._number}")
        if made is None or made.status != 201:
            self._world.ledger.violate("a thread could not be made", "", "", f"{made}")
            return
        self.talk = _Talk(made.data["id"], self._number)
        self._world.ledger.counts["threads"] += 1
        self._viewers = [
            Viewer(self._world, self.talk.id, at, random.Random(self._choose.random()))
            for at in range(self._world.viewers)
        ]
        try:
            await self._talk()
            await asyncio.gather(*self._beside)
            if self.is_deleted:
                await self._see_it_gone()
            else:
                await self._settle()
        finally:
            await asyncio.gather(*(viewer.stop() for viewer in self._viewers))

    def _may(self, kind: str, chance: float) -> bool:
        return self._choose.random() < chance and kind in self._world.kinds

    async def _talk(self) -> None:
        for turn in range(self._choose.randint(1, 4)):
            if time.time() > self._world.until:
                return
            # The two last digits are of one width, so no two are the same.
            posts = [self._post(f"t{self._number}{turn}{at}") for at in range(1 + self._may("crossing", 0.2))]
            await asyncio.gather(*posts)
            if self._may("delete", 0.04):
                await asyncio.sleep(self._choose.uniform(0, 5))
                await self._delete()
                return
            await asyncio.sleep(self._choose.uniform(0, 12))

    async def _post(self, token: str) -> None:
        choose, talk, ledger = self._choose, self.talk, self._world.ledger
        seconds = choose.choice([one for one in _ANSWERS_SECONDS if one <= self._world.longest])
        pace = choose.choice([0.05, 0.1])
        known = PLAIN + (LASTING if "background" in self._world.kinds else ())
        assistants = choose.sample(known, choose.choice([1, 1, 2]))
        body = {
            "content": question(token, int(seconds / pace), pace),
            "assistant_ids": assistants,
            "mode": choose.choice(["parallel", "sequential"]),
        }
        ledger.words[token], ledger.paces[token] = int(seconds / pace), pace
        talk.tokens[token] = ""
        talk.seconds += seconds * len(assistants)
        tries = 3 if self._may("repeat", 0.3) else 1
        path, key, began = f"/threads/{talk.id}/runs", f"{talk.id}-{token}", time.time()
        answers = await asyncio.gather(*(self._caller.command("POST", path, body, key) for _ in range(tries)))
        found = [answer for answer in answers if answer is not None]
        if any(one.status != 202 for one in found) or len({json.dumps(one.data) for one in found}) > 1:
            ledger.violate("a POST had not one answer", talk.id, "", f"{token}: {[one[::2] for one in found]}")
        elif found:
            self._started(token, began, found)

    def _started(self, token: str, began: float, found: Sequence[Answer]) -> None:
        ledger, answer = self._world.ledger, found[0].data
        self.talk.tokens[token] = answer["message"]["message"]["id"]
        for run in answer["runs"]:
            held = Held(self.talk.id, token, run["assistant_id"], began, run["assistant_id"] in LASTING)
            held.pids += dict.fromkeys(int(one.head["x-pid"]) for one in found)
            ledger.runs[run["id"]] = held
            ledger.counts["runs"] += 1
            if self._may("cancel", 0.1):
                task = asyncio.create_task(self._cancel(run["id"], self._choose.uniform(0, 15)))
                self._beside.add(task)

    async def _cancel(self, run_id: str, after: float) -> None:
        await asyncio.sleep(after)
        ledger = self._world.ledger
        ledger.runs[run_id].wanted = "cancel"
        ledger.counts["chaos: cancel"] += 1
        key = f"cancel-{run_id}"
        answer = await self._caller.command("POST", f"/threads/{self.talk.id}/runs/{run_id}/cancel", {}, key)
        if answer is not None and answer.status != 202 and not self.is_deleted:
            ledger.violate(f"a cancel was answered {answer.status}", self.talk.id, run_id, f"{answer.data}")

    async def _delete(self) -> None:
        self.is_deleted = True
        for viewer in self._viewers:
            viewer.deleting = True
        self._world.ledger.counts["chaos: delete"] += 1
        answer = await self._caller.command("DELETE", f"/threads/{self.talk.id}")
        if answer is not None and answer.status not in (204, 404):
            self._world.ledger.violate(f"a deletion was answered {answer.status}", self.talk.id, "", f"{answer.data}")

    async def _see_it_gone(self) -> None:
        """Wait until all viewers hear of it."""
        end = self._late()
        while not all(viewer.view.gone for viewer in self._viewers):
            if time.time() > end:
                self._violate("a deletion was not told")
                return
            await asyncio.sleep(0.2)

    # The end of it

    def _late(self) -> float:
        """When all is to be so: soon after the chaos, and not much later while that goes on."""
        return max(time.time(), min(time.time() + 180, self._world.until)) + PATIENCE_SECONDS

    def _violate(self, kind: str, run: str = "", detail: str = "", at: float | None = None) -> None:
        self._world.ledger.violate(kind, self.talk.id, run, detail, at=at)

    async def read(self) -> list[Json] | None:
        """Give the entries as one of the workers tells them."""
        found = await self._caller.once("GET", f"/threads/{self.talk.id}/messages?limit=200")
        if found is not None and found.status == 404:
            self._violate("a thread is gone")
        if found is None or found.status != 200:
            return None
        entries: list[Json] = found.data["data"]
        for entry in entries:
            kind = misfit(says(entry), self._world.ledger.words.get) if entry["run"] else None
            if kind is not None and entry["run"]["id"] not in self._odd:
                self._odd.add(entry["run"]["id"])
                self._violate(f"read: {kind}", entry["run"]["id"], oddity(says(entry)))
        return entries

    async def _settle(self) -> None:
        began = time.time()
        # Answers of 40 s one after another, each of which may have been lost half-way, and asked for again.
        seconds = self.talk.seconds * 2 + PATIENCE_SECONDS
        entries: list[Json] | None = None
        while entries is None or not all(one["run"]["status"] in TERMINAL for one in entries if one["run"]):
            if time.time() > max(began + seconds + 120, self._world.until + seconds):
                left = [one["run"]["id"] for one in entries or () if one["run"]["status"] not in TERMINAL]
                self._violate("not settled" if entries else "unreadable", detail=f"{left}")
                return
            await asyncio.sleep(0.5 + self._choose.random())
            entries = await self.read()
        self.entries = entries
        await self._agree(entries)
        self._judge(entries)

    async def _agree(self, entries: list[Json]) -> None:
        """Every viewer comes to have just that."""
        end = self._late()
        for viewer in self._viewers:
            while viewer.view.entries != entries:
                if time.time() > end:
                    self._violate("a viewer has not what is stored", detail=self._differences(viewer, entries))
                    break
                await asyncio.sleep(0.2)

    def _differences(self, viewer: Viewer, entries: list[Json]) -> str:
        """Give what the viewer has, and what is stored, with the time of its end where there is one."""
        mine = {entry["message"]["id"]: entry for entry in viewer.view.entries}
        found = []
        for entry in entries:
            has, run = mine.get(entry["message"]["id"]), entry["run"]
            if has != entry:
                ended = run and (run["completed_at"] or run["failed_at"] or run["cancelled_at"])
                when = f"{ended - self._world.ledger.began:.0f} s" if ended else "-"
                pairs = [(one["run"] and one["run"]["status"], count(says(one))) for one in (has, entry) if one]
                found.append(f"{entry['message']['id']} {pairs} ended at {when}")
        return f"at {viewer.view.last}: {found}"

    def _judge(self, entries: list[Json]) -> None:
        ledger, now = self._world.ledger, time.time()
        said = [says(entry).split(" ")[0].removeprefix("#") for entry in entries if entry["run"] is None]
        for token, message_id in self.talk.tokens.items():
            if said.count(token) != 1 and (message_id or said.count(token)):
                self._violate(f"a message is there {said.count(token)} times", detail=token)
        ids = [entry["message"]["id"] for entry in entries]
        if wrong := [one for one in self.talk.tokens.values() if one and ids.count(one) != 1]:
            self._violate("a message has another id", detail=f"{wrong}")
        for entry in entries:
            run = entry["run"]
            if run is not None:
                self._judge_run(entry, run, now)
        for viewer in self._viewers:
            for lost in viewer.view.shrunk:
                why = ledger.shrunk(ledger.runs[lost.run], lost) if lost.run in ledger.runs else None
                if why is None:
                    self._violate("shrunk", lost.run, lost.detail, lost.at)
                else:
                    ledger.log(f"words went back: {self.talk.id} {lost.run} {lost.detail}: {why}")
                    ledger.excused[f"words went back: {why}"] += 1

    def _judge_run(self, entry: Json, run: Json, now: float) -> None:
        ledger = self._world.ledger
        if run["id"] not in ledger.runs:
            # Nobody heard the answer to its POST.
            return
        text = says(entry)
        kind = misfit(text, ledger.words.get)
        if kind is not None:
            self._violate(f"stored: {kind}", run["id"], oddity(text))
        held = ledger.runs[run["id"]]
        if text and text.split(".")[:2] != [held.token, held.assistant]:
            self._violate("stored: words of another answer", run["id"], text[:60])
        if run["status"] == "completed" and kind is None and count(text) != ledger.words[held.token]:
            self._violate("stored: completed, and not whole", run["id"], f"…{text[-60:]!r}")
        elif run["status"] == "completed" and kind is None:
            ledger.counts["answers whole"] += 1
        seen = (viewer.view.over.get(run["id"], now) for viewer in self._viewers)
        ledger.judge_end(run, min(seen, default=now))
        ledger.judge_asks(run["id"], bool(text))
