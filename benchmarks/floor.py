"""What the SDK and its transport take by themselves: the least that a relay which uses them can cost.

python benchmarks/floor.py
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from gevent import monkey, pool

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
_REQUESTS = 200


def main() -> None:
    """Print CPU of this process."""
    monkey.patch_all()
    import openai

    from assistream_flask import lean
    from benchmarks.stream import upstream

    os.sched_setaffinity(0, {0})
    with upstream() as port:
        url = f"http://127.0.0.1:{port}/v1"
        ordinary = openai.OpenAI(api_key="k", base_url=url)
        quick = openai.OpenAI(api_key="k", base_url=url, http_client=lean(openai.DefaultHttpxClient()))

        def read(client: openai.OpenAI, model: str) -> int:
            with client.responses.create(model=model, input="Hi", stream=True) as stream:
                return sum(chunk.count(b'"response.output_text.delta"') for chunk in stream.response.iter_bytes())

        begin = time.process_time()
        deltas = sum(pool.Pool(16).map(lambda _: read(ordinary, "0:5000"), range(16)))
        spent = time.process_time() - begin
        print(f"16 streams as fast as they go, read by httpx2 and thrown away: {spent / deltas * 1e6:.1f} µs a delta")
        begin = time.process_time()
        for _ in range(_REQUESTS):
            read(quick, "0:1")
        print(
            f"a stream created and read by the SDK: {(time.process_time() - begin) / _REQUESTS * 1e3:.2f} ms a request"
        )


if __name__ == "__main__":
    main()
