"""Event streams through the real Caddy and lighttpd, and what the doctor says of each."""

from __future__ import annotations

import http.client
import json
import re
import socket
import socketserver
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from assistream_flask.testing import OfflineServer
from tests.deploy.test_doctor import Deployment, failures
from tests.programs import free_port, listening, program

ROOT = Path(__file__).resolve().parents[2]
CERTIFICATE = ROOT / "tests/localhost.pem"
LONG = "the proxy buffers what begins with many bytes, as a thread's snapshot: its events came late"
ALL = "the proxy buffers: all events came at once, at the end"
# So a newer Caddy compresses event streams as 2.6.2 does: since 2.6.3 it heeds no-transform.
HEEDLESS = "header_down Cache-Control no-cache"
GZIPPED = "the proxy, or the app, compresses event streams (gzip)"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with OfflineServer() as server, Deployment(tmp_path_factory.mktemp("good"), server.base_url) as gunicorn:
        yield gunicorn


@contextmanager
def behind_caddy(folder: Path, app: str, site: str, inside: str = "") -> Iterator[str]:
    """Give the URL of a Caddy before ``app``, with the directives ``site`` and, in ``reverse_proxy``, ``inside``."""
    caddy, port = program("caddy"), free_port()
    (folder / "Caddyfile").write_text(
        f"{{\n admin off\n}}\nhttp://127.0.0.1:{port} {{\n{site}\nreverse_proxy {app} {{\n{inside}\n}}\n}}\n"
    )
    with listening(folder, port, caddy, "run", "--config", folder / "Caddyfile"):
        yield f"http://127.0.0.1:{port}"


@contextmanager
def behind_our_caddyfile(folder: Path, app: str) -> Iterator[str]:
    """Give the URL of a Caddy with the file that the docs name, before ``app``."""
    caddy, port = program("caddy"), free_port()
    text = (ROOT / "deploy/Caddyfile").read_text()
    # Nobody but example.org gets a certificate for it; and only root listens on 80.
    for old, new in (
        ("grace_period 3s", "grace_period 1s\nadmin off\nauto_https disable_redirects"),
        ("\nexample.org {", f"\nhttps://localhost:{port} {{\ntls {CERTIFICATE} {CERTIFICATE}"),
        ("reverse_proxy 127.0.0.1:8000 ", f"reverse_proxy {app} "),
    ):
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    (folder / "Caddyfile").write_text(text)
    with listening(folder, port, caddy, "run", "--config", folder / "Caddyfile"):
        yield f"https://localhost:{port}"


@contextmanager
def behind_lighttpd(folder: Path, app: str, settings: str, *modules: str) -> Iterator[str]:
    """Give the URL of a lighttpd before ``app``, with these ``settings``."""
    lighttpd, port = program("lighttpd"), free_port()
    backend = f'"host" => "127.0.0.1", "port" => {app.rpartition(":")[2]}'
    names = ", ".join(f'"{name}"' for name in ("mod_proxy", *modules))
    (folder / "lighttpd.conf").write_text(
        f'server.bind = "127.0.0.1"\nserver.port = {port}\nserver.document-root = "{folder}"\n'
        f'server.modules = ({names})\nproxy.server = ("" => (({backend})))\n{settings}\n'
    )
    with listening(folder, port, lighttpd, "-D", "-f", folder / "lighttpd.conf"):
        yield f"http://127.0.0.1:{port}"


class Viewer:
    """A browser, as far as a proxy can tell: it keeps its cookie, takes gzip, and sends the page's origin."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._headers = {"Origin": url, "Content-Type": "application/json", "Accept-Encoding": "gzip, deflate, br"}
        thread, headers = self._post("/assistream/threads", {})
        self._headers["Cookie"] = headers["Set-Cookie"].partition(";")[0]
        self._thread = f"/assistream/threads/{thread['id']}"

    def _connect(self) -> http.client.HTTPConnection:
        host = self._url.partition("//")[2]
        if self._url.startswith("https"):
            trust = ssl.create_default_context(cafile=str(CERTIFICATE))
            return http.client.HTTPSConnection(host, timeout=20, context=trust)
        return http.client.HTTPConnection(host, timeout=20)

    def _post(self, path: str, body: Any) -> tuple[Any, Any]:
        headers = {**self._headers, "Accept-Encoding": "identity"}
        with closing(self._connect()) as connection:
            connection.request("POST", path, json.dumps(body), headers)
            answer = connection.getresponse()
            assert answer.status == 201, answer.read()
            return json.loads(answer.read()), answer.headers

    def say(self, text: str) -> None:
        self._post(f"{self._thread}/messages", {"content": text})

    @contextmanager
    def watch(self) -> Iterator[http.client.HTTPResponse]:
        """Open the thread's stream."""
        with closing(self._connect()) as connection:
            connection.request(
                "GET", f"{self._thread}/events", headers={**self._headers, "Accept": "text/event-stream"}
            )
            answer = connection.getresponse()
            assert answer.status == 200
            assert answer.headers["Content-Type"].startswith("text/event-stream")
            yield answer


