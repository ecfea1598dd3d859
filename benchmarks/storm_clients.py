"""The people of `storm.py`: twenty who chat, and those who do all else.

    python -m benchmarks.storm_clients chats CONFIG
    python -m benchmarks.storm_clients attacks CONFIG

Both write a line of JSON for each thing that they see, and end when stdin does.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import secrets
import socket
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, Final

from pydantic_core import from_json

from assistream_flask.events import RUN_ENDS, TERMINAL

from .chaos_checks import says
from .chaos_load import BROKEN, Answer, ask, fields_of, read_chunks, read_head
from .storm_servers import WORDS

Json = dict[str, Any]
_LONG: Final = 100_000
_PATIENCE_SECONDS: Final = 60.0


def tell(*what: object) -> None:
    """Write what was seen, for the process that began this one."""
    os.write(1, json.dumps(what).encode() + b"\n")


class Client:
    """One browser: an address, and the session that the app gave it."""

    def __init__(self, port: int, source: str) -> None:
        self.port, self.source = port, source
        self._cookie = ""

    def head(self) -> str:
        """Give the lines of a request that say who it is."""
        return f"Cookie: {self._cookie}\r\n" if self._cookie else ""

    async def ask(self, method: str, path: str, body: object = None, **more: Any) -> Answer:
        """Send one request, on a connection of its own. Raises one of :data:`BROKEN`."""
        more["more"] = self.head() + more.get("more", "")
        found = await ask(self.port, method, f"/assistream{path}", body, source=self.source, **more)
        if "set-cookie" in found.head:
            self._cookie = found.head["set-cookie"].partition(";")[0]
        return found

    async def open(self, path: str, receive: int = 0) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Begin a GET, and read nothing; ``receive`` is how many bytes the system takes meanwhile."""
        peer = socket.socket()
        if receive:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
        peer.setblocking(False)
        peer.bind((self.source, 0))
        try:
            async with asyncio.timeout(30):
                await asyncio.get_running_loop().sock_connect(peer, ("127.0.0.1", self.port))
        except BaseException:
            peer.close()
            raise
        reader, writer = await asyncio.open_connection(sock=peer, limit=receive or 65_536)
        writer.write(f"GET /assistream{path} HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\n{self.head()}\r\n".encode())
        return reader, writer


# Those who chat


class Chat:
    """One who asks every three seconds, and sees and tells what comes of it."""

    def __init__(self, port: int, number: int) -> None:
        self._client = Client(port, f"127.0.1.{number + 1}")
        self._number = number
        self._thread = ""
        self._place: str | None = None
        self._first: dict[str, float] = {}
        self._texts: dict[str, str] = {}
        self._ends: dict[str, tuple[float, str]] = {}
        self._news = asyncio.Condition()

    async def live(self) -> None:
        """Chat until it is cancelled."""
        found = await self._client.ask("POST", "/threads", {})
        self._thread = found.data["id"]
        tell("thread", self._thread)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._follow())
            await asyncio.sleep(3 * self._number / 20)
            while True:
                begun = time.monotonic()
                await self._round()
                await asyncio.sleep(max(0.0, begun + 3 - time.monotonic()))

    async def _round(self) -> None:
        begun = time.monotonic()
        found = await self._once("POST", "/runs", {"assistant_ids": ["chat"], "content": "Hello. " * 10})
        if found is None:
            return
        (run,) = found["runs"]
        try:
            async with asyncio.timeout(_PATIENCE_SECONDS), self._news:
                await self._news.wait_for(lambda: run["id"] in self._ends)
        except TimeoutError:
            tell("fail", "an answer without an end")
            return
        ended, status = self._ends.pop(run["id"])
        text, first = self._texts.pop(run["message_id"], ""), self._first.pop(run["message_id"], ended)
        tell("first", first - begun)
        tell("end", ended - begun)
        if status != "completed":
            tell("fail", f"a run that ended {status}")
        begun = time.monotonic()
        page = await self._once("GET", "/messages?limit=20")
        if page is None:
            return
        tell("page", time.monotonic() - begun)
        stored = [says(entry) for entry in page["data"] if entry["message"]["id"] == run["message_id"]]
        if len(text.split()) != WORDS or stored != [text]:
            tell("fail", "an answer that was not whole")

    async def _once(self, method: str, path: str, body: object = None) -> Any:
        try:
            found = await self._client.ask(method, f"/threads/{self._thread}{path}", body)
        except BROKEN as error:
            tell("fail", f"{method} {path.partition('?')[0]} broke: {type(error).__name__}")
            return None
        if found.status >= 300:
            tell("fail", f"{method} {path.partition('?')[0]} was answered {found.status}")
            return None
        return found.data

    async def _follow(self) -> None:
        while True:
            try:
                await self._view()
                tell("fail", "an event stream that ended")
            except BROKEN as error:
                tell("fail", f"an event stream that broke: {type(error).__name__}")
            await asyncio.sleep(1)

    async def _view(self) -> None:
        last = f"?last_event_id={self._place}" if self._place else ""
        reader, writer = await self._client.open(f"/threads/{self._thread}/events{last}")
        try:
            async with asyncio.timeout(30):
                status, _ = await read_head(reader)
            if status != 200:
                tell("fail", f"an event stream was answered {status}")
                return
            rest = b""
            async for data in read_chunks(reader, 40):
                *frames, rest = (rest + data).split(b"\n\n")
                now = time.monotonic()
                async with self._news:
                    for frame in frames:
                        self._see(now, *fields_of(frame))
                    self._news.notify_all()
        finally:
            writer.transport.abort()

    def _see(self, now: float, name: str, id: str | None, data: bytes) -> None:
        self._place = id or self._place
        if name == "thread.message.delta":
            found = from_json(data)
            told = "".join(part["text"]["value"] for part in found["delta"]["content"])
            self._first.setdefault(found["id"], now)
            self._texts[found["id"]] = self._texts.get(found["id"], "") + told
        elif name in RUN_ENDS:
            found = from_json(data)
            self._ends[found["id"]] = now, found["status"]
        elif name == "thread.snapshot":
            for entry in from_json(data)["data"]:
                run = entry["run"]
                if run:
                    self._texts[run["message_id"]] = says(entry)
                    if run["status"] in TERMINAL:
                        self._ends.setdefault(run["id"], (now, run["status"]))


