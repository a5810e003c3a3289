"""What /metrics says, held against what was sent."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import KEY, Service, ask, children_of, need, send, trigger, wait_for

Start = Callable[..., Service]


def metrics(service: Service) -> dict[str, float]:
    """Return each series by its name and labels."""
    return {
        name: float(value)
        for name, value in re.findall(r"^([^#\s]+(?: [^\s]+)*) ([^\s]+)$", text(service), re.M)
    }


def text(service: Service) -> str:
    with urllib.request.urlopen(service.url + "/metrics", timeout=20) as response:
        assert response.headers["Content-Type"].startswith("text/plain; version=")
        body: bytes = response.read()
    return body.decode()


def total(service: Service, name: str, **labels: str) -> float:
    """Return the sum of the series of a name that have these labels."""
    wanted = [f'{label}="{value}"' for label, value in labels.items()]
    return sum(
        value
        for series, value in metrics(service).items()
        if series.split("{")[0] == name and all(each in series for each in wanted)
    )


EVENTS = "pagerduty_compat_events_total"


@pytest.mark.parametrize("settings", ["packaged", "plain gunicorn"])
def test_each_event_is_counted_by_what_became_of_it(start: Start, settings: str) -> None:
    plain = ("-m", "gunicorn", "pagerduty_compat.server:create_app()")
    command = {} if settings == "packaged" else {"command": plain}
    service = start(env={"PAGERDUTY_COMPAT_CALLS_PER_MINUTE": "3"}, **command)
    assert total(service, EVENTS) == 0
    send(service.url, trigger())
    send(service.url, {**trigger(dedup_key="k"), "event_action": "resolve", "payload": "S3CR3T"})
    change = {"routing_key": KEY, "payload": {"summary": "deployed"}}
    ask(service.url + "/v2/change/enqueue", json.dumps(change).encode())
    send(service.url, trigger())  # one too many
    send(service.url, trigger(routing_key="S3CR3T", event_action="S3CR3T"))
    send(service.url, [])
    ask(service.url + "/v2/enqueue", method="GET")  # no event
    ask(service.url + "/S3CR3T", b"{}")
    wait_for(lambda: len(service.lines) == 3)
    counted = {k: v for k, v in metrics(service).items() if not k.endswith("_created")}

    def events(endpoint: str, action: str, severity: str, outcome: str) -> str:
        return (
            f'{EVENTS}{{action="{action}",endpoint="{endpoint}",outcome="{outcome}",'
            f'severity="{severity}"}}'
        )

    assert {k: v for k, v in counted.items() if k.startswith(EVENTS)} == {
        events("alert", "trigger", "critical", "accepted"): 1,
        events("alert", "resolve", "", "accepted"): 1,
        events("change", "", "", "accepted"): 1,
        events("alert", "trigger", "critical", "throttled"): 1,
        events("alert", "", "", "refused"): 2,
    }
    refusals = "pagerduty_compat_refusals_total"
    assert {k: v for k, v in counted.items() if k.startswith(refusals)} == {
        f'{refusals}{{code="routing_key:length"}}': 1,
        f'{refusals}{{code="event_action:value"}}': 1,
        f'{refusals}{{code="event:type"}}': 1,
    }
    answers = "pagerduty_compat_answer_duration_seconds_count"
    assert counted[f'{answers}{{endpoint="alert"}}'] == 5
    assert counted[f'{answers}{{endpoint="change"}}'] == 1
    assert counted["pagerduty_compat_lines_written_total"] == 3
    assert counted["pagerduty_compat_written_bytes_total"] == len(service.stdout)
    assert counted["pagerduty_compat_redis_failures_total"] == 0
    assert [v for k, v in counted.items() if "build_info" in k and 'version="0.1' in k] == [1]
    assert "S3CR3T" not in text(service)


def test_an_event_that_could_not_be_written_has_failed(start: Start) -> None:
    service = start(env={"PAGERDUTY_COMPAT_STDOUT_TIMEOUT": "0.2"})
    service.reading.clear()
    statuses = [send(service.url, trigger(custom="x" * 20_000)).status for _ in range(12)]
    assert statuses.count(503) > 0
    assert total(service, EVENTS, outcome="failed") == statuses.count(503)
    assert total(service, "pagerduty_compat_lines_written_total") == statuses.count(202)


def test_promtool_finds_nothing_to_say(start: Start) -> None:
    need("promtool", "prometheus")
    service = start()
    send(service.url, trigger())
    send(service.url, {})
    run = subprocess.run(
        ["promtool", "check", "metrics"], input=text(service), capture_output=True, text=True
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def folders_of(worker: int) -> set[Path]:
    """Return where a process counts, from what it has mapped into its memory."""
    maps = Path(f"/proc/{worker}/maps").read_text()
    return {Path(path) for path in re.findall(r"(/\S+)/counter_\d+\.db", maps)}


def test_the_sums_are_right_over_workers_kills_and_hups(start: Start) -> None:
    service = start("--workers=3", env={"PAGERDUTY_COMPAT_CALLS_PER_MINUTE": "0"})
    worker = children_of(service.process)[0]
    [folder] = wait_for(lambda: folders_of(worker))
    sent = 0
    for harm in (None, "kill", "hup", "kill", "hup", "hup"):
        old = set(children_of(service.process))
        if harm == "kill":
            victim = min(old)
            os.kill(victim, signal.SIGKILL)
            wait_for(lambda: victim not in children_of(service.process))  # noqa: B023
            wait_for(lambda: len(children_of(service.process)) == 3)
        elif harm == "hup":
            service.process.send_signal(signal.SIGHUP)
            wait_for(lambda: not old & set(children_of(service.process)))  # noqa: B023
        for _ in range(20):
            assert send(service.url, trigger()).status == 202
            sent += 1
        assert total(service, EVENTS, outcome="accepted") == sent
        assert total(service, "pagerduty_compat_lines_written_total") == sent
        assert total(service, "pagerduty_compat_build_info") == 1
    # A dead worker's place is taken by the next one: at most two for each worker, in a HUP.
    assert len(list(folder.glob("counter_*.db"))) <= 6
    assert service.stop() == 0
    assert not folder.exists()


def test_a_worker_that_has_no_memory_to_share_counts_alone(tmp_path: Path) -> None:
    code = (
        "from pagerduty_compat.metrics import Metrics\n"
        "metrics = Metrics('1.0', slot=0)\n"
        "metrics.lines.inc()\n"
        "print(metrics.text('')[0].decode())\n"
    )
    mount = ["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", str(tmp_path)]
    subprocess.run(mount, check=True)
    try:
        run = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)},
            capture_output=True,
            text=True,
        )
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
    assert run.returncode == 0  # it was a SIGBUS
    assert "pagerduty_compat_lines_written_total 1.0" in run.stdout
    assert "this worker counts alone in /metrics" in run.stderr
