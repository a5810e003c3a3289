"""The service as an app, and its settings."""

from __future__ import annotations

import json
from importlib.metadata import version

import pytest
from conftest import trigger
from flask.testing import FlaskClient

from pagerduty_compat.server import create_app
from pagerduty_compat.settings import InvalidSetting, Settings, read_settings, unknown_settings


@pytest.fixture
def client() -> FlaskClient:
    return create_app({}).test_client()


def test_an_event_is_one_line_of_compact_json(
    client: FlaskClient, capfd: pytest.CaptureFixture[str]
) -> None:
    event = trigger(dedup_key="k", client="Ωμέγα\u2028\n")
    assert client.post("/v2/enqueue", data=json.dumps(event)).status_code == 202
    assert capfd.readouterr().out == (
        '{"routing_key":"dummykey_length_is_32_characters","event_action":"trigger","payload":'
        '{"summary":"disk full","source":"db1","severity":"critical"},"dedup_key":"k",'
        '"client":"Ωμέγα\u2028\\n"}\n'
    )


def test_the_line_carries_the_keys_that_were_filled_in(
    client: FlaskClient, capfd: pytest.CaptureFixture[str]
) -> None:
    response = client.post(
        "/v2/enqueue",
        data=json.dumps(trigger(routing_key=None)),
        headers={"X-Routing-Key": "routing_key_of_the_header_is_it_"},
    )
    line = json.loads(capfd.readouterr().out)
    assert line["routing_key"] == "routing_key_of_the_header_is_it_"
    assert response.json is not None
    assert line["dedup_key"] == response.json["dedup_key"]


def test_a_refused_event_leaves_stdout_alone(
    client: FlaskClient, capfd: pytest.CaptureFixture[str]
) -> None:
    assert client.post("/v2/enqueue", data="{}").status_code == 400
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("path", ["/-/healthy", "/-/ready", "/-/healthy/"])
def test_health_is_answered(client: FlaskClient, path: str) -> None:
    response = client.get(path)
    assert (response.status_code, response.content_type) == (200, "application/json")


def test_the_version_is_that_of_the_package(client: FlaskClient) -> None:
    assert client.get("/version").json == {
        "status": "pagerduty-compat",
        "message": version("pagerduty-compat"),
    }


@pytest.mark.parametrize("method", ["GET", "POST", "HEAD", "OPTIONS", "PROPFIND"])
@pytest.mark.parametrize(
    "path", ["/", "/v2", "/v2/enqueue/x", "/v1/enqueue", "//v2/enqueue", "/v2//enqueue", "/%00"]
)
def test_other_paths_are_404_in_json(client: FlaskClient, method: str, path: str) -> None:
    response = client.open(environ_overrides={"PATH_INFO": path}, method=method, data="{}")
    assert (response.status_code, response.content_type) == (404, "application/json")


@pytest.mark.parametrize(
    ("path", "allow"),
    [("/v2/enqueue", "POST"), ("/-/ready", "GET, HEAD"), ("/version", "GET, HEAD")],
)
def test_other_methods_are_405_in_json(client: FlaskClient, path: str, allow: str) -> None:
    for method in ("PUT", "OPTIONS", "PROPFIND"):
        response = client.open(path, method=method)
        assert (response.status_code, response.content_type) == (405, "application/json")
        assert sorted(response.headers["Allow"].split(", ")) == allow.split(", ")


def test_settings_have_defaults() -> None:
    assert read_settings({"PAGERDUTY_COMPAT_STDOUT_TIMEOUT": ""}) == Settings(
        stdout_timeout=3,
        header_timeout=5,
        body_timeout=10,
        calls_per_minute=120,
        redis_url="",
        routing_keys_file="",
        mask_routing_keys=False,
    )


def test_settings_are_read_from_the_environment() -> None:
    environ = {"STDOUT_TIMEOUT": "0.5", "CALLS_PER_MINUTE": "0", "MASK_ROUTING_KEYS": "True"}
    settings = read_settings({f"PAGERDUTY_COMPAT_{name}": environ[name] for name in environ})
    assert settings == Settings(stdout_timeout=0.5, calls_per_minute=0, mask_routing_keys=True)


@pytest.mark.parametrize("value", ["fast", "0", "0.09", "20.1", "-1", "nan", "inf", "3s"])
def test_a_wrong_setting_is_named_with_its_bounds_and_not_repeated(value: str) -> None:
    with pytest.raises(InvalidSetting) as caught:
        create_app({"PAGERDUTY_COMPAT_STDOUT_TIMEOUT": value})
    assert str(caught.value) == "PAGERDUTY_COMPAT_STDOUT_TIMEOUT must be a number from 0.1 to 20"


def test_an_unknown_setting_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    # Kubernetes sets this one for every pod beside a Service called pagerduty-compat.
    environ = {"PAGERDUTY_COMPAT_PORT": "tcp://10.0.0.1:80", "PAGERDUTY": "x"}
    assert list(unknown_settings(environ)) == ["PAGERDUTY_COMPAT_PORT"]
    create_app(environ)
    assert "unknown setting PAGERDUTY_COMPAT_PORT is ignored" in caplog.messages


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_closed_stream_stops_the_start(monkeypatch: pytest.MonkeyPatch, stream: str) -> None:
    monkeypatch.setattr(f"sys.{stream}", None)
    with pytest.raises(InvalidSetting, match=f"{stream} is closed"):
        create_app({})
