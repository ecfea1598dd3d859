"""Serve by hand."""

from __future__ import annotations

import argparse
import time

from ._replies import FAULTS
from ._server import OfflineServer


def main(arguments: list[str] | None = None) -> None:
    """Serve until interrupted: ``python -m assistream_flask.testing --port 9000``."""
    parser = argparse.ArgumentParser(prog="python -m assistream_flask.testing")
    parser.description = "A scripted, offline OpenAI. Ask for the model offline-<fault> to see a fault."
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=9000, help="0 takes a free one (default: 9000)")
    parser.add_argument("--delay", type=float, default=0.02, help="seconds between tokens (default: 0.02)")
    parser.add_argument("--first-delay", type=float, default=0.3, help="seconds before the first (default: 0.3)")
    words = "seconds for which a response in the background can be streamed (default: 300)"
    parser.add_argument("--stream-window", type=float, default=300.0, help=words)
    options = parser.parse_args(arguments)
    server = OfflineServer(
        host=options.host,
        port=options.port,
        delay=options.delay,
        first_delay=options.first_delay,
        stream_window=options.stream_window,
    )
    with server:
        print(f"export OPENAI_BASE_URL={server.base_url} OPENAI_API_KEY=sk-offline\n\nFaults, as models:")
        for name, line in FAULTS.items():
            print(f"  offline-{name:16} {line}")
        print("\nServing; Ctrl-C ends it.", flush=True)
        try:
            while True:
                time.sleep(3600)
        except KeyboardInterrupt:
            pass


if __name__ == "__main__":
    main()
