"""Real parts for the tests: the service under gunicorn, Alertmanager, plain HTTP."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pytest
import redis

ROOT = Path(__file__).parent.parent
KEY = "dummykey_length_is_32_characters"


def trigger(**members: Any) -> dict[str, Any]:
    """Return a small alert event that is accepted."""
    payload = {"summary": "disk full", "source": "db1", "severity": "critical"}
    return {"routing_key": KEY, "event_action": "trigger", "payload": payload, **members}


class Answer(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    body: Any


def ask(
    url: str,
    body: bytes | Iterator[bytes] | None = None,
    *,
    method: str = "POST",
    headers: dict[str, str] | None = None,
    tls: ssl.SSLContext | None = None,
    source: str = "127.0.0.1",
) -> Answer:
    """Send one request; an iterator as body goes out chunked. The answer must be JSON."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=20, source_address=(source, 0))
    if tls:
        connection = http.client.HTTPSConnection(parts.netloc, timeout=20, context=tls)
    path = url[url.index(parts.netloc) + len(parts.netloc) :]
    try:
        connection.request(method, path, body, headers or {}, encode_chunked=True)
        response = connection.getresponse()
        raw = response.read()
    finally:
        connection.close()
    assert response.headers["Content-Type"] == "application/json"
    return Answer(response.status, response.headers, json.loads(raw) if raw else None)


def send(url: str, event: object, tls: ssl.SSLContext | None = None, **headers: str) -> Answer:
    return ask(url + "/v2/enqueue", json.dumps(event).encode(), headers=headers, tls=tls)


def body_of(size: int) -> bytes:
    """Return an event that is accepted, of so many bytes."""
    body = json.dumps(trigger(client="")).encode()
    return body.replace(b'"client": ""', b'"client": "%s"' % (b"x" * (size - len(body))))


def exchange(port: int, request: bytes) -> bytes:
    """Send raw bytes and no more, and return all that comes back."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        return answer_to(connection)


def answer_to(connection: socket.socket) -> bytes:
    """Return all that comes until the server closes the connection."""
    text = b""
    while chunk := connection.recv(65536):
        text += chunk
    return text


def free_port() -> int:
    """Return a port that nobody listens on, and that no connection gets by itself.

    Were it one of those, who connects to it too early could be connected to itself.
    """
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with socket.socket() as server, contextlib.suppress(OSError):
            server.bind(("127.0.0.1", port))
            return port


def wait_for(condition: Callable[[], Any], seconds: float = 20) -> Any:
    """Return the first true value of a condition, or fail after some seconds."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"nothing after {seconds} s"
        time.sleep(0.02)
    return value


def is_ready(url: str, tls: ssl.SSLContext | None = None) -> bool:
    """Say whether a service answers, and that it is ready."""
    try:
        return ask(url + "/-/ready", method="GET", tls=tls).status == 200
    except OSError:
        return False


def children_of(process: subprocess.Popen[bytes]) -> list[int]:
    """Return the process ids of gunicorn's workers, given its master."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in children.read_text().split()]


def cpu_seconds(pid: int) -> float:
    """Return the CPU time that a process has used so far."""
    stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")


class Process:
    """A server of a test, with its stdout read through a pipe, and ended by the test."""

    def __init__(
        self,
        command: list[str],
        folder: Path,
        env: dict[str, str] | None = None,
        cwd: Path | None = None,
    ):
        self.stdout = b""
        self.reading = threading.Event()  # cleared, it reads no more than it is reading
        self.reading.set()
        self._log = folder / f"{Path(command[0]).name}-{time.monotonic_ns()}.log"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, **(env or {})},
                cwd=cwd,
                start_new_session=True,
            )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        while self.reading.wait() and (chunk := os.read(self.process.stdout.fileno(), 65536)):
            self.stdout += chunk

    @property
    def log(self) -> str:
        return self._log.read_text()

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The whole lines on stdout, one event each."""
        return [json.loads(line) for line in self.stdout.split(b"\n")[:-1]]

    def stop(self) -> int:
        self.reading.set()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            status = self.process.wait(30)
        finally:
            self.process.kill()
            self._reader.join(5)
            assert self.process.stdout is not None
            self.process.stdout.close()
        return status


class Service(Process):
    """`pagerduty-compat serve` on a free port, ready."""

    def __init__(
        self,
        folder: Path,
        *options: str,
        port: int | None = None,
        env: dict[str, str] | None = None,
        cwd: Path | None = None,
        command: tuple[str, ...] = ("-m", "pagerduty_compat", "serve"),
        tls: ssl.SSLContext | None = None,
    ):
        self.port = port or free_port()
        self.tls = tls
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.port}"
        bind = f"--bind=127.0.0.1:{self.port}"
        # Most tests send more than PagerDuty would take of one routing key.
        env = {"PAGERDUTY_COMPAT_CALLS_PER_MINUTE": "0", **(env or {})}
        super().__init__([sys.executable, *command, bind, *options], folder, env, cwd)
        try:
            wait_for(self._is_ready)
        except BaseException:
            self.stop()  # nobody else has it to stop
            raise

    def _is_ready(self) -> bool:
        assert self.process.poll() is None, self.log
        return is_ready(self.url, self.tls)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Service]]:
    """Start the service with some of gunicorn's options, as often as wanted."""
    started: list[Service] = []

    def start(*options: str, **settings: Any) -> Service:
        started.append(Service(tmp_path, *options, **settings))
        return started[-1]

    yield start
    for service in started:
        service.stop()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The service as it is packaged, one for the tests of a module."""
    service = Service(tmp_path_factory.mktemp("service"))
    yield service
    service.stop()


def calls_of(work: Callable[[], object]) -> int:
    """Count the calls of Python and C functions, a cost that no other program changes."""
    calls = 0

    def count(_frame: object, event: str, _arg: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return calls


class Redis:
    """A Redis server on a free port, which keeps nothing on disk."""

    def __init__(self, folder: Path):
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._folder = folder
        self.restart()

    def restart(self) -> None:
        options = f"--port {self.port} --bind 127.0.0.1 --appendonly no --dir {self._folder}"
        self.process = subprocess.Popen(
            ["redis-server", *options.split(), "--save", ""], stdout=subprocess.DEVNULL
        )
        wait_for(self._answers)

    def _answers(self) -> bool:
        try:
            return bool(redis.Redis.from_url(self.url).ping())
        except redis.ConnectionError:
            return False

    def stop(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.terminate()
        self.process.wait(20)


def need(program: str, package: str) -> None:
    """Skip where a program is missing; in CI that is a failure."""
    if shutil.which(program) is None:
        reason = f"{program} is missing: apt-get install {package}"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