async def chat(config: Json) -> None:
    """Have all chat, and tell how late this process itself is."""
    async with asyncio.TaskGroup() as tasks:
        for number in range(config["chats"]):
            tasks.create_task(Chat(config["port"], number).live())
        while True:
            due = time.monotonic() + 0.25
            await asyncio.sleep(0.25)
            tell("late", time.monotonic() - due)


# Those who attack


class Attack:
    """What an attacker has: where, from which address, and threads of others. ``seen`` are the answers that came;
    ``rate`` is how many requests a second the address sends, 0: as fast as they go, and ``half`` how many halves."""

    def __init__(self, port: int, source: str, others: list[str], rate: float, half: float) -> None:
        self.port, self.source, self.others, self._rate, self.half = port, source, others, rate, half
        self.seen: Counter[str] = Counter()
        self._due = 0.0

    async def turn(self) -> None:
        """Wait until the next request may go."""
        now = time.monotonic()
        self._due = max(now, self._due + 1 / self._rate) if self._rate else now
        await asyncio.sleep(self._due - now)

    def client(self) -> Client:
        """Give one more session."""
        return Client(self.port, self.source)

    async def ask(self, client: Client, method: str, path: str, body: object = None, **more: Any) -> Answer | None:
        """Send one request when it is its turn, and count its answer; ``None`` where there was none."""
        await self.turn()
        try:
            found = await client.ask(method, path, body, **more)
        except BROKEN as error:
            self.seen[type(error).__name__] += 1
            await asyncio.sleep(0.1)
            return None
        self.seen[str(found.status)] += 1
        return found

    async def thread(self, client: Client) -> str:
        """Begin a thread, however often that takes; give its id."""
        while True:
            found = await self.ask(client, "POST", "/threads", {})
            if found is not None and found.status == 201:
                return str(found.data["id"])
            await asyncio.sleep(0.5)


async def _side_by_side(count: int, one: Callable[[], Awaitable[None]]) -> None:
    async with asyncio.TaskGroup() as tasks:
        for _ in range(count):

            async def forever() -> None:
                while True:
                    await one()

            tasks.create_task(forever())


async def posts(attack: Attack) -> None:
    """Write the longest messages that there may be, as fast as they go."""

    async def one() -> None:
        client = attack.client()
        for _ in range(20):
            thread = await attack.thread(client)
            for _ in range(5):
                await attack.ask(client, "POST", f"/threads/{thread}/messages", {"content": "x" * _LONG})

    await _side_by_side(4, one)


async def runs(attack: Attack) -> None:
    """Start runs from forty sessions."""

    async def one() -> None:
        client = attack.client()
        thread = await attack.thread(client)
        while True:
            body = {"assistant_ids": ["chat"] * 4, "content": "Go"}
            await attack.ask(client, "POST", f"/threads/{thread}/runs", body)

    await _side_by_side(40, one)


