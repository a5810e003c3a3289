"""Bad input by machine: against parse, and over HTTP against the running service.

EXAMPLES sets how many inputs each test makes: few in `make test`, the same ones each time;
20,000 in `make chaos`, other ones each time.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import KEY, Service, wait_for
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from test_cases import ACCEPTED, REFUSED, Request
from test_events import SCHEMAS

from pagerduty_compat import InvalidEvent, parse

EXAMPLES = int(os.environ.get("EXAMPLES", "0"))
# Stands in every string that is sent, so that any that comes back is found.
SECRET = "S3CR3T"

many = settings(
    max_examples=EXAMPLES or 150,
    derandomize=not EXAMPLES,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
texts = st.one_of(
    st.sampled_from(["", " ", "\t\u3000", "\ufeff", "\u200b", KEY, "\x00", "\u2028", "é"]),
    st.text(max_size=8).map(lambda text: SECRET + text),
    st.sampled_from([31, 32, 33, 254, 255, 256, 1023, 1024, 1025]).map(
        lambda size: SECRET + "🔥" * (size - len(SECRET))
    ),
)
times = st.one_of(
    texts,
    st.from_regex(
        r"\A[0-9]{4}-[0-1][0-9]-[0-3][0-9]"
        r"([Tt ][0-2][0-9]:[0-6][0-9](:[0-6][0-9])?(Z|[+-]0[0-9])?\n?)?\Z"
    ),
)
values = st.recursive(
    st.one_of(
        texts,
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.sampled_from([1e308, 1e-320, 10**400, -0.0]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)
    ),
    max_leaves=6,
)
FIELDS = {
    "routing_key": st.one_of(st.just(KEY), texts, values),
    "event_action": st.one_of(st.sampled_from(["trigger", "acknowledge", "resolve"]), values),
    "dedup_key": st.one_of(texts, values),
    "client": st.one_of(texts, values),
    "client_url": st.one_of(texts, values),
}
PAYLOAD = {
    "summary": st.one_of(texts, values),
    "source": st.one_of(texts, values),
    "severity": st.one_of(st.sampled_from(["critical", "warning", "error", "info"]), values),
    "timestamp": st.one_of(times, values),
    "component": st.one_of(texts, values),
    "group": values,
    "class": values,
    "custom_details": values,
    SECRET: values,
}
items = st.fixed_dictionaries(
    {}, optional={name: st.one_of(texts, values) for name in ("src", "href", "text", "alt")}
)
lists = st.one_of(st.lists(st.one_of(items, values), max_size=52), values)
WHOLE = {
    "routing_key": KEY,
    "event_action": "trigger",
    "payload": {"summary": SECRET, "source": SECRET, "severity": "info"},
}


@st.composite
def changed(draw: st.DrawFn, whole: dict[str, Any], fields: dict[str, Any]) -> Any:
    """Take what is accepted, and change or leave out a few members."""
    names = draw(st.lists(st.sampled_from([*fields]), max_size=3, unique=True))
    made = {**whole, **{name: draw(fields[name]) for name in names}}
    for name in draw(st.lists(st.sampled_from([*made]), max_size=1)):
        if draw(st.integers(0, 3)) == 0:
            del made[name]
    return made


payloads = changed(WHOLE["payload"], PAYLOAD)  # type: ignore[arg-type]
events = changed(
    WHOLE,
    {**FIELDS, "payload": payloads, "images": lists, "links": lists, SECRET: values},
)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """Take the body of a case, and cut, double or change some of it."""
    path = draw(st.sampled_from([*ACCEPTED, *REFUSED]))
    body = path.read_bytes() if path.is_file() else Request(path).body
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(body)))
        end = at + draw(st.integers(0, 20))
        change = draw(st.one_of(st.binary(max_size=4), st.just(body[at:end] * 2)))
        body = body[:at] + change + body[end:]
    return body


def encoded(event: Any) -> bytes:
    return json.dumps(event, ensure_ascii=False).encode(errors="surrogatepass")


bodies = st.one_of(events.map(encoded), events.map(encoded), values.map(encoded), mutated())


# Counts of inputs by kind and answer, shown by `make chaos`.
Tally = Counter[str]


@pytest.fixture(scope="module")
def tally() -> Iterator[Tally]:
    tally = Tally()
    yield tally
    for outcome, count in sorted(tally.items()):
        print(f"\n{count:>8} {outcome}", end="")


def judge(body: bytes, change: bool) -> str:
    """Parse a body; whatever it is, an event comes back or it is refused."""
    refusal = None
    try:
        event = parse(body, change=change)
    except InvalidEvent as error:
        refusal = error
    if refusal:
        assert refusal.errors
        assert len(set(refusal.errors)) == len(refusal.codes)
        assert SECRET not in f"{refusal}{refusal.codes}"
        return "refused"
    line = json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode()
    assert json.loads(line) == event
    assert b"\n" not in line
    assert ("event_action" in event) != change
    return "accepted"


@many
@given(body=st.binary(max_size=200))
def test_any_bytes_are_an_event_or_refused(tally: Tally, body: bytes) -> None:
    tally[f"bytes, parsed: {judge(body, change=False)}"] += 1


@many
@given(body=bodies, change=st.booleans())
def test_any_event_is_an_event_or_refused(tally: Tally, body: bytes, change: bool) -> None:
    tally[f"events, parsed: {judge(body, change)}"] += 1


@many
@given(event=events, change=st.booleans())
def test_parse_and_the_schema_alone_agree(tally: Tally, event: Any, change: bool) -> None:
    body = encoded(event)
    try:
        json.loads(body, parse_constant=lambda name: 1 / 0)
        body.decode()
    except (ValueError, ZeroDivisionError):
        return  # what is no JSON is not for the schema to judge
    schema = Draft202012Validator(SCHEMAS["change" if change else "alert"])
    verdict = schema.is_valid(json.loads(body))
    assert (judge(body, change) == "accepted") == verdict
    tally[f"events, schema alone: {'accepted' if verdict else 'refused'}"] += 1


class Talk:
    """One connection to the service, opened again when it is closed."""

    def __init__(self, port: int):
        self.address = ("127.0.0.1", port)
        self.accepted = 0
        self.unsure = 0

    def exchange(self, pieces: list[bytes]) -> list[tuple[int, bytes, bytes]]:
        """Send pieces of bytes, and return each answer as status, head and body."""
        with socket.create_connection(self.address, timeout=20) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            text = b""
            try:
                for piece in pieces:
                    connection.sendall(piece)
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_WR)
                while chunk := connection.recv(65_536):
                    text += chunk
            except ConnectionError:  # closed while we were sending: an answer may be lost
                self.unsure += 3
        answers = []
        while text:
            head, _, text = text.partition(b"\r\n\r\n")
            if head.startswith(b"HTTP/1.1 100 "):
                continue
            size = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            answers.append((int(head[9:12]), head, text[:size]))
            text = text[size:]
        return answers

    def check(self, answers: list[tuple[int, bytes, bytes]]) -> str:
        statuses = []
        for status, head, body in answers:
            assert status < 500 or status == 501, (head, body)  # 501: a foreign transfer coding
            if b"application/json" in head:
                answer = json.loads(body)
                assert set(answer) - {"dedup_key"} <= {"status", "message", "errors"}
                if status == 202:
                    self.accepted += 1
                else:
                    assert all(isinstance(error, str) for error in answer["errors"])
                    assert SECRET.encode() not in body
            else:
                assert head.split(b"\r\n")[0][9:12] in (b"400", b"414", b"417", b"431", b"501")
            statuses.append(str(status))
        return " ".join(statuses) or "no answer"


@pytest.fixture(scope="module")
def talk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Talk]:
    service = Service(tmp_path_factory.mktemp("machine"))
    talk = Talk(service.port)
    yield talk
    # Not a line but for a 202, and no value that was sent in the log.
    wait_for(lambda: service.stdout.count(b"\n") >= talk.accepted)
    assert talk.accepted <= len(service.lines) <= talk.accepted + talk.unsure
    assert service.stop() == 0
    assert "Traceback" not in service.log
    assert SECRET not in service.log


PATHS = st.sampled_from(["/v2/enqueue", "/v2/enqueue/", "/v2/change/enqueue", "/v2/x", "//v2"])


@many
@given(body=bodies, path=PATHS, chunked=st.booleans())
def test_any_event_over_http_is_answered(
    talk: Talk, tally: Tally, body: bytes, path: str, chunked: bool
) -> None:
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\n".encode()
    if chunked:
        parts = [body[i : i + 500] for i in range(0, len(body), 500)]
        body = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"
        head += b"Transfer-Encoding: chunked\r\n\r\n"
    else:
        head += b"Content-Length: %d\r\n\r\n" % len(body)
    answers = talk.exchange([head + body])
    assert len(answers) == 1
    tally[f"events over HTTP: {talk.check(answers)}"] += 1


@st.composite
def raw_requests(draw: st.DrawFn) -> list[bytes]:
    """Make requests that are wrong in their framing, in pieces of any size."""
    text = b""
    for _ in range(draw(st.integers(1, 3))):
        body = draw(st.one_of(events.map(encoded), st.binary(max_size=50)))
        method = draw(st.sampled_from(["POST", "POST", "POST", "GET", "PUT", "post", "P@ST", ""]))
        version = draw(st.sampled_from(["1.1", "1.1", "1.1", "1.0", "0.9", "2.0", "x"]))
        text += f"{method} {draw(PATHS)} HTTP/{version}\r\n".encode()
        for _ in range(draw(st.integers(0, 3))):
            text += draw(
                st.sampled_from(
                    [
                        *(b"Host: a\r\n", b"Host : a\r\n", b"X\r\n", b" folded: a\r\n", b": \r\n"),
                        *(b"Connection: close\r\n", b"Content-Encoding: gzip\r\n", b"A: b\n"),
                        *(b"Expect: 100-continue\r\n", b"X-Routing-Key: \xff\x00\r\n"),
                        *(b"SCRIPT_NAME: /x\r\n", b"X-Routing-Key: S3CR3T\r\n"),
                    ]
                )
            )
        framing = draw(st.integers(0, 5))
        length = max(0, len(body) + draw(st.sampled_from([0, 0, 0, -1, 1, 1000])))
        if framing < 3:
            text += b"Content-Length: %d\r\n" % length
        if framing in (2, 3, 4):
            text += b"Transfer-Encoding: chunked\r\n"
            size = draw(st.sampled_from([b"%x" % length, b"%X;a=b" % length, b"-1", b"G", b"0x5"]))
            end = draw(
                st.sampled_from([b"\r\n0\r\n\r\n", b"\r\n0\r\nA: b\r\n\r\n", b"\n0\n\n", b""])
            )
            body = size + b"\r\n" + body + end
        text += b"\r\n" + body
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=5)))
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@many
@given(pieces=raw_requests())
def test_any_bytes_over_http_are_answered_or_the_connection_is_closed(
    talk: Talk, tally: Tally, pieces: list[bytes]
) -> None:
    tally[f"raw HTTP: {talk.check(talk.exchange(pieces))}"] += 1
