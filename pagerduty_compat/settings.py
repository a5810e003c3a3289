"""The settings of the service: its environment variables, each read and checked here."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from hashlib import sha256
from typing import NamedTuple

PREFIX = "PAGERDUTY_COMPAT_"

ROUTING_KEY_LENGTH = 32


class InvalidSetting(ValueError):
    """A setting that the service cannot start with; its text is one line for people."""


class Settings(NamedTuple):
    """What can be set. In the environment, the names are in capitals, after `PREFIX`."""

    #: Seconds for one line to reach stdout, before the client gets a 503. Less than the 25 s
    #: and 30 s after which gunicorn kills a worker.
    stdout_timeout: float = 3
    #: Seconds for the header of a request, on a new connection from its start.
    header_timeout: float = 5
    #: Seconds for the body of a request.
    body_timeout: float = 10
    #: Events that are accepted for each routing key within 60 s; 0 for no limit.
    calls_per_minute: int = 120
    #: Where the processes that share this limit count, or "" to count in each of them.
    redis_url: str = ""
    #: A file of the routing keys that are served, or "" to serve any.
    routing_keys_file: str = ""
    #: Whether lines show no more than the last four characters of a routing key.
    mask_routing_keys: bool = False


def read_settings(environ: Mapping[str, str]) -> Settings:
    """Return the settings; what is unset or empty has its default.

    Raises:
        InvalidSetting: a value cannot be what it should be. The text does not repeat it.
    """
    default = Settings()

    def number(name: str, low: float, high: float, kind: str = "a number") -> float:
        text = environ.get(PREFIX + name.upper()) or str(getattr(default, name))
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if low <= value <= high and (kind == "a number" or value.is_integer()):
            return value
        raise _invalid(name, f"must be {kind} from {low:.10g} to {high:.10g}")

    def flag(name: str) -> bool:
        text = environ.get(PREFIX + name.upper()) or str(getattr(default, name))
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        raise _invalid(name, "must be true or false")

    return Settings(
        stdout_timeout=number("stdout_timeout", 0.1, 20),
        header_timeout=number("header_timeout", 0.1, 300),
        body_timeout=number("body_timeout", 0.1, 300),
        calls_per_minute=int(number("calls_per_minute", 0, 1_000_000, "a whole number")),
        redis_url=environ.get(PREFIX + "REDIS_URL", ""),
        routing_keys_file=environ.get(PREFIX + "ROUTING_KEYS_FILE", ""),
        mask_routing_keys=flag("mask_routing_keys"),
    )


def unknown_settings(environ: Mapping[str, str]) -> Iterator[str]:
    """Return what looks like a setting and is none.

    It may be misspelt; but Kubernetes, too, makes some up for a Service of our name.
    """
    known = {PREFIX + name.upper() for name in Settings._fields}
    return (name for name in environ if name.startswith(PREFIX) and name not in known)


def read_routing_keys(file: str) -> frozenset[bytes]:
    """Return the digests of the routing keys in a file: one a line, `#` begins a comment.

    Raises:
        InvalidSetting: there is no such file, no key in it, or something else than a key.
    """
    name = "routing_keys_file"
    keys = set()
    try:
        with open(file, encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                key = line.partition("#")[0].strip()
                if key and len(key) != ROUTING_KEY_LENGTH:
                    raise _invalid(
                        name, f"has no key of {ROUTING_KEY_LENGTH} characters in line {number}"
                    )
                if key:
                    keys.add(digest(key))
    except OSError as error:
        raise _invalid(name, f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise _invalid(name, "is not UTF-8") from None
    if not keys:
        raise _invalid(name, "holds no key")
    return frozenset(keys)


def digest(routing_key: str) -> bytes:
    """Return what a routing key is known by where it need not be kept: it is a credential."""
    return sha256(routing_key.encode()).digest()


def _invalid(name: str, reason: str) -> InvalidSetting:
    return InvalidSetting(f"{PREFIX}{name.upper()} {reason}")
