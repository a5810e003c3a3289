"""One event, one whole line on stdout, or an exception.

The line is compact JSON in UTF-8. Readers split at the newline alone: other line
separators of Unicode may stand in it as they are.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import sys
import threading
import time
from collections.abc import MutableSequence
from typing import Any

# Once poll says that a pipe can be written, a write of at most PIPE_BUF bytes does not
# block: so a write can be bounded in time without O_NONBLOCK, which would be set for all
# who share the descriptor.
_CHUNK = select.PIPE_BUF

# How long to sleep before the next try for a lock that another process holds. Waiting in
# lockf would have no bound, and in a gevent worker it would stop every greenlet.
_RETRY_SECONDS = 0.001


class NotWritten(Exception):
    """The line is not on stdout as a whole, and must not be acknowledged.

    Not an OSError: gunicorn takes a broken pipe, even this one, as "the client has left"
    and sends no answer.
    """


class EventWriter:
    """Writes events to one descriptor, shared with other threads and processes."""

    def __init__(self, fd: int, timeout: float) -> None:
        """Write to `fd`, each event within `timeout` seconds."""
        self._fd = fd
        self._timeout = timeout
        self._lock = threading.Lock()
        self._torn: MutableSequence[int] = bytearray(1)  # 1: a line may have been begun
        self._failed = False
        self._unwritable_since: float | None = None

    def write(self, event: dict[str, Any]) -> None:
        """Write the event as one line, whole, never between the bytes of another.

        Raises:
            NotWritten: nobody reads, the disk is full, or it took longer than the timeout.
                After that, further events fail at once until stdout can be written again.
        """
        text = json.dumps(event, ensure_ascii=False, separators=(",", ":"))
        deadline = time.monotonic() + self._timeout
        if not self._lock.acquire(timeout=self._timeout):
            raise NotWritten("stdout is busy")
        try:
            if self._failed and not self._writable():
                raise NotWritten("stdout cannot be written")
            self._lock_file(deadline)
            try:
                self._write_line(text.encode() + b"\n", deadline)
            finally:
                fcntl.lockf(self._fd, fcntl.LOCK_UN)
            self._failed = False
        except OSError as error:
            self._failed = True
            raise NotWritten(f"stdout cannot be written: {error.strerror}") from error
        except NotWritten:
            self._failed = True
            raise
        finally:
            self._lock.release()

    def ready(self) -> bool:
        """Say at once whether the next event can be expected to be written.

        False after a write has failed, or when stdout has been found unwritable for the
        timeout; true again as soon as it can be written.
        """
        try:
            if self._writable():
                self._failed, self._unwritable_since = False, None
                return True
        except NotWritten:
            self._failed = True
        now = time.monotonic()
        self._unwritable_since = self._unwritable_since or now
        return not self._failed and now - self._unwritable_since < self._timeout

    def _lock_file(self, deadline: float) -> None:
        """Keep other processes out. The kernel lets go of the lock when its holder dies."""
        while True:
            try:
                fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except (BlockingIOError, PermissionError):
                if time.monotonic() > deadline:
                    raise NotWritten("stdout is busy") from None
                time.sleep(_RETRY_SECONDS)

    def _write_line(self, line: bytes, deadline: float) -> None:
        if self._torn[0]:  # end what is left there, so that our line is not glued to it
            line = b"\n" + line
        rest = memoryview(line)
        while rest:
            self._wait_until_writable(deadline)
            try:
                self._torn[0] = 1
                rest = rest[os.write(self._fd, rest[:_CHUNK]) :]
            except BlockingIOError:  # somebody made the descriptor non-blocking
                time.sleep(_RETRY_SECONDS)
        self._torn[0] = 0

    def _wait_until_writable(self, deadline: float) -> None:
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                raise NotWritten("stdout is not read")
            if self._writable():
                return
            poll = select.poll()  # one for each call: threads cannot share it
            poll.register(self._fd, select.POLLOUT)
            poll.poll(left * 1000)

    def _writable(self) -> bool:
        """Say, without waiting, whether a write would not block.

        Raises:
            NotWritten: it would fail, for nobody reads any more.
        """
        # gevent's own poll hides POLLERR and waits for its hub, even with no time to wait.
        monkey = sys.modules.get("gevent.monkey")
        poll = monkey.get_original("select", "poll")() if monkey else select.poll()
        poll.register(self._fd, select.POLLOUT)
        flags = sum(flags for _, flags in poll.poll(0))
        if flags & ~select.POLLOUT:
            raise NotWritten("stdout has no reader")
        return flags == select.POLLOUT
