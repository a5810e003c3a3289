"""gunicorn's workers, with bounds on what a client may take of them.

gunicorn has no setting for how long a request may take to arrive, nor for how much of what
has arrived is held at once. A client that is late is treated as one that has left: the rest
of its request reads as the end of the stream.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from errno import ECONNRESET
from functools import partial
from io import BytesIO
from socket import SHUT_RD, SHUT_WR
from typing import Any
from weakref import WeakValueDictionary

import gevent
from gevent.lock import Semaphore
from gunicorn.http.body import Body
from gunicorn.workers import base, ggevent, gthread, sync

# Seconds for a client to take an answer.
ANSWER_SECONDS = 10.0

# A stopping worker keeps idle connections so long, for a request that may be on its way.
LINGER_SECONDS = 2.0

# A body of more bytes than this is large: it is read before the app is called, up to the
# second number, and few of them are held and worked on at once. Of the smaller ones, each
# connection may hold one.
LARGE_BODY = 16_384
LARGEST_READ_AHEAD = 1_048_576
LARGE_BODIES_HELD = 128
LARGE_BODIES_OF_ONE_ADDRESS = 32
LARGE_BODIES_WORKED_ON = 1

# So many connections from one address stand in gevent's queue at once, the others behind them:
# however many it opens, a client from elsewhere waits for a few requests. Those that may have
# their next request ready stand apart, and let the new ones pass.
NEW_TURNS = 16
NEXT_TURNS = 4


class Worker(base.Worker):
    """What the workers have in common: the deadlines, as settings."""

    def init_process(self) -> None:
        # Here, not at the top: the master imports this module, and a HUP should load that anew.
        from .settings import read_settings

        settings = read_settings(os.environ)
        self.header_seconds = settings.header_timeout
        self.body_seconds = settings.body_timeout
        self.cfg.set("ssl_context", _ssl_context)
        self.cfg.set("do_handshake_on_connect", True)  # or gunicorn would call for it, too early
        super().init_process()


class Client:
    """A client's socket, read and written within deadlines."""

    def __init__(self, sock: Any, worker: Worker) -> None:
        self._sock = sock
        self._worker = worker
        self.left = False
        self.expect(worker.header_seconds)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)

    def start_tls(self, wrap: Callable[..., Any]) -> Client:
        """Go on over TLS; `wrap` makes a TLS socket of a socket."""
        self._sock = wrap(self._sock)
        return self

    def expect(self, seconds: float) -> None:
        """Set the time for all that is read from now on."""
        self._deadline = time.monotonic() + seconds

    def gettimeout(self) -> None:
        """Return no timeout, for gunicorn to set again after its own."""

    def settimeout(self, seconds: float | None) -> None:
        """Leave no more than these seconds; gunicorn asks for them when it waits for the end."""
        if seconds is not None:
            self._deadline = min(self._deadline, time.monotonic() + seconds)

    def finish(self) -> None:
        """Wait until the client has taken its answer and left, for as long as gunicorn would."""
        self.settimeout(LINGER_SECONDS)
        with suppress(OSError):
            self._sock.shutdown(SHUT_WR)
            for _ in range(16):
                if not self.recv(4096):
                    break
        self.left = True

    def recv(self, size: int) -> bytes:
        """Return what has come, or nothing, as at the end, once the client is late."""
        left = self._deadline - time.monotonic()
        if self.left or left <= 0:
            self.left = True
            return b""
        try:
            return self.recv_within(left, size)
        except TimeoutError:
            self.left = True
            return b""

    def recv_within(self, seconds: float | None, size: int) -> bytes:
        self._sock.settimeout(seconds)
        data: bytes = self._sock.recv(size)
        return data

    def sendall(self, data: bytes) -> None:
        """Send all of it, or raise as if the client had closed the connection."""
        self._sock.settimeout(ANSWER_SECONDS)
        try:
            self._sock.sendall(data)
        except TimeoutError:
            raise ConnectionResetError(ECONNRESET, "the answer was not taken") from None


class SyncWorker(Worker, sync.SyncWorker):
    """A sync worker whose clients have deadlines: each of them may stop it for so long."""

    def handle(self, listener: Any, client: Any, addr: Any) -> None:
        with_deadlines: Any = Client(client, self)
        super().handle(listener, with_deadlines, addr)

    def handle_request(self, listener: Any, req: Any, client: Any, addr: Any) -> Any:
        client.expect(self.body_seconds)
        return super().handle_request(listener, req, client, addr)


class ThreadWorker(Worker, gthread.ThreadWorker):
    """A gthread worker whose clients have deadlines: each may stop a thread for so long."""

    def handle(self, conn: Any) -> Any:
        if isinstance(conn.sock, Client):
            conn.sock.expect(self.header_seconds)
        else:
            conn.sock = Client(conn.sock, self)
            conn.data_ready = True  # gunicorn would wait here, and then for the idle time
        if super().handle(conn) and not conn.sock.left:
            return True
        conn.sock.finish()  # here, since gunicorn would do so in the thread that accepts
        return False

    def handle_request(self, req: Any, conn: Any) -> Any:
        conn.sock.expect(self.body_seconds)
        return super().handle_request(req, conn)


