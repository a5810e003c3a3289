"""The service as a WSGI app: the blueprint, events to stdout, health."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from flask import Flask, Response, request
from werkzeug.exceptions import HTTPException, NotFound, ServiceUnavailable

from .blueprint import answer, events_blueprint, http_error
from .settings import InvalidSetting, read_settings, unknown_settings
from .stdout import EventWriter, NotWritten

log = logging.getLogger("pagerduty_compat")

# When a client is asked to come back after a line could not be written.
_RETRY_AFTER_SECONDS = 5


def create_app(environ: Mapping[str, str] = os.environ) -> Flask:
    """Return the service: accepted events go to stdout, and all else to the log.

    Raises:
        InvalidSetting: a setting is wrong, or stdout or stderr is closed.
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
    gunicorn_conf = sys.modules.get(f"{__package__}.gunicorn_conf")
    if gunicorn_conf is None:
        log.warning(
            "the packaged gunicorn settings are not in use: if a worker is killed while it writes,"
            " the next event is glued to the torn line"
        )
    state = getattr(gunicorn_conf, "stdout_state", None)
    writer = EventWriter(fd=1, timeout=settings["STDOUT_TIMEOUT"], state=state)

    def print_event(event: dict[str, Any]) -> None:
        try:
            writer.write(event)
        except NotWritten as error:
            log.error("an event was not accepted: %s", error)
            raise ServiceUnavailable(retry_after=_RETRY_AFTER_SECONDS) from error

    release = version("pagerduty-compat")
    app = Flask(__name__, static_folder=None)
    app.config["PROVIDE_AUTOMATIC_OPTIONS"] = False  # they would not be JSON
    app.url_map.strict_slashes = False
    app.url_map.merge_slashes = False  # a redirect, in HTML
    app.register_blueprint(events_blueprint(print_event))
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

    return app


def _log_where_gunicorn_does() -> None:
    """Under gunicorn, log as it does: to stderr, in its format, at its level."""
    gunicorn = logging.getLogger("gunicorn.error")
    if gunicorn.handlers:
        log.handlers = gunicorn.handlers
        log.setLevel(gunicorn.level)
        log.propagate = False
