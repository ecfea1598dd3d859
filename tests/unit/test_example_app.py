"""What the example app's assistant calls."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date
from pathlib import Path

import pytest
from flask import Flask

from assistream_flask import ToolArgumentsError, ToolContext
from example_app.observatory import book_telescope, look_up


@pytest.fixture
def app(tmp_path: Path) -> Iterator[Flask]:
    """Give an app whose files are in a folder of the test's."""
    app = Flask("example_app", instance_path=str(tmp_path / "instance"))
    with app.app_context():
        yield app


def booked_by(owner: str) -> ToolContext:
    return ToolContext("thread_1", "run_1", "astronomer", owner, "call_1")


@pytest.mark.parametrize("name", ["Saturn", "saturn", "the planet Saturn", 'Saturn"; DROP TABLE bodies; --'])
def test_a_body_is_found_by_its_name_among_other_words(app: Flask, name: str) -> None:
    assert [found["circles"] for found in look_up(name)] == ["Sun"]


@pytest.mark.parametrize("name", ["", "Nibiru", "%", "question"])
def test_the_model_is_told_of_a_name_that_is_none(app: Flask, name: str) -> None:
    with pytest.raises(ToolArgumentsError, match="nothing of that name"):
        look_up(name)
    assert not Path(app.instance_path).exists()


def test_a_night_is_booked_once_by_each_user(app: Flask) -> None:
    night = date(2027, 1, 5)
    for owner in ("1", "2"):
        assert "Booked: Io" in book_telescope("Io", night, booked_by(owner))
    with pytest.raises(ToolArgumentsError, match="booked the night of 2027-01-05 already"):
        book_telescope("Titan", night, booked_by("1"))
    assert "Booked" in book_telescope("Titan", date(2027, 1, 6), booked_by("1"))
