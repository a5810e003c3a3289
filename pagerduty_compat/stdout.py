"""One event, one whole line on stdout, or an exception.

The line is compact JSON in UTF-8. Its readers split at the newline alone: other line
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
from collections.abc import Iterator, MutableSequence
from contextlib import contextmanager, suppress
from typing import Any

# Once poll says that a pipe can be written, a write of at most PIPE_BUF bytes does not
# block. So a write can be bounded in time without O_NONBLOCK, which would hold for all who
# share the descriptor.
_CHUNK = select.PIPE_BUF

# Seconds to sleep before the next try for a lock that another process holds. Waiting in
# lockf would have no bound, and in a gevent worker it would stop every greenlet.
_RETRY = 0.001

# What the processes that share a stdout must know of it, as numbers in memory that they
# share: whether its last line may lack its end, and since when it has been unwritable, by
# the monotonic clock (0 if it is not).
_TORN, _SINCE = 0, 1


class NotWritten(Exception):
    """The line is not on stdout as a whole, and must not be acknowledged.

    Not an OSError: gunicorn takes a broken pipe, even this one, as "the client has left",
    and sends no answer.
    """


class EventWriter:
    """Writes events to a descriptor that threads and other processes write to as well."""

    def __init__(
        self,
        fd: int,
        timeout: float,
        state: MutableSequence[float] | memoryview[float] | None = None,
    ) -> None:
        """Write to `fd`, each event within `timeout` seconds.

        `state`: two zeros in memory that is shared by all processes that write there. Without
        it, a line that a killed process left unfinished has the next one glued to it.
        """
        self._fd = fd
        self._timeout = timeout
        self._state = [0.0, 0.0] if state is None else state
        self._lock = threading.Lock()
        # gevent's own poll hides POLLERR, and waits for its hub even with no time to wait.
        monkey = sys.modules.get("gevent.monkey")
        self._real_poll = monkey.get_original("select", "poll") if monkey else select.poll

    def write(self, event: dict[str, Any]) -> int:
        """Write the event as one line, whole, and never between the bytes of another.

        Returns the length of the line in bytes.

        Raises:
            NotWritten: nobody reads, the disk is full, or it took longer than the timeout.
                Further events then fail at once until stdout can be written again.
        """
        text = json.dumps(event, ensure_ascii=False, separators=(",", ":"))
        line = text.encode() + b"\n"
        deadline = time.monotonic() + self._timeout
        with self._locked(deadline):
            try:
                if self._overdue() and not self._writable():
                    raise NotWritten("it is not read")
                self._write(line, deadline)
            except (NotWritten, OSError) as error:
                self._state[_SINCE] = time.monotonic() - self._timeout
                reason = error.strerror if isinstance(error, OSError) else error
                raise NotWritten(f"stdout cannot be written: {reason}") from error
            self._state[_SINCE] = 0.0
        return len(line)

    def ready(self) -> bool:
        """Say at once whether the next event can be expected to be written.

        False after a write has failed, or once stdout has been unwritable for the timeout;
        true again as soon as it can be written.
        """
        if self.broken():
            return False
        if not self._poll():
            self._state[_SINCE] = self._state[_SINCE] or time.monotonic()
        elif self._state[_SINCE]:
            # A full disk looks writable. The newline that a torn line still needs is a write
            # that can be made without an event, and that tells.
            with suppress(NotWritten, OSError), self._locked(deadline=0):
                self._write(b"", time.monotonic() + _RETRY)
                self._state[_SINCE] = 0.0
        return not self._overdue()

    def broken(self) -> bool:
        """Say whether nobody can read any more, which only a new stdout mends."""
        return bool(self._poll() & ~select.POLLOUT)

    def _overdue(self) -> bool:
        since = self._state[_SINCE]
        return since > 0 and time.monotonic() - since >= self._timeout

    @contextmanager
    def _locked(self, deadline: float) -> Iterator[None]:
        """Keep other threads out, and other processes; the kernel frees what the dead hold."""
        if not self._lock.acquire(timeout=max(0, deadline - time.monotonic())):
            raise NotWritten("stdout is busy")
        try:
            while True:
                try:
                    fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except (BlockingIOError, PermissionError):
                    if time.monotonic() >= deadline:
                        raise NotWritten("stdout is busy") from None
                    time.sleep(_RETRY)
            try:
                yield
            finally:
                fcntl.lockf(self._fd, fcntl.LOCK_UN)
        finally:
            self._lock.release()

    def _write(self, line: bytes, deadline: float) -> None:
        """Write all of a line, and before it the end of one that was torn."""
        rest = memoryview(b"\n" + line if self._state[_TORN] else line)
        while rest:
            self._wait_until_writable(deadline)
            self._state[_TORN] = 1.0
            rest = rest[os.write(self._fd, rest[:_CHUNK]) :]
        self._state[_TORN] = 0.0

    def _wait_until_writable(self, deadline: float) -> None:
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                raise NotWritten("it is not read")
            if self._writable():
                return
            poll = select.poll()  # one for each call: threads cannot share it
            poll.register(self._fd, select.POLLOUT)
            poll.poll(left * 1000)

    def _writable(self) -> bool:
        """Say, without waiting, whether a small write would not block.

        Raises:
            NotWritten: it would fail, for nobody can read any more.
        """
        flags = self._poll()
        if flags & ~select.POLLOUT:
            raise NotWritten("it has no reader")
        return bool(flags)

    def _poll(self) -> int:
        poll = self._real_poll()
        poll.register(self._fd, select.POLLOUT)
        return sum(flags for _, flags in poll.poll(0))
