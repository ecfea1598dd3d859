"""`flask assistream doctor`: a good deployment, broken ones, and what it says of each."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from unittest import mock

import click
import openai
import pytest
from click.testing import CliRunner
from flask import Flask

from assistream_flask import Assistant, McpServer, create_blueprint
from assistream_flask.settings import Settings
from assistream_flask.store.sql import StoredAnswer
from assistream_flask.testing import OfflineServer
from assistream_flask.web import doctor
from tests.conftest import KEY, MakeApp, wait_until
from tests.gunicorn_server import Gunicorn
from tests.mcp_server import mcp_server
from tests.postgres_server import PostgresServer
from tests.programs import BUFFERS, HOST, behind_nginx, free_port
from tests.redis_server import RedisServer

APP = """
import json, os, time
from flask import Flask, redirect
from werkzeug.middleware.proxy_fix import ProxyFix
from assistream_flask import Assistant, create_blueprint

app = Flask(__name__)
app.wsgi_app = ProxyFix(app.wsgi_app)
app.config.update(SECRET_KEY="long enough for a test", **json.loads(os.environ["APP_CONFIG"]))
app.register_blueprint(create_blueprint([Assistant("tutor", model="m")]), url_prefix="/assistream")

@app.get("/page")
@app.get("/page/doctor")
def page():
    return "<!doctype html><title>test</title>"

@app.get("/compute")
def compute():
    end = time.monotonic() + 4
    while time.monotonic() < end:
        pass
    return "done"

@app.get("/moved/doctor")
def moved():
    return redirect("https://example.org")

@app.get("/private/doctor")
def private():
    return "Sign in", 401
"""
PROCESSES = """
import pathlib, sys
from werkzeug.serving import make_server
from live_app import app

server = make_server("127.0.0.1", 0, app, processes=2)
(part := pathlib.Path(sys.argv[1] + ".part")).write_text(str(server.port))
part.rename(sys.argv[1])
server.serve_forever()
"""
GZIP = f"{HOST} gzip on; gzip_types text/event-stream;"


class _Locked(BaseHTTPRequestHandler):
    """A model server that knows no key; what it says repeats the one it got, as OpenAI's does."""

    def do_GET(self) -> None:
        key = self.headers["Authorization"]
        body = json.dumps({"error": {"message": f"Incorrect API key provided: {key}", "code": "invalid_api_key"}})
        self.send_response(401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def locked() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Locked) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()
        thread.join()


class Deployment(Gunicorn):
    """The app under gunicorn, started with ``options``, and the shell of its operator."""

    def __init__(
        self, folder: Path, model_url: str, *options: str, worker_class: str = "gevent", **settings: Any
    ) -> None:
        super().__init__(folder, app=APP, worker_class=worker_class, **settings)
        self._shell = folder
        self.env.update(OPENAI_BASE_URL=model_url, OPENAI_API_KEY=KEY, GUNICORN_CMD_ARGS=" ".join(options))

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def doctor(self, url: str) -> tuple[int, str]:
        """Give the exit status and the output of the command, run in this process: to start one takes longer."""
        with mock.patch.dict(os.environ, self.env):
            app: Flask = runpy.run_path(str(self._shell / "live_app.py"))["app"]
            result = app.test_cli_runner().invoke(args=["assistream", "doctor", "--url", url])
            # It is closed with its process, else.
            app.extensions["assistream"].parts["assistream"].client().close()
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
        assert result.stderr == ""
        assert KEY not in result.stdout
        return result.exit_code, result.stdout

    def shell(self, url: str | None, **env: str) -> tuple[int, str]:
        """Give the same of the command that an operator gives a shell."""
        command = [sys.executable, "-m", "flask", "--app", "live_app", "assistream", "doctor"]
        command += ["--url", url] if url is not None else []
        done = subprocess.run(
            command, cwd=self._shell, env={**self.env, **env}, capture_output=True, text=True, timeout=120
        )
        assert done.stderr == ""
        assert KEY not in done.stdout
        return done.returncode, done.stdout


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with OfflineServer() as server, Deployment(tmp_path_factory.mktemp("good"), server.base_url) as gunicorn:
        yield gunicorn


