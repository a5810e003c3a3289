"""Deadlines and turns of the packaged worker, on real connections."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import ssl
import struct
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import Service, answer_to, ask, children_of, need, send, trigger, wait_for

from pagerduty_compat.worker import GeventClient

EVENT = json.dumps(trigger()).encode()
HEAD = b"POST /v2/enqueue HTTP/1.1\r\nHost: a\r\n"
REQUEST = HEAD + b"Content-Length: %d\r\n\r\n%s" % (len(EVENT), EVENT)


HASTY = {"PAGERDUTY_COMPAT_HEADER_TIMEOUT": "0.5", "PAGERDUTY_COMPAT_BODY_TIMEOUT": "0.5"}
WORKERS = ["GeventWorker", "ThreadWorker", "SyncWorker"]


@pytest.fixture
def hasty(start: Callable[..., Service], request: pytest.FixtureRequest) -> Service:
    """A service with short deadlines; a test may ask for a worker class."""
    worker = getattr(request, "param", "GeventWorker")
    return start(of_class(worker), env=HASTY)


every_worker = pytest.mark.parametrize("hasty", WORKERS, indirect=True)


def connect(service: Service, source: str = "127.0.0.1") -> socket.socket:
    return socket.create_connection(("127.0.0.1", service.port), 20, (source, 0))


def of_class(worker: str) -> str:
    return f"--worker-class=pagerduty_compat.worker.{worker}"


def large(size: int) -> bytes:
    event = json.dumps(trigger(custom="x" * size)).encode()
    return HEAD + b"Content-Length: %d\r\n\r\n%s" % (len(event), event)


def dribble(service: Service, text: bytes) -> bytes:
    """Send bytes one by one until the service hangs up, and return those that are left."""
    rest = bytearray(text)
    with connect(service) as connection, contextlib.suppress(ConnectionError):
        while rest:
            connection.sendall(bytes([rest.pop(0)]))
            time.sleep(0.05)
    return bytes(rest)


def reset(connection: socket.socket) -> None:
    """Close a connection so that the other side finds it reset."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def exchange(connection: socket.socket) -> bytes:
    """Send an event, and return the answer; the connection stays open."""
    connection.sendall(REQUEST)
    text = b""
    while not text.endswith(b"}\n"):
        text += connection.recv(65_536)
    assert text.startswith(b"HTTP/1.1 202 ")
    return text


@every_worker
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


@every_worker
def test_a_header_that_is_dribbled_is_cut_off(hasty: Service) -> None:
    assert dribble(hasty, HEAD)


