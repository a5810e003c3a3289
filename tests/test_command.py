"""The command as it is called, with and without the server's extra."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from conftest import KEY, trigger
from test_cases import ACCEPTED

from pagerduty_compat.events import MAX_BYTES

MODULE = (sys.executable, "-m", "pagerduty_compat")


def run(*args: str, command: tuple[str, ...] = MODULE, text: str = "") -> tuple[int, str, str]:
    done = subprocess.run(
        [*command, *args], input=text, capture_output=True, text=True, timeout=20
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, event in {
        "good.json": trigger(),
        "keyless.json": trigger(routing_key=None),
        "bad.json": trigger(routing_key="k", client=5),
        "change.json": {**trigger(), "event_action": 5, "payload": {"summary": "s"}},
    }.items():
        (tmp_path / name).write_text(json.dumps(event))
    return tmp_path


BAD = (
    "bad.json: Length of 'routing_key' is incorrect (should be 32 characters)\n"
    "bad.json: 'client' is invalid (must be a string)\n"
)


def test_a_valid_file_is_status_0_and_no_word(folder: Path) -> None:
    assert run("validate", "good.json") == (0, "", "")


def test_an_event_that_is_refused_is_status_1(folder: Path) -> None:
    assert run("validate", "bad.json", "good.json") == (1, BAD, "")


def test_a_file_that_cannot_be_read_is_status_2_and_the_others_are_judged(folder: Path) -> None:
    assert run("validate", "none.json", ".", "bad.json", "good.json") == (
        2,
        BAD,
        "none.json: No such file or directory\n.: Is a directory\n",
    )


def test_stdin_is_a_file_called_dash(folder: Path) -> None:
    assert run("validate", "-", text="[]") == (1, "-: Event must be a JSON object\n", "")


def test_change_events_are_judged_as_such(folder: Path) -> None:
    assert run("validate", "--change", "change.json") == (0, "", "")
    assert run("validate", "change.json")[0] == 1


def test_a_routing_key_stands_for_the_header(folder: Path) -> None:
    missing = "keyless.json: 'routing_key' cannot be blank\n"
    assert run("validate", "keyless.json") == (1, missing, "")
    assert run("validate", "--routing-key", "x" * 32, "keyless.json") == (0, "", "")
    assert run("validate", "--routing-key", "x" * 32, "bad.json") == (1, BAD, "")


def test_a_large_file_is_not_read_to_its_end(folder: Path) -> None:
    os.truncate("good.json", 1_000_000_000_000)
    too_large = "good.json: Event is too large (maximum is 512 KB)\n"
    assert run("validate", "good.json") == (1, too_large, "")
    assert MAX_BYTES == 524_288


def test_a_reader_that_has_seen_enough_is_no_traceback(folder: Path) -> None:
    command = f"{' '.join(MODULE)} validate {'bad.json ' * 5000} | head -1"
    done = subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True, timeout=20)
    assert (done.stdout, done.stderr) == (BAD.splitlines(keepends=True)[0], "")


def test_what_cannot_be_read_or_printed_is_status_2(folder: Path) -> None:
    for redirection, line in (
        ("- <&-", "-: Bad file descriptor\n"),
        ("bad.json >/dev/full", "stdout: No space left on device\n"),
    ):
        command = f"{' '.join(MODULE)} validate {redirection}"
        done = subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (2, "", line)


def test_a_file_may_have_any_name(folder: Path) -> None:
    name = os.fsdecode(b"\xff.json")
    Path(name).write_text("[]")
    command = ("env", "PYTHONIOENCODING=utf-8:strict", *MODULE)
    answer = "\\udcff.json: Event must be a JSON object\n"
    assert run("validate", name, command=command) == (1, answer, "")


def test_the_version_is_told() -> None:
    assert run("--version") == (0, version("pagerduty-compat") + "\n", "")


def test_without_a_file_it_says_how_it_is_called() -> None:
    status, out, err = run("validate")
    assert (status, out) == (2, "")
    assert err.startswith("usage: pagerduty-compat validate ")
    assert run("validate", "--changes", "-", text="[]")[0] == 2
    assert run()[0] == 2


def test_help_names_what_can_be_done() -> None:
    status, out, _ = run("--help")
    assert status == 0
    assert "validate" in out
    assert "serve" in out
    assert "exit status: 0 all are valid, 1 an event is refused" in run("validate", "--help")[1]
    assert "--workers 2" in run("serve", "--help")[1]


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """The command as `pip install pagerduty-compat` leaves it: nothing but jsonschema."""
    folder = tmp_path_factory.mktemp("bare")
    (folder / "sitecustomize.py").write_text(
        "import sys\n"
        "for name in 'flask werkzeug gunicorn gevent jsonschema_rs'.split():\n"
        "    sys.modules[name] = None\n"
    )
    return ("env", f"PYTHONPATH={folder}", *MODULE)


def test_files_are_checked_without_flask(bare: tuple[str, ...], folder: Path) -> None:
    assert run("validate", "bad.json", command=bare) == (1, BAD, "")
    alert = [str(path) for path in ACCEPTED if path.parent.name == "alert"]
    change = [str(path) for path in ACCEPTED if path.parent.name == "change"]
    key = ("--routing-key", KEY)
    assert run("validate", *key, *alert, command=bare) == (0, "", "")
    assert run("validate", "--change", *key, *change, command=bare) == (0, "", "")


def test_serve_says_what_to_install(bare: tuple[str, ...]) -> None:
    assert run("serve", command=bare) == (
        2,
        "",
        "install what it needs: pip install 'pagerduty-compat[server]'\n",
    )


def test_the_public_names_are_there_without_flask(bare: tuple[str, ...]) -> None:
    code = "import pagerduty_compat as p; print(p.parse, p.validate, p.InvalidEvent)"
    status, out, _ = run("-c", code, command=(*bare[:2], sys.executable))
    assert status == 0
    assert out.count("pagerduty_compat.events") == 1
