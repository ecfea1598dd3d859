"""The OpenAPI file, run against the app by schemathesis: test_openapi.py has pytest run this file."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import hypothesis
import pytest
import schemathesis
from flask import Flask
from schemathesis.config import SchemathesisConfig
from schemathesis.specs.openapi.schemas import OpenApiSchema

from assistream_flask import create_blueprint
from assistream_flask.testing import OfflineServer
from tests.conftest import ASSISTANTS, Caller, quick_client
from tests.deploy.test_openapi import API, THREAD
from tests.http_helpers import P


class Stage:
    """The app that schemathesis asks, which it must know before there is one."""

    def __init__(self) -> None:
        self.app: Flask

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        body = self.app.wsgi_app(environ, start_response)
        # A thread's events have no end: of those only the first frame is read.
        most = 1 if environ["PATH_INFO"].endswith("/events") else None
        try:
            return list(itertools.islice((chunk for chunk in body if chunk), most))
        finally:
            if hasattr(body, "close"):
                body.close()


PLACEHOLDER = "thread_" + 32 * "0"
MOST = 2


def described() -> OpenApiSchema:
    """Give the file, with what a random value would never meet in it: a thread and assistants that are there."""
    api = copy.deepcopy(API)
    api["components"]["parameters"]["ThreadId"]["schema"] = {"enum": [PLACEHOLDER]}
    runs = api["paths"][f"{THREAD}/runs"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    runs["properties"]["assistant_ids"].update(items={"enum": ["tutor", "poet"]}, maxItems=MOST)
    # That each is of another call, and that what is nested in arguments can be stored, no schema says.
    for name, field in (("submit_tool_outputs", "tool_outputs"), ("approvals", "approvals")):
        body = api["paths"][f"{THREAD}/runs/{{run_id}}/{name}"]["post"]["requestBody"]["content"]["application/json"]
        body["schema"]["properties"][field]["maxItems"] = 1
    approval = api["components"]["schemas"]["Approval"]["oneOf"][0]["properties"]
    approval["arguments"]["maxProperties"] = 0
    # Of what is right, a key may have been used for another request (422), and a thing not be there. What is wrong may
    # be so by its length (413).
    expected = {
        "positive_data_acceptance": {"expected-statuses": ["2xx", "3xx", "404", "422"]},
        "negative_data_rejection": {"expected-statuses": ["400", "404", "405", "413", "415", "422"]},
    }
    found = schemathesis.openapi.from_dict(api, config=SchemathesisConfig.from_dict({"checks": expected}))
    found.app = Stage()
    return found


DESCRIBED = described()


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Flask]:
    """One app for all routes: to start and end one takes longer than to ask it."""
    DESCRIBED.app.app = app = Flask("described", instance_path=str(tmp_path_factory.mktemp("described")))
    app.config.update(ASSISTREAM_DRAIN_SECONDS=0, ASSISTREAM_MAX_RUNS=10_000, ASSISTREAM_MAX_ASSISTANTS=MOST)
    with OfflineServer(delay=0) as server, quick_client(server) as client:
        app.register_blueprint(create_blueprint(ASSISTANTS, owner=lambda: "me", client=client), url_prefix=P)
        yield app
        app.extensions["assistream"].close()


@DESCRIBED.parametrize()
@hypothesis.settings(max_examples=8, deadline=None)
def test_the_app_keeps_what_the_file_says(case: schemathesis.Case[Any], staged: Flask) -> None:
    # Anew each time: some delete it.
    if case.path_parameters.get("thread_id") == PLACEHOLDER:
        case.path_parameters["thread_id"] = Caller(staged).thread_id
    case.call_and_validate()