class GeventWorker(Worker, ggevent.GeventWorker):
    """A gevent worker whose clients have deadlines, and take their turns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Those that wait for a next request, the longest waiting first.
        self.idle: dict[GeventClient, None] = {}
        self.shares: WeakValueDictionary[tuple[str, int], Semaphore] = WeakValueDictionary()

    def init_process(self) -> None:
        self.held = Semaphore(LARGE_BODIES_HELD)
        self.worked_on = Semaphore(LARGE_BODIES_WORKED_ON)
        super().init_process()

    def timeout_ctx(self) -> Any:
        return nullcontext()  # gunicorn's covers idling and header with one number

    def share(self, addr: Any, at_once: int) -> Semaphore:
        """Return what lets so many clients from one address pass at once."""
        key = (addr[0] if isinstance(addr, tuple) else "", at_once)
        share = self.shares.get(key)
        if share is None:
            share = self.shares[key] = Semaphore(at_once)
        return share

    def take_turn(self, addr: Any, at_once: int) -> None:
        """Let those go first who wait already; of those from the same address, all but a few."""
        with self.share(addr, at_once):
            gevent.sleep(0)

    def handle(self, listener: Any, client: Any, addr: Any) -> None:
        self.take_turn(addr, NEW_TURNS)
        with_deadlines: Any = GeventClient(client, self)
        super().handle(listener, with_deadlines, addr)

    def handle_request(self, listener_name: Any, req: Any, sock: Any, addr: Any) -> Any:
        sock.expect(self.body_seconds)
        try:
            if _is_large(req):
                return self.handle_large(listener_name, req, sock, addr)
            return super().handle_request(listener_name, req, sock, addr)
        finally:
            sock.expect_request()
            self.take_turn(addr, NEXT_TURNS)

    def handle_large(self, listener_name: Any, req: Any, sock: Any, addr: Any) -> Any:
        with self.share(addr, LARGE_BODIES_OF_ONE_ADDRESS), self.held:
            sock.expect(self.body_seconds)
            if req._expected_100_continue:  # gunicorn would say so only when the app is called
                req._expected_100_continue = False
                sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            buffered: Any = _Buffered(req.body)
            req.body = Body(buffered)
            # One that is longer than what was read ahead is refused unseen, as fast as it comes.
            with nullcontext() if buffered.over else self.worked_on:
                gevent.sleep(0)  # after each of them, the others have a turn
                return super().handle_request(listener_name, req, sock, addr)

    def handle_exit(self, sig: int, frame: Any) -> None:
        super().handle_exit(sig, frame)
        gevent.spawn_later(LINGER_SECONDS, self.hang_up)

    def hang_up(self) -> None:
        """End the connections that wait for a request: they would last for the graceful time."""
        for client in list(self.idle):
            client.hang_up()


class GeventClient(Client):
    """A client that may wait for its next request, while there is room for it."""

    _worker: GeventWorker
    _idle = False

    def expect(self, seconds: float) -> None:
        self._idle = False
        super().expect(seconds)

    def expect_request(self) -> None:
        """Keep the connection for the idle time; the header's begins with its first byte."""
        self.expect(self._worker.cfg.keepalive)
        self._idle = True

    def hang_up(self) -> None:
        """End a connection that waits for a request, as if the client had."""
        self._worker.idle.pop(self, None)
        self.left = True
        with suppress(OSError):  # it may be gone; that is no affair of whoever called this
            self._sock.shutdown(SHUT_RD)

    def recv(self, size: int) -> bytes:
        if not self._idle:
            return super().recv(size)
        self._worker.idle[self] = None
        if len(self._worker.idle) > self._worker.worker_connections // 2:
            next(iter(self._worker.idle)).hang_up()  # room for those who have something to say
        try:
            data = super().recv(size)
        except (OSError, ValueError):
            if self.left:  # hang_up has closed it under us
                return b""
            raise
        finally:
            self._worker.idle.pop(self, None)
        self.expect(self._worker.header_seconds)
        return data

    def recv_within(self, seconds: float | None, size: int) -> bytes:
        # Over TLS, one read may wait many times, for which gevent has no common timeout.
        with gevent.Timeout(seconds, TimeoutError):
            return super().recv_within(None, size)


def _ssl_context(config: Any, default_ssl_context_factory: Callable[[], Any]) -> Any:
    """Leave the TLS handshake to a connection's first read: that one has a deadline."""
    context = default_ssl_context_factory()
    wrap = context.wrap_socket

    def wrap_socket(client: Any, **options: Any) -> Any:
        options["do_handshake_on_connect"] = False
        if isinstance(client, Client):
            return client.start_tls(partial(wrap, **options))
        try:
            return wrap(client, **options)
        except OSError:  # it has left already; gevent would print a traceback
            raise gevent.GreenletExit from None

    context.wrap_socket = wrap_socket
    return context


class _Buffered:
    """A reader of a body that has been read, as far as it came, its error included."""

    def __init__(self, body: Any) -> None:
        self.rest = body
        self.error: Exception | None = None
        self.buffer = BytesIO()
        try:
            while self.buffer.tell() < LARGEST_READ_AHEAD and (chunk := body.read(65_536)):
                self.buffer.write(chunk)
        except Exception as error:
            self.error = error
        self.over = self.buffer.tell() >= LARGEST_READ_AHEAD
        self.buffer.seek(0)

    def read(self, size: int) -> bytes:
        if data := self.buffer.read(size):
            return data
        if self.error is not None:
            raise self.error
        rest: bytes = self.rest.read(size)
        return rest


def _is_large(req: Any) -> bool:
    for name, value in req.headers:
        if name == "TRANSFER-ENCODING":
            return True
        if name == "CONTENT-LENGTH":
            return int(value) > LARGE_BODY
    return False