def failures(output: str) -> list[str]:
    """Give what failed; each has its fix below it."""
    lines = output.splitlines()
    for line, after in zip(lines, [*lines[1:], ""], strict=True):
        assert after.startswith("     fix: ") == line.startswith(("FAIL", "warn")), output
    return [line.removeprefix("FAIL ") for line in lines if line.startswith("FAIL")]


def test_a_good_deployment_has_nothing_to_mend(good: Deployment, tmp_path: Path) -> None:
    with behind_nginx(tmp_path, good.url, HOST) as url:
        status, output = good.shell(f"{url}/assistream")
    lines = output.splitlines()
    assert (status, [line for line in lines if not line.startswith("ok ")]) == (0, [])
    for said in (
        "database sqlite",
        "uses this database",
        "in the worker: gunicorn/",
        "patched by gevent",
        "in the worker: model server of 'assistream' at 127.0.0.1 takes the key",
        "ok   the clock agrees with the database's",
        "in the worker: the clock agrees with the database's",
        "in the worker: within ten minutes it stood still for",
        "in the worker: this request comes from 127.0.0.1",
        "one by one",
        "not compressed",
        "the host that browsers see",
    ):
        assert said in output


def test_a_server_without_a_proxy_is_good_too(good: Deployment) -> None:
    assert good.doctor(f"{good.url}/assistream/")[0] == 0


def test_a_worker_that_stood_still_is_warned_of(tmp_path: Path) -> None:
    with OfflineServer() as server, Deployment(tmp_path, server.base_url) as gunicorn:
        gunicorn.get("/assistream/assistants")
        with urllib.request.urlopen(f"{gunicorn.url}/compute", timeout=30) as answer:
            assert answer.read() == b"done"
        status, output = gunicorn.doctor(f"{gunicorn.url}/assistream")
    assert (status, failures(output)) == (0, [])
    assert "\nwarn in the worker: within ten minutes it stood still for" in output


def test_two_workers_with_redis_between_them_are_good(good: Deployment, own_redis: RedisServer, tmp_path: Path) -> None:
    model_url = good.env["OPENAI_BASE_URL"]
    with Deployment(tmp_path, model_url, "--workers 2", redis_url=own_redis.url) as gunicorn:
        status, output = gunicorn.doctor(f"{gunicorn.url}/assistream")
    assert (status, failures(output)) == (0, [])
    assert f"ok   in the worker: Redis at 127.0.0.1:{own_redis.port}/0" in output


def test_without_a_url_it_says_that_the_worker_was_not_looked_at(good: Deployment) -> None:
    status, output = good.shell(None)
    assert (status, failures(output)) == (0, [])
    assert "warn workers and proxy were not looked at\n     fix: give the public address with --url" in output


# Broken deployments


def test_a_sync_worker_is_found(good: Deployment, tmp_path: Path) -> None:
    with Deployment(tmp_path, good.env["OPENAI_BASE_URL"], worker_class="sync") as gunicorn:
        status, output = gunicorn.doctor(f"{gunicorn.url}/assistream")
    assert (status, failures(output)) == (1, ["the worker class is sync, so one event stream holds up all else"])
    assert "fix: run gunicorn with --worker-class gevent" in output


def test_late_patching_is_found(good: Deployment, tmp_path: Path) -> None:
    with Deployment(tmp_path, good.env["OPENAI_BASE_URL"], "--preload") as gunicorn:
        status, output = gunicorn.doctor(f"{gunicorn.url}/assistream")
    assert (status, len(failures(output))) == (1, 1)
    assert "FAIL in the worker: gevent patched late" in output
    assert "fix: drop gunicorn's --preload, or make `from gevent import monkey; monkey.patch_all()`" in output


