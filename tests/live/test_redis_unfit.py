"""A Redis that cannot be used is said to be so, and what to do: in the log, to whoever asks, and by the doctor."""

from __future__ import annotations

import contextlib
import logging
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from assistream_flask.events import Event
from assistream_flask.log import redis as redis_log
from assistream_flask.log import redis_requirements
from assistream_flask.log.protocol import LogUnavailableError
from assistream_flask.log.redis import RedisLog
from tests.conftest import Caller, MakeApp, wait_until
from tests.deploy.test_doctor import examine, failures
from tests.programs import free_port, listening, program
from tests.redis_server import DOCUMENTED, RedisServer, running_redis

CERTIFICATE = Path(__file__).resolve().parent.parent / "localhost.pem"
THREAD = "thread_" + "a" * 32
RIGHTS = [right for right in DOCUMENTED.split() if right[0] in "+~&" and right != "-@all"]
CLUSTER = "it is a Redis Cluster, or a Sentinel, which assistream cannot use: in ASSISTREAM_REDIS_URL give one Redis"
REPLICA = "it is a replica, which takes no writes: in ASSISTREAM_REDIS_URL give the primary's address"
SCRIPTS = "it lacks commands that are needed: in ASSISTREAM_REDIS_URL give a Redis that runs Lua scripts"
FULL = "it is full: raise its maxmemory, or give assistream a Redis of its own"
DISK = "it cannot save to its disk, and takes no writes: run it with `--save ''`, or make room there"
UNKNOWN = "its certificate is of no authority that is known here: add ?ssl_ca_certs="
PASSWORD = "it refuses the user or the password: correct ASSISTREAM_REDIS_URL and the password in it"


@contextlib.contextmanager
def logging_to(url: str) -> Iterator[RedisLog]:
    log = RedisLog(url)
    try:
        yield log
    finally:
        log.close()


def works(log: RedisLog) -> bool:
    """Tell whether a viewer of it hears what is told."""
    try:
        with contextlib.closing(log.subscribe(THREAD, log.end(THREAD))) as reader:
            log.append(THREAD, [Event("e", cast(Any, {"n": 1}))])
            return len(reader.read(5)) == 1
    except LogUnavailableError:
        return False


def refusal(log: RedisLog) -> str:
    """Give what a viewer is told."""
    with pytest.raises(LogUnavailableError) as told:
        log.subscribe(THREAD, log.end(THREAD))
    return str(told.value)


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]


def check_said(url: str, what: str, caplog: pytest.LogCaptureFixture) -> None:
    """Check that a worker says it once, in one line, however often it tries again; and a viewer and the doctor too."""
    with logging_to(url) as log:
        wait_until(lambda: errors(caplog))
        assert what in refusal(log)
        time.sleep(1.5)
        (line,) = errors(caplog)
        assert what in line
    output = examine(redis_url=url)
    (failed,) = failures(output)
    problem, _, fix = what.partition(": ")
    assert problem in failed
    assert f"fix: {fix}" in output


# Rights


def test_all_that_scripts_and_client_ask_for_is_what_the_docs_allow() -> None:
    scripts = [file.read_text() for file in Path(redis_log.__file__).parent.glob("lua/*.lua")]
    called = set(re.findall(r"redis\.call\('(\w+)'(?:, '(USAGE|NUMSUB)')?", "".join(scripts)))
    assert called
    assert {f"+{'|'.join(filter(None, one)).lower()}" for one in called} <= set(RIGHTS)
    assert set(redis_requirements.RULE.split()) == set(RIGHTS)


@pytest.mark.parametrize("right", RIGHTS)
def test_a_user_that_lacks_a_right_is_told_which_and_what_it_is_told_mends_that(
    redis_server: RedisServer, caplog: pytest.LogCaptureFixture, right: str
) -> None:
    url = redis_server.url_of(" ".join(one for one in DOCUMENTED.split() if one != right), 5)
    with logging_to(url) as log:
        wait_until(lambda: errors(caplog))
        (line,) = errors(caplog)
        told = re.search(r"as its admin run `ACL SETUSER <user> (.*)`$", line)
        assert told is not None, line
        # Without SELECT it cannot even try the others.
        assert told[1] == (redis_requirements.RULE if right == "+select" else right)
        assert told[0] in refusal(log)
        output = examine(redis_url=url)
        assert len(failures(output)) == 1
        assert f"fix: {told[0]}" in output
        redis_server.ask("ACL", "SETUSER", "user5", *told[1].split())
        wait_until(lambda: works(log))
        assert failures(examine(redis_url=url)) == []


