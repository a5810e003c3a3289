"""Three replicas behind a real HAProxy, sharing a real Redis, as in sample/scale."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
from conftest import (
    KEY,
    ROOT,
    Process,
    Redis,
    Service,
    free_port,
    is_ready,
    need,
    send,
    trigger,
    wait_for,
)

CLIENTS = 6


class Scale:
    """The replicas, and the address of what stands in front of them."""

    def __init__(self, folder: Path, calls: int):
        self.redis = Redis(folder)
        env = {
            "PAGERDUTY_COMPAT_REDIS_URL": self.redis.url,
            "PAGERDUTY_COMPAT_CALLS_PER_MINUTE": str(calls),
        }
        self.replicas = [Service(folder, env=env) for _ in range(3)]
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        addresses = {
            f"REPLICA{n}": f"127.0.0.1:{replica.port}"
            for n, replica in enumerate(self.replicas, start=1)
        }
        self.haproxy = Process(
            ["haproxy", "-db", "-f", str(ROOT / "sample/scale/haproxy.cfg")],
            folder,
            {"LISTEN": f"127.0.0.1:{port}", **addresses},
        )
        wait_for(lambda: is_ready(self.url))
        self.statuses: Counter[int] = Counter()
        self.acknowledged: set[str] = set()
        self.slowest = 0.0

    def storm(self, events: int) -> None:
        """Send so many events of one key from several clients at once."""
        numbers = iter(range(events))
        lock = threading.Lock()

        def client() -> None:
            while True:
                with lock:
                    number = next(numbers, None)
                if number is None:
                    return
                key = f"{number}-{time.monotonic_ns()}"
                began = time.monotonic()
                status = send(self.url, trigger(dedup_key=key)).status
                with lock:
                    self.slowest = max(self.slowest, time.monotonic() - began)
                    self.statuses[status] += 1
                    if status == 202:
                        self.acknowledged.add(key)

        clients = [threading.Thread(target=client) for _ in range(CLIENTS)]
        for each in clients:
            each.start()
        for each in clients:
            each.join()

    def printed(self) -> set[str]:
        return {line["dedup_key"] for replica in self.replicas for line in replica.lines}

    def stop(self) -> None:
        self.haproxy.stop()
        for replica in self.replicas:
            replica.stop()
        self.redis.stop()


@pytest.fixture
def scale(tmp_path: Path) -> Iterator[Callable[[int], Scale]]:
    need("haproxy", "haproxy")
    need("redis-server", "redis-server")
    started: list[Scale] = []

    def scale(calls: int) -> Scale:
        started.append(Scale(tmp_path, calls))
        return started[-1]

    yield scale
    for each in started:
        each.stop()


def test_a_storm_of_one_key_gets_the_shared_number(scale: Callable[[int], Scale]) -> None:
    three = scale(120)
    three.storm(300)
    assert three.statuses == {202: 120, 429: 180}
    wait_for(lambda: three.printed() >= three.acknowledged)
    assert all(replica.lines for replica in three.replicas)  # each of them had a part
    for path in ("/metrics", "/metrics/", "/%6detrics", "/-/healthy"):
        with pytest.raises(HTTPError, match="404"):
            urlopen(three.url + path)
    assert send(three.url, trigger(routing_key=KEY[::-1])).status == 202


@pytest.mark.parametrize("harm", [signal.SIGSTOP, signal.SIGKILL])
def test_without_redis_the_storm_passes(
    scale: Callable[[int], Scale], harm: signal.Signals
) -> None:
    three = scale(10)
    three.redis.process.send_signal(harm)
    if harm == signal.SIGKILL:
        three.redis.process.wait()
    three.storm(300)
    assert three.statuses == {202: 300}
    assert three.slowest < 2  # a bound that no machine needs; each waits 0.1 s at most for Redis


def test_a_replica_that_is_killed_loses_nothing_acknowledged(
    scale: Callable[[int], Scale],
) -> None:
    three = scale(1_000_000)
    storm = threading.Thread(target=three.storm, args=(1500,))
    storm.start()
    wait_for(lambda: len(three.acknowledged) > 300)
    os.killpg(three.replicas[0].process.pid, signal.SIGKILL)
    storm.join()
    assert sum(three.statuses.values()) == 1500
    # Those under way were sent to another replica; its own answers may break off after the status.
    assert three.statuses == {202: 1500}
    wait_for(lambda: three.printed() >= three.acknowledged)
