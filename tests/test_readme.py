"""What the README and the sample say is what happens."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import pytest
import yaml
from conftest import KEY, ROOT, Process, Service, ask, free_port, send, trigger, wait_for
from flask import Flask

from pagerduty_compat import InvalidEvent
from pagerduty_compat.settings import PREFIX, InvalidSetting, Settings, read_settings

README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def sessions() -> Iterator[tuple[str, str]]:
    """Yield each command of the console blocks, and what it prints."""
    for block in blocks("console"):
        yield from re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", block, re.MULTILINE)


SESSIONS = dict(sessions())


def shell(command: str) -> str:
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        command, shell=True, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60
    )
    assert done.stderr == ""
    return done.stdout


def test_the_readme_fits_one_sitting() -> None:
    assert len(README.splitlines()) < 200


@pytest.mark.parametrize("command", [c for c in SESSIONS if c.startswith("curl")])
def test_the_curl_examples_print_what_the_readme_shows(service: Service, command: str) -> None:
    seen = len(service.lines)
    output = shell(command.replace("localhost:8080", f"127.0.0.1:{service.port}"))
    assert output == SESSIONS[command]
    if '"success"' in output:
        wait_for(lambda: len(service.lines) > seen)
        [shown] = blocks("json")
        assert service.stdout.decode().endswith("\n" + shown) or service.stdout.decode() == shown
    else:
        assert len(service.lines) == seen


@pytest.mark.parametrize("command", [c for c in SESSIONS if "validate" in c])
def test_the_validate_examples_print_what_the_readme_shows(command: str) -> None:
    assert shell(command) == SESSIONS[command]


def test_every_example_is_run_by_some_test() -> None:
    # Alertmanager and the script of the sample run in test_alertmanager.py.
    elsewhere = ("make run", "prometheus-alertmanager", "sample/alert.sh")
    for command in SESSIONS:
        assert command.startswith(("curl", *elsewhere)) or "validate" in command


def test_make_run_serves_in_the_foreground_with_events_alone_on_stdout(tmp_path: Path) -> None:
    port = free_port()
    arguments = f"ARGS=--bind=127.0.0.1:{port}"
    process = Process(
        ["make", "-C", str(ROOT), "--no-print-directory", "run", arguments], tmp_path
    )
    try:
        wait_for(lambda: "Booting worker" in process.log, 120)
        url = f"http://127.0.0.1:{port}"
        assert wait_for(lambda: send(url, trigger(dedup_key="k"))).status == 202
        wait_for(lambda: process.lines)
        assert [line["dedup_key"] for line in process.lines] == ["k"]
    finally:
        process.stop()


def test_alertmanagers_configuration_is_that_of_the_sample() -> None:
    [block] = blocks("yaml")
    sample = yaml.safe_load((ROOT / "sample/alertmanager.yml").read_text())
    assert yaml.safe_load(block).items() <= sample["receivers"][0].items()
    assert len(block.splitlines()) == 3


def test_the_app_of_the_readme_is_the_sample_and_works() -> None:
    source, library = blocks("python")
    assert source == (ROOT / "sample/app.py").read_text()
    app: Flask = runpy.run_path(str(ROOT / "sample/app.py"))["app"]
    client = app.test_client()
    event = json.dumps(trigger(dedup_key="k"))
    resolve = json.dumps({"routing_key": KEY, "event_action": "resolve", "dedup_key": "k"})
    assert client.post("/pagerduty/v2/enqueue", data=event).status_code == 202
    assert client.get("/alerts").json == {"k": "disk full"}
    assert client.post("/pagerduty/v2/enqueue", data=resolve).status_code == 202
    assert client.get("/alerts").json == {}
    with pytest.raises(InvalidEvent):
        exec(library, {})


def test_every_setting_is_in_the_readme_with_its_bounds_and_default() -> None:
    rows = {
        name.removeprefix(PREFIX).lower(): (meaning, default)
        for name, meaning, default in re.findall(
            r"^\| `([A-Z_]+)` \| (.*) \| (.*) \|$", README, re.M
        )
    }
    assert rows.pop("port") == ("the port to listen on, 1 to 65535", "8080")
    assert [*rows] == [*Settings._fields]
    for name, (meaning, default) in rows.items():
        value = getattr(Settings(), name)
        shown = {"": "-", False: "false"}.get(value, f"{value:g}" if value else "")
        assert default == shown, name
        for low, high in re.findall(r"([0-9.]+) to ([0-9.]+)", meaning):
            for bound, beyond in ((low, float(low) - 0.01), (high, float(high) + 0.01)):
                assert getattr(read_settings({PREFIX + name.upper(): bound}), name) == float(bound)
                with pytest.raises(InvalidSetting):
                    read_settings({PREFIX + name.upper(): str(beyond)})


def test_every_path_of_the_readme_answers(service: Service) -> None:
    paths = re.findall(r"^\| `(POST|GET) (/[^`]*)`", README, re.MULTILINE)
    assert len(paths) == 6
    for method, path in paths:
        body = b"{}" if method == "POST" else None
        status = 200
        if path == "/metrics":
            assert b"pagerduty_compat_events_total" in urlopen(service.url + path).read()
        else:
            status = ask(service.url + path, body, method=method).status
        assert status == (400 if method == "POST" else 200)


def test_links_within_the_repository_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
