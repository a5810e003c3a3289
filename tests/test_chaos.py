"""The short form of `make chaos`: see chaos.py for what is counted, and what must be true."""

from __future__ import annotations

import chaos
import pytest


@pytest.mark.parametrize(
    ("worker", "processes", "harm"),
    [
        ("ours", 2, chaos.sigterm),
        ("ours", 2, chaos.hup),
        ("ours", 1, chaos.sigkill),
        ("ours", 2, chaos.sigkill),
        ("gthread", 2, chaos.sigkill),
        ("sync", 2, chaos.sigkill),
        ("ours", 2, chaos.reader_stops_and_resumes),
        ("gthread", 2, chaos.reader_leaves),
        ("ours", 1, chaos.stdout_is_non_blocking),
        ("ours", 2, chaos.disk_is_full),
        ("ours", 1, chaos.stderr_is_stalled),
    ],
)
def test_no_acknowledged_event_is_lost(worker: str, processes: int, harm: chaos.Harm) -> None:
    counts = chaos.Run(worker, processes, harm, 1.5).judge()
    assert counts.wrong == [], counts.row()
