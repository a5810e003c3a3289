"""A real Alertmanager delivers to the real service, with the sample's own files."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import KEY, ROOT, Process, Service, free_port, need, wait_for

PROGRAM = "prometheus-alertmanager"  # Debian's name for it


class Alertmanager(Process):
    """Alertmanager with the sample's configuration, the receiver changed by the test."""

    def __init__(
        self, folder: Path, url: str, receiver: dict[str, Any], group_interval: str = "1s"
    ):
        self.target = url
        config = yaml.safe_load((ROOT / "sample/alertmanager.yml").read_text())
        config["route"].update(group_wait="200ms", group_interval=group_interval)
        [sample] = config["receivers"][0]["pagerduty_configs"]
        assert sample["url"] == "http://127.0.0.1:8080/v2/enqueue"
        sample.update(receiver, url=url + "/v2/enqueue")
        (folder / "alertmanager.yml").write_text(yaml.safe_dump(config))
        address = f"127.0.0.1:{free_port()}"
        super().__init__(
            [
                PROGRAM,
                f"--config.file={folder / 'alertmanager.yml'}",
                f"--storage.path={folder / 'data'}",
                f"--web.listen-address={address}",
                "--cluster.listen-address=",
                "--log.level=debug",
            ],
            folder,
        )
        self.url = f"http://{address}"
        wait_for(lambda: "Listening on" in self.log)

    def alert(self, action: str, name: str) -> None:
        """Fire or resolve an alert with the sample's script."""
        env = {**os.environ, "ALERTMANAGER": self.url}
        subprocess.run([ROOT / "sample/alert.sh", action, name], env=env, check=True)

    def metric(self, name: str) -> float:
        """Return one of Alertmanager's own counters for PagerDuty."""
        metrics = subprocess.run(["curl", "-sf", f"{self.url}/metrics"], capture_output=True)
        [line] = re.findall(
            rf'^{name}{{integration="pagerduty"}} (.*)$', metrics.stdout.decode(), re.M
        )
        return float(line)

    def connections(self) -> set[str]:
        """Return its open TCP connections, but those of who asks it, as the kernel shows them."""
        port = f"{int(self.target.rpartition(':')[2]):04X}"
        table = Path("/proc/net/tcp").read_text().splitlines()[1:]
        rows = [line.split() for line in table]
        return {row[1] for row in rows if row[2].endswith(f":{port}") and row[3] == "01"}

    def post(self, *alerts: dict[str, Any]) -> None:
        """Fire alerts as Prometheus does."""
        curl = ["curl", "-sf", f"{self.url}/api/v2/alerts", "-H", "Content-Type: application/json"]
        subprocess.run([*curl, "-d", "@-"], input=json.dumps(alerts).encode(), check=True)


@pytest.fixture
def alertmanager(tmp_path: Path) -> Iterator[Callable[..., Alertmanager]]:
    need(PROGRAM, "prometheus-alertmanager")
    need("curl", "curl")
    started: list[Alertmanager] = []

    def start(url: str, group_interval: str = "1s", **receiver: Any) -> Alertmanager:
        started.append(Alertmanager(tmp_path, url, receiver, group_interval))
        return started[-1]

    yield start
    for process in started:
        process.stop()


def test_a_firing_and_a_resolved_alert_are_two_lines_with_one_dedup_key(
    service: Service, alertmanager: Callable[..., Alertmanager]
) -> None:
    seen = len(service.lines)
    sender = alertmanager(service.url)
    sender.alert("fire", "DiskFull")
    wait_for(lambda: len(service.lines) > seen)
    sender.alert("resolve", "DiskFull")
    wait_for(lambda: len(service.lines) > seen + 1)
    firing, resolved = service.lines[seen:]
    assert (firing["event_action"], resolved["event_action"]) == ("trigger", "resolve")
    assert firing["routing_key"] == resolved["routing_key"] == KEY
    assert firing["payload"]["summary"] == "[FIRING:1] DiskFull (db1)"
    assert firing["dedup_key"] == resolved["dedup_key"]
    assert len(firing["dedup_key"]) == 64
    assert sender.metric("alertmanager_notifications_total") == 2
    assert sender.metric("alertmanager_notification_requests_failed_total") == 0


