"""How many events of one routing key are accepted: so many within any 60 seconds.

Only accepted events count. Were refused ones to count, a client that keeps trying would
never get through.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from queue import Empty, LifoQueue
from typing import Any, Protocol

from .settings import digest

log = logging.getLogger(__name__)

WINDOW_SECONDS = 60

# So many routing keys are known in memory, those that were used last. Of a key that has been
# forgotten no event is refused: random keys cannot make an honest client wait.
MAX_KEYS = 10_000

# Seconds that an event may wait for Redis, and that pass before it is tried again.
REDIS_TIMEOUT = 0.1
REDIS_RETRY = 1.0

# So many events ask Redis at once; the others wait, no longer than the timeout.
REDIS_CONNECTIONS = 8


class Throttle(Protocol):
    """What counts the events of each routing key."""

    def take(self, routing_key: str) -> float:
        """Count an event, and return 0; or return in how many seconds the next one passes."""

    def give_back(self, routing_key: str) -> None:
        """Take back the event that was counted last: it was not accepted after all."""


class MemoryThrottle:
    """Counts within this process, in bounded memory, at the same cost for any number."""

    def __init__(self, calls: int, window: float = WINDOW_SECONDS) -> None:
        """Accept so many `calls`, at least 1, of each key within the seconds of `window`."""
        self._calls = calls
        self._window = window
        self._times: OrderedDict[str, deque[float]] = OrderedDict()
        self._lock = threading.Lock()

    def take(self, routing_key: str) -> float:
        with self._lock:
            now = time.monotonic()
            times = self._times.get(routing_key)
            if times is None:
                times = self._times[routing_key] = deque(maxlen=self._calls)
                if len(self._times) > MAX_KEYS:
                    self._times.popitem(last=False)
            else:
                self._times.move_to_end(routing_key)
            if len(times) == self._calls and (wait := times[0] + self._window - now) > 0:
                return wait
            # Two for each that comes: what is over goes, and no call pays for many.
            over = now - self._window
            for _ in range(2):
                if times and times[0] <= over:
                    times.popleft()
            times.append(now)
            for _ in range(2):
                oldest, others = next(iter(self._times.items()))
                if not others or others[-1] <= over:
                    del self._times[oldest]
            return 0.0

    def give_back(self, routing_key: str) -> None:
        with self._lock:
            if times := self._times.get(routing_key):
                times.pop()


# One atomic step, by the clock of the Redis server. The list holds the milliseconds at which
# the last events were accepted.
_TAKE = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local calls, window = tonumber(ARGV[1]), tonumber(ARGV[2])
redis.call('LTRIM', KEYS[1], -calls, -1)
if redis.call('LLEN', KEYS[1]) == calls then
  local wait = redis.call('LINDEX', KEYS[1], 0) + window - now
  if wait > 0 then return wait end
end
redis.call('RPUSH', KEYS[1], now)
redis.call('PEXPIRE', KEYS[1], window)
return 0
"""


class RedisThrottle:
    """Counts in Redis, for all processes and machines that share it.

    While Redis does not answer, events are accepted: losing an alert is worse than exceeding
    a rate. Those that find out wait for the timeout; from then on a thread looks after Redis,
    and no event waits.
    """

    def __init__(
        self,
        url: str,
        calls: int,
        window: float = WINDOW_SECONDS,
        on_failure: Callable[[], object] = lambda: None,
    ) -> None:
        """Accept so many `calls`, at least 1, of each key within the seconds of `window`.

        `on_failure` is called for each event that passes without being counted.

        Raises:
            ValueError: `url` is none of Redis. Its text may hold the password.
        """
        import redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        self._limits = (calls, round(window * 1000))
        self._on_failure = on_failure
        self._errors = (redis.RedisError, OSError)
        self._closed = (redis.ConnectionError, ConnectionError)
        self._pool = redis.ConnectionPool.from_url(url, protocol=2)  # asks for less at the start
        self._pool.connection_kwargs.update(  # whatever the URL says
            socket_timeout=REDIS_TIMEOUT,
            socket_connect_timeout=REDIS_TIMEOUT,
            retry=Retry(NoBackoff(), 0),
        )
        # The connections that no event uses. Redis's own pool would make one while an event
        # waits, for as long as it takes to resolve a name.
        self._idle: LifoQueue[Any] = LifoQueue()
        self._lock = threading.Lock()
        self._answers = False
        self._look(said=False).join(2 * REDIS_TIMEOUT)

    def take(self, routing_key: str) -> float:
        wait: int | None = self._ask("EVAL", _TAKE, 1, _name(routing_key), *self._limits)
        if wait is None:
            self._on_failure()
            return 0.0
        return wait / 1000

    def give_back(self, routing_key: str) -> None:
        self._ask("RPOP", _name(routing_key))

    def _ask(self, *command: object) -> Any:
        """Return what Redis says, or None if it says nothing in time."""
        idle = self._idle
        if not self._answers:
            return None
        try:
            connection = idle.get(timeout=REDIS_TIMEOUT)
        except Empty:
            return None
        try:
            answer = _command(connection, *command)
        except self._errors as error:
            self._lose(error)
            return None
        idle.put(connection)
        return answer

    def _lose(self, error: Exception) -> None:
        with self._lock:
            if not self._answers:
                return  # another one has noticed
            self._answers = False
        # Redis closes connections that are idle for long. If there are new ones at once, that is
        # not worth a word.
        said = not isinstance(error, self._closed)
        if said:
            _say_lost(error)
        self._look(said)

    def _look(self, said: bool) -> threading.Thread:
        thread = threading.Thread(target=self._find, args=(said,), daemon=True)
        thread.start()
        return thread

    def _find(self, said: bool) -> None:
        """Connect, again and again; say that Redis is lost, if that is not said, and found."""
        while True:
            if said:
                time.sleep(REDIS_RETRY)
            try:
                self._idle = self._connect()
                break
            except self._errors as error:
                if not said:
                    _say_lost(error)
                said = True
        if said:
            log.warning("Redis answers again: the limit holds")
        self._answers = True

    def _connect(self) -> LifoQueue[Any]:
        idle: LifoQueue[Any] = LifoQueue()
        for _ in range(REDIS_CONNECTIONS):
            connection = self._pool.connection_class(**self._pool.connection_kwargs)
            connection.connect()
            # More than a PING: a Redis that answers may still refuse to write.
            _command(connection, "EVAL", _TAKE, 1, _name(""), *self._limits)
            idle.put(connection)
        return idle


def _command(connection: Any, *command: object) -> Any:
    connection.send_command(*command)
    return connection.read_response()


def _say_lost(error: Exception) -> None:
    # Not its text, which may hold what stands in the URL.
    log.warning("Redis does not answer (%s): events pass without a limit", type(error).__name__)


def _name(routing_key: str) -> str:
    """Return the name in Redis, which others may read: a routing key is a credential."""
    return f"pagerduty-compat:{digest(routing_key).hex()}"
