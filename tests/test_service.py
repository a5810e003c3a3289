"""The service as it runs: a real gunicorn, real sockets, a real pipe."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import (
    ROOT,
    Service,
    ask,
    body_of,
    children_of,
    exchange,
    free_port,
    is_ready,
    send,
    trigger,
    wait_for,
)

from pagerduty_compat.events import MAX_BYTES

JSON_PARSE_ERROR = {
    "status": "Unrecognized object",
    "message": "Event object format is unrecognized",
    "errors": ["JSON parse error"],
}
TOO_LARGE = {
    "status": "invalid event",
    "message": "Event object is invalid",
    "errors": ["Event is too large (maximum is 512 KB)"],
}
EVENT = json.dumps(trigger()).encode()


def chunks(body: bytes, size: int = 10_000) -> Iterator[bytes]:
    return (body[i : i + size] for i in range(0, len(body), size))


def bad_links() -> bytes:
    body = json.dumps(trigger(links=["?"])).encode()
    return body.replace(b'"?"', b",".join([b"{}"] * ((MAX_BYTES - len(body)) // 3)))


@pytest.mark.parametrize(
    ("body", "answer"),
    [
        (b"[" * 100_000, JSON_PARSE_ERROR),
        (b"", JSON_PARSE_ERROR),
        (body_of(MAX_BYTES + 1), TOO_LARGE),
        (body_of(3 * MAX_BYTES), TOO_LARGE),
        (
            bad_links(),
            {**TOO_LARGE, "errors": ["'link href' is missing or blank"]},
        ),
    ],
    ids=["nested", "empty", "a byte too large", "three times too large", "bad links"],
)
@pytest.mark.parametrize("chunked", [False, True], ids=["with a length", "chunked"])
def test_a_bad_body_is_a_400(service: Service, body: bytes, answer: Any, chunked: bool) -> None:
    seen = len(service.stdout)
    response = ask(service.url + "/v2/enqueue", chunks(body) if chunked else body)
    assert (response.status, response.body) == (400, answer)
    assert len(service.stdout) == seen


def test_an_event_of_512_kb_is_accepted_chunked_or_not(service: Service) -> None:
    seen = service.stdout.count(b"\n")
    assert ask(service.url + "/v2/enqueue", body_of(MAX_BYTES)).status == 202
    assert ask(service.url + "/v2/enqueue", chunks(body_of(MAX_BYTES))).status == 202
    wait_for(lambda: service.stdout.count(b"\n") == seen + 2)
    assert [len(line["client"]) > 500_000 for line in service.lines[seen:]] == [True, True]


@pytest.mark.parametrize(
    "request_",
    [
        b"Content-Length: %d\r\n\r\n%s" % (len(EVENT) + 1, EVENT),
        b"Content-Length: 100\r\n\r\n{}     ",
        b"Content-Length: 100\r\n\r\n",
        b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n" % (len(EVENT), EVENT),
        b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\nG\r\n" % (len(EVENT), EVENT),
        b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s" % (len(EVENT) + 9, EVENT),
        b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%sxx0\r\n\r\n" % (len(EVENT), EVENT),
    ],
    ids=["one short", "a prefix", "none", "no last chunk", "bad size", "cut chunk", "no newline"],
)
def test_a_body_that_breaks_off_is_a_400(service: Service, request_: bytes) -> None:
    seen = len(service.stdout)
    answer = exchange(service.port, b"POST /v2/enqueue HTTP/1.1\r\nHost: a\r\n" + request_)
    head, body = answer.split(b"\r\n\r\n", 1)
    assert head.startswith(b"HTTP/1.1 400 ")
    assert b"\r\nContent-Type: application/json\r\n" in head + b"\r\n"
    assert json.loads(body) == JSON_PARSE_ERROR
    assert len(service.stdout) == seen


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v2/enqueue", 405),
        ("PROPFIND", "/v2/enqueue", 405),
        ("POST", "/", 404),
        ("POST", "//v2/enqueue", 404),
        ("POST", "/v2//enqueue", 404),
        ("POST", "/v2/enqueue/%2e%2e/%00%ff", 404),
    ],
)
def test_what_is_not_ours_is_json(service: Service, method: str, path: str, status: int) -> None:
    seen = len(service.stdout)
    response = ask(service.url + path, EVENT, method=method)
    assert response.status == status
    assert set(response.body) == {"status", "message", "errors"}
    assert response.headers["Allow"] == ("POST" if status == 405 else None)
    assert len(service.stdout) == seen


def test_the_log_gives_the_reasons_and_no_value(service: Service) -> None:
    send(service.url, trigger(routing_key="SECRET", client=["SECRET"]))
    line = wait_for(lambda: [line for line in service.log.splitlines() if "'client'" in line])
    assert line[0].endswith(
        "[WARNING] refused an alert event from 127.0.0.1: Length of 'routing_key' is incorrect"
        " (should be 32 characters); 'client' is invalid (must be a string)"
    )
    assert "SECRET" not in service.log


def test_gunicorns_own_refusals_leave_no_value_in_the_log(service: Service) -> None:
    answer = exchange(service.port, b"POST /v2/enqueue HTTP/1.1\r\nX-Routing-Key SECRET\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    wait_for(lambda: "[WARNING] Invalid request from ip=127.0.0.1\n" in service.log)
    assert "SECRET" not in service.log


@pytest.mark.parametrize("worker", ["pagerduty_compat.worker.GeventWorker", "gthread", "sync"])
def test_a_client_that_sends_all_before_it_reads_gets_its_answer(
    start: Callable[..., Service], worker: str
) -> None:
    service = start(f"--worker-class={worker}")
    assert ask(service.url + "/v2/enqueue", body_of(6_000_000)).status == 400


def test_what_a_client_says_of_a_proxy_is_not_believed(service: Service) -> None:
    for header in ("SCRIPT_NAME", "Script-Name", "X-Forwarded-Prefix", "X-Script-Name"):
        headers = {header: "/elsewhere", "PATH_INFO": "/elsewhere"}
        assert ask(service.url + "/v2/enqueue", EVENT, headers=headers).status == 202


def test_a_connection_is_kept_for_the_next_event(service: Service) -> None:
    request = b"POST /v2/enqueue HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%s"
    answer = exchange(service.port, request % (len(EVENT), EVENT) * 3)
    assert answer.count(b"HTTP/1.1 202 ") == 3


WORKERS = [
    ["--workers=1"],
    ["--workers=2"],
    ["--worker-class=gevent", "--workers=2"],
    ["--worker-class=gthread", "--workers=2", "--threads=4"],
    ["--worker-class=sync", "--workers=2"],
]


@pytest.mark.parametrize("options", WORKERS, ids=" ".join)
def test_there_are_as_many_whole_lines_as_202s(
    start: Callable[..., Service], options: list[str]
) -> None:
    service = start(*options)
    sizes = random.Random(options[0])

    def client(number: int) -> list[str]:
        keys = []
        for _ in range(20):
            text = f"{number}" * sizes.choice([1, 300, 5_000, 50_000, 200_000])
            answer = send(service.url, trigger(custom=text[:200_000]))
            assert answer.status == 202
            keys.append(answer.body["dedup_key"])
        return keys

    with ThreadPoolExecutor(8) as clients:
        keys = [key for keys in clients.map(client, range(8)) for key in keys]
    wait_for(lambda: service.stdout.count(b"\n") >= len(keys))
    assert sorted(line["dedup_key"] for line in service.lines) == sorted(keys)


def test_plain_gunicorn_runs_the_app(start: Callable[..., Service]) -> None:
    command = ("-m", "gunicorn", "pagerduty_compat.server:create_app()")
    service = start(command=command)
    assert send(service.url, trigger(dedup_key="k")).status == 202
    wait_for(lambda: service.lines)
    assert "Using worker: sync" in service.log


def test_serve_becomes_the_gunicorn_master(start: Callable[..., Service]) -> None:
    service = start()
    assert f"[{service.process.pid}] [INFO] Starting gunicorn" in service.log
    assert "Using worker: pagerduty_compat.worker.GeventWorker" in service.log
    assert service.stop() == 0
    assert "Shutting down: Master" in service.log


def test_ctrl_c_stops_it_without_a_traceback(start: Callable[..., Service]) -> None:
    service = start("--workers=2")
    assert send(service.url, trigger()).status == 202
    os.killpg(service.process.pid, signal.SIGINT)  # as a terminal does: to all of the group
    assert service.process.wait(10) == 0
    assert "Traceback" not in service.log
    assert "Shutting down: Master" in service.log


def test_a_hup_loads_new_code(start: Callable[..., Service], tmp_path: Path) -> None:
    code = tmp_path / "pagerduty_compat"
    shutil.copytree(ROOT / "pagerduty_compat", code)
    service = start(cwd=tmp_path)
    before = send(service.url, {}).body["errors"]
    assert before == ["'routing_key' cannot be blank", "'event_action' is missing or blank"]
    events = code / "events.py"
    events.write_text(events.read_text().replace("cannot be blank", "is still blank"))
    service.process.send_signal(signal.SIGHUP)
    after = ["'routing_key' is still blank", "'event_action' is missing or blank"]
    wait_for(lambda: send(service.url, {}).body["errors"] == after)


def test_a_worker_that_is_killed_is_replaced(start: Callable[..., Service]) -> None:
    service = start()
    [worker] = children_of(service.process)
    os.kill(worker, signal.SIGKILL)

    def answered() -> bool:
        with contextlib.suppress(OSError):
            return send(service.url, trigger()).status == 202
        return False

    wait_for(answered)
    assert children_of(service.process) != [worker]


def test_the_access_log_stays_off_stdout(start: Callable[..., Service]) -> None:
    service = start("--access-logfile=-")
    assert send(service.url, trigger(dedup_key="k")).status == 202
    wait_for(lambda: '"POST /v2/enqueue HTTP/1.1" 202' in service.log)
    assert [line["dedup_key"] for line in service.lines] == ["k"]


def test_a_full_disk_is_a_503_and_not_ready(tmp_path: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "pagerduty_compat", "serve", f"--bind=127.0.0.1:{port}"]
    with open("/dev/full", "wb") as full, (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=full, stderr=log)
    try:
        url = f"http://127.0.0.1:{port}"

        wait_for(lambda: is_ready(url))
        assert [send(url, trigger()).status for _ in range(2)] == [503, 503]
        assert ask(url + "/-/ready", method="GET").status == 503
        # A restart would not free the disk.
        assert ask(url + "/-/healthy", method="GET").status == 200
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def test_it_listens_on_port_8080_or_where_the_environment_says(tmp_path: Path) -> None:
    def bind(**environ: str) -> str:
        command = [sys.executable, "-m", "pagerduty_compat", "serve", "--print-config"]
        environ = {k: v for k, v in os.environ.items() if k != "PORT"} | environ
        shown = subprocess.run(command, env=environ, capture_output=True, check=True).stdout
        [line] = [line for line in shown.decode().splitlines() if line.startswith("bind ")]
        return line.split("= ")[1]

    assert bind() == "['0.0.0.0:8080']"
    assert bind(PORT="") == "['0.0.0.0:8080']"
    assert bind(PORT="9000") == "['0.0.0.0:9000']"


@pytest.mark.parametrize(
    ("environ", "line"),
    [
        (
            {"PAGERDUTY_COMPAT_STDOUT_TIMEOUT": "soon"},
            "cannot start: PAGERDUTY_COMPAT_STDOUT_TIMEOUT must be a number from 0.1 to 20",
        ),
        (
            {"PAGERDUTY_COMPAT_BODY_TIMEOUT": "0"},
            "cannot start: PAGERDUTY_COMPAT_BODY_TIMEOUT must be a number from 0.1 to 300",
        ),
        (
            {"OPTIONS": "--capture-output"},
            "cannot start: --capture-output would take events off stdout",
        ),
        (
            {"OPTIONS": "--preload"},
            "cannot start: --preload would load the app before gevent is ready for it",
        ),
        ({"OPTIONS": "--daemon"}, "cannot start: --daemon would take events off stdout"),
        (
            {"GUNICORN_CMD_ARGS": "--capture-output"},
            "cannot start: --daemon and --capture-output would take events off stdout",
        ),
        (
            {"OPTIONS": "--certfile none --keyfile none"},
            "cannot start: [Errno 2] No such file or directory: 'none'",
        ),
        ({"PORT": "http"}, "cannot start: PORT must be a number from 1 to 65535"),
        ({"PORT": "65536"}, "cannot start: PORT must be a number from 1 to 65535"),
    ],
)
def test_a_wrong_setting_is_one_line_and_status_2_before_the_port_opens(
    tmp_path: Path, environ: dict[str, str], line: str
) -> None:
    port = environ.get("PORT", str(free_port()))
    options = environ.get("OPTIONS", "").split()
    run = subprocess.run(
        [sys.executable, "-m", "pagerduty_compat", "serve", *options],
        env={**os.environ, "PORT": port, **environ},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=20,
    )
    *before, last = run.stderr.splitlines()
    assert (run.returncode, run.stdout, last) == (2, "", line)
    assert all("Starting gunicorn" in line for line in before)  # no port, no worker, no traceback


def test_a_wrong_setting_is_found_under_gunicorns_own_command_too() -> None:
    run = subprocess.run(
        [
            *(sys.executable, "-m", "gunicorn", "--config=python:pagerduty_compat.gunicorn_conf"),
            *(f"--bind=127.0.0.1:{free_port()}", "pagerduty_compat.server:create_app()"),
        ],
        env={**os.environ, "PAGERDUTY_COMPAT_STDOUT_TIMEOUT": "soon"},
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert run.returncode == 2
    assert run.stderr.splitlines()[-1].startswith("cannot start: PAGERDUTY_COMPAT_STDOUT_TIMEOUT")
    assert len(run.stderr.splitlines()) == 2


def test_the_log_of_a_start_has_nothing_to_warn_of(start: Callable[..., Service]) -> None:
    for line in start().log.splitlines():
        assert re.match(r"\[[^]]*\] \[[0-9]+\] \[INFO\] ", line)


def test_a_closed_stdout_is_one_line_and_status_2() -> None:
    command = f"exec {sys.executable} -m pagerduty_compat serve --bind 127.0.0.1:{free_port()} >&-"
    run = subprocess.run(["/bin/sh", "-c", command], stderr=subprocess.PIPE, text=True, timeout=20)
    assert run.returncode == 2
    assert run.stderr.splitlines()[-1].startswith("cannot start: stdout is closed")
    assert "Booting worker" not in run.stderr


def test_the_settings_leave_nothing_in_the_master_that_a_hup_should_load_anew() -> None:
    code = "import sys, pagerduty_compat.gunicorn_conf; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = run.stdout.split()
    assert "pagerduty_compat.gunicorn_conf" in loaded
    ours = {name for name in loaded if name.startswith("pagerduty_compat")}
    assert ours == {"pagerduty_compat", "pagerduty_compat.gunicorn_conf"}
    assert not {"flask", "jsonschema", "gevent"} & set(loaded)


@pytest.mark.parametrize("worker", ["pagerduty_compat.worker.GeventWorker", "gthread", "sync"])
def test_without_a_reader_no_event_is_accepted(start: Callable[..., Service], worker: str) -> None:
    service = start(f"--worker-class={worker}", env={"PAGERDUTY_COMPAT_STDOUT_TIMEOUT": "0.5"})
    assert service.process.stdout is not None
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, service.process.stdout.fileno())  # the reader leaves
    os.close(null)
    # Our own thread may still sit in its last read.
    wait_for(lambda: send(service.url, trigger()).status == 503)
    answer = send(service.url, trigger())
    assert (answer.status, answer.headers["Retry-After"]) == (503, "5")
    assert answer.body == {
        "status": "service unavailable",
        "message": "Please retry later.",
        "errors": ["Service Unavailable"],
    }
    assert ask(service.url + "/-/ready", method="GET").status == 503
    assert ask(service.url + "/-/healthy", method="GET").status == 503  # only a restart mends it


@pytest.mark.parametrize("worker", ["pagerduty_compat.worker.GeventWorker", "gthread", "sync"])
def test_a_reader_that_stalls_is_a_503_until_it_reads_again(tmp_path: Path, worker: str) -> None:
    port = free_port()
    read, write = os.pipe()
    command = [sys.executable, "-m", "pagerduty_compat", "serve", f"--bind=127.0.0.1:{port}"]
    env = {**os.environ, "PAGERDUTY_COMPAT_STDOUT_TIMEOUT": "0.5"}
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command, f"--worker-class={worker}"], stdout=write, stderr=log, env=env
        )
    os.close(write)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: is_ready(url))
        statuses = [send(url, trigger(custom="x" * 20_000)).status for _ in range(5)]
        assert statuses == [202, 202, 202, 503, 503]  # a pipe holds 64 KB
        assert ask(url + "/-/ready", method="GET").status == 503
        text = os.read(read, 1_000_000)
        assert wait_for(lambda: ask(url + "/-/ready", method="GET").status == 200)
        assert send(url, trigger(dedup_key="later")).status == 202
        text += os.read(read, 1_000_000)
        *accepted, fragment, later, end = text.split(b"\n")
        assert [json.loads(line)["custom"] for line in accepted] == ["x" * 20_000] * 3
        assert fragment.startswith(b'{"routing_key":')  # alone on its line, never acknowledged
        assert json.loads(later)["dedup_key"] == "later"
        assert end == b""
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)
        os.close(read)
