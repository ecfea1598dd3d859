"""The tables and examples of the docs, held to the code; the files to deploy with; and what the wheel has in it."""

from __future__ import annotations

import ast
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flask import Flask
from werkzeug.test import TestResponse

import assistream_flask
import example_app
from assistream_flask import current_assistream as assistream
from assistream_flask import mcp
from assistream_flask.errors import RUN_ERRORS
from assistream_flask.runs import mcp_tools
from assistream_flask.settings import Settings
from assistream_flask.testing import FAULTS, OfflineServer, Reply, ToolCall
from assistream_flask.tools import ToolArgumentsError, ToolContext
from assistream_flask.types import Run
from assistream_flask.upstream import mcp_session
from tests.conftest import MakeApp, wait_until
from tests.programs import free_port, program

ROOT = Path(__file__).resolve().parents[2]
HOUSE = ROOT / "assistream_flask"
DEPLOY = (ROOT / "docs/guides/deploy.md").read_text()
EVENTS = (ROOT / "docs/reference/events.md").read_text()
DOCS = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]


def section(title: str, text: str) -> str:
    """Give the text under a heading."""
    found = re.search(rf"^(#+) {re.escape(title)}\n(.*?)(?=^#{{1,3}} |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, title
    return found[2]


def rows(title: str, text: str) -> list[list[str]]:
    """Give the table under a heading, without its head."""
    lines = [line for line in section(title, text).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]


def code(language: str, page: str) -> list[str]:
    """Give all examples of a page in a language."""
    found = re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    return [str(one) for one in found]


def test_no_example_in_python_stands_where_no_test_runs_it() -> None:
    assert {path.relative_to(ROOT).as_posix(): n for path in DOCS if (n := len(code("python", str(path))))} == {
        "README.md": 1,
        "docs/guides/approval.md": 1,
        "docs/guides/deploy.md": 1,
        "docs/guides/existing-app.md": 3,
        "docs/guides/mcp.md": 1,
        "docs/guides/model-servers.md": 2,
        "docs/guides/owners.md": 1,
        "docs/guides/page_tools.md": 1,
        # tests/live/test_service.py and tests/unit/test_signals.py run these.
        "docs/guides/python.md": 2,
        "docs/guides/testing.md": 2,
        "docs/guides/tools.md": 1,
        # tests/unit/test_tracing.py runs it.
        "docs/guides/tracing.md": 1,
        # Of these, tests/browser/test_browser.py makes an app.
        "docs/tutorial/first-app.md": 3,
    }


def test_the_settings_table_is_the_settings() -> None:
    expected = [[f"`ASSISTREAM_{one.name.upper()}`", str(one.default), one.metadata["doc"]] for one in fields(Settings)]
    assert rows("Settings", (ROOT / "docs/reference/settings.md").read_text()) == expected


def test_the_event_table_names_all_events_and_no_other() -> None:
    helper = (ROOT / "assistream_flask/static/assistream.js").read_text()
    declared = re.search(r"const EVENTS =(.*?);", helper, re.DOTALL)
    assert declared
    listened = {f"thread.{name}" for name in " ".join(re.findall(r'"(.*?)"', declared[1])).split()}
    assert {row[0].strip("`") for row in rows("All events", EVENTS)} == listened | {"ping"}


def test_the_helpers_page_tells_every_function_of_it() -> None:
    helper = (ROOT / "assistream_flask/static/assistream.js").read_text()
    bound = re.search(r"^export const \{(.*?)\} = createAssistream", helper, re.MULTILINE | re.DOTALL)
    assert bound
    exported = [*re.findall(r"\w+", bound[1]), *re.findall(r"^export const (\w+)", helper, re.MULTILINE)]
    assert {"addMessageAndRuns", "cancelRun", "createAssistream", "text"} <= set(exported)
    told = (ROOT / "docs/reference/helper.md").read_text()
    assert [name for name in exported if f"`{name}(" not in told] == []


def assert_safe(answer: TestResponse) -> None:
    """Check that the session's cookie goes over HTTPS only, and to the site's own pages."""
    assert {"Secure", "HttpOnly", "SameSite=Lax"} <= set(answer.headers["Set-Cookie"].split("; "))


@pytest.mark.parametrize("page", ["README.md", "docs/guides/existing-app.md"])
def test_the_flask_example_makes_an_app(page: str) -> None:
    names: dict[str, Any] = {"__name__": __name__}
    exec(code("python", page)[0], names)
    names["app"].config["ASSISTREAM_DATABASE_URL"] = "sqlite://"
    assert_safe(names["app"].test_client().get("/assistream/threads", base_url="https://example.org"))
    found = names["app"].test_client().get("/assistream/assistants").get_json()
    assert found == {"data": [{"id": "tutor", "name": "tutor", "description": ""}]}
    names["app"].extensions["assistream"].close()


def test_the_examples_that_are_deployed_have_safe_cookies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SECRET_KEY", "long enough for a test")
    database = {"ASSISTREAM_DATABASE_URL": "sqlite://"}
    minimal = runpy.run_path(str(ROOT / "examples/minimal/app.py"))["app"]
    minimal.config.update(database)
    example = example_app.create_app(database)
    for app in (minimal, example):
        assert_safe(app.test_client().get("/assistream/threads", base_url="https://example.org"))
        app.extensions["assistream"].close()
    names: dict[str, Any] = {"__name__": __name__}
    exec(code("python", "docs/tutorial/first-app.md")[0], names)
    names["app"].config.update(database)
    assert_safe(names["app"].test_client().get("/assistream/threads", base_url="https://example.org"))
    names["app"].extensions["assistream"].close()


def test_the_example_of_tools_makes_an_assistant_that_has_them() -> None:
    names: dict[str, Any] = {"__name__": __name__}
    exec(code("python", "docs/guides/tools.md")[0], names)
    clerk, context = names["clerk"], ToolContext("thread_1", "run_1", "clerk", "42", "call_1")
    assert [(one.name, one.strict) for one in clerk.specs] == [("find_order", True), ("refund", True)]
    assert clerk.specs[0].description == "Tell what is known of an order."
    assert clerk.tools["refund"]("A-7", 250, context) == "Paid back."
    with pytest.raises(ToolArgumentsError):
        clerk.tools["refund"]("A-7", 1001, context)
    found = clerk.tools["find_order"].keywords({"order_id": "A-7"}, context)
    assert clerk.tools["find_order"](**found) == {"owner": "42", "cents": 1000, "state": "sent"}


def test_the_example_of_an_approval_asks_where_much_is_paid_and_only_there(
    make_app: MakeApp, server: OfflineServer
) -> None:
    names: dict[str, Any] = {"__name__": __name__}
    exec(code("python", "docs/guides/approval.md")[0], names)
    server.replies = [
        Reply(
            calls=[ToolCall("refund", {"order_id": order, "cents": cents}) for order, cents in (("A", 9), ("B", 9999))]
        ),
        "Both are paid back.",
    ]
    app = make_app([names["clerk"]])
    with app.app_context():
        thread = assistream.create_thread(owner="me")["id"]
        [run] = assistream.run(thread, ["clerk"], content="Pay them back.", owner="me")

        def now() -> Run:
            found = assistream.messages(thread, owner="me")[-1]["run"]
            assert found is not None
            return found

        wait_until(lambda: now()["status"] == "requires_action")
        required = now()["required_action"]
        assert required is not None
        [asked] = required["submit_tool_outputs"]["tool_calls"]
        assert json.loads(asked["function"]["arguments"]) == {"order_id": "B", "cents": 9999}
        edited = {"order_id": "B", "cents": 99}
        assistream.approve(thread, run["id"], asked["id"], owner="me", arguments=edited)
        wait_until(lambda: now()["status"] == "completed")
    assert [text for role, text in server.requests[-1].messages if role == "tool"] == [
        "Paid back 9 cents of A.",
        "Paid back 99 cents of B.",
    ]


def test_the_example_of_page_tools_makes_an_assistant_that_has_them() -> None:
    names: dict[str, Any] = {"__name__": __name__}
    exec(code("python", "docs/guides/page_tools.md")[0], names)
    guide = names["guide"]
    assert guide.page_tools == {"highlight", "where_am_i"}
    script = "".join(code("js", "docs/guides/page_tools.md"))
    assert [name for name in guide.page_tools if not re.search(rf"^  {name}(\(|:)", script, re.MULTILINE)] == []
    assert guide.tools["highlight"].checked({"row": 1}) == {"row": 1}
    with pytest.raises(ToolArgumentsError):
        guide.tools["highlight"].checked({"row": 0})


def test_the_example_of_mcp_servers_makes_an_assistant_that_asks_before_it_closes() -> None:
    names: dict[str, Any] = {"__name__": __name__}
    exec(code("python", "docs/guides/mcp.md")[0], names)
    [tickets] = names["clerk"].mcp
    with names["app"].app_context():
        sent = tickets.headers(ToolContext("thread_1", "run_1", "clerk", "42", ""))
    assert sent == {"Authorization": "Bearer change me too", "X-On-Behalf-Of": "42"}
    assert (tickets.approval("search"), tickets.approval("close")) == (False, True)


def test_what_the_guide_says_of_mcp_servers_is_what_the_code_says() -> None:
    source = "".join(path.read_text() for path in HOUSE.rglob("*.py"))
    page = (ROOT / "docs/guides/mcp.md").read_text()
    told = [said for row in rows("When it is away", page) for said in re.findall(r'"(.+?)"', row[2])]
    assert [said for said in told if "30 seconds" not in said and f'"{said}"' not in source] == []
    errors = [word for row in rows("When it is away", page) for word in re.findall(r"`(.+?)`", row[1])]
    assert len(errors) == 5
    assert [word for word in errors if f'"{word}"' not in source] == []
    most = (
        mcp_session.MOST_BYTES,
        mcp_session.MOST_MESSAGES,
        mcp_session.MOST_PIECES,
        mcp.MOST_TOOLS,
        mcp_tools.MOST_SCHEMA,
        mcp_tools.MOST_DESCRIPTION,
    )
    assert [one for one in (*most, mcp_tools.MOST_LIST) if f"{one:,}" not in page] == []


def test_what_a_model_is_told_of_calls_without_an_output_is_what_the_code_says() -> None:
    source = "".join(path.read_text() for path in HOUSE.rglob("*.py"))
    table = rows("What the model is told", (ROOT / "docs/explanation/tools.md").read_text())
    told = [said for row in table for said in re.findall(r'"(.+?)"', row[3])]
    fixed = [said for said in told if "'x'" not in said and "30 seconds" not in said]
    assert len(fixed) > 8
    assert [said for said in fixed if f'"{said}"' not in source] == []
    errors = {word for row in table for word in re.findall(r"`(.+?)`", row[2])}
    assert [word for word in errors if f'"{word}"' not in source] == []


def test_the_example_of_a_list_for_each_user_gives_each_their_own() -> None:
    app = Flask("docs")
    names: dict[str, Any] = {
        "Assistant": assistream_flask.Assistant,
        "create_blueprint": assistream_flask.create_blueprint,
        "current_user": SimpleNamespace(id="7", language="Swiss German"),
        "find_user": {"8": SimpleNamespace(language="French")}.get,
    }
    example = code("python", "docs/guides/existing-app.md")[1].replace(
        "\ncreate_blueprint(", "\nblueprint = create_blueprint("
    )
    exec(example, names)
    app.register_blueprint(names["blueprint"])
    app.config["ASSISTREAM_DATABASE_URL"] = "sqlite://"
    (assistant,) = app.extensions["assistream"].parts["assistream"].assistants().values()
    assert assistant.instructions == "Explain step by step, in Swiss German."
    adopted = app.extensions["assistream"].parts["assistream"].adopted("8", "tutor")
    assert adopted.assistant.instructions == "Explain step by step, in French."
    assert app.extensions["assistream"].parts["assistream"].adopted("8", "critic") is None


def test_the_examples_of_model_servers_ask_them() -> None:
    names: dict[str, Any] = {
        "Assistant": assistream_flask.Assistant,
        "assistants": [],
        "create_blueprint": lambda assistants, client: names.update(made=client()),
    }
    for example in code("python", "docs/guides/model-servers.md"):
        exec(example.replace("\nAssistant(", "\nassistant = Assistant("), names)
    with names["made"] as client:
        assert str(client.base_url) == "http://127.0.0.1:8080/v1/"
    assert names["assistant"].max_history([1, 2, 3]) == [3]


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
        exec("blueprint = " + code("python", "docs/guides/owners.md")[0], names)
        app.register_blueprint(names["blueprint"])
        app.config["ASSISTREAM_DATABASE_URL"] = "sqlite://"
        assert app.test_client().get("/threads").status_code == status
        app.extensions["assistream"].close()


def test_the_event_response_example_streams(server: OfflineServer) -> None:
    app = Flask("docs")
    server.replies = "Forty-two."
    with server.client() as client:
        exec(
            code("python", "docs/guides/existing-app.md")[2],
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
    (tmp_path / "test_example.py").write_text(code("python", "docs/guides/testing.md")[0])
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", str(tmp_path)], capture_output=True, text=True)
    assert "1 passed" in done.stdout, done.stdout
    from assistream_flask.testing import OfflineServer

    with OfflineServer(delay=0) as server, server.client() as client:
        exec(code("python", "docs/guides/testing.md")[1], {"openai_server": server})
        assert [item.type for item in client.responses.create(model="m", input="Who was Ada?").output] == [
            "reasoning",
            "message",
            "function_call",
            "function_call",
        ]
        assert client.responses.create(model="m", input="Who?").output_text == "She wrote the first program."


def test_the_docs_say_where_the_helper_and_its_types_are_installed() -> None:
    blocks = code("sh", "docs/guides/page.md")
    (command,) = [line for block in blocks for line in block.splitlines() if line.startswith("python -c ")]
    words = [sys.executable, *shlex.split(command)[1:]]
    told = Path(subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip())
    assert told.name == "assistream.js"
    assert told.exists()
    assert told.with_suffix(".d.ts").exists()


def test_the_docs_name_no_fault_or_reason_that_is_not_there() -> None:
    named = {fault for path in DOCS for fault in re.findall(r"\boffline-(\w+)", path.read_text())}
    assert {"stall", "cut"} <= named <= set(FAULTS)
    reasons = re.findall(r"`(\w+)`", next(row[1] for row in rows("All events", EVENTS) if "e.incomplete" in row[0]))
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


def test_every_dependency_has_a_lowest_version_and_says_in_its_line_what_it_is_for() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    project = tomllib.loads(text)["project"]
    others = [one for extra in project["optional-dependencies"].values() for one in extra]
    for one in [*project["dependencies"], *others]:
        assert re.fullmatch(r"[\w.-]+(\[\w+\])?>=[\d.]+(,<\d+)?|assistream-flask\[[\w,]+\]", one)
        assert re.search(rf'^    "{re.escape(one)}", +# \w.{{3}}', text, re.MULTILINE), one


def test_a_major_version_of_what_is_known_from_within_comes_only_when_it_was_looked_at() -> None:
    known = runpy.run_path(str(ROOT / "run_tests.py"))["lowest"]
    text = (ROOT / "pyproject.toml").read_text()
    for name in ("openai", "httpx2", "httpcore2", "mcp", r"gunicorn\[gevent\]", r"redis\[hiredis\]"):
        assert re.search(rf'"{name}>=[\d.]+,<\d+"', text), name
    assert {"flask", "gunicorn[gevent]", "redis[hiredis]"} <= {one.partition("==")[0] for one in known()}


def test_every_file_that_the_docs_name_is_there() -> None:
    for path in DOCS:
        links = re.findall(r"\]\((?!https?:|#)([^)#]+)", path.read_text())
        assert [link for link in links if not (path.parent / link).exists()] == [], path


def test_the_docs_name_no_setting_that_is_not_there() -> None:
    known = {f"ASSISTREAM_{one.name.upper()}" for one in fields(Settings)}
    for path in [*DOCS, *(ROOT / "deploy").iterdir(), ROOT / "gunicorn.conf.py"]:
        # The example app's own, and what the tests take.
        others = {"ASSISTREAM_UPSTREAM", "ASSISTREAM_TRIALS", "ASSISTREAM_WRITE_ROOMS"}
        named = set(re.findall(r"ASSISTREAM_[A-Z_]+", path.read_text())) - others
        assert named <= known, path


def test_what_users_see_when_something_fails_is_what_the_code_says() -> None:
    table = rows("When X fails, your users see Y", DEPLOY)
    seen = " ".join(row[1] for row in table)
    source = "".join(path.read_text() for path in (ROOT / "assistream_flask").rglob("*.py"))
    codes = re.findall(r"`([a-z]+_[a-z_]+)`", seen)
    assert "worker_lost" in codes
    assert [code for code in codes if f'"{code}"' not in source] == []
    assert [said for said in re.findall(r'"(.+?)"', seen) if said not in RUN_ERRORS.values()] == []


# The files to deploy with


def test_all_servers_are_started_by_the_same_command() -> None:
    command = section("Any number of workers", DEPLOY).partition("\ngunicorn ")[2].partition("\n")[0]
    words = shlex.split(command)
    alone = section("One worker", DEPLOY).partition("\ngunicorn ")[2].partition("\n")[0]
    assert shlex.split(alone) == [word if word != "4" else "1" for word in words]
    assert [block for block in code("sh", "README.md") if block == f"gunicorn {alone}\n"]
    assert (ROOT / "deploy/Procfile").read_text() == f"web: gunicorn {command}\n"
    unit = re.search(r"^ExecStart=\S+/gunicorn (.*)", (ROOT / "deploy/assistream.service").read_text(), re.MULTILINE)
    image = re.search(r"^CMD (\[.*\])", (ROOT / "deploy/Dockerfile").read_text(), re.MULTILINE)
    assert unit
    assert image
    for started in (shlex.split(unit[1]), json.loads(image[1])[1:]):
        assert started[: len(words) - 1] == words[:-1]
        assert started[-1] == words[-1]


def test_behind_a_proxy_the_docs_lines_tell_visitors_from_each_other(make_app: MakeApp) -> None:
    app = make_app(address_sessions=1)
    [given] = code("python", "docs/guides/deploy.md")
    exec(given, {"app": app})
    client = app.test_client(use_cookies=False)
    for address, status in (("93.184.216.34", 201), ("93.184.216.34", 429), ("151.101.1.69", 201)):
        headers = {"X-Forwarded-For": f"1.1.1.1, {address}"}
        assert client.post("/assistream/threads", headers=headers).status_code == status


def test_nginx_takes_its_file(tmp_path: Path) -> None:
    nginx = program("nginx")
    certificate = ["-keyout", str(tmp_path / "example.org.key"), "-out", str(tmp_path / "example.org.pem")]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=example.org", *certificate]
    subprocess.run(command, check=True, capture_output=True)
    text = (ROOT / "deploy/nginx.conf").read_text().replace("/etc/nginx/example.org", f"{tmp_path}/example.org")
    # It binds them even to test.
    for port in ("80", "443"):
        text = text.replace(f"listen {port}", f"listen 127.0.0.1:{free_port()}")
    (tmp_path / "nginx.conf").write_text(text)
    command = [nginx, "-t", "-c", str(tmp_path / "nginx.conf"), "-g", f"pid {tmp_path}/pid;"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_systemd_takes_its_unit(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd is not installed")
    unit = (ROOT / "deploy/assistream.service").read_text()
    # It looks whether the program is there.
    (tmp_path / "assistream.service").write_text(unit.replace("/srv/assistream/.venv/bin/gunicorn", "/bin/true"))
    command = ["systemd-analyze", "verify", str(tmp_path / "assistream.service")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("where", ["environment", ".env"])
def test_gunicorn_takes_more_workers_where_redis_has_their_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ASSISTREAM_REDIS_URL", raising=False)
    monkeypatch.setenv("WEB_CONCURRENCY", "4")
    server = SimpleNamespace(cfg=SimpleNamespace(workers=4))
    with pytest.raises(SystemExit, match="set ASSISTREAM_REDIS_URL"):
        runpy.run_path(str(ROOT / "gunicorn.conf.py"))["on_starting"](server)
    if where == "environment":
        monkeypatch.setenv("ASSISTREAM_REDIS_URL", "redis://localhost")
    else:
        Path(".env").write_text("ASSISTREAM_REDIS_URL=redis://localhost\n")
    found = runpy.run_path(str(ROOT / "gunicorn.conf.py"))
    assert found["workers"] == 4
    found["on_starting"](server)


def test_the_wheel_has_the_static_files_and_the_types(tmp_path: Path) -> None:
    # Once: pip builds in the folder itself, where two at a time would meet.
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    built = zipfile.ZipFile(wheel).namelist()
    static = {f"assistream_flask/static/{name}" for name in ("assistream.js", "assistream.min.js", "assistream.d.ts")}
    assert static <= set(built)
    assert "assistream_flask/py.typed" in built
    migrations = {
        path.relative_to(ROOT).as_posix() for path in (ROOT / "assistream_flask/store/migrations").rglob("*.py")
    }
    assert migrations
    assert migrations <= set(built)
    scripts = {path.relative_to(ROOT).as_posix() for path in (ROOT / "assistream_flask/log/lua").iterdir()}
    assert scripts
    assert scripts <= set(built)
    assert not [one for one in built if one.startswith(("tests", "example_app"))]


def test_the_docs_tell_of_every_function_of_the_helper_and_of_no_other() -> None:
    types = (HOUSE / "static/assistream.d.ts").read_text()
    # Several stand in one declaration, each with the type of a function.
    exported = set(re.findall(r"(\w+): \(", types.partition("export declare const text")[2])) | {"text"}
    exported |= set(re.findall(r"^export declare const (\w+)", types, re.MULTILINE))
    page = (ROOT / "docs/reference/helper.md").read_text()
    told = re.findall(r"^### (\w+)$", page.partition("\n## The functions\n")[2].partition("\n## ")[0], re.MULTILINE)
    assert set(told) == exported
    five = [row[0].strip("`").partition("(")[0] for row in rows("The five functions", (ROOT / "README.md").read_text())]
    assert len(five) == 5
    assert set(five) <= set(told)


ERRORS = (ROOT / "docs/reference/errors.md").read_text()


def test_the_docs_have_every_code_that_a_run_can_fail_with_and_no_other() -> None:
    told = [code for row in rows("When a run fails", ERRORS) for code in re.findall(r"`(\w+)`", row[0])]
    assert sorted(told) == sorted(RUN_ERRORS)


def test_the_docs_have_every_code_that_a_request_is_refused_with_and_no_other() -> None:
    told = [code for row in rows("When a request is refused", ERRORS) for code in re.findall(r"`(\w+)`", row[1])]
    source = "".join(path.read_text() for path in HOUSE.rglob("*.py"))
    assert [code for code in told if f'"{code}"' not in source] == []
    assert [code for code in re.findall(r"RequestError\(\s*\d+,\s*\"(\w+)\"", source) if code not in told] == []
    # The same as the OpenAPI file has, for each status; 405 is every route's.
    page = {row[0]: set(re.findall(r"`(\w+)`", row[1])) for row in rows("Errors", HTTP)}
    assert {row[0] for row in rows("When a request is refused", ERRORS)} == page.keys() | {"405"}
    assert set(told) - {"method_not_allowed"} <= set().union(*page.values())


HTTP = (ROOT / "docs/reference/http.md").read_text()


def test_the_page_of_the_routes_is_made_of_the_openapi_file() -> None:
    names = runpy.run_path(str(ROOT / "docs/http_page.py"))
    assert names["page"](names["load"]()) == HTTP, "make it anew: python docs/http_page.py"


def test_the_glossary_has_at_most_forty_terms_each_of_them_once() -> None:
    text = (ROOT / "docs/explanation/glossary.md").read_text()
    blocks = re.findall(r"^```\{glossary\}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    terms = re.findall(r"^(\w.*)$", "".join(blocks), re.MULTILINE)
    assert len(terms) == len(set(terms))
    assert 30 <= len(terms) <= 40


LOCK = re.compile("R?Lock|Condition|(Bounded)?Semaphore|plain_lock|allocate_lock")


def locks(path: Path) -> set[str]:
    """Give the locks that a module's objects make for themselves, as ``Class.name``."""
    found = set()
    for kind in [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)]:
        for node in ast.walk(kind):
            if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
                target = ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target)
                # The name of what is called, or of what gevent is asked for.
                made = re.findall(r"(?:^|[ (])(?:threading\.)?(\w+)\(|'(\w+)'\)\(\)", ast.unparse(node.value))
                if any(LOCK.fullmatch(name) for names in made for name in names):
                    found |= {f"{kind.name}.{name}" for name in re.findall(r"self\.(\w+)", target)}
    return found


def test_the_lock_order_has_every_lock_of_the_package_and_no_other() -> None:
    table = rows("The order", (ROOT / "docs/explanation/locks.md").read_text())
    told = {found for row in table for found in re.findall(r"(`[\w.]+` in `[\w/.]+`)", row[1])}
    made = {
        f"`{lock}` in `{path.relative_to(HOUSE).as_posix()}`"
        for path in HOUSE.rglob("*.py")
        if "testing" not in path.parts
        for lock in locks(path)
    }
    assert told == made


def test_every_module_that_the_docs_name_is_there() -> None:
    for path in (ROOT / "docs").rglob("*.md"):
        named = re.findall(r"`((?:\w+/)*\w+\.py|\w+/)`", path.read_text())
        places = (HOUSE, ROOT)
        missing = [name for name in named if name != "wsgi.py" and not any((one / name).exists() for one in places)]
        assert missing == [], path