async def slow(attack: Attack) -> None:
    """Start answers of a word a second, as many as there may be."""

    async def one() -> None:
        client = attack.client()
        while True:
            thread = await attack.thread(client)
            found = await attack.ask(
                client, "POST", f"/threads/{thread}/runs", {"assistant_ids": ["slow"], "content": "Go"}
            )
            if found is None or found.status != 202:
                await asyncio.sleep(1)

    await _side_by_side(12, one)


def hostile(kind: str) -> Callable[[Attack], Awaitable[None]]:
    """Give an attack by a model server's answers of that kind."""

    async def have(attack: Attack) -> None:
        async def one() -> None:
            client = attack.client()
            thread = await attack.thread(client)
            body = {"assistant_ids": [kind], "content": "Go"}
            await attack.ask(
                client, "POST", f"/threads/{thread}/runs", body, seconds=60, more="Accept: text/event-stream\r\n"
            )

        await _side_by_side(2, one)

    return have


async def _held(attack: Attack, client: Client, path: str, receive: int = 0) -> None:
    """Open it, and hold it until the server ends it; read all where nothing is said of ``receive``, else nothing."""
    await attack.turn()
    try:
        reader, writer = await client.open(path, receive)
    except BROKEN as error:
        attack.seen[type(error).__name__] += 1
        await asyncio.sleep(1)
        return
    try:
        status, _ = await read_head(reader)
        attack.seen[str(status)] += 1
        if status != 200:
            await asyncio.sleep(1)
        elif receive:
            while not writer.transport.is_closing():
                await asyncio.sleep(0.5)
                # What is never written to is not told of its end either.
                writer.write(b"\r\n")
        else:
            while await reader.read(65_536):
                pass
    except BROKEN as error:
        attack.seen[type(error).__name__] += 1
        await asyncio.sleep(0.2)
    finally:
        writer.transport.abort()


async def streams(attack: Attack) -> None:
    """Open event streams, fifty a session, up to what there may be."""
    sessions = asyncio.Queue[tuple[Client, str]]()

    async def one() -> None:
        if sessions.empty():
            client = attack.client()
            thread = await attack.thread(client)
            for _ in range(50):
                sessions.put_nowait((client, thread))
        client, thread = await sessions.get()
        await _held(attack, client, f"/threads/{thread}/events")
        sessions.put_nowait((client, thread))

    await _slowly(2_000, one)


async def _slowly(count: int, one: Callable[[], Awaitable[None]], a_second: float = 100) -> None:
    """Have so many do it over and over, who come one after the other."""

    async def forever() -> None:
        while True:
            await one()

    async with asyncio.TaskGroup() as tasks:
        for _ in range(count):
            tasks.create_task(forever())
            await asyncio.sleep(1 / a_second)


def _half(count: int, begin: Callable[[Client], bytes]) -> Callable[[Attack], Awaitable[None]]:
    async def have(attack: Attack) -> None:
        client = attack.client()
        await attack.thread(client)

        async def one() -> None:
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", attack.port, local_addr=(attack.source, 0))
            except BROKEN as error:
                attack.seen[type(error).__name__] += 1
                await asyncio.sleep(1)
                return
            attack.seen["begun"] += 1
            try:
                writer.write(begin(client))
                found = await reader.read(65_536)
                attack.seen[found[9:12].decode() or "closed"] += 1
            except BROKEN:
                attack.seen["reset"] += 1
            finally:
                writer.transport.abort()
            # Whoever is cut comes back, as often as at first.
            await asyncio.sleep(count / attack.half)

        await _slowly(count, one, attack.half)

    return have


def _half_body(client: Client) -> bytes:
    head = f"POST /assistream/threads HTTP/1.1\r\nHost: 127.0.0.1:{client.port}\r\n{client.head()}"
    return f'{head}Content-Type: application/json\r\nContent-Length: 20000\r\n\r\n{{"metadata": '.encode()


def _half_head(client: Client) -> bytes:
    return f"POST /assistream/threads HTTP/1.1\r\nHost: 127.0.0.1:{client.port}\r\nCookie: ".encode()


async def unread(attack: Attack) -> None:
    """Ask for the largest pages and event streams, and read neither."""
    client = attack.client()
    thread = await attack.thread(client)
    for _ in range(90):
        await attack.ask(client, "POST", f"/threads/{thread}/messages", {"content": "x" * _LONG})
    paths = itertools.cycle([f"/threads/{thread}/messages?limit=200"] * 3 + [f"/threads/{thread}/events"])
    await _slowly(60, lambda: _held(attack, client, next(paths), 2048), 10)


