"""The README's tables and examples, held to the code; and what the wheel has in it."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from flask import Flask

import assistream_flask
from assistream_flask.settings import Settings
from assistream_flask.testing import FAULTS, OfflineServer

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def section(title: str) -> str:
    """The text under a heading."""
    found = re.search(rf"^(#+) {re.escape(title)}\n(.*?)(?=^#{{1,3}} |\Z)", README, re.MULTILINE | re.DOTALL)
    assert found, title
    return found[2]


def rows(title: str) -> list[list[str]]:
    """The table under a heading, without its head."""
    lines = [line for line in section(title).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]


def code(language: str) -> list[str]:
    """All examples in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_the_settings_table_is_the_settings() -> None:
    expected = [[f"`ASSISTREAM_{one.name.upper()}`", str(one.default), one.metadata["doc"]] for one in fields(Settings)]
    assert rows("Settings") == expected


def test_the_event_table_names_all_events_and_no_other() -> None:
    helper = (ROOT / "assistream_flask/static/assistream.js").read_text()
    declared = re.search(r"const EVENTS =(.*?);", helper, re.DOTALL)
    assert declared
    listened = {f"thread.{name}" for name in " ".join(re.findall(r'"(.*?)"', declared[1])).split()}
    assert {row[0].strip("`") for row in rows("Events")} == listened | {"ping"}


def test_the_route_table_is_the_blueprint() -> None:
    app = Flask("docs")
    app.secret_key = "only for tests"
    app.register_blueprint(assistream_flask.create_blueprint([]), url_prefix="/p")
    routes = {
        f"{method} {re.sub(r'<.*?>', '<>', rule.rule.removeprefix('/p'))}"
        for rule in app.url_map.iter_rules()
        if rule.endpoint.startswith("assistream.") and not rule.endpoint.endswith(".nothing")
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
    }
    told = {re.sub(r"<.*?>", "<>", row[0].strip("`").partition("?")[0]) for row in rows("Routes")}
    assert told == routes


def test_the_flask_example_makes_an_app() -> None:
    names: dict[str, Any] = {"__name__": __name__}
    exec(code("python")[0], names)
    names["app"].config["ASSISTREAM_DATABASE_URL"] = "sqlite://"
    found = names["app"].test_client().get("/assistream/assistants").get_json()
    assert found == {"data": [{"id": "tutor", "name": "tutor", "description": ""}]}
    names["app"].extensions["assistream"].close()


def test_the_owner_example_names_signed_in_users_only() -> None:
    class User:
        def __init__(self, id: int, is_authenticated: bool) -> None:
            self.id, self.is_authenticated = id, is_authenticated

    for user, status in ((User(7, True), 200), (User(0, False), 401)):
        app = Flask("docs")
        names: dict[str, Any] = {
            "create_blueprint": assistream_flask.create_blueprint,
            "assistants": [],
            "current_user": user,
        }
        exec("blueprint = " + code("python")[1], names)
        app.register_blueprint(names["blueprint"])
        app.config["ASSISTREAM_DATABASE_URL"] = "sqlite://"
        assert app.test_client().get("/threads").status_code == status
        app.extensions["assistream"].close()


def test_the_event_response_example_streams(server: OfflineServer) -> None:
    app = Flask("docs")
    server.replies = "Forty-two."
    with server.client() as client:
        exec(
            code("python")[2],
            {"app": app, "client": client},
        )
        answer = app.test_client().post("/ask", json={"question": "What?"})
        assert answer.mimetype == "text/event-stream"
        assert answer.text.endswith("event: done\ndata: [DONE]\n\n")
        assert "thread.run.completed" in answer.text


def test_the_testing_example_runs(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(
        "import pytest\n\n@pytest.fixture\ndef make_my_app():\n    return lambda client: client\n"
    )
    (tmp_path / "test_example.py").write_text(code("python")[3])
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", str(tmp_path)], capture_output=True, text=True)
    assert "1 passed" in done.stdout, done.stdout


def test_the_readme_names_no_fault_or_reason_that_is_not_there() -> None:
    assert "stall" in FAULTS
    reasons = re.findall(r"`(\w+)`", next(row[1] for row in rows("Events") if "message.incomplete" in row[0]))
    source = "".join(path.read_text() for path in (ROOT / "assistream_flask").rglob("*.py"))
    assert all(f'"{reason}"' in source for reason in reasons)


def test_the_requirements_are_those_of_the_package_and_the_example() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    pytest_itself = [one for one in extras["test"] if one.startswith("pytest>")]
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == [
        *project["dependencies"],
        *extras["example"],
        *pytest_itself,
    ]


@pytest.mark.parametrize("name", ["assistream.js", "assistream.d.ts"])
def test_the_wheel_has_the_static_files_and_the_types(built: list[str], name: str) -> None:
    assert f"assistream_flask/static/{name}" in built
    assert "assistream_flask/py.typed" in built
    assert not [one for one in built if one.startswith(("tests", "example_app"))]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    return zipfile.ZipFile(wheel).namelist()
