"""The writer on its own, on real pipes, between real processes."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
from conftest import wait_for

from pagerduty_compat.stdout import EventWriter, NotWritten

LINE = b'{"n":1}\n'
PIPE_BYTES = 65_536


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    read, write = os.pipe()
    yield read, write
    for end in (read, write):
        with contextlib.suppress(OSError):
            os.close(end)


def fill(fd: int) -> None:
    """Leave no room in a pipe."""
    os.set_blocking(fd, False)
    try:
        while os.write(fd, b"x" * 4096):
            pass
    except BlockingIOError:
        os.set_blocking(fd, True)


def test_an_event_is_a_line(pipe: tuple[int, int]) -> None:
    EventWriter(pipe[1], timeout=1).write({"n": 1, "s": "é\u2028\n"})
    assert os.read(pipe[0], 100) == '{"n":1,"s":"é\u2028\\n"}\n'.encode()


@pytest.mark.parametrize("blocking", [True, False])
def test_a_line_longer_than_the_pipe_is_written_whole(
    pipe: tuple[int, int], blocking: bool
) -> None:
    os.set_blocking(pipe[1], blocking)
    event = {"s": "x" * 5 * PIPE_BYTES}
    thread = threading.Thread(target=EventWriter(pipe[1], timeout=20).write, args=(event,))
    thread.start()
    text = b""
    while not text.endswith(b"\n"):
        text += os.read(pipe[0], 10_000)
    thread.join()
    assert json.loads(text) == event


def test_a_full_pipe_is_ready_for_the_timeout_and_then_not_until_it_is_read(
    pipe: tuple[int, int],
) -> None:
    writer = EventWriter(pipe[1], timeout=0.2)
    fill(pipe[1])
    assert writer.ready()
    wait_for(lambda: not writer.ready())
    assert not writer.broken()
    os.read(pipe[0], PIPE_BYTES)
    assert writer.ready()


def test_a_failed_write_is_not_ready_at_once_and_the_next_one_does_not_wait(
    pipe: tuple[int, int],
) -> None:
    fill(pipe[1])
    with pytest.raises(NotWritten, match="stdout cannot be written: it is not read"):
        EventWriter(pipe[1], 0.1, state := [0.0, 0.0]).write({})
    since = state[1]
    writer = EventWriter(pipe[1], 1000, [0.0, since - 1000])  # it would wait for long
    assert not writer.ready()
    with pytest.raises(NotWritten):
        writer.write({})
    os.read(pipe[0], PIPE_BYTES)
    writer.write({"n": 1})
    assert os.read(pipe[0], PIPE_BYTES) == LINE


def test_a_pipe_without_a_reader_is_broken(pipe: tuple[int, int]) -> None:
    writer = EventWriter(pipe[1], timeout=1000)
    assert not writer.broken()
    os.close(pipe[0])
    assert writer.broken()
    assert not writer.ready()
    with pytest.raises(NotWritten, match="it has no reader"):
        writer.write({})


def test_a_full_disk_is_told_by_the_line_that_was_torn() -> None:
    with open("/dev/full", "wb") as full:
        writer = EventWriter(full.fileno(), timeout=1)
        assert writer.ready()
        with pytest.raises(NotWritten, match="No space left on device"):
            writer.write({})
        assert not writer.ready()
        assert not writer.broken()


def test_after_a_line_that_was_cut_short_the_next_begins_anew(pipe: tuple[int, int]) -> None:
    state = [0.0, 0.0]
    with pytest.raises(NotWritten):
        EventWriter(pipe[1], 0.1, state).write({"s": "x" * 2 * PIPE_BYTES})
    torn = os.read(pipe[0], PIPE_BYTES)
    EventWriter(pipe[1], 1, state).write({"n": 1})
    assert b"\n" not in torn
    assert os.read(pipe[0], PIPE_BYTES) == b"\n" + LINE


def test_health_ends_a_torn_line_when_it_can(pipe: tuple[int, int]) -> None:
    writer = EventWriter(pipe[1], timeout=0.1)
    with pytest.raises(NotWritten):
        writer.write({"s": "x" * 2 * PIPE_BYTES})
    os.read(pipe[0], PIPE_BYTES)
    assert writer.ready()
    writer.write({"n": 1})
    assert os.read(pipe[0], PIPE_BYTES) == b"\n" + LINE


HOLD_THE_LOCK = """
import fcntl, sys
fcntl.lockf(1, fcntl.LOCK_EX)
print(flush=True)
sys.stdin.read()
"""


def test_another_process_that_writes_is_waited_for_and_its_death_frees_the_lock(
    pipe: tuple[int, int],
) -> None:
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD_THE_LOCK], stdin=subprocess.PIPE, stdout=pipe[1]
    )
    assert os.read(pipe[0], 1) == b"\n"
    with pytest.raises(NotWritten, match="busy"):
        EventWriter(pipe[1], timeout=0.1).write({})
    other.kill()
    other.communicate()
    EventWriter(pipe[1], timeout=1).write({"n": 1})
    assert os.read(pipe[0], 100) == LINE


GREENLETS = """
from gevent import monkey; monkey.patch_all()
import sys, gevent
from pagerduty_compat.stdout import EventWriter, NotWritten
ticks = 0
def tick():
    global ticks
    while True:
        gevent.sleep(0.01)
        ticks += 1
gevent.spawn(tick)
try:
    EventWriter(1, timeout=1).write({"s": "x" * 200_000})
except NotWritten as error:
    print(ticks > 20, error, file=sys.stderr)
"""


@pytest.mark.parametrize("harm", ["lock", "reader"])
def test_no_wait_stops_the_other_greenlets(pipe: tuple[int, int], harm: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD_THE_LOCK if harm == "lock" else "print(flush=True)"],
        stdin=subprocess.PIPE,
        stdout=pipe[1],
    ) as other:
        assert os.read(pipe[0], 1) == b"\n"
        run = subprocess.run(
            [sys.executable, "-c", GREENLETS],
            stdout=pipe[1],
            stderr=subprocess.PIPE,
            text=True,
            timeout=20,
        )
        reason = "stdout is busy" if harm == "lock" else "stdout cannot be written: it is not read"
        assert run.stderr == f"True {reason}\n"
        other.communicate()
