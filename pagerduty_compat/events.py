"""Bytes in, event out, or `InvalidEvent` in PagerDuty's words.

An event is the JSON object that a client sends to PagerDuty's Events API v2. The rules
stand in the JSON Schemas of the folder `schema`, which are all that another validator
needs. This module reads strict JSON, lets `jsonschema` judge it, and words the verdict as
PagerDuty does. It knows nothing of HTTP, Flask, stdout or the environment.

Where `jsonschema-rs` is installed, it is asked first, since it is hundreds of times as quick:
what it accepts is accepted. What it does not, `jsonschema` judges and explains.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from importlib.resources import files
from itertools import accumulate, repeat
from typing import Any, NamedTuple, NoReturn

from jsonschema import Draft202012Validator, ValidationError
from jsonschema.validators import extend

try:
    import jsonschema_rs
except ImportError:
    jsonschema_rs = None  # type: ignore[assignment]

#: The largest event, in bytes: 512 KB, from PagerDuty's status page of June 2018.
MAX_BYTES = 524_288

#: How deep objects and arrays may nest; the event itself is the first level. JSON parsers
#: give up somewhere past a few hundred, each at a depth of its own; one fixed limit gives
#: the same verdict on every Python.
MAX_DEPTH = 200

#: After so many wrong items of one list, the rest are not looked at. It bounds what a body
#: full of mistakes costs, and leaves the verdict alone.
MAX_WRONG_ITEMS = 100

# PagerDuty's sentences, to the letter where they are on record, its slips included. The order
# of the rows, not that of the schema, is the order of the errors in an answer. A member with a
# sentence for "blank" is required, at least of some events.
_BLANK = "'{}' is missing or blank"
_STRING = "'{}' is invalid (must be a string)"
_OBJECT = "'{}' is invalid (must be an object)"
_ARRAY = "'{}' is invalid (must be an array)"
_FALLBACK = "'{}' is invalid"
_SENTENCES: dict[str, dict[str, str]] = {
    "routing_key": {
        "blank": "'{}' cannot be blank",
        "type": _STRING,
        "length": "Length of '{}' is incorrect (should be 32 characters)",
        "value": "Invalid routing key",  # of a list that the schema does not know
    },
    "event_action": {
        "blank": _BLANK,
        "type": _STRING,
        "value": "'{}' is invalid (must be one of the following:"
        " 'trigger', 'acknowledge' or 'resolve')",
    },
    "dedup_key": {
        "blank": _BLANK,
        "type": _STRING,
        "length": "'{}' is too long (maiximum is 255 characters)",
    },
    "payload": {"blank": _BLANK, "type": _OBJECT},
    "payload.summary": {
        "blank": _BLANK,
        "type": _STRING,
        "length": "'summary' is too long (maiximum is 1024 characters)",
    },
    "payload.source": {"blank": _BLANK, "type": _STRING},
    "payload.severity": {
        "blank": _BLANK,
        "type": _STRING,
        "value": "'{}' is invalid (must be one of the following:"
        " 'critical', 'warning', 'error' or 'info')",
    },
    "payload.timestamp": {
        "type": _STRING,
        "value": "'{}' is invalid (must be an ISO 8601 date-time)",
    },
    "client": {"type": _STRING},
    "client_url": {"type": _STRING},
    "payload.component": {"type": _STRING},
    "payload.group": {"type": _STRING},
    "payload.class": {"type": _STRING},
    "images": {"type": _ARRAY},
    "image": {"type": _OBJECT},
    "image src": {"blank": _BLANK, "type": _STRING},
    "image href": {"type": _STRING},
    "image alt": {"type": _STRING},
    "links": {"type": _ARRAY, "length": "{} should have at most 50 item(s)"},
    "link": {"type": _OBJECT},
    "link href": {"blank": _BLANK, "type": _STRING},
    "link text": {"type": _STRING},
    # What is said of a whole body, always alone.
    "json": {"value": "JSON parse error"},
    "event": {"type": "Event must be a JSON object"},
    "size": {"value": "Event is too large (maximum is 512 KB)"},
    "content_encoding": {"value": "Content-Encoding is not supported"},
}
_ROW = {member: row for row, member in enumerate(_SENTENCES)}

# The first kind that applies to a member is the one that is reported.
_KINDS = ("blank", "type", "value", "length")
_KIND_OF_KEYWORD = {
    "required": "blank",
    "type": "type",
    "minLength": "length",
    "maxLength": "length",
    "maxItems": "length",
}


class InvalidEvent(ValueError):
    """An event that PagerDuty refuses with status 400.

    It holds no value that was sent: a routing key is a credential.

    Attributes:
        codes: a name for each thing that is wrong, `member:kind`, for programs:
            `payload.severity:value`. The members are those of the schema, the kinds
            `blank`, `type`, `value` and `length`; neither comes from the event.
        errors: PagerDuty's sentence for each code, in the order of the contract.
        status: the first member of PagerDuty's answer, a short phrase.
        message: its second member, a sentence.
    """

    status = "invalid event"
    message = "Event object is invalid"

    def __init__(self, *codes: str) -> None:
        super().__init__(*codes)
        self.codes = codes
        self.errors = tuple(map(_sentence, codes))

    def __str__(self) -> str:
        return f"{self.message}: {', '.join(self.errors)}"


class UnrecognizedObject(InvalidEvent):
    """A body that is no event at all: not JSON, or not a JSON object."""

    status = "Unrecognized object"
    message = "Event object format is unrecognized"


def parse(body: bytes, *, change: bool = False, routing_key: str | None = None) -> dict[str, Any]:
    """Return the event in a body, as it was sent.

    Args:
        body: JSON in UTF-8, at most `MAX_BYTES` long and `MAX_DEPTH` deep. Numbers are
            Python's; of equal names in one object the last counts.
        change: judge a change event, not an alert event. It comes back without an
            `event_action` and a `dedup_key`: these are what an alert event is told by.
        routing_key: put in where the event's own is absent, null or empty, as the header
            X-Routing-Key is.

    Raises:
        InvalidEvent: PagerDuty would refuse it; `UnrecognizedObject` if it is no event.
    """
    if len(body) > MAX_BYTES:
        raise InvalidEvent("size:value")
    try:
        event = _loads(body)
        (routing_key or "").encode()  # of a command line it may hold lone surrogates
    except ValueError:
        raise UnrecognizedObject("json:value") from None  # its cause would hold the body
    if not isinstance(event, dict):
        raise UnrecognizedObject("event:type")
    if routing_key and event.get("routing_key") in (None, ""):
        event["routing_key"] = routing_key
    codes = _codes(_CHANGE_EVENT if change else _ALERT_EVENT, event)
    if codes:
        raise InvalidEvent(*codes)
    if change:
        event.pop("event_action", None)
        event.pop("dedup_key", None)
    return event


def validate(event: Any, *, change: bool = False) -> None:
    """Judge an event in hand, a dict, as `parse` judges the JSON that `json.dumps` makes.

    Args:
        event: what a client would hand to `json.dumps`.
        change: judge a change event, not an alert event.

    Raises:
        InvalidEvent: PagerDuty would refuse it; `UnrecognizedObject` if it is no event.
        TypeError: it holds something that JSON has no form for.
    """
    try:
        text = json.dumps(event, ensure_ascii=False, separators=(",", ":"))
    except (RecursionError, ValueError):  # a circle, or an integer of too many digits
        raise UnrecognizedObject("json:value") from None
    parse(text.encode(errors="surrogatepass"), change=change)


def _loads(body: bytes) -> Any:
    """Read JSON that can be written again as it was, or raise ValueError."""
    if body.count(b"[") + body.count(b"{") > MAX_DEPTH and _depth(body) > MAX_DEPTH:
        raise ValueError("nested too deep")
    event = json.loads(body.decode(), parse_constant=_refuse, parse_float=_float)
    if _ESCAPED_SURROGATE.search(body):
        json.dumps(event, ensure_ascii=False).encode()  # a lone one has no UTF-8
    return event


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _float(text: str) -> float:
    number = float(text)
    if math.isinf(number) or (number == 0 and _NOT_ZERO.match(text)):
        raise ValueError("out of the range of a float")
    return number


_NOT_ZERO = re.compile("[-0.]*[1-9]")
_ESCAPED_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")

# The closing quote is optional so that the search never turns back, however long the text:
# a string without an end is the JSON parser's to refuse.
_QUOTED = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?', re.DOTALL)
_ALL_BUT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_STEPS = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")  # 1 and, as a signed byte, -1


def _depth(body: bytes) -> int:
    """Return how deep a JSON text nests, without parsing it."""
    steps = _QUOTED.sub(b"", body).translate(_STEPS, _ALL_BUT_BRACKETS)
    return max(accumulate(memoryview(steps).cast("b")), default=0)


def _items(validator: Any, schema: Any, instance: Any, _: Any) -> Iterator[ValidationError]:
    """Judge the keyword `items`: items that look alike once, and few that are wrong.

    512 KB hold 40,000 links, for which jsonschema would take a second and more.
    """
    if not isinstance(instance, list):
        return
    verdicts: dict[object, bool] = {}
    wrong = 0
    for index, item in enumerate(instance):
        look = _look(item, schema["properties"])
        if look not in verdicts:
            errors = list(validator.descend(item, schema, path=index))
            yield from errors
            verdicts[look] = bool(errors)
        wrong += verdicts[look]
        if wrong == MAX_WRONG_ITEMS:
            return


def _look(item: Any, properties: Iterable[str]) -> object:
    """Return all that the schema of an image or a link can see of it.

    That is the type of each member that it names, and of a text whether it is blank.
    """
    if type(item) is not dict:
        return type(item)
    return tuple(
        [
            type(value) if type(value) is not str else bool(_NOT_BLANK.search(value))
            for value in map(item.get, properties, repeat(_ABSENT))
        ]
    )


_ABSENT = object()


class _Judge(NamedTuple):
    """A schema, ready to judge: whether an event is valid for certain, and why it is not."""

    is_valid: Callable[[Any], bool]
    explain: Any


def _load(name: str) -> _Judge:
    schema = json.loads((files(__package__) / "schema" / name).read_text("utf-8"))
    Draft202012Validator.check_schema(schema)
    explain = extend(Draft202012Validator, {"items": _items})(schema)
    if jsonschema_rs is None:
        return _Judge(lambda event: False, explain)
    return _Judge(jsonschema_rs.Draft202012Validator(schema).is_valid, explain)


# Made once, at import: a broken schema stops the start, not the first alert.
_ALERT_EVENT = _load("alert_event.json")
_CHANGE_EVENT = _load("change_event.json")
_NOT_BLANK = re.compile(_ALERT_EVENT.explain.schema["$defs"]["text"]["pattern"])


def _codes(judge: _Judge, event: dict[str, Any]) -> list[str]:
    """Return the code of all that the schema finds wrong, one a member, in order."""
    if judge.is_valid(event):
        return []
    kinds: dict[str, str] = {}
    for error in judge.explain.iter_errors(event):
        for member in _members(error):
            kind = _kind(error, member)
            kinds[member] = min(kind, kinds.get(member, kind), key=_KINDS.index)
    members = sorted(kinds, key=lambda member: _ROW.get(member, len(_ROW)))
    return [f"{member}:{kinds[member]}" for member in members]


def _members(error: ValidationError) -> list[str]:
    """Name what an error is about. `required` does not say which name is missing."""
    path = list(error.absolute_path)
    if error.validator != "required":
        return [_name(path)]
    names: Any = error.validator_value
    event: Any = error.instance
    return [_name([*path, name]) for name in names if name not in event]


def _name(path: list[str | int]) -> str:
    """Name a member as PagerDuty does: `payload.summary`, and `link href` for `links`."""
    if len(path) > 1 and isinstance(path[1], int):
        return " ".join([str(path[0]).removesuffix("s"), *map(str, path[2:])])
    return ".".join(map(str, path))


def _kind(error: ValidationError, member: str) -> str:
    kind = _KIND_OF_KEYWORD.get(str(error.validator), "value")
    if kind == "length" or "blank" not in _SENTENCES.get(member, {}):
        return kind
    value = error.instance
    blank = value is None or (isinstance(value, str) and not _NOT_BLANK.search(value))
    return "blank" if blank else kind


def _sentence(code: str) -> str:
    member, _, kind = code.rpartition(":")
    return _SENTENCES.get(member, {}).get(kind, _FALLBACK).format(member)
