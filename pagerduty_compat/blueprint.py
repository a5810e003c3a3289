"""PagerDuty's two endpoints as a Flask blueprint: HTTP and nothing else."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from typing import Any, NamedTuple
from uuid import uuid4

from flask import Blueprint, Response, request
from werkzeug.exceptions import HTTPException, MethodNotAllowed, default_exceptions
from werkzeug.wsgi import get_content_length, get_input_stream

from .events import MAX_BYTES, InvalidEvent, UnrecognizedObject, parse

log = logging.getLogger(__name__)

_METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE")

# What is over the limit is read as well, up to here, and thrown away: a client that sends
# its whole body before it reads would otherwise see a reset in place of the answer.
_MAX_BYTES_READ = 16 * MAX_BYTES
_CHUNK = 65_536


class Answered(NamedTuple):
    """What became of one event that was sent."""

    #: Whether it was sent as a change event.
    change: bool
    #: The event, or None if it was refused before it was one.
    event: dict[str, Any] | None
    #: The status of the answer.
    status: int
    #: The codes of `InvalidEvent`, if it was refused.
    codes: tuple[str, ...]
    #: How long it took to read, judge and handle it.
    seconds: float


def events_blueprint(
    on_event: Callable[[dict[str, Any]], object],
    on_answer: Callable[[Answered], object] = lambda answered: None,
) -> Blueprint:
    """Return a blueprint that answers `/v2/enqueue` and `/v2/change/enqueue` as PagerDuty.

    It can be registered under any prefix, and again under another name. It reads the body
    itself, from the stream: nothing in the app may have read it before.

    Args:
        on_event: the handler, called once for each accepted event, in the request's thread
            or greenlet, before the client is told that the event was processed. An alert
            event always has its `dedup_key`; a change event has none, and no
            `event_action`. What it returns is ignored. If it raises, the client gets an
            error of the 5xx class and sends the event again, so it must be idempotent on
            `dedup_key` (one that was generated is new each time). `InvalidEvent` refuses
            the event with 400. An exception of `werkzeug.exceptions` sets the status
            itself: ServiceUnavailable, say, or TooManyRequests, which becomes PagerDuty's 429.
        on_answer: called once for each event that was sent, when its answer is known; for
            counting. It must not raise.
    """
    blueprint = Blueprint("pagerduty_compat", __name__)

    def enqueue(change: bool) -> Response:
        if request.method != "POST":
            raise MethodNotAllowed(["POST"])
        began = time.perf_counter()
        event = None
        status = 500
        codes: tuple[str, ...] = ()
        try:
            event = parse(_body(), change=change, routing_key=request.headers.get("X-Routing-Key"))
            members = {}
            if not change:
                members["dedup_key"] = event["dedup_key"] = event.get("dedup_key") or uuid4().hex
            on_event(event)
            status = 202
            kind = "Change event" if change else "Event"
            return answer(202, "success", f"{kind} processed", **members)
        except InvalidEvent as error:
            status, codes = 400, error.codes
            kind = "a change event" if change else "an alert event"
            log.warning(
                "refused %s from %s: %s", kind, request.remote_addr, "; ".join(error.errors)
            )
            return answer(400, error.status, error.message, errors=list(error.errors))
        except HTTPException as error:
            status = error.code or 500
            raise
        finally:
            seconds = time.perf_counter() - began
            on_answer(Answered(change, event, status, codes, seconds))

    for path, change in (("/v2/enqueue", False), ("/v2/change/enqueue", True)):
        blueprint.add_url_rule(
            path,
            endpoint="change_event" if change else "alert_event",
            view_func=enqueue,
            defaults={"change": change},
            methods=_METHODS,  # the others too, or Flask would refuse them in HTML
            strict_slashes=False,  # with a slash at the end too, and never a redirect
            merge_slashes=False,
        )
    # One for each status, since Flask prefers a status's handler of the app to a general one.
    blueprint.register_error_handler(HTTPException, http_error)
    for code in default_exceptions:
        blueprint.register_error_handler(code, http_error)
    return blueprint


def answer(code: int, status: str, message: str, **members: Any) -> Response:
    """Return a response of PagerDuty's shape: `status`, `message`, and what else is given.

    Flask's own JSON settings belong to the app; PagerDuty's clients must not depend on them.
    """
    body = json.dumps({"status": status, "message": message, **members}) + "\n"
    return Response(body, code, mimetype="application/json")


def http_error(error: HTTPException) -> Response:
    """Return any error of HTTP as JSON in PagerDuty's shape, its own headers kept."""
    code = error.code or 500
    status, message, reason = error.name.lower(), error.name, error.name
    if code in (404, 405):
        message = "Events are sent to /v2/enqueue and /v2/change/enqueue with POST"
    elif code == 429:
        status, reason = "throttle exceeded", "Enhance Your Calm."
        message = "Requests for this service are arriving too quickly.  Please retry later."
    elif code >= 500:
        message = "Please retry later."
    response = answer(code, status, message, errors=[reason])
    for name, value in error.get_headers():
        if name != "Content-Type":
            response.headers[name] = value
    if code == 405 and "POST" in response.headers.get("Allow", ""):
        response.headers["Allow"] = "POST"  # our rules take other methods only to refuse them
    if code == 429 and "Retry-After" in response.headers:
        response.headers["ratelimit-reset"] = response.headers["Retry-After"]
    return response


def _body() -> bytes:
    """Return the body of the request, whole or not at all.

    Raises:
        InvalidEvent: it breaks off, or it is compressed. A body over the limit comes back
            as one that is one byte too long.
    """
    if request.headers.get("Content-Encoding", "identity").lower() not in ("identity", ""):
        raise InvalidEvent("content_encoding:value")
    stream = get_input_stream(request.environ)
    body = bytearray()
    read = 0
    try:
        while read <= _MAX_BYTES_READ and (chunk := stream.read(_CHUNK)):
            read += len(chunk)
            body += chunk[: MAX_BYTES + 1 - len(body)]
    except Exception:
        # WSGI names no exception for a body that breaks off or is chunked wrongly; each
        # server raises its own, which may quote what was sent.
        raise UnrecognizedObject("json:value") from None
    if len(body) <= MAX_BYTES and read < (get_content_length(request.environ) or 0):
        raise UnrecognizedObject("json:value")
    return bytes(body)
