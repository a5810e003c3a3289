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


@pytest.mark.parametrize(
    ("kind", "count", "seconds"),
    [("answers_never_read", 500, 3), ("mistakes_512_kb", 50, 2)],
)
def test_an_honest_client_is_served_beside_hostile_ones(
    kind: str, count: int, seconds: float
) -> None:
    # The bound is no measurement, but far from what a client that is not served would wait.
    row, wrong = chaos.hostile_run(kind, count, seconds, bound=5)
    assert wrong == [], row
