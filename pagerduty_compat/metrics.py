"""What became of the events, counted for Prometheus."""

from __future__ import annotations

import logging
import os
import platform
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, values
from prometheus_client.exposition import choose_encoder
from prometheus_client.multiprocess import MultiProcessCollector

from .blueprint import Answered

log = logging.getLogger(__name__)

_OUTCOMES = {202: "accepted", 400: "refused", 429: "throttled"}


class Metrics:
    """The counts of this process, and the text of those of all that share a folder."""

    def __init__(self, release: str, slot: int | None = None) -> None:
        """Start counting.

        Args:
            release: the version to show.
            slot: the place among the processes that count in PROMETHEUS_MULTIPROC_DIR, or
                None to count alone. Whoever comes next to the same place counts on from
                there, so that the folder does not grow.
        """
        self._shared = slot is not None and _reserve(slot)
        if self._shared:
            values.ValueClass = values.MultiProcessValue(lambda: slot)
        self._registry = registry = CollectorRegistry()
        self._events = Counter(
            "pagerduty_compat_events",
            "Events that were sent, by what became of them.",
            ["endpoint", "action", "severity", "outcome"],
            registry=registry,
        )
        self._refusals = Counter(
            "pagerduty_compat_refusals",
            "What was wrong with refused events, by member and kind.",
            ["code"],
            registry=registry,
        )
        self._answers = Histogram(
            "pagerduty_compat_answer_duration_seconds",
            "Time that the service worked on an event, from its header or its large body on.",
            ["endpoint"],
            registry=registry,
        )
        self.lines = Counter(
            "pagerduty_compat_lines_written", "Lines written to stdout.", registry=registry
        )
        self.bytes = Counter(
            "pagerduty_compat_written_bytes", "Bytes written to stdout.", registry=registry
        )
        self.redis_failures = Counter(
            "pagerduty_compat_redis_failures",
            "Events that passed without a limit, since Redis did not answer.",
            registry=registry,
        )
        Gauge(
            "pagerduty_compat_build_info",
            "The version of the service and of Python.",
            ["version", "python_version"],
            registry=registry,
            multiprocess_mode="max",
        ).labels(release, platform.python_version()).set(1)

    def count(self, answered: Answered) -> None:
        """Count what became of an event. Nothing that a client made up becomes a label."""
        endpoint = "change" if answered.change else "alert"
        action = severity = ""
        if answered.event is not None and not answered.change:
            action = answered.event["event_action"]
            if action == "trigger":
                severity = answered.event["payload"]["severity"]
        outcome = _OUTCOMES.get(answered.status, "failed")
        self._events.labels(endpoint, action, severity, outcome).inc()
        for code in answered.codes:
            self._refusals.labels(code).inc()
        self._answers.labels(endpoint).observe(answered.seconds)

    def text(self, accept: str) -> tuple[bytes, str]:
        """Return all counts, and their content type, in a format that is accepted."""
        registry: Any = self._registry
        if self._shared:
            MultiProcessCollector(registry := CollectorRegistry())
        encode, content_type = choose_encoder(accept)
        return encode(registry), content_type


def _reserve(slot: int) -> bool:
    """Take the memory that counting needs, or return False.

    prometheus_client maps files that have holes; where the folder is full, the first write to
    one would kill the process.
    """
    folder = os.environ["PROMETHEUS_MULTIPROC_DIR"]
    try:
        for kind in ("counter", "histogram", "gauge_max"):
            with open(f"{folder}/{kind}_{slot}.db", "ab") as file:
                os.posix_fallocate(file.fileno(), 0, 65_536)  # what it maps at first
    except OSError as error:
        log.warning("this worker counts alone in /metrics: %s: %s", folder, error.strerror)
        return False
    return True
