"""The settings of the service: its environment variables, by one table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

PREFIX = "PAGERDUTY_COMPAT_"


class InvalidSetting(ValueError):
    """A setting that the service cannot start with; its text is one line for people."""


class Setting(NamedTuple):
    """A number within bounds."""

    low: float
    high: float
    default: float


SETTINGS = {
    # Seconds for one line to reach stdout, before the client gets a 503. Less than the 25 s
    # and 30 s after which gunicorn kills a worker.
    "STDOUT_TIMEOUT": Setting(0.1, 20, 3),
    # Seconds for the header of a request, on a new connection from its start.
    "HEADER_TIMEOUT": Setting(0.1, 300, 5),
    # Seconds for the body of a request.
    "BODY_TIMEOUT": Setting(0.1, 300, 10),
}


def read_settings(environ: Mapping[str, str]) -> dict[str, float]:
    """Return each setting by its name without the prefix `PAGERDUTY_COMPAT_`.

    Raises:
        InvalidSetting: a value is no number, or out of bounds.
    """
    return {name: _read(name, environ.get(PREFIX + name)) for name in SETTINGS}


def unknown_settings(environ: Mapping[str, str]) -> Iterator[str]:
    """Return what looks like a setting and is none.

    It may be misspelt; but Kubernetes, too, makes some up for a Service of our name.
    """
    return (
        name
        for name in environ
        if name.startswith(PREFIX) and name.removeprefix(PREFIX) not in SETTINGS
    )


def _read(name: str, text: str | None) -> float:
    low, high, default = SETTINGS[name]
    if not text:
        return default
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if low <= value <= high:
        return value
    raise InvalidSetting(f"{PREFIX}{name} must be a number from {low:g} to {high:g}")
