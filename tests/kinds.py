"""What kind of tests each file has; `run_tests.py` reads it too, so it needs nothing that is installed."""

from pathlib import Path

KINDS = {
    # A part, or the app within this process.
    "unit": "architecture background events failing_servers gate history lean pace relay runner secrets "
    "shared_snapshots signals snapshots sse types wire",
    # What others rely on, held for each implementation: routes, store, log, dialects, the offline server.
    "contract": "background_server bad_input cases dialects idempotency leases log migrations ownership routes store "
    "testing upstream",
    # Gunicorn, Redis and PostgreSQL, in processes of their own.
    "live": "chaos cluster complaints crashes crowds deletion dropped_streams fuzz leaks live locked_database outages "
    "recycle redis_log redis_unfit runtime service straight workers",
    # The helper and pages, under Node and in Chromium.
    "browser": "browser helper others",
    # What is deployed, and what it is deployed behind; the docs.
    "deploy": "docs doctor openapi proxies",
}


def kind_of(path: Path) -> str:
    """Gives a test file's kind, which is a mark of all its tests."""
    (kind,) = (kind for kind, names in KINDS.items() if path.stem.removeprefix("test_") in names.split())
    return kind


def files_of(*kinds: str) -> list[str]:
    """Gives the files of these kinds, from the project's folder."""
    return [f"tests/test_{name}.py" for kind in kinds for name in KINDS[kind].split()]
