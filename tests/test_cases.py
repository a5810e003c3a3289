"""Every case file goes through the three doors: parse, HTTP under a prefix, the command.

A file `cases/accepted/{alert,change}/NAME.json` is a body that is accepted. Each is sent with
a routing key in the header, which must count where the body has none. A folder
`cases/refused/NAME` holds a request (a line of method and path, headers, a blank line, the
body) and the whole answer to it.
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from flask import Flask

from pagerduty_compat import InvalidEvent, parse
from pagerduty_compat.__main__ import main
from pagerduty_compat.blueprint import events_blueprint

CASES = Path(__file__).parent / "cases"
HEADER_KEY = "routing_key_of_the_header_is_it_"

ACCEPTED = sorted(CASES.glob("accepted/*/*.json"))
REFUSED = sorted(CASES.glob("refused/*"))
assert ACCEPTED
assert REFUSED


def name(path: Path) -> str:
    return str(path.relative_to(CASES).with_suffix(""))


def expected(path: Path) -> dict[str, Any]:
    event: dict[str, Any] = json.loads(path.read_bytes())
    event["routing_key"] = event.get("routing_key") or HEADER_KEY
    if is_change(path):
        return {k: v for k, v in event.items() if k not in ("event_action", "dedup_key")}
    return event


def is_change(path: Path) -> bool:
    return path.parent.name == "change"


class Request:
    """A request of a refused case, read from its file."""

    def __init__(self, case: Path):
        head, self.body = (case / "request").read_bytes().split(b"\n\n", 1)
        first, *headers = head.decode().split("\n")
        _, self.path = first.split(" ")
        self.headers = dict(line.split(": ", 1) for line in headers if line)
        self.change = "change" in self.path
        self.routing_key = self.headers.get("X-Routing-Key")


@pytest.mark.parametrize("path", ACCEPTED, ids=name)
def test_parse_returns_an_accepted_event_as_it_was_sent(path: Path) -> None:
    event = parse(path.read_bytes(), change=is_change(path), routing_key=HEADER_KEY)
    assert event == expected(path)


@pytest.mark.parametrize("path", ACCEPTED, ids=name)
def test_an_accepted_event_is_answered_as_pagerduty_does(path: Path) -> None:
    events: list[dict[str, Any]] = []
    app = Flask(__name__)
    app.register_blueprint(events_blueprint(events.append), url_prefix="/some/prefix")
    url = "/some/prefix/v2/change/enqueue" if is_change(path) else "/some/prefix/v2/enqueue"
    response = app.test_client().post(
        url, data=path.read_bytes(), headers={"X-Routing-Key": HEADER_KEY}
    )
    assert (response.status_code, response.content_type) == (202, "application/json")
    [event] = events
    if is_change(path):
        assert response.json == {"status": "success", "message": "Change event processed"}
        assert event == expected(path)
    else:
        key = expected(path).get("dedup_key") or event["dedup_key"]
        assert response.json == {
            "status": "success",
            "message": "Event processed",
            "dedup_key": key,
        }
        assert event == {**expected(path), "dedup_key": key}


@pytest.mark.parametrize("path", ACCEPTED, ids=name)
def test_the_command_accepts_an_accepted_event(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change = ["--change"] if is_change(path) else []
    assert main(["validate", *change, f"--routing-key={HEADER_KEY}", str(path)]) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("case", REFUSED, ids=name)
def test_parse_refuses_with_all_that_is_wrong(case: Path) -> None:
    request = Request(case)
    answer = json.loads((case / "answer.json").read_bytes())
    with pytest.raises(InvalidEvent) as caught:
        parse(request.body, change=request.change, routing_key=request.routing_key)
    error = caught.value
    assert list(error.errors) == answer["errors"]
    assert {"status": error.status, "message": error.message, "errors": [*error.errors]} == answer
    assert len(set(error.codes)) == len(error.errors)


@pytest.mark.parametrize("case", REFUSED, ids=name)
def test_a_refused_event_is_answered_as_pagerduty_does(case: Path) -> None:
    request = Request(case)
    events: list[dict[str, Any]] = []
    app = Flask(__name__)
    app.register_blueprint(events_blueprint(events.append), url_prefix="/some/prefix")
    response = app.test_client().post(
        "/some/prefix" + request.path, data=request.body, headers=request.headers
    )
    assert (response.status_code, response.content_type) == (400, "application/json")
    assert response.json == json.loads((case / "answer.json").read_bytes())
    assert events == []


@pytest.mark.parametrize("case", REFUSED, ids=name)
def test_the_command_refuses_with_all_that_is_wrong(
    case: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    request = Request(case)
    options = ["--change"] if request.change else []
    if request.routing_key:
        options += ["--routing-key", request.routing_key]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(request.body)))
    assert main(["validate", *options, "-"]) == 1
    errors = json.loads((case / "answer.json").read_bytes())["errors"]
    assert capsys.readouterr() == ("".join(f"-: {error}\n" for error in errors), "")
