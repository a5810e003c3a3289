"""What a case file cannot hold: limits, costs, wording, and the schemas on their own."""

from __future__ import annotations

import json
import pickle
import re
import traceback
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import pytest
from conftest import KEY, body_of, calls_of, trigger
from jsonschema import Draft202012Validator
from test_cases import ACCEPTED, REFUSED, Request, expected, is_change

from pagerduty_compat import InvalidEvent, parse, validate
from pagerduty_compat.events import _SENTENCES, MAX_BYTES, UnrecognizedObject

SCHEMAS = {
    name: json.loads((files("pagerduty_compat") / "schema" / f"{name}_event.json").read_bytes())
    for name in ("alert", "change")
}


def test_an_event_of_512_kb_is_accepted() -> None:
    assert len(body_of(MAX_BYTES)) == 524_288
    assert parse(body_of(524_288))["event_action"] == "trigger"


def test_an_event_of_one_byte_more_is_refused() -> None:
    with pytest.raises(InvalidEvent, match=r"Event is too large \(maximum is 512 KB\)") as caught:
        parse(body_of(524_289))
    assert not isinstance(caught.value, UnrecognizedObject)


@pytest.mark.parametrize("bracket", ["[", "{", '{"a":'])
def test_100000_nested_brackets_are_a_json_parse_error(bracket: str) -> None:
    with pytest.raises(UnrecognizedObject, match="JSON parse error"):
        parse(bracket.encode() * 100_000)


def refuse(body: bytes) -> InvalidEvent:
    with pytest.raises(InvalidEvent) as caught:
        parse(body)
    return caught.value


