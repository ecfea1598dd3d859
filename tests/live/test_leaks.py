"""After many runs that ended in every way, nothing of them is left."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("kind", ["threads", "gevent"])
def test_no_thread_greenlet_socket_or_file_is_left_after_many_runs(kind: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-m", "tests.live.leak_check", kind, "100"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["runs"] >= 100
    assert found["after"] == found["before"]
    # Of the main thread, of the leases' and of those that look up names: not one a run.
    assert found["loops"] < 10
    assert [name for name in found["closed"]["threads"] if name != "MainThread"] == []
    # The cancelled runs waited for headers, or for more of the text.
    assert found["slowest"] < 1
    assert "Traceback" not in done.stderr
