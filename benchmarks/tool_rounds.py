"""What a round of tools costs, ours beside the runner that the OpenAI SDK brings, on the same scripted model.

    python -m benchmarks.tool_rounds                 five rounds a run, two hundred runs of each
    python -m benchmarks.tool_rounds --runs 50 --words 200

A run asks the model, which calls one function, and gets the output back, so many times; then it answers in words. Runs
come one after the other, in turns of ten, and the model server is another process. Prints CPU and time of this process:
of a run without calls, and what each round adds.

Ours stores each call before it is executed and its output before the model hears of it, in SQLite, and tells all of it
to the event log; the runner keeps nothing, but for the line that has a ledger: that one is given each checkpoint, and
writes it to a file.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from tests.programs import free_port, listening

ROOT: Final = Path(__file__).resolve().parent.parent
_TURN: Final = 10

Run = Callable[[int], None]


def serve(port: int, words: int) -> None:
    """Be the model: call ``add`` until the history has as many outputs as its question says."""
    from assistream_flask.testing import OfflineServer, Reply, Request, ToolCall

    def reply(request: Request) -> Reply:
        roles = [role for role, _ in request.messages]
        rounds = int(next(text for role, text in reversed(request.messages) if role == "user").split()[0])
        done = roles[::-1].index("user") and roles[len(roles) - roles[::-1].index("user") :].count("tool")
        if done < rounds:
            return Reply(calls=[ToolCall("add", {"one": done, "other": 1})])
        return Reply("word " * words)

    with OfflineServer(reply, port=port, delay=0):
        signal.pause()


def ours(url: str, folder: Path) -> Run:
    """Give a run of assistream's, from a message to its end."""
    from flask import Flask
    from openai import DefaultHttpxClient, OpenAI

    from assistream_flask import Assistant, create_blueprint, current_assistream, lean

    def add(one: int, other: int) -> int:
        """Add two numbers."""
        return one + other

    app = Flask("tool_rounds")
    app.config.update(SECRET_KEY="only for a benchmark", ASSISTREAM_DATABASE_URL=f"sqlite:///{folder}/x.sqlite3")
    client = OpenAI(base_url=url, api_key="k", http_client=lean(DefaultHttpxClient()))
    assistant = Assistant("a", model="m", tools=[add], max_rounds=100)
    app.register_blueprint(create_blueprint([assistant], client=client, owner=lambda: "me"), url_prefix="/assistream")

    def run(rounds: int) -> None:
        with app.app_context():
            thread = current_assistream.create_thread(owner="me")
            (found,) = current_assistream.run(thread["id"], ["a"], content=f"{rounds} rounds", owner="me").wait(60)
        assert found["status"] == "completed", found

    return run


def runner(url: str, ledger: Path | None = None) -> Run:
    """Give a run of the SDK's tool runner, streamed."""
    from openai import OpenAI, pydantic_responses_function_tool
    from openai.lib.responses_tool_runner import RegisteredFunction, ResponsesToolLedger, ResponsesToolRunner
    from pydantic import BaseModel

    class Add(BaseModel):
        """Add two numbers."""

        one: int
        other: int

    client = OpenAI(base_url=url, api_key="k")
    tool: Any = pydantic_responses_function_tool(Add, name="add")

    def save(checkpoint: object) -> None:
        assert ledger is not None
        ledger.write_text(json.dumps(checkpoint))

    def execute(found: Add) -> str:
        return str(found.one + found.other)

    def run(rounds: int) -> None:
        added = RegisteredFunction.from_tool(tool, execute=execute)
        more: Any = {} if ledger is None else {"ledger": ResponsesToolLedger(secrets.token_hex(8), save)}
        found = ResponsesToolRunner(functions=[added]).run(
            client, {"model": "m", "input": f"{rounds} rounds", "store": False}, stream=True, max_steps=200, **more
        )
        assert found.status == "completed"

    return run


def measure(run: Run, rounds: int) -> tuple[float, float]:
    """Give milliseconds a run: of this process's CPU, and of time."""
    cpu, begun = time.process_time(), time.monotonic()
    for _ in range(_TURN):
        run(rounds)
    return (time.process_time() - cpu) * 1000 / _TURN, (time.monotonic() - begun) * 1000 / _TURN


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--words", type=int, default=40, help="how many its last answer has")
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.words)
        return
    os.sched_setaffinity(0, {0})
    with tempfile.TemporaryDirectory() as name:
        folder, port = Path(name), free_port()
        model = [sys.executable, "-m", "benchmarks.tool_rounds", "--serve", str(port), "--words", str(options.words)]
        with listening(folder, port, *model):
            url = f"http://127.0.0.1:{port}/v1"
            kinds = {
                "ours": ours(url, folder),
                "the SDK's runner": runner(url),
                "the SDK's runner, with a ledger": runner(url, folder / "ledger"),
            }
            found: dict[tuple[str, int], list[tuple[float, float]]] = {}
            for turn in range(1 + options.runs // _TURN):
                for kind, run in kinds.items():
                    for rounds in (0, options.rounds):
                        times = measure(run, rounds)
                        # The first turn imports and compiles.
                        if turn:
                            found.setdefault((kind, rounds), []).append(times)
    print(f"{'ms':32} a run without calls: CPU    time   a round more: CPU    time")
    for kind in kinds:
        plain, more = (
            [statistics.median(column) for column in zip(*found[kind, rounds], strict=True)]
            for rounds in (0, options.rounds)
        )
        cpu, seconds = ((one - other) / options.rounds for one, other in zip(more, plain, strict=True))
        print(f"{kind:32} {plain[0]:24.2f} {plain[1]:7.2f} {cpu:19.2f} {seconds:7.2f}")


if __name__ == "__main__":
    main()