@pytest.mark.parametrize("item", ["{}", "1", '{"href":""}', '{"href":1,"text":1}', "[]"])
def test_512_kb_of_mistakes_cost_little_more_than_a_few(item: str) -> None:
    def mistakes(count: int) -> bytes:
        return json.dumps(trigger(links=0)).replace("0", f"[{','.join([item] * count)}]").encode()

    few, many = mistakes(200), mistakes((MAX_BYTES - 200) // (len(item) + 1))
    assert refuse(many).errors == refuse(few).errors
    assert calls_of(lambda: refuse(many)) < 1.1 * calls_of(lambda: refuse(few))


@pytest.mark.parametrize("last", ["{}", '{"href":"a"}'])
def test_40000_links_cost_little_more_than_a_few(last: str) -> None:
    def links(count: int) -> bytes:
        items = ",".join([*(f'{{"href":"{n:x}"}}' for n in range(count)), last])
        return json.dumps(trigger(links=0)).replace("0", f"[{items}]").encode()

    def verdict(body: bytes) -> tuple[str, ...]:
        try:
            parse(body)
        except InvalidEvent as error:
            return error.errors
        return ()

    few, many = links(200), links(30_000)
    assert len(many) < MAX_BYTES
    assert verdict(many) == verdict(few)
    # At most a few calls for each link; jsonschema alone would make a hundred.
    assert calls_of(lambda: verdict(many)) - calls_of(lambda: verdict(few)) < 30_000 * 10


def test_a_valid_event_costs_no_walk_through_the_schema() -> None:
    body = json.dumps(trigger()).encode()
    assert calls_of(lambda: parse(body)) < 100  # jsonschema makes 900


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_schema_sees_of_images_and_links_what_look_sees(name: str) -> None:
    for part in ("images", "links"):
        items = SCHEMAS[name]["$defs"][part]["items"]
        assert set(items) == {"type", "required", "properties"}
        for member in items["properties"].values():
            assert set(member) == {"description", "$ref"}
            assert member["$ref"] in ("#/$defs/text", "#/$defs/optional_text")
    assert set(SCHEMAS[name]["$defs"]["text"]) == {"description", "$comment", "type", "pattern"}
    assert set(SCHEMAS[name]["$defs"]["optional_text"]) == {"description", "type"}


def test_an_unfinished_string_of_escapes_is_scanned_once() -> None:
    # A search that turned back at each quote would take hours.
    refuse(b"[" * 300 + b'"' + b'\\"' * 260_000)


def test_no_value_that_was_sent_is_repeated() -> None:
    secret = "SECRET"

    def every_member(schema: Any) -> Any:
        return {name: {secret: secret} for name in schema}

    event = every_member(SCHEMAS["alert"]["properties"])
    payload = every_member(SCHEMAS["alert"]["$defs"]["payload"]["properties"])
    bodies = [
        json.dumps(event),
        json.dumps({**event, "event_action": secret}),
        json.dumps({**event, "event_action": "trigger", "links": [secret], "images": [secret]}),
        json.dumps({**event, "event_action": "trigger", "payload": payload}),
        json.dumps({"routing_key": secret, "event_action": "trigger", "payload": secret}),
        f'{{"{secret}": {secret}}}',
        f'"{secret}"',
        f"{secret}\udcff",
    ]
    for body in bodies:
        error = refuse(body.encode(errors="surrogateescape"))
        assert error.errors
        assert error.__cause__ is None
        assert secret not in "".join(traceback.format_exception(error)) + repr(error)


def test_a_code_without_a_sentence_of_its_own_gets_the_fallback() -> None:
    assert InvalidEvent("payload.summary:fashion", "colour:value").errors == (
        "'payload.summary' is invalid",
        "'colour' is invalid",
    )


def test_an_invalid_event_can_be_sent_to_another_process() -> None:
    error = pickle.loads(pickle.dumps(refuse(b"{}")))
    assert error.errors == ("'routing_key' cannot be blank", "'event_action' is missing or blank")
    assert error.codes == ("routing_key:blank", "event_action:blank")


def test_validate_judges_a_dict_as_parse_judges_its_json() -> None:
    validate(trigger())
    validate(trigger(links=({"href": "a"},)))  # a tuple is an array in JSON
    validate({"routing_key": KEY, "payload": {"summary": "s"}}, change=True)
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    circle: list[Any] = []
    circle.append(circle)
    for event, sentence in [
        (trigger(payload={}), "'payload.summary' is missing or blank"),
        (trigger(extra=float("nan")), "JSON parse error"),
        (trigger(extra="\ud800"), "JSON parse error"),
        (trigger(extra=deep), "JSON parse error"),
        (trigger(extra=circle), "JSON parse error"),
        (trigger(extra=10**5000), "JSON parse error"),
        (trigger(extra="x" * MAX_BYTES), "Event is too large (maximum is 512 KB)"),
        ([trigger()], "Event must be a JSON object"),
    ]:
        with pytest.raises(InvalidEvent) as caught:
            validate(event)
        assert caught.value.errors[0] == sentence
    with pytest.raises(TypeError, match="set is not JSON serializable"):
        validate(trigger(extra={1}))


def test_a_routing_key_from_outside_that_has_no_utf_8_is_refused() -> None:
    with pytest.raises(UnrecognizedObject, match="JSON parse error"):
        parse(json.dumps(trigger(routing_key=None)).encode(), routing_key="\udcff" * 32)


def test_a_routing_key_given_from_outside_is_not_put_in_where_there_is_one() -> None:
    assert parse(json.dumps(trigger()).encode(), routing_key="x" * 32)["routing_key"] == KEY


def schema_parts(schema: Any) -> Iterator[dict[str, Any]]:
    if isinstance(schema, dict):
        yield schema
    for part in schema.values() if isinstance(schema, dict) else schema:
        if isinstance(part, dict | list):
            yield from schema_parts(part)


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_schema_keeps_to_what_all_validators_agree_on(name: str) -> None:
    refuses_newlines = {"not": {"type": "string", "pattern": "[\\n\\r]"}}
    patterns = []
    for part in schema_parts(SCHEMAS[name]):
        assert "format" not in part
        assert part.get("additionalProperties") is not False
        if isinstance(pattern := part.get("pattern"), str):
            patterns.append(pattern)
            assert not re.search(r"\\[^tnru]|\(\?", pattern)
            assert "$" not in pattern or refuses_newlines in part["allOf"]
    assert patterns


def test_both_schemas_define_the_same_parts_alike() -> None:
    alert, change = (schema["$defs"] for schema in SCHEMAS.values())
    assert {name: alert[name] for name in change if name != "payload"} == {
        name: change[name] for name in change if name != "payload"
    }


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_judged_member_of_the_schema_has_a_sentence(name: str) -> None:
    schema = SCHEMAS[name]
    members = {m: schema["properties"][m] for m in schema["properties"]}
    for prefix, part in (
        ("payload.", schema["$defs"]["payload"]),
        ("image ", schema["$defs"]["images"]["items"]),
        ("link ", schema["$defs"]["links"]["items"]),
    ):
        members |= {prefix + m: part["properties"][m] for m in part["properties"]}
    unjudged = {"payload.custom_details"}
    assert set(members) - unjudged <= set(_SENTENCES)
    for prefix, part in (
        ("", schema),
        ("payload.", schema["$defs"]["payload"]),
        ("image ", schema["$defs"]["images"]["items"]),
        ("link ", schema["$defs"]["links"]["items"]),
    ):
        for member in part["required"]:
            assert "blank" in _SENTENCES[prefix + member]


@pytest.mark.parametrize("path", ACCEPTED, ids=lambda path: path.stem)
def test_the_schema_alone_accepts_what_parse_accepts(path: Any) -> None:
    schema = SCHEMAS["change" if is_change(path) else "alert"]
    Draft202012Validator(schema).validate(expected(path))


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_the_schema_alone_refuses_what_parse_refuses(case: Any) -> None:
    request = Request(case)
    try:
        event = json.loads(request.body)
    except ValueError:
        assert case.name.startswith("json_")
        return
    if isinstance(event, dict) and request.routing_key and not event.get("routing_key"):
        event["routing_key"] = request.routing_key
    schema = SCHEMAS["change" if request.change else "alert"]
    strict_json_alone = case.name.startswith("json_")
    assert Draft202012Validator(schema).is_valid(event) == strict_json_alone