def test_two_alerts_of_one_group_are_one_event(
    service: Service, alertmanager: Callable[..., Alertmanager]
) -> None:
    seen = len(service.lines)
    labels = [{"alertname": "Slow", "instance": instance} for instance in ("db1", "db2")]
    alertmanager(service.url).post(*({"labels": each} for each in labels))
    wait_for(lambda: len(service.lines) > seen)
    [event] = service.lines[seen:]
    assert event["payload"]["summary"].startswith("[FIRING:2] Slow")
    assert event["payload"]["custom_details"]["num_firing"] == "2"


def test_our_reasons_are_in_alertmanagers_log(
    service: Service, alertmanager: Callable[..., Alertmanager]
) -> None:
    seen = len(service.lines)
    receiver = {"severity": "{{ .CommonLabels.severity }}", "description": " "}
    sender = alertmanager(service.url, **receiver)
    sender.post({"labels": {"alertname": "Page", "severity": "page"}})
    wait_for(lambda: "level=error" in sender.log)
    reasons = (
        "'payload.summary' is missing or blank,'payload.severity' is invalid"
        " (must be one of the following: 'critical', 'warning', 'error' or 'info')"
    )
    assert f"status code 400: Event object is invalid: {reasons}" in sender.log
    assert len(service.lines) == seen


def test_an_event_is_delivered_by_a_retry_once_the_service_is_back(
    start: Callable[..., Service], alertmanager: Callable[..., Alertmanager]
) -> None:
    port = free_port()
    sender = alertmanager(f"http://127.0.0.1:{port}")
    sender.alert("fire", "DiskFull")
    wait_for(lambda: "connection refused" in sender.log)
    service = start(port=port)
    wait_for(lambda: service.lines, 60)
    assert [line["event_action"] for line in service.lines] == ["trigger"]


@pytest.mark.slow
def test_a_pause_of_70_seconds_costs_no_notification(
    service: Service, alertmanager: Callable[..., Alertmanager]
) -> None:
    seen = len(service.lines)
    sender = alertmanager(service.url)
    sender.alert("fire", "Paused")
    wait_for(lambda: len(service.lines) > seen)
    connection = sender.connections()
    time.sleep(70)
    assert sender.connections() == connection  # idle, and kept
    sender.alert("resolve", "Paused")
    wait_for(lambda: len(service.lines) > seen + 1)
    assert sender.metric("alertmanager_notifications_total") == 2
    assert sender.metric("alertmanager_notifications_failed_total") == 0
    assert sender.metric("alertmanager_notification_requests_failed_total") == 0


@pytest.mark.slow
def test_an_event_that_was_throttled_arrives_when_the_window_opens(
    start: Callable[..., Service], alertmanager: Callable[..., Alertmanager]
) -> None:
    service = start(env={"PAGERDUTY_COMPAT_CALLS_PER_MINUTE": "1"})
    # It tries again for as long as a group_interval.
    sender = alertmanager(service.url, group_interval="3m")
    sender.alert("fire", "First")
    wait_for(lambda: len(service.lines) == 1)
    sender.alert("fire", "Second")
    wait_for(lambda: "status code 429" in sender.log)
    assert len(service.lines) == 1
    wait_for(lambda: len(service.lines) == 2, 150)  # it waits longer from try to try
    assert sender.metric("alertmanager_notifications_total") == 2
    assert sender.metric("alertmanager_notifications_failed_total") == 0
    print(*(line for line in sender.log.splitlines() if "429" in line), sep="\n")


def test_an_event_of_512000_bytes_is_accepted(
    service: Service, alertmanager: Callable[..., Alertmanager]
) -> None:
    # More than that Alertmanager does not send: it drops the custom details.
    details = {"blob": "{{ .CommonAnnotations.blob }}", "firing": "", "num_firing": ""}
    sender = alertmanager(service.url, details=details)

    def line_of(name: str, size: int) -> bytes:
        before = service.stdout.count(b"\n")
        sender.post({"labels": {"alertname": name}, "annotations": {"blob": "x" * size}})
        wait_for(lambda: service.stdout.count(b"\n") > before)
        return service.stdout.split(b"\n")[before]

    # Alertmanager's encoder ends with a newline, which is a byte of the body.
    rest = len(line_of("A", 1000)) + 1 - 1000
    assert len(line_of("B", 512_000 - rest)) + 1 == 512_000
    assert b"Custom details have been removed" in line_of("C", 512_001 - rest)
