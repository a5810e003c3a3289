"""Count what is lost while things die: `make chaos`, and a short form in `make test`.

Each run starts the service, sends it events from several clients, does it harm, and then
holds what was acknowledged against what came out of its stdout. What must be true:

- every event that was answered with 202 is a whole line (if the reader leaves, all but what
  the kernel's pipe held);
- a line that does not parse is the beginning of an event that was never acknowledged, alone
  between newlines, at most one for each kill or event that was answered with 503;
- no answer is other than those that PagerDuty's clients try again, or a closed connection.

A row of a table says what was counted; the exit status is 1 if one of them broke the promise.
"""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import hostile
from conftest import KEY, Service, ask, children_of, cpu_seconds, free_port, is_ready, wait_for

CLIENTS = 6
SIZES = [200, 1_000, 5_000, 20_000, 100_000, 524_288]
WEIGHTS = [20, 30, 20, 20, 8, 2]
PIPE_BYTES = 65_536


@dataclass
class Counts:
    """What was seen in one run."""

    name: str
    acknowledged: dict[str, int] = field(default_factory=dict)  # dedup key: bytes of the event
    statuses: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0
    kills: int = 0
    whole: int = 0
    lost: int = 0
    fragments: int = 0
    notes: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def row(self) -> str:
        statuses = ", ".join(f"{s}: {n}" for s, n in sorted(self.statuses.items()))
        cells = [
            self.name,
            str(len(self.acknowledged)),
            str(self.whole),
            str(self.lost),
            str(self.fragments),
            str(self.kills),
            statuses,
            f"{self.slowest:.1f} s",
            "; ".join(self.notes + self.wrong) or "-",
        ]
        return f"| {' | '.join(cells)} |"


HEAD = (
    "| worker, processes, harm | 202s | whole lines | 202s without a line | torn lines | kills"
    " | answers | slowest | notes |\n|" + " --- |" * 9
)


