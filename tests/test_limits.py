"""What the running service lets through: the throttle, and the list of routing keys."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import KEY, Redis, Service, ask, children_of, need, send, trigger, wait_for

OTHER = "another_key_that_has_32_letters_"
PREFIX = "PAGERDUTY_COMPAT_"
Start = Callable[..., Service]


def change() -> dict[str, Any]:
    return {"routing_key": KEY, "payload": {"summary": "deployed"}}


def test_one_event_too_many_is_pagerdutys_429(start: Start) -> None:
    service = start(env={PREFIX + "CALLS_PER_MINUTE": "2"})
    began = time.monotonic()
    assert send(service.url, trigger()).status == 202
    url = service.url + "/v2/change/enqueue"
    assert ask(url, json.dumps(change()).encode()).status == 202  # alert and change events share
    for _ in range(3):
        answer = send(service.url, trigger())
        assert (answer.status, answer.body) == (
            429,
            {
                "status": "throttle exceeded",
                "message": "Requests for this service are arriving too quickly."
                "  Please retry later.",
                "errors": ["Enhance Your Calm."],
            },
        )
        assert answer.headers["Retry-After"] == answer.headers["ratelimit-reset"]
        # Not a second too early: rounded up.
        assert began + 60 - time.monotonic() <= int(answer.headers["Retry-After"]) <= 60
    assert send(service.url, trigger(routing_key=OTHER)).status == 202
    assert send(service.url, trigger(client=5)).status == 400  # whatever else, it is no event
    wait_for(lambda: len(service.lines) == 3)


def test_120_events_a_minute_pass_and_0_is_no_limit(start: Start) -> None:
    service = start(env={PREFIX + "CALLS_PER_MINUTE": ""})
    statuses = [send(service.url, trigger()).status for _ in range(125)]
    assert statuses == [202] * 120 + [429] * 5
    unlimited = start(env={PREFIX + "CALLS_PER_MINUTE": "0"})
    assert {send(unlimited.url, trigger()).status for _ in range(125)} == {202}


def test_an_event_that_was_not_written_does_not_count(start: Start) -> None:
    env = {PREFIX + "CALLS_PER_MINUTE": "6", PREFIX + "STDOUT_TIMEOUT": "0.3"}
    service = start(env=env)
    service.reading.clear()
    send(service.url, trigger())  # the reader notices with this one
    statuses = [send(service.url, trigger(custom="x" * 20_000)).status for _ in range(10)]
    assert statuses == [202] * 3 + [503] * 7
    service.reading.set()
    wait_for(lambda: ask(service.url + "/-/ready", method="GET").status == 200)
    assert [send(service.url, trigger()).status for _ in range(3)] == [202, 202, 429]


def test_several_workers_share_the_number_through_redis(start: Start, tmp_path: Path) -> None:
    need("redis-server", "redis-server")
    redis = Redis(tmp_path)
    try:
        env = {PREFIX + "CALLS_PER_MINUTE": "10", PREFIX + "REDIS_URL": redis.url}
        service = start("--workers=3", env=env)
        assert "each of" not in service.log
        statuses = [send(service.url, trigger()).status for _ in range(30)]
        assert statuses == [202] * 10 + [429] * 20
    finally:
        redis.stop()
    assert {send(service.url, trigger()).status for _ in range(10)} == {202}
    assert 1 <= service.log.count("Redis does not answer") <= 3  # once in each worker
    assert "Traceback" not in service.log


def test_several_workers_without_redis_say_so_in_one_line(start: Start) -> None:
    service = start("--workers=2", env={PREFIX + "CALLS_PER_MINUTE": "120"})
    said = "each of 2 workers accepts 120 events a minute of a routing key"
    assert service.log.count(said) == 1


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    file = tmp_path / "keys"
    file.write_text(f"# the database team\n\n  {KEY}  # db\n{OTHER}\n")
    return file


@pytest.fixture
def listed(start: Start, keys: Path) -> Service:
    return start("--log-level=debug", env={PREFIX + "ROUTING_KEYS_FILE": str(keys)})


def test_a_routing_key_that_is_not_listed_is_refused(listed: Service) -> None:
    assert send(listed.url, trigger()).status == 202
    assert send(listed.url, trigger(routing_key=OTHER)).status == 202
    unlisted = "S3CR3T_key_that_has_32_letters__"
    answer = send(listed.url, trigger(routing_key=unlisted))
    assert (answer.status, answer.body) == (
        400,
        {
            "status": "invalid event",
            "message": "Event object is invalid",
            "errors": ["Invalid routing key"],
        },
    )
    assert send(listed.url, trigger(routing_key="é" * 32)).status == 400
    wait_for(lambda: len(listed.lines) == 2)
    for key in (KEY, OTHER, unlisted):
        assert key not in listed.log


def hup(service: Service) -> None:
    """Tell the service to start new workers, and wait until the old ones are gone."""
    old = set(children_of(service.process))
    service.process.send_signal(signal.SIGHUP)
    wait_for(lambda: not old & set(children_of(service.process)))


@pytest.mark.parametrize("bad", [None, "", "# none\n", "short\n", b"\xff\xfe"])
def test_a_hup_with_a_bad_file_keeps_the_keys(
    listed: Service, keys: Path, bad: str | bytes | None
) -> None:
    if bad is None:
        keys.unlink()
    else:
        keys.write_bytes(bad if isinstance(bad, bytes) else bad.encode())
    hup(listed)
    assert listed.log.count("the routing keys stay as they were") == 1
    assert send(listed.url, trigger()).status == 202
    assert send(listed.url, trigger(routing_key="x" * 32)).status == 400
    assert listed.log.count("Booting worker") == 2
    assert "Traceback" not in listed.log
    keys.write_text("x" * 32)
    hup(listed)
    assert send(listed.url, trigger()).status == 400
    assert send(listed.url, trigger(routing_key="x" * 32)).status == 202


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "cannot be read: No such file or directory"),
        (b"", "holds no key"),
        (b"# none\n", "holds no key"),
        (KEY.encode() + b"\nS3CR3T\n", "has no key of 32 characters in line 2"),
        (b"\xff", "is not UTF-8"),
    ],
)
@pytest.mark.parametrize("command", ["pagerduty_compat serve", "gunicorn"])
def test_a_bad_file_of_keys_stops_the_start_with_one_line(
    tmp_path: Path, text: bytes | None, reason: str, command: str
) -> None:
    if text is not None:
        (tmp_path / "keys").write_bytes(text)
    if command == "gunicorn":
        command += " --config=python:pagerduty_compat.gunicorn_conf"
        command += " pagerduty_compat.server:create_app()"
    run = subprocess.run(
        [sys.executable, "-m", *command.split(), "--bind=127.0.0.1:0"],
        env={**os.environ, PREFIX + "ROUTING_KEYS_FILE": str(tmp_path / "keys")},
        capture_output=True,
        text=True,
        timeout=20,
    )
    *before, last = run.stderr.splitlines()
    assert (run.returncode, run.stdout) == (2, "")
    assert last == f"cannot start: {PREFIX}ROUTING_KEYS_FILE {reason}"
    assert all("Starting gunicorn" in line for line in before)


def test_masked_keys_show_their_end(start: Start) -> None:
    service = start("--log-level=debug", env={PREFIX + "MASK_ROUTING_KEYS": "true"})
    assert send(service.url, trigger()).status == 202
    [line] = wait_for(lambda: service.lines)
    assert line["routing_key"] == "*" * (len(KEY) - 4) + KEY[-4:]
    assert KEY not in service.log


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("CALLS_PER_MINUTE", "1.5", "must be a whole number from 0 to 1000000"),
        ("CALLS_PER_MINUTE", "-1", "must be a whole number from 0 to 1000000"),
        ("MASK_ROUTING_KEYS", "yes", "must be true or false"),
        ("REDIS_URL", "http://:S3CR3T@host", "must be like redis://:PASSWORD@HOST:6379/0"),
        ("REDIS_URL", "redis://:S3CR3T/1@host", "must be like redis://:PASSWORD@HOST:6379/0"),
    ],
)
def test_a_wrong_limit_stops_the_start_with_one_line(name: str, value: str, reason: str) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "pagerduty_compat", "serve", "--bind=127.0.0.1:0"],
        env={**os.environ, PREFIX + name: value},
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert run.returncode == 2
    assert run.stderr.splitlines()[-1] == f"cannot start: {PREFIX}{name} {reason}"
    assert "S3CR3T" not in run.stderr