def test_preloading_what_gevent_has_patched_is_fine(good: Deployment, tmp_path: Path) -> None:
    (tmp_path / "gunicorn.conf.py").write_text("from gevent import monkey; monkey.patch_all()\n")
    with Deployment(tmp_path, good.env["OPENAI_BASE_URL"], "--preload") as gunicorn:
        status, output = gunicorn.doctor(f"{gunicorn.url}/assistream")
    assert (status, failures(output)) == (0, [])


def test_a_proxy_that_buffers_is_found(good: Deployment, tmp_path: Path) -> None:
    with behind_nginx(tmp_path, good.url, BUFFERS) as url:
        status, output = good.doctor(f"{url}/assistream")
    assert (status, failures(output)) == (1, ["the proxy buffers: all events came at once, at the end"])
    assert "fix: nginx: `proxy_buffering off;`" in output


def test_a_proxy_that_hides_the_visitors_addresses_is_found(good: Deployment, tmp_path: Path) -> None:
    with behind_nginx(tmp_path, good.url, "proxy_set_header Host $http_host;") as url:
        status, output = good.doctor(f"{url}/assistream")
    assert (status, failures(output)) == (0, [])
    assert "warn in the worker: all visitors have the proxy's address, 127.0.0.1: there are no limits for" in output
    assert "     fix: app.wsgi_app = ProxyFix(app.wsgi_app, x_for=1), from werkzeug.middleware.proxy_fix" in output


def test_compression_is_found(good: Deployment, tmp_path: Path) -> None:
    with behind_nginx(tmp_path, good.url, GZIP) as url:
        status, output = good.doctor(f"{url}/assistream")
    assert (status, failures(output)) == (1, ["the proxy, or the app, compresses event streams (gzip)"])
    assert "`gzip_types`" in output


def test_how_a_worker_ends_is_told(good: Deployment, tmp_path: Path) -> None:
    options = ("--max-requests 1000", "--graceful-timeout 10", "--keep-alive 0")
    with Deployment(tmp_path, good.env["OPENAI_BASE_URL"], *options) as gunicorn:
        status, output = gunicorn.doctor(f"{gunicorn.url}/assistream")
    assert (status, failures(output)) == (0, [])
    assert "warn in the worker: gunicorn ends its workers after 10 s, before answers had" in output
    assert "ok   in the worker: a worker that has served 1000 requests (--max-requests) ends between answers" in output
    assert "warn in the worker: with a --keep-alive of 0 gunicorn waits for a request's headers for ever" in output


def test_a_limit_of_requests_that_is_not_in_our_hands_is_found(good: Deployment, tmp_path: Path) -> None:
    # As of a worker class that counts otherwise.
    elsewhere = "type(worker).max_requests = vars(worker).pop('max_requests')"
    (tmp_path / "gunicorn.conf.py").write_text(f"def post_worker_init(worker): {elsewhere}\n")
    with Deployment(tmp_path, good.env["OPENAI_BASE_URL"], "--max-requests 1000") as gunicorn:
        status, output = gunicorn.doctor(f"{gunicorn.url}/assistream")
    assert (status, failures(output)) == (0, [])
    assert "warn in the worker: a worker that has served 1000 requests (--max-requests) ends in the midst" in output


def test_an_app_that_handles_sigterm_itself_is_found(good: Deployment, tmp_path: Path) -> None:
    with Deployment(tmp_path, good.env["OPENAI_BASE_URL"]) as gunicorn:
        gunicorn.stop()
        module = tmp_path / "live_app.py"
        module.write_text(
            f"import os, signal\nsignal.signal(signal.SIGTERM, lambda *_: os._exit(0))\n{module.read_text()}"
        )
        gunicorn.start()
        status, output = gunicorn.doctor(f"{gunicorn.url}/assistream")
    assert (status, failures(output)) == (0, [])
    assert "warn in the worker: the app handles SIGTERM itself" in output