def until(answer: http.client.HTTPResponse, event: str) -> str:
    """Give the data of the next event of that name; ``TimeoutError`` where it does not come."""
    name = ""
    for raw in answer:
        field, _, value = raw.decode().rstrip("\n").partition(": ")
        if field == "event":
            name = value
        elif field == "data" and name == event:
            return value
    raise AssertionError(f"the stream ended before {event}")


def streams_at_once(url: str) -> None:
    """See that each event comes before the next one is sent, in a new thread and in one with a long snapshot."""
    for before in (0, 12):
        viewer = Viewer(url)
        for _ in range(before):
            viewer.say("word " * 200)
        with viewer.watch() as answer:
            assert (len(until(answer, "thread.snapshot")) > 4096) == bool(before)
            for text in ("one", "two"):
                viewer.say(text)
                assert text in until(answer, "thread.message.created")


# Caddy


def test_our_caddyfile_streams_at_once_and_the_doctor_finds_nothing(good: Deployment, tmp_path: Path) -> None:
    with behind_our_caddyfile(tmp_path, good.url.removeprefix("http://")) as url:
        streams_at_once(url)
        status, output = good.shell(f"{url}/assistream", SSL_CERT_FILE=str(CERTIFICATE))
    assert (status, failures(output)) == (0, [])
    assert "warn" not in output


def test_our_caddyfile_speaks_http_2_and_compresses_the_rest(good: Deployment, tmp_path: Path) -> None:
    with behind_our_caddyfile(tmp_path, good.url.removeprefix("http://")) as url:
        trust = ssl.create_default_context(cafile=str(CERTIFICATE))
        trust.set_alpn_protocols(["h2", "http/1.1"])
        port = int(url.rpartition(":")[2])
        with (
            socket.create_connection(("127.0.0.1", port), 20) as plain,
            trust.wrap_socket(plain, server_hostname="localhost") as encrypted,
        ):
            assert encrypted.selected_alpn_protocol() == "h2"
        trust = ssl.create_default_context(cafile=str(CERTIFICATE))
        with closing(http.client.HTTPSConnection("localhost", port, timeout=20, context=trust)) as connection:
            connection.request("GET", "/assistream/assistream.js", headers={"Accept-Encoding": "gzip"})
            assert connection.getresponse().headers["Content-Encoding"] == "gzip"


def test_a_caddy_that_compresses_nothing_is_good(good: Deployment, tmp_path: Path) -> None:
    with behind_caddy(tmp_path, good.url, "") as url:
        streams_at_once(url)
        assert good.doctor(f"{url}/assistream")[0] == 0


@pytest.mark.parametrize("encoding", ["gzip", "zstd"])
def test_a_caddy_that_compresses_event_streams_is_found(good: Deployment, tmp_path: Path, encoding: str) -> None:
    with behind_caddy(tmp_path, good.url, f"encode {encoding}", HEEDLESS) as url:
        status, output = good.doctor(f"{url}/assistream")
    compressed = f"the proxy, or the app, compresses event streams ({encoding})"
    # Since 2.9 it holds back nothing.
    assert status == 1
    assert [one for one in failures(output) if one != LONG] == [compressed]
    assert "fix: Caddy: give `encode` a `match` of Content-Types without text/event-stream" in output
    assert "nginx" not in output


def test_a_plain_encode_is_found_where_it_holds_a_thread_back(good: Deployment, tmp_path: Path) -> None:
    with behind_caddy(tmp_path, good.url, "encode gzip") as url:
        status, output = good.doctor(f"{url}/assistream")
        if status == 0:
            # Caddy 2.6.3 or newer.
            streams_at_once(url)
            return
        viewer = Viewer(url)
        viewer.say("word " * 200)
        with viewer.watch() as answer:
            assert answer.headers["Content-Encoding"] == "gzip"
    assert failures(output) == [LONG, GZIPPED]
    assert "     fix: stop the compression, as below; where that is not enough, Caddy: " in output
    assert "     fix: Caddy: give `encode` a `match` of Content-Types without text/event-stream" in output


def test_identity_is_no_compression(good: Deployment, tmp_path: Path) -> None:
    with behind_caddy(tmp_path, good.url, "encode gzip", "header_down Content-Encoding identity") as url:
        streams_at_once(url)
        assert good.doctor(f"{url}/assistream")[0] == 0


def test_a_caddy_that_hides_the_host_is_found(good: Deployment, tmp_path: Path) -> None:
    with behind_caddy(tmp_path, good.url, "", "header_up Host {upstream_hostport}") as url:
        status, output = good.doctor(f"{url}/assistream")
    assert (status, len(failures(output))) == (1, 1)
    assert "fix: Caddy: no `header_up Host` in `reverse_proxy`. Or add the origin" in output


