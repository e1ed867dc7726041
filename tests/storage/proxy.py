"""An HTTP proxy that fails on demand: it cuts, resets, stalls, loses or replaces the answers of a real S3 server.

Each connection carries one request. A fault is an async function of the
Exchange; `FaultyProxy.fail` queues faults for the next requests of a method.
"""

from __future__ import annotations

import asyncio
import re
import socket
import struct
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import NamedTuple


class Answer(NamedTuple):
    head: bytes
    body: bytes


class Exchange:
    """One request on its way: `forward` asks the real server, `send` answers the client."""

    def __init__(self, head: bytes, body: bytes, upstream: int, writer: asyncio.StreamWriter) -> None:
        self.head, self.body = head, body
        self.method, self.target, _ = head.split(b"\r\n")[0].decode().split(" ")
        self._upstream = upstream
        self._writer = writer

    @property
    def operation(self) -> str:
        """S3's name of what is asked for."""
        query = self.target.partition("?")[2]
        kind = next((name for name in ("partNumber", "uploadId", "uploads") if name in query), "")
        return {
            ("PUT", "partNumber"): "UploadPart",
            ("PUT", ""): "PutObject",
            ("GET", ""): "GetObject",
            ("GET", "uploadId"): "ListParts",
            ("GET", "uploads"): "ListMultipartUploads",
            ("POST", "uploads"): "CreateMultipartUpload",
            ("POST", "uploadId"): "CompleteMultipartUpload",
            ("DELETE", "uploadId"): "AbortMultipartUpload",
        }.get((self.method, kind), self.method)

    def header(self, name: str) -> str | None:
        match = re.search(rf"\r\n{name}: *([^\r]*)".encode(), self.head, re.IGNORECASE)
        return match[1].decode() if match else None

    async def forward(self) -> Answer:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._upstream)
        try:
            writer.write(self.head.replace(b"\r\n", b"\r\nConnection: close\r\n", 1) + self.body)
            await writer.drain()
            head, _, body = (await reader.read(-1)).partition(b"\r\n\r\n")
            return Answer(head + b"\r\n\r\n", body)
        finally:
            writer.close()

    async def send(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    def reset(self) -> None:
        """End the connection with RST, as a crashed server or a firewall does."""
        sock = self._writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()


Fault = Callable[[Exchange], Awaitable[None]]


async def passes(exchange: Exchange) -> None:
    answer = await exchange.forward()
    await exchange.send(answer.head + answer.body)


def answers(status: int, code: str = "") -> Fault:
    """The server itself refuses; the request never reaches the real one."""

    async def fault(exchange: Exchange) -> None:
        body = f"<Error><Code>{code}</Code></Error>".encode() if code and exchange.method != "HEAD" else b""
        await exchange.send(
            f"HTTP/1.1 {status} X\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
        )

    return fault


def cuts(after: int, reset: bool = False) -> Fault:
    """The connection ends `after` bytes of the body."""

    async def fault(exchange: Exchange) -> None:
        answer = await exchange.forward()
        await exchange.send(answer.head + answer.body[:after])
        if reset:
            await asyncio.sleep(0.05)  # RST overtakes data: let the client read what came before it
            exchange.reset()

    return fault


def loses(then: Fault | None = None) -> Fault:
    """The real server does its work, but the client hears of nothing, or of `then`."""

    async def fault(exchange: Exchange) -> None:
        await exchange.forward()
        if then is None:
            exchange.reset()
        else:
            await then(exchange)

    return fault


async def stalls(exchange: Exchange) -> None:
    await asyncio.sleep(60)


def rewrites(pattern: bytes, replacement: bytes) -> Fault:
    """The head of the real answer, changed."""

    async def fault(exchange: Exchange) -> None:
        answer = await exchange.forward()
        head, count = re.subn(pattern, replacement, answer.head, flags=re.IGNORECASE)
        assert count, f"{pattern!r} is not in {answer.head!r}"
        await exchange.send(head + answer.body)

    return fault


class FaultyProxy:
    """`requests` is every Exchange seen so far. `kind` is a method, or the name of an S3 operation."""

    def __init__(self, upstream: int) -> None:
        self._upstream = upstream
        self._faults: list[tuple[str, Fault]] = []
        self._standing: list[tuple[Callable[[Exchange], bool], Fault]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self.requests: list[Exchange] = []

    def fail(self, kind: str, *faults: Fault) -> None:
        """Let the next requests of `kind` meet `faults`, one each; later ones pass."""
        self._faults += [(kind, fault) for fault in faults]

    def fail_while(self, applies: Callable[[Exchange], bool], fault: Fault) -> None:
        """Let every request that `applies` says so of meet `fault`, until `heal`."""
        self._standing.append((applies, fault))

    def heal(self) -> None:
        self._faults.clear()
        self._standing.clear()

    def seen(self, kind: str) -> list[Exchange]:
        return [exchange for exchange in self.requests if kind in (exchange.method, exchange.operation)]

    async def __aenter__(self) -> FaultyProxy:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"content-length: *(\d+)", head, re.IGNORECASE)
            body = await reader.readexactly(int(length[1])) if length else b""
            # Connection: close, so that the client does not send a second request here.
            exchange = Exchange(head, body, self._upstream, writer)
            self.requests.append(exchange)
            await self._fault_for(exchange)(exchange)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client left, which is its right
        finally:
            self._tasks.discard(task)
            writer.close()

    def _fault_for(self, exchange: Exchange) -> Fault:
        for index, (wanted, fault) in enumerate(self._faults):
            if wanted in (exchange.method, exchange.operation):
                del self._faults[index]
                return fault
        return next((fault for applies, fault in self._standing if applies(exchange)), passes)