def test_two_workers_without_redis_are_found(good: Deployment, tmp_path: Path) -> None:
    database = json.loads(good.env["APP_CONFIG"])["ASSISTREAM_DATABASE_URL"]
    with Deployment(tmp_path, good.env["OPENAI_BASE_URL"], database_url=database) as another:
        upstream = f"server {good.url[7:]}; server {another.url[7:]};"
        with behind_nginx(tmp_path, "http://both", HOST, upstream) as url:
            status, output = good.doctor(f"{url}/assistream")
    assert (status, failures(output)) == (1, ["several workers serve, each with an event log of its own"])
    assert "fix: set ASSISTREAM_REDIS_URL, or run gunicorn with --workers 1" in output


def test_several_processes_without_redis_are_found(good: Deployment, tmp_path: Path) -> None:
    # Gunicorn does not even start so; other servers do.
    command = [sys.executable, "-c", PROCESSES, str(tmp_path / "port")]
    (tmp_path / "live_app.py").write_text(APP)
    with subprocess.Popen(command, cwd=tmp_path, env=good.env, stderr=subprocess.DEVNULL) as process:
        try:
            wait_until((tmp_path / "port").exists, 20)
            status, output = good.doctor(f"http://127.0.0.1:{(tmp_path / 'port').read_text()}/assistream")
        finally:
            process.terminate()
    assert (status, failures(output)) == (1, ["several workers serve, each with an event log of its own"])


def test_a_wrong_key_is_found_here_and_in_the_worker(tmp_path: Path) -> None:
    with locked() as model_url, Deployment(tmp_path, model_url) as gunicorn:
        status, output = gunicorn.shell(f"{gunicorn.url}/assistream")
    refused = "model server of 'assistream' at 127.0.0.1 refuses the key (401)"
    assert (status, failures(output)) == (1, [refused, f"in the worker: {refused}"])
    assert "fix: set OPENAI_API_KEY" in output


def test_a_proxy_that_hides_the_host_is_found(good: Deployment, tmp_path: Path) -> None:
    with behind_nginx(tmp_path, good.url, "") as url:
        status, output = good.doctor(f"{url}/assistream")
    assert (status, len(failures(output))) == (1, 1)
    assert "their commands are refused\n     fix: nginx: `proxy_set_header Host $http_host;`" in output


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("{url}/assistream", "does not use this shell's database, or the URL is not the blueprint's"),
        ("{url}/elsewhere", "does not use this shell's database, or the URL is not the blueprint's"),
        ("{url}/page", "something else than the blueprint answers at the URL"),
        ("{url}/moved", "the URL answers 302 and leads to https://example.org"),
        ("{url}/private", "the URL answers 401"),
        ("{closed}/assistream", "Connection refused"),
        ("https{tls}/assistream", "cannot be read"),
        ("{url}/assist ream", "cannot be read"),
        ("example.org/assistream", "--url is not a URL"),
        ("http://[::1/assistream", "--url is not a URL"),
        ("http://host:port/assistream", "--url is not a URL"),
    ],
)
def test_another_database_or_another_url_than_the_servers_is_found(good: Deployment, url: str, said: str) -> None:
    output = examine(url=url.format(url=good.url, closed=closed("http"), tls=good.url.removeprefix("http")))
    assert len(failures(output)) == 1
    assert said in output


# What the shell sees


def closed(scheme: str) -> str:
    """Give a URL with a password where nothing listens."""
    return f"{scheme}://:pa55@127.0.0.1:{free_port()}"


class _Part:
    owner: Callable[[], str | None] | None = None

    def __init__(self, make: Callable[[], openai.OpenAI]) -> None:
        self._make = make

    def client(self) -> openai.OpenAI:
        return self._make()

    def mcp_servers(self) -> list[Any]:
        return []


