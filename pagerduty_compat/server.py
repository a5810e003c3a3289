"""The service as a WSGI app: the blueprint, events to stdout, health, metrics."""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from flask import Flask, Response, request
from werkzeug.exceptions import HTTPException, NotFound, ServiceUnavailable, TooManyRequests

from .blueprint import answer, events_blueprint, http_error
from .events import InvalidEvent
from .metrics import Metrics
from .settings import (
    InvalidSetting,
    Settings,
    digest,
    read_routing_keys,
    read_settings,
    unknown_settings,
)
from .stdout import EventWriter, NotWritten
from .throttle import MemoryThrottle, RedisThrottle, Throttle

log = logging.getLogger("pagerduty_compat")

# When a client is asked to come back after a line could not be written.
_RETRY_AFTER_SECONDS = 5


def create_app(environ: Mapping[str, str] = os.environ) -> Flask:
    """Return the service: accepted events go to stdout, and all else to the log.

    Raises:
        InvalidSetting: a setting is wrong, what it names is missing, or stdout or stderr is
            closed.
    """
    _log_where_gunicorn_does()
    for name in unknown_settings(environ):
        log.warning("unknown setting %s is ignored", name)
    settings = read_settings(environ)
    for stream, name in ((sys.stdout, "stdout"), (sys.stderr, "stderr")):
        if stream is None:  # its descriptor is free then, and may soon be some client's socket
            raise InvalidSetting(f"{name} is closed")
    if os.path.sameopenfile(1, 2) and not os.isatty(1):
        log.warning("stdout and stderr are one: lines of the log may fall between or into events")
    # What its master has prepared, if gunicorn runs with the packaged settings.
    gunicorn_conf = sys.modules.get(f"{__package__}.gunicorn_conf")
    if gunicorn_conf is None:
        log.warning(
            "the packaged gunicorn settings are not in use: if a worker is killed while it writes,"
            " the next event is glued to the torn line"
        )
    state = getattr(gunicorn_conf, "stdout_state", None)
    writer = EventWriter(fd=1, timeout=settings.stdout_timeout, state=state)
    routing_keys = getattr(gunicorn_conf, "routing_keys", None)
    if routing_keys is None and settings.routing_keys_file:
        routing_keys = read_routing_keys(settings.routing_keys_file)
    release = version("pagerduty-compat")
    metrics = Metrics(release, slot=getattr(gunicorn_conf, "worker_slot", None))
    throttle = _throttle(settings, on_failure=metrics.redis_failures.inc)

    def accept(event: dict[str, Any]) -> None:
        routing_key = event["routing_key"]
        if routing_keys is not None and digest(routing_key) not in routing_keys:
            raise InvalidEvent("routing_key:value")
        if throttle and (wait := throttle.take(routing_key)):
            raise TooManyRequests(retry_after=math.ceil(wait))
        if settings.mask_routing_keys:
            event = {**event, "routing_key": "*" * (len(routing_key) - 4) + routing_key[-4:]}
        try:
            size = writer.write(event)
        except NotWritten as error:
            if throttle:
                throttle.give_back(routing_key)
            log.error("an event was not accepted: %s", error)
            raise ServiceUnavailable(retry_after=_RETRY_AFTER_SECONDS) from error
        metrics.lines.inc()
        metrics.bytes.inc(size)

    app = Flask(__name__, static_folder=None)
    app.config["PROVIDE_AUTOMATIC_OPTIONS"] = False  # they would not be JSON
    app.url_map.strict_slashes = False
    app.url_map.merge_slashes = False  # a redirect, in HTML
    app.register_blueprint(events_blueprint(accept, on_answer=metrics.count))
    app.register_error_handler(HTTPException, http_error)

    @app.before_request
    def refuse_double_slash() -> None:
        # Werkzeug drops slashes in front; within the path a double one is a 404 too.
        if request.environ["PATH_INFO"].startswith("//"):
            raise NotFound

    @app.get("/-/healthy")
    def healthy() -> Response:
        if writer.broken():  # and a restart brings a new one
            return answer(503, "unhealthy", "stdout has no reader", errors=["stdout"])
        return answer(200, "healthy", "The service is running")

    @app.get("/-/ready")
    def ready() -> Response:
        if writer.ready():
            return answer(200, "ready", "Events can be accepted")
        return answer(503, "not ready", "stdout cannot be written", errors=["stdout"])

    @app.get("/version")
    def show_version() -> Response:
        return answer(200, "pagerduty-compat", release)

    @app.get("/metrics")
    def show_metrics() -> Response:
        text, content_type = metrics.text(request.headers.get("Accept", ""))
        return Response(text, content_type=content_type)

    return app


def _throttle(settings: Settings, on_failure: Callable[[], object]) -> Throttle | None:
    calls = settings.calls_per_minute
    if not calls:
        return None
    if not settings.redis_url:
        return MemoryThrottle(calls)
    if find_spec("redis") is None:
        raise InvalidSetting("install what it needs: pip install 'pagerduty-compat[redis]'")
    try:
        return RedisThrottle(settings.redis_url, calls, on_failure=on_failure)
    except ValueError:  # its text may hold the password
        raise InvalidSetting(
            "PAGERDUTY_COMPAT_REDIS_URL must be like redis://:PASSWORD@HOST:6379/0"
        ) from None


def _log_where_gunicorn_does() -> None:
    """Under gunicorn, log as it does: to stderr, in its format, at its level."""
    gunicorn = logging.getLogger("gunicorn.error")
    if gunicorn.handlers:
        log.handlers = gunicorn.handlers
        log.setLevel(gunicorn.level)
        log.propagate = False
