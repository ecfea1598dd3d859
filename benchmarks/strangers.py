"""What a stranger can do to one gevent worker of gunicorn, and what it does to others meanwhile.

    python benchmarks/strangers.py post    messages of 100,000 characters, as fast as they go, for 30 seconds
    python benchmarks/strangers.py slow    1,000 answers that say a word a second, and then another caller's

Prints the worker's resident memory before and after, how many messages were stored and refused, and what became of the
other caller's run. `--threads N` has N threads a caller post; `--callers N` has so many callers.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PORT = 8124


def make_app() -> Any:
    """Give the app, for gunicorn: the model server is in MODEL_URL, settings come in APP_CONFIG."""
    from flask import Flask, request

    from assistream_flask import Assistant, create_blueprint

    app = Flask("strangers")
    app.config.update(json.loads(os.environ["APP_CONFIG"]))
    blueprint = create_blueprint([Assistant("a", model="m")], owner=lambda: request.headers.get("X-Caller"))
    app.register_blueprint(blueprint, url_prefix="/assistream")
    return app


def send(caller: str, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    """Send one request; give its status and its JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=60)
    try:
        headers = {"X-Caller": caller, "Content-Type": "application/json"}
        connection.request(method, f"/assistream{path}", None if body is None else json.dumps(body), headers)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read() or b"null")
    finally:
        connection.close()


def resident(pid: int) -> int:
    """Give the memory of the gunicorn's worker, in MiB."""
    (worker,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    status = Path(f"/proc/{worker}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) // 1024


def post(pid: int, callers: int, threads: int) -> None:
    """Write messages for thirty seconds, in new threads."""
    found: Counter[str] = Counter()
    until = time.monotonic() + 30

    def work(caller: str) -> None:
        while time.monotonic() < until:
            status, thread = send(caller, "POST", "/threads", {})
            for _ in range(5):
                if status == 201:
                    status, _ = send(caller, "POST", f"/threads/{thread['id']}/messages", {"content": "x" * 100_000})
                    found[str(status)] += 1

    print(f"{resident(pid)} MiB before")
    working = [threading.Thread(target=work, args=(f"c{at % callers}",)) for at in range(callers * threads)]
    for one in working:
        one.start()
    for one in working:
        one.join()
    print(f"{resident(pid)} MiB after; messages by status: {dict(found)}")


def slow(pid: int, callers: int) -> None:
    """Begin a thousand answers that say a word a second, then another caller's."""
    begun = 0
    for at in range(1000):
        caller = f"c{at % max(callers, 25)}"
        _, thread = send(caller, "POST", "/threads", {})
        status, _ = send(caller, "POST", f"/threads/{thread['id']}/runs", {"assistant_ids": ["a"], "content": "slow"})
        begun += status == 202
    _, thread = send("another", "POST", "/threads", {})
    send("another", "POST", f"/threads/{thread['id']}/runs", {"assistant_ids": ["a"], "content": "quick"})
    start, run = time.monotonic(), None
    while time.monotonic() - start < 150:
        _, page = send("another", "GET", f"/threads/{thread['id']}/messages")
        run = page["data"][1]["run"]
        if run["status"] not in ("queued", "in_progress"):
            break
        time.sleep(0.5)
    assert run is not None
    print(
        f"{begun} begun, {resident(pid)} MiB; after {time.monotonic() - start:.0f} s the other caller's run is "
        f"{run['status']}, {run['last_error']}"
    )


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("attack", choices=["post", "slow"])
    parser.add_argument("--callers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--settings", type=json.loads, default={})
    options = parser.parse_args()
    from assistream_flask.testing import OfflineServer, Reply

    def reply(request: Any) -> Reply:
        return Reply("slow " * 100, delay=1.0) if "slow" in json.dumps(request.body) else Reply("done")

    with tempfile.TemporaryDirectory() as folder, OfflineServer(reply) as model:
        config = {"ASSISTREAM_DATABASE_URL": f"sqlite:///{folder}/a.sqlite3", **options.settings}
        environment = {**os.environ, "OPENAI_BASE_URL": model.base_url, "APP_CONFIG": json.dumps(config)}
        command = [sys.executable, "-m", "gunicorn", "--worker-class", "gevent", "--no-control-socket", "--bind"]
        command += [f"127.0.0.1:{PORT}", "--worker-connections", "4000", "benchmarks.strangers:make_app()"]
        server = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
        try:
            time.sleep(4)
            if options.attack == "post":
                post(server.pid, options.callers, options.threads)
            else:
                slow(server.pid, options.callers)
        finally:
            server.kill()
            server.wait()


if __name__ == "__main__":
    main()
