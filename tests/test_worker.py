"""Deadlines and turns of the packaged worker, on real connections."""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Service, answer_to, ask, need, send, trigger, wait_for

EVENT = json.dumps(trigger()).encode()
HEAD = b"POST /v2/enqueue HTTP/1.1\r\nHost: a\r\n"
REQUEST = HEAD + b"Content-Length: %d\r\n\r\n%s" % (len(EVENT), EVENT)


@pytest.fixture
def hasty(start: Callable[..., Service]) -> Service:
    """A service with short deadlines."""
    return start(
        env={"PAGERDUTY_COMPAT_HEADER_TIMEOUT": "0.5", "PAGERDUTY_COMPAT_BODY_TIMEOUT": "0.5"}
    )


def connect(service: Service) -> socket.socket:
    return socket.create_connection(("127.0.0.1", service.port), timeout=20)


def exchange(connection: socket.socket) -> bytes:
    """Send an event, and return the answer; the connection stays open."""
    connection.sendall(REQUEST)
    text = b""
    while not text.endswith(b"}\n"):
        text += connection.recv(65_536)
    assert text.startswith(b"HTTP/1.1 202 ")
    return text


@pytest.mark.parametrize("sent", [b"", b"P", HEAD], ids=["silent", "begun", "unfinished"])
def test_a_header_that_does_not_arrive_is_cut_off(hasty: Service, sent: bytes) -> None:
    with connect(hasty) as connection:
        connection.sendall(sent)
        assert answer_to(connection) == b""


def test_the_header_of_a_later_request_is_cut_off_too(hasty: Service) -> None:
    with connect(hasty) as connection:
        exchange(connection)
        connection.sendall(HEAD)
        assert answer_to(connection) == b""


def test_a_header_that_is_dribbled_is_cut_off(hasty: Service) -> None:
    rest = bytearray(HEAD)
    with connect(hasty) as connection, contextlib.suppress(ConnectionError):
        while rest:
            connection.sendall(bytes([rest.pop(0)]))
            time.sleep(0.05)
    assert rest


@pytest.mark.parametrize("size", [100, 100_000])
def test_a_body_that_does_not_arrive_is_a_400_and_cut_off(hasty: Service, size: int) -> None:
    with connect(hasty) as connection:
        connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n{" % size)
        head, body = answer_to(connection).split(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 ")
        assert json.loads(body)["errors"] == ["JSON parse error"]


def test_an_idle_connection_is_not_cut_off(hasty: Service) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", hasty.port, timeout=20)
    for _ in range(2):
        connection.request("POST", "/v2/enqueue", EVENT)
        assert connection.getresponse().read()
        first = connection.sock
        time.sleep(1)  # longer than the deadlines
    assert connection.sock is first
    connection.close()


def test_no_deadline_of_a_client_cuts_a_line_that_is_being_written(hasty: Service) -> None:
    hasty.reading.clear()
    send(hasty.url, trigger())  # the reader notices with this one
    with connect(hasty) as connection:
        event = json.dumps(trigger(custom="x" * 300_000)).encode()
        connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n%s" % (len(event), event))
        time.sleep(1.5)  # the pipe is full for longer than the deadlines
        hasty.reading.set()
        assert connection.recv(100).startswith(b"HTTP/1.1 202 ")
    wait_for(lambda: [line for line in hasty.lines if len(line.get("custom", "")) == 300_000])


def test_idle_connections_make_room_for_new_ones(start: Callable[..., Service]) -> None:
    service = start("--worker-connections=10")
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(connect(service)) for _ in range(30)]
        for connection in idle:
            exchange(connection)
        assert answer_to(idle[0]) == b""  # closed
        exchange(idle[-1])  # kept


@pytest.mark.parametrize("size", [1_000, 100_000])
def test_a_client_that_waits_for_100_continue_gets_it(
    start: Callable[..., Service], size: int
) -> None:
    service = start()
    event = json.dumps(trigger(custom="x" * size)).encode()
    with connect(service) as connection:
        connection.sendall(
            HEAD + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(event)
        )
        assert connection.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(event)
        assert connection.recv(1000).startswith(b"HTTP/1.1 202 ")


def test_an_idle_connection_does_not_hold_up_the_end(start: Callable[..., Service]) -> None:
    service = start()
    with connect(service) as connection:
        exchange(connection)
        service.process.send_signal(signal.SIGTERM)
        assert answer_to(connection) == b""
        # Not after the graceful time of 25 s, nor killed.
        assert service.process.wait(15) == 0
    assert "graceful timeout" not in service.log
    assert "Traceback" not in service.log


def test_a_stopping_worker_answers_on_its_open_connections(start: Callable[..., Service]) -> None:
    service = start()
    with connect(service) as connection:
        exchange(connection)
        service.process.send_signal(signal.SIGTERM)
        wait_for(lambda: "Handling signal: term" in service.log)
        time.sleep(0.3)
        assert b"Connection: close" in exchange(connection)
        assert answer_to(connection) == b""


def test_tls_works_with_deadlines_too(start: Callable[..., Service], tmp_path: Path) -> None:
    need("openssl", "openssl")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost"
    files = [
        "-addext",
        "subjectAltName=IP:127.0.0.1",
        "-keyout",
        str(key),
        "-out",
        str(certificate),
    ]
    subprocess.run([*command.split(), *files], check=True, capture_output=True)
    context = ssl.create_default_context(cafile=str(certificate))
    service = start(
        f"--certfile={certificate}",
        f"--keyfile={key}",
        env={"PAGERDUTY_COMPAT_HEADER_TIMEOUT": "0.5"},
        tls=context,
    )
    assert send(service.url, trigger(dedup_key="k"), tls=context).status == 202
    assert ask(service.url + "/-/ready", method="GET", tls=context).status == 200
    wait_for(lambda: service.lines)
    with context.wrap_socket(connect(service), server_hostname="127.0.0.1") as connection:
        connection.sendall(HEAD)
        assert answer_to(connection) == b""
    with context.wrap_socket(connect(service), server_hostname="127.0.0.1") as connection:
        exchange(connection)
        service.process.send_signal(signal.SIGTERM)
        assert answer_to(connection) == b""
        assert service.process.wait(15) == 0
    assert "Traceback" not in service.log
