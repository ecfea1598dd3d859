"""The passwords of addresses, and keys, are in no line of the log, no traceback and no refusal."""

from __future__ import annotations

import logging

import pytest

from assistream_flask import ConfigurationError
from assistream_flask.errors import masked
from assistream_flask.platform.log_throttle import LogThrottle
from assistream_flask.settings import Settings
from assistream_flask.store import database
from tests.conftest import KEY


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("redis://:hunter2@host:6379/0", "redis://***@host:6379/0"),
        ("redis://:hun/ter2@host:6379/0", "redis://***@host:6379/0"),
        ("postgresql://me:hun@ter2@host/db", "postgresql://***@host/db"),
        ("https://hunter2@host/v1", "https://***@host/v1"),
        ("postgresql://host/db?user=me&password=abc", "postgresql://host/db?user=me&password=***"),
        ("redis://host?sslpassword=abc", "redis://host?sslpassword=***"),
        ("https://host:8080/v1 and me", "https://host:8080/v1 and me"),
    ],
)
def test_a_password_in_an_address_is_not_in_the_log(said: str, kept: str) -> None:
    assert masked(said) == kept


def raised(error: Exception) -> Exception:
    try:
        raise error
    except Exception as found:
        return found


def test_a_traceback_has_no_password(caplog: pytest.LogCaptureFixture) -> None:
    throttle, log = LogThrottle(), logging.getLogger("assistream_flask.tests")
    error = raised(OSError(f"redis://:hunter2@host refused {KEY}"))
    throttle.error(log, error, "run %s failed", "run_1")
    throttle.warn(log, "it waits: %r", error)
    throttle.warn(log, "it fails: %s", error, level=logging.ERROR)
    assert caplog.text.count("redis://***@host") == 3
    assert "Traceback" in caplog.text
    assert "test_passwords" in caplog.text
    assert "hunter2" not in caplog.text
    assert KEY not in caplog.text


@pytest.mark.parametrize("url", ["redis://:hunter2/x@127.0.0.1:1/0", "redis://:hunter2#x@127.0.0.1:1/0", "hunter2"])
def test_a_redis_url_that_cannot_be_read_is_refused_without_repeating_it(url: str) -> None:
    with pytest.raises(ConfigurationError, match="write / as %2F") as caught:
        Settings.read({"ASSISTREAM_REDIS_URL": url})
    assert "hunter2" not in str(caught.value)
    # Nor in a traceback.
    assert caught.value.__context__ is None


@pytest.mark.parametrize("url", ["postgresql://me:x@hunter2:y@host/db", "postgresql://me:x@hunter2@host/db", "hunter2"])
def test_a_database_url_that_cannot_be_read_is_refused_without_repeating_it(url: str) -> None:
    with pytest.raises(ConfigurationError, match="ASSISTREAM_DATABASE_URL cannot be used") as caught:
        database.check(url)
    assert "hunter2" not in str(caught.value)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_settings_show_no_password() -> None:
    settings = Settings(database_url="postgresql://me:hunter2@host/db", redis_url="redis://:hunter2@host")
    assert "hunter2" not in f"{settings!r} {settings}"