# Lighttpd


DEFLATE = 'deflate.mimetypes = ("text/")\ndeflate.allowed-encodings = ("gzip")'


@pytest.mark.parametrize("value", [1, 2])
@pytest.mark.parametrize("deflate", [(), ("mod_deflate",)])
def test_a_lighttpd_that_streams_bodies_is_good(
    good: Deployment, tmp_path: Path, value: int, deflate: tuple[str, ...]
) -> None:
    settings = f"server.stream-response-body = {value}\n{DEFLATE if deflate else ''}"
    with behind_lighttpd(tmp_path, good.url, settings, *deflate) as url:
        streams_at_once(url)
        status, output = good.doctor(f"{url}/assistream")
    assert (status, failures(output)) == (0, [])


def test_lighttpd_as_it_comes_is_found_with_its_own_advice(good: Deployment, tmp_path: Path) -> None:
    with behind_lighttpd(tmp_path, good.url, "") as url:
        status, output = good.doctor(f"{url}/assistream")
    assert (status, failures(output)) == (1, [ALL])
    assert "fix: lighttpd: `server.stream-response-body = 2`" in output
    assert "nginx" not in output


def test_a_lighttpd_that_compresses_event_streams_is_found(good: Deployment, tmp_path: Path) -> None:
    with behind_lighttpd(tmp_path, good.url, DEFLATE, "mod_deflate") as url:
        status, output = good.doctor(f"{url}/assistream")
    assert (status, failures(output)) == (1, [ALL, GZIPPED])
    assert "fix: lighttpd: `server.stream-response-body = 2`" in output
    assert "fix: lighttpd: take text/event-stream, and prefixes of it such as text/, out of `deflate.mime" in output
    assert "nginx" not in output


# Others


class Relay(socketserver.ThreadingTCPServer):
    """A proxy without a name, for requests that get a chunked answer. It passes on what ``ready`` gives of the pieces
    that came, with the bytes that went on before."""

    daemon_threads = True

    def __init__(self, app: str, ready: Callable[[list[bytes], int], int]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.app, self.ready = app, ready


class _Handler(socketserver.BaseRequestHandler):
    server: Relay

    def handle(self) -> None:
        host, _, port = self.server.app.rpartition("//")[2].partition(":")
        with socket.create_connection((host, int(port)), 20) as app:
            request = b""
            while not _is_whole(request):
                request += self.request.recv(65_536)
            app.sendall(request)
            streams = request.startswith(b"GET")
            pieces: list[bytes] = []
            answer = b""
            sent = 0
            while not _is_whole(answer):
                piece = app.recv(65_536)
                answer += piece
                pieces.append(piece)
                count = self.server.ready(pieces, sent) if streams and not _is_whole(answer) else len(pieces)
                data = b"".join(pieces[:count])
                del pieces[:count]
                self.request.sendall(data)
                sent += len(data)


def _is_whole(message: bytes) -> bool:
    """Act as a slow machine, which sends a head before its body, so that the two may be read apart."""
    head, end, body = message.partition(b"\r\n\r\n")
    if b"chunked" in head.lower():
        return body.endswith(b"0\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head.lower())
    return bool(end) and len(body) >= (int(length[1]) if length else 0)


@contextmanager
def behind_relay(app: str, ready: Callable[[list[bytes], int], int]) -> Iterator[str]:
    with Relay(app, ready) as relay:
        thread = threading.Thread(target=relay.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{relay.server_address[1]}"
        finally:
            relay.shutdown()
            thread.join()


def from_four_kib(pieces: list[bytes], sent: int) -> int:
    return len(pieces) if sent + sum(map(len, pieces)) > 4096 else 0


def all_but_the_last(pieces: list[bytes], _: int) -> int:
    return len(pieces) - 1


def the_first_eight_kib(pieces: list[bytes], sent: int) -> int:
    return len(pieces) if sent < 8192 else 0


@pytest.mark.parametrize(
    ("ready", "said"),
    [
        (from_four_kib, "the proxy buffers what begins with few bytes, as a new thread's stream: its events came late"),
        (all_but_the_last, ALL),
        (the_first_eight_kib, LONG),
    ],
)
def test_a_proxy_that_holds_back_some_is_found(
    good: Deployment, ready: Callable[[list[bytes], int], int], said: str
) -> None:
    with behind_relay(good.url, ready) as url:
        status, output = good.shell(f"{url}/assistream")
    # Its Host is its own, as the browsers'.
    assert (status, failures(output)) == (1, [said])
    for name in ("nginx: `proxy_buffering off;`", "Caddy: no `buffer_resp", "lighttpd: `server.str", "others: no resp"):
        assert name in output


def test_a_proxy_that_passes_all_on_is_good(good: Deployment) -> None:
    with behind_relay(good.url, lambda pieces, _: len(pieces)) as url:
        assert good.shell(f"{url}/assistream")[0] == 0
