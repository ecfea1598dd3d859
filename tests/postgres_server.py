"""A PostgreSQL of the tests' own: one a test process, with a fresh database a test."""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa


class PostgresServer:
    """Runs in ``folder``, on a socket there, as user postgres where we are root: it refuses to run as root.

    One that is ``lasting`` keeps what it was given when it is stopped at once, until it is started again.
    """

    def __init__(self, binaries: Path, folder: Path, *, lasting: bool = False) -> None:
        self._folder, self._count = folder, 0
        root = os.geteuid() == 0
        self._user = pwd.getpwnam("postgres").pw_uid if root else os.geteuid()
        if root:
            os.chown(folder, self._user, -1)
        data = folder / "data"
        self._run(binaries / "initdb", "--no-sync", "-A", "trust", "-U", "postgres", "-E", "UTF8", "--locale=C", data)
        # What a crash of the machine would lose, nobody misses.
        fast = ["-c", "fsync=off", "-c", "full_page_writes=off"]
        fast += [] if lasting else ["-c", "synchronous_commit=off"]
        self._command: list[str | Path] = [
            binaries / "postgres",
            "-D",
            data,
            "-k",
            folder,
            "-c",
            "listen_addresses=",
            *fast,
        ]
        self._log = (folder / "log").open("w+")
        self._admin = sa.create_engine(
            self.url("postgres"),
            isolation_level="AUTOCOMMIT",
            poolclass=sa.NullPool,
            connect_args={"connect_timeout": 5},
        )
        self.start()

    def start(self) -> None:
        """Start it and waits until it answers."""
        self._process = subprocess.Popen(
            self._command, user=self._user, cwd=self._folder, stdout=self._log, stderr=subprocess.STDOUT
        )
        self._wait()

    def _run(self, *command: str | Path) -> None:
        done = subprocess.run(command, user=self._user, cwd=self._folder, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr

    def _wait(self) -> None:
        end = time.monotonic() + 60
        while True:
            try:
                self._admin.connect().close()
                return
            except sa.exc.OperationalError:
                if self._process.poll() is not None or time.monotonic() > end:
                    self._log.seek(0)
                    raise AssertionError(f"PostgreSQL does not start: {self._log.read()}") from None
                time.sleep(0.05)

    def url(self, database: str) -> str:
        return f"postgresql+psycopg://postgres@/{database}?host={self._folder}"

    def new_database(self) -> str:
        """Give the URL of a database that is empty."""
        self._count += 1
        with self._admin.connect() as connection:
            connection.exec_driver_sql(f"CREATE DATABASE test{self._count} TEMPLATE template0")
        return self.url(f"test{self._count}")

    def stop(self) -> None:
        """End it at once, as a crash would."""
        self._process.send_signal(signal.SIGQUIT)
        self._process.wait(30)

    def close(self) -> None:
        """End it for good; what is in it goes with the folder."""
        self.stop()
        self._log.close()


def postgres_binaries() -> Path | None:
    """Give the folder of initdb and postgres, where they are installed."""
    found = shutil.which("initdb")
    # Debian has them beside the PATH.
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    here = Path(found) if found else next(reversed(debian), None)
    return here.resolve().parent if here else None


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    binaries = postgres_binaries()
    if binaries is None or importlib.util.find_spec("psycopg") is None:
        assert not os.environ.get("CI"), "CI needs PostgreSQL and psycopg"
        pytest.skip("PostgreSQL or psycopg is not installed")
    # Not pytest's folder: user postgres cannot enter root's, and a socket's path is short.
    with tempfile.TemporaryDirectory(prefix="assistream-", ignore_cleanup_errors=True) as folder:
        server = PostgresServer(binaries, Path(folder))
        try:
            yield server
        finally:
            server.close()


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.server)])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Give an empty database of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'a.sqlite3'}"
    server: PostgresServer = request.getfixturevalue("postgres")
    return server.new_database()
