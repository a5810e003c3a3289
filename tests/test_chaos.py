"""The short form of `make chaos`: see chaos.py for what is counted, and what must be true."""

from __future__ import annotations

import chaos
import pytest


@pytest.mark.parametrize(
    ("worker", "processes", "harm"),
    [
        ("gevent", 2, chaos.sigterm),
        ("gevent", 2, chaos.hup),
        ("gevent", 1, chaos.sigkill),
        ("gevent", 2, chaos.sigkill),
        ("gthread", 2, chaos.sigkill),
        ("sync", 2, chaos.sigkill),
        ("gevent", 2, chaos.reader_stops_and_resumes),
        ("gthread", 2, chaos.reader_leaves),
        ("gevent", 1, chaos.stdout_is_non_blocking),
        ("gevent", 2, chaos.disk_is_full),
        ("gevent", 1, chaos.stderr_is_stalled),
    ],
)
def test_no_acknowledged_event_is_lost(worker: str, processes: int, harm: chaos.Harm) -> None:
    counts = chaos.Run(worker, processes, harm, 1.5).judge()
    assert counts.wrong == [], counts.row()
