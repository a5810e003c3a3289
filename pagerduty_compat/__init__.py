"""A receiver that speaks PagerDuty's Events API v2; here, the names of its checker."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .events import InvalidEvent, parse, validate

__all__ = ["InvalidEvent", "parse", "validate"]


def __getattr__(name: str) -> object:
    # Looked up on first use: gunicorn's master imports this package for its settings, and
    # what the master has imported, its workers cannot load anew after a HUP.
    if name in __all__:
        from . import events

        return getattr(events, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
