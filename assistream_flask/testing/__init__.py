"""A scripted, offline OpenAI: for your tests, for ours, and for the demo without a key.

It is a real HTTP/1.1 server on a loopback port, so a test runs your code, the OpenAI SDK and the wire, with
nothing patched. The answers are deterministic, paced like a model's, and go wrong on demand.
As a pytest fixture::

    import pytest
    from assistream_flask.testing import OfflineServer, Reply

    @pytest.fixture
    def openai_server():
        with OfflineServer(delay=0) as server:
            yield server

    def test_it_answers(openai_server):
        openai_server.replies = [Reply("Hello there."), Reply(fault="429")]
        client = openai_server.client(max_retries=0)
        answer = client.responses.create(model="any", input="Hi")
        assert answer.output_text == "Hello there."
        assert openai_server.requests[0].messages == [("user", "Hi")]

By hand: ``python -m assistream_flask.testing --port 9000``, then ask for the model ``offline-429`` (or
``offline-`` and any other name of `FAULTS`) to see that fault.

It speaks the three dialects, streamed or not:

* Responses, ``POST /v1/responses``, and ``GET /v1/responses/<id>`` and ``POST /v1/responses/<id>/cancel``
  (https://developers.openai.com/api/reference/resources/responses/streaming-events);
* Chat Completions, ``POST /v1/chat/completions``
  (https://developers.openai.com/api/reference/resources/chat/subresources/completions/streaming-events);
* Assistants v2, ``/v1/threads`` with messages, runs, their steps, tool outputs and cancel, and ``/v1/threads/runs``
  (gone from OpenAI, https://developers.openai.com/api/docs/assistants/migration; the SDK keeps its types);

and ``GET /v1/models``. Frames have the shapes of the SDK's own types (`openai.types`). Any bearer key will do.
An Assistants run that is not streamed is answered when it is over or waits for tool outputs, in its last state.
`Reply(calls=[ToolCall("lookup", {"query": "x"})])` calls functions, in all three. A history that is not closed (a call
without an output, reasoning without what followed it, ...), and a function whose schema is not what its ``strict``
says, are refused in OpenAI's words, and so is encrypted reasoning that another model or key was given.
A response with ``background=True`` goes on when its client leaves; ``client.responses.retrieve`` gives it as it is,
or with ``stream=True, starting_after=n`` the events behind number n, for `stream_window` seconds
(https://developers.openai.com/api/docs/guides/background). Asked for again under the ``Idempotency-Key`` of the first
request, it is the same response, from its start; OpenAI does not promise that.
Nothing runs at import, so it is safe to import before gevent patches.
"""

from ._replies import FAULTS, HostedCall, Replies, Reply, Request, ToolCall
from ._script import scripted
from ._server import OfflineServer

__all__ = ["FAULTS", "HostedCall", "OfflineServer", "Replies", "Reply", "Request", "ToolCall", "scripted"]
