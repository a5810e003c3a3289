"""What the throttle costs: `python benchmarks/throttle.py`, a minute, needs redis-server.

Prints what one worker carries without it, with it in memory, and with it in Redis, in CPU time
of the worker per event and in events a second, and the price of 1,000,000 random keys. Compare
the rows of one run with each other; between runs and machines they drift.
"""

from __future__ import annotations

import os
import socket
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from conftest import KEY, Redis, Service, children_of, cpu_seconds  # noqa: E402

from pagerduty_compat.throttle import MAX_KEYS, MemoryThrottle  # noqa: E402

CLIENTS = 8
EVENTS = 4000
ROUNDS = 5
EVENT = (ROOT / "sample/event.json").read_bytes()
REQUEST = (
    b"POST /v2/enqueue HTTP/1.1\r\nHost: a\r\nX-Routing-Key: %s\r\nContent-Length: %d\r\n\r\n"
)


def load(port: int) -> None:
    """Send so many events from several clients, each on one connection."""

    def client() -> None:
        with socket.create_connection(("127.0.0.1", port)) as connection:
            for _ in range(EVENTS // CLIENTS):
                connection.sendall(REQUEST % (KEY.encode(), len(EVENT)) + EVENT)
                answer = b""
                while not answer.endswith(b"}\n"):
                    answer += connection.recv(4096)
                assert answer.startswith(b"HTTP/1.1 202 "), answer

    clients = [threading.Thread(target=client) for _ in range(CLIENTS)]
    for each in clients:
        each.start()
    for each in clients:
        each.join()


def carries(folder: Path) -> None:
    redis = Redis(folder)
    high = {"PAGERDUTY_COMPAT_CALLS_PER_MINUTE": "1000000"}
    services = {
        "off": Service(folder),
        "in memory": Service(folder, env=high),
        "in Redis": Service(folder, env={**high, "PAGERDUTY_COMPAT_REDIS_URL": redis.url}),
    }
    costs: dict[str, list[float]] = {name: [] for name in services}
    rates: dict[str, list[float]] = {name: [] for name in services}
    for _ in range(ROUNDS + 1):
        for name, service in services.items():
            [worker] = children_of(service.process)
            before, began = cpu_seconds(worker), time.monotonic()
            load(service.port)
            costs[name].append((cpu_seconds(worker) - before) / EVENTS * 1e6)
            rates[name].append(EVENTS / (time.monotonic() - began))
    print("\n| throttle | CPU per event | to none | events a second |\n|" + " --- |" * 4)
    none = statistics.median(costs["off"][1:])
    for name, service in services.items():
        cost = statistics.median(costs[name][1:])  # the first round warms up
        rate = statistics.median(rates[name][1:])
        print(f"| {name} | {cost:.0f} µs | {cost / none:.2f} | {rate:.0f} |")
        service.stop()
    redis.stop()


def memory() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 1e6


def random_keys() -> None:
    throttle = MemoryThrottle(120)

    def cost() -> float:
        keys = [os.urandom(16).hex() for _ in range(MAX_KEYS // 2)]
        rounds = []
        for _ in range(ROUNDS):
            began = time.perf_counter()
            for key in keys:
                throttle.take(key)
            rounds.append(time.perf_counter() - began)
        return min(rounds) / len(keys) * 1e6

    print("| random keys so far | memory | a call |\n|" + " --- |" * 3)
    print(f"| 0 | {memory():.1f} MB | {cost():.2f} µs |")
    for _ in range(1_000_000):
        throttle.take(os.urandom(16).hex())
    print(f"| 1,000,000 | {memory():.1f} MB | {cost():.2f} µs |")


if __name__ == "__main__":
    random_keys()
    with tempfile.TemporaryDirectory() as temporary:
        carries(Path(temporary))