@every_worker
@pytest.mark.parametrize("size", [100, 100_000])
def test_a_body_that_does_not_arrive_is_a_400_and_cut_off(hasty: Service, size: int) -> None:
    with connect(hasty) as connection:
        connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n{" % size)
        head, body = answer_to(connection).split(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 ")
        assert json.loads(body)["errors"] == ["JSON parse error"]


def test_an_idle_connection_is_not_cut_off(hasty: Service) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", hasty.port, timeout=20)
    sockets = []
    for pause in (0, 1, 11):  # longer than each deadline, that for the answer too
        time.sleep(pause)
        connection.request("POST", "/v2/enqueue", EVENT)
        assert connection.getresponse().read()
        sockets.append(connection.sock)
    assert len(set(sockets)) == 1
    connection.close()


def test_no_deadline_of_a_client_cuts_a_line_that_is_being_written(hasty: Service) -> None:
    hasty.reading.clear()
    send(hasty.url, trigger())  # the reader notices with this one
    with connect(hasty) as connection:
        connection.sendall(large(300_000))
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


def test_hanging_up_on_a_client_that_has_gone_fails_nobody_else() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        theirs = socket.create_connection(listener.getsockname())
        ours, _ = listener.accept()
    with ours:
        reset(theirs)
        worker: Any = SimpleNamespace(idle={}, header_seconds=1)
        client = GeventClient(ours, worker)
        worker.idle[client] = None
        with pytest.raises(OSError, match="not connected"):
            ours.shutdown(socket.SHUT_RD)
        client.hang_up()
        assert worker.idle == {}
        assert client.recv(1) == b""


def test_many_requests_from_one_address_do_not_hold_up_another(
    start: Callable[..., Service],
) -> None:
    service = start()
    [worker] = children_of(service.process)
    with contextlib.ExitStack() as stack:
        os.kill(worker, signal.SIGSTOP)
        clients = [stack.enter_context(connect(service, "127.0.0.2")) for _ in range(300)]
        for connection in clients:
            connection.sendall(REQUEST)
        another = stack.enter_context(connect(service))
        another.sendall(REQUEST.replace(b"disk full", b"cpu blaze"))
        os.kill(worker, signal.SIGCONT)
        wait_for(lambda: len(service.lines) == 301)
    summaries = [line["payload"]["summary"] for line in service.lines]
    assert summaries.index("cpu blaze") < 100  # it was the last to come


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


@pytest.fixture(scope="module")
def certified(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], ssl.SSLContext]:
    """Return the options that turn TLS on, and a client's context that trusts it."""
    need("openssl", "openssl")
    folder = tmp_path_factory.mktemp("tls")
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost"
    command += f" -addext subjectAltName=IP:127.0.0.1 -keyout {key} -out {certificate}"
    subprocess.run(command.split(), check=True, capture_output=True)
    context = ssl.create_default_context(cafile=str(certificate))
    return [f"--certfile={certificate}", f"--keyfile={key}"], context


Certified = tuple[list[str], ssl.SSLContext]


@pytest.mark.parametrize("worker", WORKERS)
def test_tls_works_with_deadlines_too(
    start: Callable[..., Service], certified: Certified, worker: str
) -> None:
    options, tls = certified
    service = start(*options, of_class(worker), env=HASTY, tls=tls)
    assert send(service.url, trigger(dedup_key="k"), tls=tls).status == 202
    wait_for(lambda: service.lines)
    with tls.wrap_socket(connect(service), server_hostname="127.0.0.1") as connection:
        connection.sendall(HEAD)
        assert answer_to(connection) == b""
    assert ask(service.url + "/-/ready", method="GET", tls=tls).status == 200
    assert service.stop() == 0
    assert "Traceback" not in service.log


@pytest.mark.parametrize("worker", WORKERS)
def test_a_tls_handshake_that_is_dribbled_is_cut_off(
    start: Callable[..., Service], certified: Certified, worker: str
) -> None:
    options, tls = certified
    service = start(*options, of_class(worker), env=HASTY, tls=tls)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        tls.wrap_bio(incoming, outgoing, server_hostname="127.0.0.1").do_handshake()
    hello = outgoing.read()
    assert len(hello) > 200
    assert dribble(service, hello)
    assert ask(service.url + "/-/ready", method="GET", tls=tls).status == 200


def test_an_idle_tls_connection_does_not_hold_up_the_end(
    start: Callable[..., Service], certified: Certified
) -> None:
    options, tls = certified
    service = start(*options, tls=tls)
    with tls.wrap_socket(connect(service), server_hostname="127.0.0.1") as connection:
        exchange(connection)
        service.process.send_signal(signal.SIGTERM)
        assert answer_to(connection) == b""
        assert service.process.wait(15) == 0
    assert "Traceback" not in service.log


# What follows bounds what one client does to another: each of these waited for 10 s or more.
SOON = 5.0


def is_served_soon(service: Service, request: bytes) -> None:
    with connect(service) as connection:
        connection.settimeout(SOON)
        connection.sendall(request)
        assert connection.recv(100).startswith(b"HTTP/1.1 202 ")


def test_large_bodies_that_do_not_come_do_not_hold_up_those_of_others(
    start: Callable[..., Service],
) -> None:
    service = start()
    with contextlib.ExitStack() as stack:
        for _ in range(200):
            connection = stack.enter_context(connect(service, "127.0.0.2"))
            connection.sendall(HEAD + b"Content-Length: 100000\r\n\r\n{")
        wait_for(lambda: unread(service) == 0)
        is_served_soon(service, large(20_000))


def test_a_body_over_the_limit_that_stalls_does_not_hold_up_others(
    start: Callable[..., Service],
) -> None:
    service = start()
    with connect(service) as connection:
        connection.sendall(HEAD + b"Content-Length: 2000000\r\n\r\n" + b"x" * 1_100_000)
        wait_for(lambda: unread(service) == 0)
        is_served_soon(service, large(20_000))


def unread(service: Service) -> int:
    """Return how many bytes its connections still have to read, as the kernel shows them."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    port = f":{service.port:04X}"
    queues = [row[4] for row in rows if port in (row[1][-5:], row[2][-5:]) and row[3] == "01"]
    return sum(int(part, 16) for queue in queues for part in queue.split(":"))


def test_a_body_behind_a_pipelined_header_has_its_own_deadline(
    start: Callable[..., Service],
) -> None:
    service = start(env={"PAGERDUTY_COMPAT_HEADER_TIMEOUT": "0.5"})
    with connect(service) as connection:
        head, _, body = REQUEST.partition(b"\r\n\r\n")
        connection.sendall(REQUEST + head + b"\r\n\r\n")  # both at once
        for part in (body[:10], body[10:20], body[20:]):
            time.sleep(0.4)
            connection.sendall(part)
        text = b""
        while text.count(b"}\n") < 2:
            text += connection.recv(65_536)
        assert text.count(b"HTTP/1.1 202 ") == 2


def test_clients_that_stay_after_their_answer_do_not_stop_a_thread_worker(
    start: Callable[..., Service],
) -> None:
    service = start(of_class("ThreadWorker"), "--threads=48")
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(service)) for _ in range(40)]
        for connection in clients:
            connection.sendall(b"GET /version HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        for connection in clients:
            assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")
        is_served_soon(service, REQUEST)


def test_a_reset_within_a_tls_handshake_is_no_traceback(
    start: Callable[..., Service], certified: Certified
) -> None:
    options, tls = certified
    service = start(*options, tls=tls)
    [worker] = children_of(service.process)
    os.kill(worker, signal.SIGSTOP)  # so that it finds the connection reset
    for _ in range(5):
        reset(connect(service))
    os.kill(worker, signal.SIGCONT)
    assert send(service.url, trigger(), tls=tls).status == 202
    assert "Traceback" not in service.log


@pytest.mark.parametrize("worker", WORKERS)
def test_the_workers_have_their_deadlines_without_the_packaged_settings(
    start: Callable[..., Service], certified: Certified, worker: str
) -> None:
    options, tls = certified
    command = ("-m", "gunicorn", "pagerduty_compat.server:create_app()")
    service = start(*options, of_class(worker), env=HASTY, tls=tls, command=command)
    with connect(service) as connection:
        assert answer_to(connection) == b""
    assert send(service.url, trigger(), tls=tls).status == 202
