"""Clients that mean harm: `hostile.py KIND COUNT SECONDS PORT` keeps so many of them busy.

They come from an address of their own. Whoever is cut off comes again. Prints how long they
lasted, as JSON.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import time
from collections.abc import Awaitable, Callable

from conftest import trigger

ADDRESS = "127.0.0.2"
IP_BIND_ADDRESS_NO_PORT = 24  # Linux; Python names it from 3.12 on
HEAD = b"POST /v2/enqueue HTTP/1.1\r\nHost: a\r\n"
EVENT = json.dumps(trigger()).encode()
REQUEST = HEAD + b"Content-Length: %d\r\n\r\n%s" % (len(EVENT), EVENT)
BIG = 524_288
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def until_cut(reader: asyncio.StreamReader) -> None:
    while await reader.read(65_536):
        pass


async def dribble(writer: asyncio.StreamWriter, text: bytes, size: int, pause: float) -> None:
    for start in range(0, len(text), size):
        writer.write(text[start : start + size])
        await writer.drain()
        await asyncio.sleep(pause)


async def silent_connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await until_cut(reader)


async def dribbled_header(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await dribble(writer, HEAD + b"X-Filler: " + b"x" * 1000, 1, 0.5)


async def dribbled_body(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(HEAD + b"Content-Length: 1000\r\n\r\n")
    await dribble(writer, b" " * 1000, 1, 0.5)


async def bad_request_left_open(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    writer.write(b"NONSENSE\r\n\r\n")
    await until_cut(reader)


async def half_closed(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(HEAD + b"Content-Length: 1000\r\n\r\n{")
    writer.write_eof()
    await until_cut(reader)


async def answers_never_read(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while True:
        writer.write(REQUEST * 20)
        await writer.drain()
        await asyncio.sleep(0)  # drain does not yield while the kernel takes all of it


async def trickled_512_kb(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(HEAD + b"Content-Length: %d\r\n\r\n" % BIG)
    await dribble(writer, b" " * BIG, BIG // 40, 0.5)


async def mistakes_512_kb(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    body = json.dumps(trigger(links=["?"])).encode()
    body = body.replace(b'"?"', b",".join([b"{}"] * ((BIG - len(body)) // 3)))
    while True:
        writer.write(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        await writer.drain()
        await reader.readuntil(b"}\n")


KINDS: dict[str, Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]] = {
    kind.__name__: kind
    for kind in (
        *(silent_connection, dribbled_header, dribbled_body, bad_request_left_open),
        *(half_closed, answers_never_read, trickled_512_kb, mistakes_512_kb),
    )
}


async def connect(port: int, limit: int) -> Connection:
    """Connect from our own address; its port is chosen late, since early is slow among many."""
    connection = socket.socket()
    connection.setblocking(False)
    connection.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
    connection.bind((ADDRESS, 0))
    await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", port))
    return await asyncio.open_connection(sock=connection, limit=limit)


async def attack(kind: str, count: int, seconds: float, port: int) -> dict[str, float]:
    lasted: list[float] = []

    async def client() -> None:
        while True:
            began = time.monotonic()
            try:
                limit = 4096 if kind == "answers_never_read" else 65_536
                reader, writer = await connect(port, limit)
            except OSError:
                await asyncio.sleep(0.1)
                continue
            try:
                await KINDS[kind](reader, writer)
            except (OSError, asyncio.IncompleteReadError):
                pass
            finally:
                writer.close()
            lasted.append(time.monotonic() - began)
            await asyncio.sleep(0.1)

    clients = [asyncio.create_task(client()) for _ in range(count)]
    await asyncio.sleep(seconds)
    for each in clients:
        each.cancel()
    await asyncio.gather(*clients, return_exceptions=True)
    lasted.sort()
    if not lasted:
        return {"cut": 0}
    return {"cut": len(lasted), "median": lasted[len(lasted) // 2], "longest": lasted[-1]}


if __name__ == "__main__":
    name, number, period, target = sys.argv[1:]
    print(json.dumps(asyncio.run(attack(name, int(number), float(period), int(target)))))