def examine(
    client: Callable[[], openai.OpenAI] | None = None,
    *,
    url: str | None = None,
    secret_key: str = "long enough for a test",
    has_logins: bool = False,
    **settings: Any,
) -> str:
    """Give what the command says of an app with these ``settings``, which are taken unread."""
    settings.setdefault("database_url", "sqlite://")
    parts = {"assistream": _Part(client)} if client else {}
    patient = doctor.Patient(Settings(**settings), parts, secret_key, True, has_logins=has_logins)
    result = CliRunner().invoke(click.command()(doctor.command(lambda: patient)), ["--url", url] if url else [])
    assert result.exit_code == bool(failures(result.output))
    assert "pa55" not in result.output
    return result.output


def test_redis_is_named_with_its_version_and_round_trip(own_redis: RedisServer) -> None:
    output = examine(redis_url=own_redis.url)
    assert failures(output) == []
    assert f"ok   Redis at 127.0.0.1:{own_redis.port}/0: version " in output
    assert " ms" in output


def test_a_redis_that_may_drop_logs_is_warned_of(own_redis: RedisServer) -> None:
    own_redis.ask("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    assert "warn" not in examine(redis_url=own_redis.url).partition("Redis")[2].partition("database")[0]
    own_redis.ask("CONFIG", "SET", "maxmemory", "100mb")
    output = examine(redis_url=own_redis.url)
    assert failures(output) == []
    assert "(maxmemory-policy allkeys-lru)" in output
    assert "fix: set maxmemory-policy to noeviction" in output


def test_a_redis_that_wants_another_password_is_found(own_redis: RedisServer) -> None:
    own_redis.ask("CONFIG", "SET", "requirepass", "another")
    output = examine(redis_url=own_redis.url.replace("//", "//:pa55@"))
    assert len(failures(output)) == 1
    assert "the password in it" in output


@pytest.mark.parametrize(
    "url",
    [closed("redis"), "rediss://:pa55@127.0.0.1", "redis://:pa55@127.0.0.1:pa55"],
    ids=["away", "no TLS", "no port"],
)
def test_a_redis_that_is_away_or_misnamed_is_found(url: str) -> None:
    output = examine(redis_url=url)
    assert len(failures(output)) == 1
    assert "ASSISTREAM_REDIS_URL" in output


def test_an_old_redis_is_refused(own_redis: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_REDIS", (99, 0))
    assert "is too old\n     fix: run Redis 99.0 or newer" in examine(redis_url=own_redis.url)


def test_postgresql_is_named_with_its_version(postgres: PostgresServer) -> None:
    output = examine(database_url=postgres.new_database())
    assert failures(output) == []
    assert "ok   database postgresql" in output


@pytest.mark.parametrize(
    "url", [closed("postgresql+psycopg") + "/app", "sqlite:////no/such/folder/x.sqlite3"], ids=["away", "no folder"]
)
def test_a_database_that_is_away_is_found(url: str) -> None:
    output = examine(database_url=url)
    assert len(failures(output)) == 1
    assert "fix: start it, or correct ASSISTREAM_DATABASE_URL" in output


def test_a_model_server_that_is_away_is_found() -> None:
    output = examine(lambda: openai.OpenAI(api_key="pa55", base_url=closed("http")))
    assert len(failures(output)) == 1
    assert "cannot be reached" in output
    assert "OPENAI_BASE_URL" in output


def test_no_key_at_all_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert "there is no key\n     fix: set OPENAI_API_KEY" in examine(openai.OpenAI)


def test_a_short_key_for_sessions_is_warned_of(server: OfflineServer) -> None:
    output = examine(server.client, secret_key="dev")
    assert failures(output) == []
    assert "warn SECRET_KEY is short" in output


def test_logins_without_an_owner_are_warned_of(server: OfflineServer, monkeypatch: pytest.MonkeyPatch) -> None:
    output = examine(server.client, has_logins=True)
    assert failures(output) == []
    assert "warn the app has logins, and 'assistream' knows browsers, not users" in output
    assert "owner=lambda: current_user.get_id()" in output
    monkeypatch.setattr(_Part, "owner", lambda: "me")
    assert "logins" not in examine(server.client, has_logins=True)


def test_each_mcp_server_is_asked_for_its_tools(server: OfflineServer, tmp_path: Path) -> None:
    app = Flask("mcp", instance_path=str(tmp_path))
    app.secret_key = "long enough for a test"

    def no_headers() -> dict[str, str]:
        raise KeyError("pa55")

    with mcp_server(tmp_path / "mcp") as mcp, server.client() as client:
        given: dict[str, Any] = {"dice": {}, "few": {"allowed": ["add", "roll"]}, "bad": {"headers": no_headers}}
        servers = [McpServer(mcp.url, name=name, **options) for name, options in given.items()]
        away = McpServer(f"http://127.0.0.1:{free_port()}/mcp?key=pa55", name="away", headers={"Authorization": "pa55"})
        blueprint = create_blueprint([Assistant("tutor", model="m", mcp=[*servers, away])], client=client)
        app.register_blueprint(blueprint, url_prefix="/assistream")
        result = app.test_cli_runner().invoke(args=["assistream", "doctor"])
    assert "ok   MCP server 'dice' at 127.0.0.1 answers; models are told of 7 tools" in result.output
    assert "warn MCP server 'few' at 127.0.0.1 has no tool 'roll'\n     fix: correct allowed=" in result.output
    assert "warn MCP server 'bad' at 127.0.0.1 was not asked: headers= raised KeyError" in result.output
    assert failures(result.output) == ["MCP server 'away' at 127.0.0.1 gives no list of tools: unreachable"]
    assert "pa55" not in result.output


def test_two_blueprints_of_one_app_share_the_command(server: OfflineServer, tmp_path: Path) -> None:
    app = Flask("two", instance_path=str(tmp_path))
    app.secret_key = "long enough for a test"
    with server.client() as client:
        for name in ("one", "two"):
            blueprint = create_blueprint([Assistant("tutor", model="m")], client=client, name=name)
            app.register_blueprint(blueprint, url_prefix=f"/{name}")
        result = app.test_cli_runner().invoke(args=["assistream", "doctor"])
    assert result.exit_code == 0
    assert "model server of 'one'" in result.output
    assert "model server of 'two'" in result.output


# Strangers


def test_threads_that_compute_for_nobody_are_counted() -> None:
    *_, told = doctor._health(doctor.Health(0.2, None, 3))
    assert (told.level, "3 threads" in told.text) == ("warn", True)
    assert [one.level for one in doctor._health(doctor.Health(0.2, None))] == ["ok"]


def test_a_clock_that_differs_from_the_databases_is_warned_of() -> None:
    ahead, behind, right = (next(doctor._health(doctor.Health(0.2, skew))) for skew in (9.5, -60.2, 1.9))
    assert (ahead.level, ahead.text) == ("warn", "the clock is 10 s ahead of the database's")
    assert (behind.level, behind.text) == ("warn", "the clock is 60 s behind the database's")
    assert right.level == "ok"


@pytest.mark.parametrize("key", [None, "", "guess", "0" * 64, "\x7f" * 64])
def test_who_has_no_key_finds_nothing_there(make_app: MakeApp, key: str | None) -> None:
    client = make_app().test_client()
    there = client.get("/assistream/doctor", headers={doctor.HEADER: key} if key is not None else {})
    nowhere = client.get("/assistream/nowhere")
    assert (there.status_code, there.get_json()) == (404, nowhere.get_json())
    assert dict(there.headers) == dict(nowhere.headers)


def test_a_key_ends_with_its_minute(make_app: MakeApp, monkeypatch: pytest.MonkeyPatch) -> None:
    app = make_app()
    client = app.test_client()
    assert client.get("/assistream/assistants").status_code == 200
    store = app.extensions["assistream"].runtime().store
    for key, seconds, status in (("a" * 64, -1, 404), ("b" * 64, 30, 200)):
        answer = StoredAnswer(key, "", 0, {"expires": time.time() + seconds})
        store.remember(doctor._WHERE, answer)
        assert client.head("/assistream/doctor", headers={doctor.HEADER: key}).status_code == status