class Run:
    """The service under load, its stdout and stderr in the hands of the test."""

    def __init__(self, worker: str, processes: int, harm: Harm, seconds: float):
        self.counts = Counts(f"{worker}, {processes}, {harm.__name__.replace('_', ' ')}")
        self.seconds = seconds
        self.text = bytearray()
        self.slow = True
        self.reading = threading.Event()
        self.reading.set()
        self.over = threading.Event()
        self.lock = threading.Lock()
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.read_end, self.stdout = os.pipe()
        fcntl.fcntl(self.read_end, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        self.stderr = os.open(os.devnull, os.O_WRONLY)
        self.command = [
            *(sys.executable, "-m", "pagerduty_compat", "serve"),
            *(f"--bind=127.0.0.1:{self.port}", "--graceful-timeout=10"),
            f"--workers={processes}",
            *([] if worker == "ours" else [f"--worker-class={worker}"]),
            *(["--threads=4"] if worker == "gthread" else []),
        ]
        with contextlib.ExitStack() as self.at_the_end:
            steps = harm(self)
            next(steps)
            self.start()
            try:
                clients = [threading.Thread(target=self.client, args=(n,)) for n in range(CLIENTS)]
                for client in clients:
                    client.start()
                try:
                    next(steps, None)
                finally:
                    self.over.set()
                    for client in clients:
                        client.join(30)
            finally:
                self.stop()

    def start(self) -> None:
        env = {**os.environ, "PAGERDUTY_COMPAT_CALLS_PER_MINUTE": "0"}
        self.process = subprocess.Popen(
            self.command, stdout=self.stdout, stderr=self.stderr, env=env
        )
        os.close(self.stdout)
        os.close(self.stderr)
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()
        wait_for(self.is_ready)

    def is_ready(self) -> bool:
        return is_ready(self.url)

    def workers(self) -> list[int]:
        return children_of(self.process)

    def read(self) -> None:
        """Read so slowly that lines are half written for much of the time."""
        with contextlib.suppress(OSError):  # reader_leaves has closed it
            while self.reading.wait() and (chunk := os.read(self.read_end, 16_384)):
                self.text += chunk
                if self.slow:
                    time.sleep(0.001)

    def client(self, number: int) -> None:
        """Send events one after the other, each once, whatever comes back."""
        dice = random.Random(number)
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        while not self.over.is_set():
            key = f"{number}-{time.monotonic_ns()}"
            body = event(key, dice.choices(SIZES, WEIGHTS)[0]) if dice.random() < 0.9 else b"{}"
            began = time.monotonic()
            try:
                connection.request("POST", "/v2/enqueue", body)
                response = connection.getresponse()
                answer = json.loads(response.read())
                status = str(response.status)
            except (OSError, http.client.HTTPException) as error:
                connection.close()  # it opens itself again
                status = type(error).__name__
            with self.lock:
                self.counts.statuses[status] += 1
                self.counts.slowest = max(self.counts.slowest, time.monotonic() - began)
                if status == "202":
                    assert answer["dedup_key"] == key
                    self.counts.acknowledged[key] = len(body)
            if status not in ("202", "400"):
                time.sleep(0.05)
            if dice.random() < 0.1:
                connection.close()  # the next one may be taken by another process
        connection.close()

    def stop(self) -> None:
        self.slow = False
        self.reading.set()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            status = self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait()
        if status:
            self.counts.wrong.append(f"ended with status {status}")
        self.reader.join(20)
        with contextlib.suppress(OSError):
            os.close(self.read_end)

    def judge(self) -> Counts:
        """Hold what was acknowledged against what was printed."""
        counts = self.counts
        whole: set[str] = set()
        torn: list[bytes] = []
        for line in bytes(self.text).split(b"\n"):
            try:
                whole.add(json.loads(line)["dedup_key"])
                counts.whole += 1
            except ValueError:
                torn += [line] if line else []
        missing = set(counts.acknowledged) - whole
        glued = 0
        in_the_pipe = sum(counts.acknowledged[key] for key in missing)
        for line in torn:
            key = line[len(START) :].split(b'"')[0].decode()
            if line[: len(START)] != START[: len(line)] or line.count(START) > 1:
                glued += 1
            elif key in missing:
                in_the_pipe -= len(line)
        if glued:
            counts.wrong.append(f"{glued} torn lines are no beginning of an event")
        counts.lost = len(missing)
        reader_left = "reader leaves" in counts.name
        if missing and not (reader_left and in_the_pipe <= PIPE_BYTES):
            counts.wrong.append("acknowledged events are lost")
        counts.fragments = len(torn)
        allowed = counts.kills + counts.statuses["503"] + reader_left
        if len(torn) > allowed:
            counts.wrong.append(f"{len(torn)} torn lines where {allowed} may be")
        if odd := set(counts.statuses) - {"202", "400", "503", *LEFT}:
            counts.wrong.append(f"answers {sorted(odd)}")
        if len(counts.acknowledged) < 10:
            counts.wrong.append("too few events were accepted to tell")
        return counts


# What a client sees of a server that goes away: no answer, so that it sends again.
LEFT = {
    *("RemoteDisconnected", "ConnectionResetError", "ConnectionRefusedError"),
    *("BrokenPipeError", "IncompleteRead"),
}
START = b'{"dedup_key":"'


def event(key: str, size: int) -> bytes:
    """Return an event of so many bytes, its dedup key in front, so that a torn line has it."""
    members = {
        "dedup_key": key,
        "routing_key": KEY,
        "event_action": "trigger",
        "payload": {"summary": "s", "source": "s", "severity": "info"},
        "blob": "",
    }
    body = json.dumps(members, separators=(",", ":")).encode()
    return body.replace(b'"blob":""', b'"blob":"%s"' % (b"x" * max(0, size - len(body))))


# Each harm is a generator: what stands before its yield is done before the service starts,
# what stands after it while the clients send.
Harm = Callable[[Run], Iterator[None]]


def no_harm(run: Run) -> Iterator[None]:
    yield
    time.sleep(run.seconds)


def sigterm(run: Run) -> Iterator[None]:
    yield
    time.sleep(run.seconds)
    began = time.monotonic()
    run.process.send_signal(signal.SIGTERM)
    run.process.wait(20)
    run.counts.notes.append(f"stopped in {time.monotonic() - began:.1f} s")


def hup(run: Run) -> Iterator[None]:
    yield
    end = time.monotonic() + run.seconds
    hups = 0
    while time.monotonic() < end:
        time.sleep(0.5)
        old = set(run.workers())
        run.process.send_signal(signal.SIGHUP)
        hups += 1
        while old & set(run.workers()):
            time.sleep(0.05)
    run.counts.notes.append(f"{hups} HUPs")
    if set(run.counts.statuses) - {"202", "400"}:
        run.counts.wrong.append("a HUP cost a request")


def sigkill(run: Run) -> Iterator[None]:
    yield
    end = time.monotonic() + run.seconds
    dice = random.Random(1)
    while time.monotonic() < end:
        time.sleep(dice.uniform(0.3, 1))
        for pid in run.workers()[:1]:
            os.kill(pid, signal.SIGKILL)
            run.counts.kills += 1
    wait_for(run.is_ready)
    time.sleep(1)


def reader_stops_and_resumes(run: Run) -> Iterator[None]:
    yield
    time.sleep(run.seconds / 2)
    run.reading.clear()
    time.sleep(4)  # longer than the timeout of 3 s
    began = time.monotonic()
    ready = ask(run.url + "/-/ready", method="GET").status
    run.counts.notes.append(f"ready: {ready} in {(time.monotonic() - began) * 1000:.0f} ms")
    run.reading.set()
    wait_for(run.is_ready)
    time.sleep(run.seconds / 2)


def reader_leaves(run: Run) -> Iterator[None]:
    yield
    time.sleep(run.seconds)
    run.reading.clear()
    time.sleep(0.1)  # its last read is over
    os.close(run.read_end)
    time.sleep(run.seconds / 2)


def stdout_is_non_blocking(run: Run) -> Iterator[None]:
    os.set_blocking(run.stdout, False)
    yield
    time.sleep(run.seconds)


def disk_is_full(run: Run) -> Iterator[None]:
    folder = Path(run.at_the_end.enter_context(tempfile.TemporaryDirectory()))
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    subprocess.run(mount, check=True)
    run.at_the_end.callback(subprocess.run, ["umount", str(folder)], check=True)
    os.close(run.stdout)
    run.stdout = os.open(folder / "stdout", os.O_WRONLY | os.O_CREAT)
    yield
    time.sleep(run.seconds)
    run.counts.notes.append(f"{run.counts.statuses['503']} refused while it was full")
    subprocess.run([*mount[:3], "-o", "remount,size=1g", str(folder)], check=True)
    wait_for(run.is_ready)
    accepted = len(run.counts.acknowledged)
    wait_for(lambda: len(run.counts.acknowledged) > accepted + 10)
    run.over.set()
    run.process.send_signal(signal.SIGTERM)
    run.process.wait(20)
    run.text += (folder / "stdout").read_bytes()


def stderr_is_stalled(run: Run) -> Iterator[None]:
    os.close(run.stderr)
    read_end, run.stderr = os.pipe()
    run.at_the_end.callback(os.close, read_end)
    os.set_blocking(run.stderr, False)
    with contextlib.suppress(BlockingIOError):
        while os.write(run.stderr, b"x"):
            pass
    os.set_blocking(run.stderr, True)
    yield
    time.sleep(run.seconds)


HARMS = [
    *(no_harm, sigterm, hup, sigkill, reader_stops_and_resumes, reader_leaves),
    *(stdout_is_non_blocking, disk_is_full, stderr_is_stalled),
]


HOSTILE_HEAD = (
    "| hostile clients | count | slowest honest request | the same from the address of the hostile"
    " ones | honest requests | memory before, at the peak, after | cut off after | notes |\n|"
    + " --- |"
    * 8
)


def memory(pids: list[int]) -> int:
    """Return the resident memory of some processes, in MB."""
    status = [Path(f"/proc/{pid}/status").read_text() for pid in pids]
    return sum(int(text.split("VmRSS:")[1].split()[0]) for text in status) // 1024


def settle(pids: list[int]) -> None:
    """Wait until processes have nothing left to do, for 2 minutes at most."""
    deadline = time.monotonic() + 120
    before = -1.0
    while (now := sum(map(cpu_seconds, pids))) > before + 0.05 and time.monotonic() < deadline:
        before = now
        time.sleep(1)


def hostile_run(kind: str, count: int, seconds: float, bound: float) -> tuple[str, list[str]]:
    """Serve an honest client beside hostile ones; return a row, and what was wrong."""
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        service = Service(Path(folder))
        pids = children_of(service.process)
        command = [sys.executable, str(Path(__file__).parent / "hostile.py"), kind, str(count)]
        # Once to warm up: a process keeps some of the memory that it has needed once.
        subprocess.run([*command, str(seconds), str(service.port)], stdout=subprocess.DEVNULL)
        settle(pids)
        before = peak = memory(pids)
        clients = subprocess.Popen(
            [*command, str(seconds), str(service.port)], stdout=subprocess.PIPE, text=True
        )
        statuses: Counter[int] = Counter()
        slowest = {"127.0.0.1": 0.0, hostile.ADDRESS: 0.0}
        while clients.poll() is None:
            for source in slowest:
                began = time.monotonic()
                answer = ask(service.url + "/v2/enqueue", event(str(began), 500), source=source)
                statuses[answer.status] += 1
                slowest[source] = max(slowest[source], time.monotonic() - began)
            peak = max(peak, memory(pids))
            time.sleep(0.02)
        lasted = json.loads(clients.communicate()[0])
        settle(pids)
        after = memory(pids)
        if service.stop():
            wrong.append("ended badly")
        if "Traceback" in service.log:
            wrong.append("a traceback in the log")
    if set(statuses) != {202}:
        wrong.append("an honest request was not accepted")
    if slowest["127.0.0.1"] > bound:
        wrong.append(f"an honest request took more than {bound} s")
    if after > 1.2 * before:
        wrong.append("memory is not given back")
    cut = (
        f"{lasted['median']:.1f} s, at most {lasted['longest']:.1f}" if lasted["cut"] else "never"
    )
    cells = [
        *(kind.replace("_", " "), str(count), *(f"{each:.2f} s" for each in slowest.values())),
        str(statuses.total()),
        *(f"{before}, {peak}, {after} MB", cut, "; ".join(wrong) or "-"),
    ]
    return f"| {' | '.join(cells)} |", wrong


def main() -> int:
    """Run every harm with every worker class and 1 and 2 processes; print the tables."""
    failed = 0
    print(HOSTILE_HEAD)
    for kind in hostile.KINDS:
        for count in (50, 500, 2000):
            row, wrong = hostile_run(kind, count, 12, bound=1)
            print(row, flush=True)
            failed += bool(wrong)
    print(f"\n{HEAD}")
    for worker in ("ours", "gthread", "sync"):
        for processes in (1, 2):
            for harm in HARMS:
                counts = Run(worker, processes, harm, 8).judge()
                print(counts.row(), flush=True)
                failed += bool(counts.wrong)
    print(f"\n{failed} runs broke the promise" if failed else "\nthe promise held in every run")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