def test_a_right_that_is_taken_away_later_is_told_too(
    redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    with logging_to(redis_server.url_of(DOCUMENTED, 6)) as log:
        wait_until(lambda: works(log))
        redis_server.ask("ACL", "SETUSER", "user6", "-xadd")
        with pytest.raises(
            LogUnavailableError, match=re.escape(f"ACL SETUSER <user> {redis_requirements.RULE}")
        ) as told:
            log.append(THREAD, [Event("e", cast(Any, {"n": 1}))])
        assert errors(caplog) == [f"Redis cannot be used: {told.value}"]


# Other servers


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[RedisServer]:
    with running_redis(tmp_path, "--cluster-enabled", "yes", "--cluster-port", str(free_port())) as server:
        yield server


@pytest.mark.parametrize("database", [0, 1])
@pytest.mark.parametrize("serves", [True, False], ids=["with slots", "without"])
def test_a_redis_cluster_is_named_and_what_to_do(
    cluster: RedisServer, caplog: pytest.LogCaptureFixture, make_app: MakeApp, serves: bool, database: int
) -> None:
    if serves:
        cluster.ask("CLUSTER", "ADDSLOTSRANGE", "0", "16383")
        wait_until(lambda: "cluster_state:ok" in str(cluster.ask("CLUSTER", "INFO")))
    url = cluster.url.removesuffix("0") + str(database)
    check_said(url, CLUSTER, caplog)
    caller = Caller(make_app(redis_url=url))
    asks: list[Callable[[FlaskClient], TestResponse]] = [
        lambda client: client.post(f"{caller.url}/messages", json={"content": "Hi"}),
        lambda client: client.get(f"{caller.url}/messages"),
        lambda client: client.get(f"{caller.url}/events"),
        lambda client: client.delete(caller.url),
    ]
    for ask in asks:
        answer = ask(caller.client)
        assert answer.status_code == 503
        error = answer.get_json()["error"]
        assert error["code"] == "log_unavailable"
        assert error["message"].startswith(f"The event log cannot be used: {CLUSTER}")


def test_a_redis_sentinel_is_named_and_what_to_do(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    port = free_port()
    file = tmp_path / "sentinel.conf"
    file.write_text(f"port {port}\nbind 127.0.0.1\n")
    with listening(tmp_path, port, program("redis-server"), file, "--sentinel"):
        check_said(f"redis://127.0.0.1:{port}/0", CLUSTER, caplog)


def test_a_user_with_the_documented_rights_works_over_tls_and_an_unknown_certificate_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    port = free_port()
    options = ["--tls-port", str(port), "--tls-auth-clients", "no"]
    for kind in ("cert", "key"):
        options += [f"--tls-{kind}-file", str(CERTIFICATE)]
    with running_redis(tmp_path, *options) as server:
        plain = server.url_of(DOCUMENTED, 3)
        url = plain.replace("redis://", "rediss://").replace(f"127.0.0.1:{server.port}", f"localhost:{port}")
        with logging_to(f"{url}?ssl_ca_certs={CERTIFICATE}") as log:
            wait_until(lambda: works(log))
        check_said(url, UNKNOWN, caplog)


def test_a_replica_is_named_and_works_once_it_is_the_primary(
    own_redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    own_redis.ask("REPLICAOF", "127.0.0.1", "1")
    check_said(own_redis.url, REPLICA, caplog)
    with logging_to(own_redis.url) as log:
        assert not works(log)
        own_redis.ask("REPLICAOF", "NO", "ONE")
        wait_until(lambda: works(log))


def test_a_redis_that_runs_no_scripts_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with running_redis(tmp_path, "--rename-command", "EVALSHA", "") as server:
        check_said(server.url, SCRIPTS, caplog)


def test_a_full_redis_is_named(own_redis: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    own_redis.ask("CONFIG", "SET", "maxmemory", "1")
    check_said(own_redis.url, FULL, caplog)


def test_a_redis_that_cannot_save_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    with running_redis(folder) as server:
        server.ask("CONFIG", "SET", "save", "3600 1")
        folder.rmdir()
        server.ask("SET", "a", "b")
        server.ask("BGSAVE")
        wait_until(lambda: "'rdb_last_bgsave_status': 'err'" in str(server.ask("INFO", "persistence")))
        check_said(server.url, DISK, caplog)


def test_a_refused_password_is_named(own_redis: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    own_redis.ask("CONFIG", "SET", "requirepass", "another")
    check_said(own_redis.url.replace("//", "//:pa55@"), PASSWORD, caplog)


def test_what_is_not_known_of_an_error_is_logged_as_redis_said_it(
    own_redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    with logging_to(own_redis.url) as log:
        wait_until(lambda: works(log))
        own_redis.ask("SET", f"assistream:0:{THREAD}", "no stream")
        with pytest.raises(LogUnavailableError):
            log.append(THREAD, [Event("e", cast(Any, {"n": 1}))])
    assert "WRONGTYPE Operation against a key holding the wrong kind of value" in caplog.text


# A failover


class Address:
    """An address that leads to another server from one moment on; connections stay where they are."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._ends: list[socket.socket] = []
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._socket.getsockname()[1]}/0"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                ends = self._socket.accept()[0], socket.create_connection(("127.0.0.1", self.port))
                self._ends += ends
                for one in (ends, ends[::-1]):
                    threading.Thread(target=self._pass, args=one, daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65_536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        for one in (self._socket, *self._ends):
            one.close()


def test_after_a_failover_the_new_primary_is_used_though_no_connection_broke(
    own_redis: RedisServer, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    with (
        running_redis(tmp_path / "other") as other,
        contextlib.closing(Address(own_redis.port)) as address,
        logging_to(address.url) as log,
    ):
        wait_until(lambda: works(log))
        address.port = other.port
        own_redis.ask("REPLICAOF", "127.0.0.1", str(other.port))
        wait_until(lambda: works(log))
