"""The nginx that the docs name: what it lets through, and what never reaches the app."""

from __future__ import annotations

import http.client
import socket
import ssl
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from assistream_flask.testing import OfflineServer
from tests.conftest import at_once
from tests.deploy.test_doctor import Deployment, failures
from tests.deploy.test_proxies import CERTIFICATE, ROOT, streams_at_once
from tests.programs import free_port, listening, program


@contextmanager
def behind_our_nginx(folder: Path, app: str, *changes: tuple[str, str]) -> Iterator[int]:
    """Give the port of an nginx with the file that the docs name, before ``app``."""
    nginx, port = program("nginx"), free_port()
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    paths = " ".join(f"{kind}_temp_path {folder / kind};" for kind in kinds)
    text = (ROOT / "deploy/nginx.conf").read_text()
    for old, new in (
        ("user www-data;", "user root;"),
        ("http {\n", f"http {{ access_log off; {paths}\n"),
        ("listen 80;", f"listen 127.0.0.1:{free_port()};"),
        ("listen 443 ", f"listen 127.0.0.1:{port} "),
        ("/etc/nginx/example.org.pem", str(CERTIFICATE)),
        ("/etc/nginx/example.org.key", str(CERTIFICATE)),
        ("server 127.0.0.1:8000;", f"server {app};"),
        *changes,
    ):
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    (folder / "nginx.conf").write_text(text)
    command = f"daemon off; pid {folder}/nginx.pid; error_log stderr;"
    with listening(folder, port, nginx, "-p", folder, "-c", folder / "nginx.conf", "-g", command):
        yield port


class _App(BaseHTTPRequestHandler):
    """Answers at once, and counts."""

    server: Counting
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.do_GET()

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def handle(self) -> None:
        self.server.connections += 1
        super().handle()

    def log_message(self, *_: object) -> None:
        pass


class Counting(ThreadingHTTPServer):
    connections = 0


@pytest.fixture
def counting() -> Iterator[Counting]:
    with Counting(("127.0.0.1", 0), _App) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def connected(port: int) -> ssl.SSLSocket:
    plain = socket.create_connection(("127.0.0.1", port), 20)
    return ssl.create_default_context(cafile=str(CERTIFICATE)).wrap_socket(plain, server_hostname="localhost")


def statuses(port: int, method: str, count: int) -> Counter[int]:
    """Ask so often, as fast as it is answered."""
    trust = ssl.create_default_context(cafile=str(CERTIFICATE))
    found: Counter[int] = Counter()
    with closing(http.client.HTTPSConnection("localhost", port, timeout=20, context=trust)) as line:
        for _ in range(count):
            line.request(method, "/assistream/threads", b"{}" if method == "POST" else None)
            answer = line.getresponse()
            answer.read()
            found[answer.status] += 1
    return found


def test_our_nginx_streams_at_once_and_the_doctor_finds_nothing(tmp_path: Path) -> None:
    (folder := tmp_path / "nginx").mkdir()
    with (
        OfflineServer() as server,
        Deployment(tmp_path, server.base_url) as app,
        behind_our_nginx(folder, app.url.removeprefix("http://")) as port,
    ):
        streams_at_once(f"https://localhost:{port}")
        status, output = app.shell(f"https://localhost:{port}/assistream", SSL_CERT_FILE=str(CERTIFICATE))
    assert (status, failures(output)) == (0, [])
    assert "warn" not in output


def test_a_flood_of_commands_is_429_and_reading_goes_on(counting: Counting, tmp_path: Path) -> None:
    with behind_our_nginx(tmp_path, f"127.0.0.1:{counting.server_port}") as port:
        found: Counter[int] = sum(at_once(4, lambda _: statuses(port, "POST", 200)), Counter())
        assert set(found) == {200, 429}
        assert found[200] >= 100
        assert statuses(port, "GET", 100) == {200: 100}


def test_a_flood_of_requests_is_429(counting: Counting, tmp_path: Path) -> None:
    change = ("zone=assistream_requests burst=500", "zone=assistream_requests burst=20")
    with behind_our_nginx(tmp_path, f"127.0.0.1:{counting.server_port}", change) as port:
        found: Counter[int] = sum(at_once(4, lambda _: statuses(port, "GET", 100)), Counter())
    assert set(found) == {200, 429}
    assert found[200] >= 20


def test_more_connections_than_one_address_may_have_are_429(counting: Counting, tmp_path: Path) -> None:
    change = ("limit_conn assistream_connections 1000;", "limit_conn assistream_connections 2;")
    with behind_our_nginx(tmp_path, f"127.0.0.1:{counting.server_port}", change) as port:
        # A connection is one from its header on.
        waiting = [connected(port) for _ in range(2)]
        for one in waiting:
            one.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n")
        with connected(port) as another:
            another.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert another.recv(4096).startswith(b"HTTP/1.1 429 ")
        for one in waiting:
            one.close()


@pytest.mark.parametrize("rest", [b"", b"ngth: 9\r\n\r\n{"], ids=["header", "body"])
def test_what_is_sent_by_half_never_reaches_the_app_and_is_cut_off(
    counting: Counting, tmp_path: Path, rest: bytes
) -> None:
    changes = [(f"client_{part}_timeout 10s;", f"client_{part}_timeout 1s;") for part in ("header", "body")]
    with behind_our_nginx(tmp_path, f"127.0.0.1:{counting.server_port}", *changes) as port:
        with connected(port) as slow:
            slow.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Le" + rest)
            assert statuses(port, "GET", 1) == {200: 1}
            # It waits for the rest, then for no longer.
            assert slow.recv(4096)[:13] in (b"", b"HTTP/1.1 408 ")
        assert counting.connections == 1
