"""The blueprint in an app of one's own."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from conftest import KEY, trigger
from flask import Flask
from werkzeug.exceptions import ServiceUnavailable, abort

from pagerduty_compat.blueprint import events_blueprint

EVENT = json.dumps(trigger())
RESOLVE = json.dumps({"routing_key": KEY, "event_action": "resolve", "dedup_key": "never seen"})


@pytest.fixture
def events() -> list[dict[str, Any]]:
    return []


@pytest.fixture
def app(events: list[dict[str, Any]]) -> Flask:
    app = Flask(__name__)
    app.register_blueprint(events_blueprint(events.append))
    return app


@pytest.mark.parametrize("path", ["/v2/enqueue", "/v2/enqueue/"])
def test_a_trailing_slash_makes_no_difference(app: Flask, path: str) -> None:
    assert app.test_client().post(path, data=EVENT).status_code == 202


@pytest.mark.parametrize("path", ["/v2/change/enqueue", "/v2/change/enqueue/"])
def test_a_change_event_gets_no_dedup_key(
    app: Flask, events: list[dict[str, Any]], path: str
) -> None:
    change = {"routing_key": KEY, "payload": {"summary": "deployed"}}
    response = app.test_client().post(path, data=json.dumps(change))
    assert response.json == {"status": "success", "message": "Change event processed"}
    assert events == [change]


@pytest.mark.parametrize("dedup_key", [{}, {"dedup_key": None}, {"dedup_key": ""}])
def test_a_missing_dedup_key_is_generated(
    app: Flask, events: list[dict[str, Any]], dedup_key: dict[str, Any]
) -> None:
    for _ in range(2):
        response = app.test_client().post("/v2/enqueue", data=json.dumps(trigger(**dedup_key)))
        assert response.json is not None
        assert re.fullmatch(
            "[0-9a-f]{12}4[0-9a-f]{3}[89ab][0-9a-f]{15}", response.json["dedup_key"]
        )
        assert events[-1]["dedup_key"] == response.json["dedup_key"]
    assert events[0]["dedup_key"] != events[1]["dedup_key"]


def test_a_resolve_that_matches_nothing_is_accepted(app: Flask) -> None:
    response = app.test_client().post("/v2/enqueue", data=RESOLVE)
    assert (response.status_code, response.json) == (
        202,
        {"status": "success", "message": "Event processed", "dedup_key": "never seen"},
    )


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Content-Type": "application/x-www-form-urlencoded"},
        {"Content-Type": "text/html; charset=utf-16"},
        {"Content-Type": "/;;"},
        {"Accept": "text/html"},
        {"Authorization": "Token token=y_NbAkKc66ryYTWUXYEu"},
        {"Authorization": "Basic \N{LATIN SMALL LETTER E WITH ACUTE}"},
        {"Content-Encoding": "identity"},
        {"Content-Encoding": ""},
    ],
    ids=str,
)
def test_headers_of_all_sorts_are_accepted(app: Flask, headers: dict[str, str]) -> None:
    assert app.test_client().post("/v2/enqueue", data=EVENT, headers=headers).status_code == 202


@pytest.mark.parametrize("encoding", ["gzip", "br", "GZIP", "identity, gzip"])
def test_a_compressed_body_is_refused(app: Flask, encoding: str) -> None:
    response = app.test_client().post(
        "/v2/enqueue", data=EVENT, headers={"Content-Encoding": encoding}
    )
    assert (response.status_code, response.json) == (
        400,
        {
            "status": "invalid event",
            "message": "Event object is invalid",
            "errors": ["Content-Encoding is not supported"],
        },
    )


@pytest.mark.parametrize("path", ["/v2/enqueue", "/v2/change/enqueue/"])
@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"])
def test_other_methods_are_refused_in_json(app: Flask, method: str, path: str) -> None:
    response = app.test_client().open(path, method=method)
    assert (response.status_code, response.content_type) == (405, "application/json")
    assert response.headers["Allow"] == "POST"
    if method != "HEAD":
        assert response.json is not None
        assert response.json["errors"] == ["Method Not Allowed"]


def test_a_handler_that_raises_is_no_202() -> None:
    def broken(event: dict[str, Any]) -> None:
        raise BrokenPipeError("no luck")

    app = Flask(__name__)
    app.register_blueprint(events_blueprint(broken))
    response = app.test_client().post("/v2/enqueue", data=EVENT)
    assert (response.status_code, response.content_type) == (500, "application/json")
    assert response.json == {
        "status": "internal server error",
        "message": "Please retry later.",
        "errors": ["Internal Server Error"],
    }


def test_a_handler_may_choose_the_status() -> None:
    def busy(event: dict[str, Any]) -> None:
        raise ServiceUnavailable(retry_after=7)

    app = Flask(__name__)
    app.register_blueprint(events_blueprint(busy))
    response = app.test_client().post("/v2/enqueue", data=EVENT)
    assert (response.status_code, response.headers["Retry-After"]) == (503, "7")
    assert response.json == {
        "status": "service unavailable",
        "message": "Please retry later.",
        "errors": ["Service Unavailable"],
    }


def test_what_the_app_refuses_on_these_paths_is_json_too(app: Flask) -> None:
    app.before_request(lambda: abort(401))
    response = app.test_client().post("/v2/enqueue", data=EVENT)
    assert (response.status_code, response.content_type) == (401, "application/json")


def test_elsewhere_errors_are_the_apps_own(app: Flask) -> None:
    response = app.test_client().get("/nothing")
    assert (response.status_code, response.mimetype) == (404, "text/html")


def test_the_apps_own_error_pages_do_not_apply(events: list[dict[str, Any]]) -> None:
    def handle(event: dict[str, Any]) -> None:
        raise KeyError(event["payload"]["summary"]) if event["client"] else abort(405)

    app = Flask(__name__)
    app.register_blueprint(events_blueprint(handle))
    for code in (400, 404, 405, 500, 503):
        app.register_error_handler(code, lambda error: ("<h1>ours</h1>", 418))
    client = app.test_client()
    for event, status in ((trigger(client="a"), 500), (trigger(client=""), 405)):
        response = client.post("/v2/enqueue", data=json.dumps(event))
        assert (response.status_code, response.content_type) == (status, "application/json")
    response = client.get("/v2/enqueue")
    assert (response.status_code, response.content_type) == (405, "application/json")
    assert client.get("/elsewhere").status_code == 418


def test_what_the_handler_does_to_the_event_leaves_the_answer_alone() -> None:
    app = Flask(__name__)
    app.register_blueprint(events_blueprint(lambda event: event.clear()))
    response = app.test_client().post("/v2/enqueue", data=json.dumps(trigger(dedup_key="k")))
    assert response.json is not None
    assert response.json["dedup_key"] == "k"


def test_a_double_slash_within_the_path_is_no_redirect(app: Flask) -> None:
    assert app.test_client().post("/v2//enqueue", data=EVENT).status_code == 404


def test_the_blueprint_can_be_mounted_twice_with_two_handlers() -> None:
    first: list[dict[str, Any]] = []
    second: list[dict[str, Any]] = []
    app = Flask(__name__)
    app.register_blueprint(events_blueprint(first.append), url_prefix="/a")
    app.register_blueprint(events_blueprint(second.append), url_prefix="/b", name="second")
    client = app.test_client()
    assert client.post("/a/v2/enqueue", data=EVENT).status_code == 202
    assert client.post("/b/v2/enqueue", data=RESOLVE).status_code == 202
    assert [event["event_action"] for event in first] == ["trigger"]
    assert [event["event_action"] for event in second] == ["resolve"]


def test_the_apps_own_limit_of_content_length_does_not_apply(app: Flask) -> None:
    app.config["MAX_CONTENT_LENGTH"] = 10
    assert app.test_client().post("/v2/enqueue", data=EVENT).status_code == 202


def test_a_refusal_is_logged_without_its_values(
    app: Flask, caplog: pytest.LogCaptureFixture
) -> None:
    app.test_client().post("/v2/enqueue", data=json.dumps(trigger(routing_key="SECRET", client=1)))
    assert caplog.messages == [
        "refused an alert event from 127.0.0.1: Length of 'routing_key' is incorrect"
        " (should be 32 characters); 'client' is invalid (must be a string)"
    ]