async def junk(attack: Attack) -> None:
    """Send what is no JSON, or too deep, and headers without number or end."""
    client = attack.client()
    thread = await attack.thread(client)
    bodies: list[bytes] = [
        b"{" * 10,
        b"\xff\xfe",
        b"[" * 1_000_000,
        b'{"content": ' + b"[" * 1_000_000,
        b'{"content": ' + b"[" * 500_000 + b"]" * 500_000 + b"}",
        b'{"content": ' + b"9" * 1_000_000 + b"}",
        b'{"content": ' + b"9" * 4_000 + b"e99999}",
        b'{"content": "' + b"\\ud800" * 190_000 + b'"}',
        b'{"content": {' + b",".join(b'"%d": 1' % at for at in range(90_000)) + b"}}",
        b"{" + b",".join(b'"%d": 1' % at for at in range(90_000)) + b"}",
        b'{"content": "' + b"x" * 1_200_000 + b'"}',
    ]
    heads = ["", "".join(f"X-{at}: {at}\r\n" for at in range(2_000)), f"X-Long: {'x' * 100_000}\r\n"]
    heads += ["".join(f"X-{at}: {'y' * 7_000}\r\n" for at in range(80)), "Idempotency-Key: \x00\r\n"]
    heads += [f"Cookie: {'; '.join(f'a{at}=b' for at in range(900))}\r\n"]
    at = itertools.count()

    async def one() -> None:
        number = next(at)
        if number % 3:
            body = bodies[number // 3 % len(bodies)]
            await attack.ask(client, "POST", f"/threads/{thread}/messages", body)
        else:
            await attack.ask(client, "GET", f"/threads/{thread}/messages", more=heads[number // 3 % len(heads)])

    await _side_by_side(4, one)


async def keys(attack: Attack) -> None:
    """Use an Idempotency-Key for each of very many messages."""
    client = attack.client()
    thread = await attack.thread(client)

    async def one() -> None:
        await attack.ask(client, "POST", f"/threads/{thread}/messages", {"content": "x"}, key=secrets.token_hex(100))

    await _side_by_side(4, one)


async def threads(attack: Attack) -> None:
    """Begin threads without number, in a session and in new ones."""
    client = attack.client()
    await attack.thread(client)

    async def one() -> None:
        who = client if random.random() < 0.5 else attack.client()
        await attack.ask(who, "POST", "/threads", {"metadata": {f"{at}": "x" * 512 for at in range(16)}})
        await attack.ask(client, "GET", "/threads?limit=200")

    await _side_by_side(4, one)


async def ids(attack: Attack) -> None:
    """Ask for other people's threads."""
    client = attack.client()
    await attack.thread(client)

    async def one() -> None:
        path = f"/threads/{random.choice(attack.others)}"
        for method, end, body in (
            ("GET", "/messages?limit=200", None),
            ("GET", "/events", None),
            ("POST", "/messages", {"content": "mine"}),
            ("POST", "/runs", {"assistant_ids": ["chat"]}),
            ("DELETE", "", None),
        ):
            found = await attack.ask(client, method, path + end, body)
            if found is not None and found.status < 400:
                tell("leak", f"{method} {end}")

    await _side_by_side(2, one)


ATTACKS: Final[dict[str, Callable[[Attack], Awaitable[None]]]] = {
    "posts": posts,
    "runs": runs,
    "slow": slow,
    **{kind: hostile(kind) for kind in ("line", "bomb", "flood", "heartbeats", "lines", "parts", "error")},
    "streams": streams,
    "bodies": _half(2_100, _half_body),
    "headers": _half(400, _half_head),
    "unread": unread,
    "junk": junk,
    "keys": keys,
    "threads": threads,
    "ids": ids,
}


async def attack(config: Json) -> None:
    """Have all attack at once, each kind from an address of its own."""
    seen: dict[str, Counter[str]] = {}
    async with asyncio.TaskGroup() as tasks:
        for kind in config["kinds"]:
            source = f"127.0.2.{list(ATTACKS).index(kind) + 1}"
            one = Attack(config["port"], source, config["others"], config["rate"], config["half"])
            seen[kind] = one.seen
            tasks.create_task(_go(ATTACKS[kind](one)))
        while True:
            await asyncio.sleep(1)
            tell("seen", {kind: dict(found) for kind, found in seen.items()})


async def _go(work: Awaitable[None]) -> None:
    await work


async def _until_stdin_ends(work: Awaitable[None]) -> None:
    task = asyncio.ensure_future(work)
    ended = asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await asyncio.wait([task, ended], return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        task.result()
    # Whatever is still open is cut by the end of this process.
    os._exit(0)


def main() -> None:
    """Do what the command line names."""
    work = {"chats": chat, "attacks": attack}[sys.argv[1]]
    asyncio.run(_until_stdin_ends(work(json.loads(sys.argv[2]))))


if __name__ == "__main__":
    main()
