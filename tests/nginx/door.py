"""A real nginx with the configuration that `delineate serve` and `delineate edge` make, and ways to talk to it.

Door       nginx as a child; when it ends its log must have had nothing but lines of the access log
Upstream   what stands behind it where a test has to see, or say, what a real API or store never would
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp

from delineate.config import Config
from delineate.nginx import Machine, Store, check, command, render
from tests.api.running import Reply, changed
from tests.proxies.fronts import find
from tests.servers import ServerProcess, wait_until

TEMPLATE = Path(__file__).resolve().parent.parent.parent / "nginx.conf"
CA_FILE = "/etc/ssl/certs/ca-certificates.crt"
CLIENT = "127.0.0.1"


@dataclass
class Door:
    port: int
    internal_port: int
    tls_port: int
    folder: Path
    server: ServerProcess

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @asynccontextmanager
    async def client(self, address: str = CLIENT, port: int | None = None) -> AsyncIterator[aiohttp.ClientSession]:
        """A client without cookies, which calls from `address` and takes gzip."""
        connector = aiohttp.TCPConnector(local_addr=(address, 0))
        async with aiohttp.ClientSession(
            f"http://127.0.0.1:{port or self.port}", cookie_jar=aiohttp.DummyCookieJar(), connector=connector
        ) as session:
            yield session

    async def ask(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        *,
        address: str = CLIENT,
        port: int | None = None,
        **headers: str,
    ) -> Reply:
        """One request on a connection of its own; `headers` with _ for -."""
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        async with (
            self.client(address, port) as client,
            client.request(method, path, data=body, headers=sent, allow_redirects=False) as answer,
        ):
            return Reply(answer.status, answer.headers, await answer.text())

    async def raw(self, request: bytes, seconds: float = 10, address: str = CLIENT) -> RawReply:
        """Everything that comes for exactly these bytes, until nginx closes."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, local_addr=(address, 0))
        writer.write(request)
        data = b""
        try:
            async with asyncio.timeout(seconds):
                while piece := await reader.read(65536):
                    data += piece
        except ConnectionResetError:
            pass
        finally:
            writer.close()
        return RawReply.parse(data)

    def log(self) -> list[dict[str, Any]]:
        """The access log, parsed."""
        return [json.loads(line) for line in self.server.log.read_bytes().splitlines() if line.startswith(b"{")]

    def logged(self, request_id: str) -> dict[str, Any]:
        """The line of one request, which is written when its answer has been."""
        found: list[dict[str, Any]] = []

        def there() -> bool:
            found[:] = [line for line in self.log() if line["requestId"] == request_id]
            return bool(found)

        wait_until(there, f"a line about {request_id}")
        (line,) = found
        return line

    def errors(self) -> list[str]:
        lines = self.server.log.read_text("utf-8", "replace").splitlines()
        return [line for line in lines if line and not line.startswith("{")]


class RawReply(NamedTuple):
    """`headers` are pairs, so that one which comes twice is seen."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes

    @classmethod
    def parse(cls, data: bytes) -> RawReply:
        if not data.startswith(b"HTTP/1.1 "):  # nothing, or the answer to a request of HTTP/0.9, which is a body alone
            return cls(0, (), data)
        head, _, body = data.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        pairs = tuple((name.lower(), value) for name, _, value in (line.partition(": ") for line in lines))
        return cls(int(first.split()[1]), pairs, body)

    def all(self, name: str) -> list[str]:
        return [value for key, value in self.headers if key == name]

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def store_of(config: Config) -> Store:
    return Store(url=f"{config.storage.endpoint_url}/{config.storage.archive_bucket}", ca_file=CA_FILE)


def rendered(
    config: Config, folder: Path, *, store: Store | None = None, edge: bool = False, machine: Machine | None = None
) -> str:
    find("nginx")
    template = TEMPLATE.read_text()
    return render(template, config, store or store_of(config), folder, machine or Machine.look(), edge=edge)


def steady_port() -> int:
    """One that Linux gives to no outgoing connection: nginx could not listen there on every address any more."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind(("", port))
                return port


def with_ports(config: Config, **keys: Any) -> Config:
    ports = {name: steady_port() for name in ("http_port", "https_port", "internal_port")}
    return changed(config, "nginx", **{**ports, "processes": 1, "certificate": "/none", **keys})


@contextmanager
def door(
    config: Config,
    folder: Path,
    *,
    api: int | None = None,
    store: Store | None = None,
    edge: bool = False,
    machine: Machine | None = None,
    changes: Mapping[str, str] | None = None,
    environ: Mapping[str, str] | None = None,
    **keys: Any,
) -> Iterator[Door]:
    """nginx in front of the API at port `api`; `keys` are of the section nginx.

    `changes` replaces words of the rendered file: waits that no user would see to their end.
    """
    folder.mkdir(exist_ok=True)
    config = with_ports(config, **keys)
    if api is not None:
        config = changed(config, "api", port=api)
    text = rendered(config, folder, store=store, edge=edge, machine=machine)
    for old, new in (changes or {}).items():
        assert old in text, old
        text = text.replace(old, new)
    conf = folder / "nginx.conf"
    conf.write_text(text)
    check(conf)
    nginx = config.nginx
    server = ServerProcess([*command(conf), "-g", "daemon off;"], nginx.http_port, folder / "log", environ)
    started = Door(nginx.http_port, nginx.internal_port, nginx.https_port, folder, server)
    server.start()
    try:
        yield started
    finally:
        server.stop()
    assert started.errors() == [], "\n".join(started.errors())


class Seen(NamedTuple):
    """A request as it came to an Upstream."""

    connection: int
    line: str
    headers: tuple[tuple[str, str], ...]
    body: bytes

    def all(self, name: str) -> list[str]:
        return [value for key, value in self.headers if key == name]


Answering = Callable[[Seen], Awaitable[bytes | None]]


def answer(body: bytes = b"{}", status: int = 200, *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status} X", "Content-Type: application/json", *headers, f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, "", ""]).encode() + body


async def always_fine(_: Seen) -> bytes:
    return answer()


class Upstream:
    """`answering` makes the bytes of each answer; None closes the connection without one."""

    def __init__(
        self,
        answering: Answering = always_fine,
        *,
        address: str = "127.0.0.1",
        port: int = 0,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.answering, self.address, self.port, self.tls = answering, address, port, tls
        self.seen: list[Seen] = []
        self.connections = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Upstream:
        self._server = await asyncio.start_server(self._serve, self.address, self.port, ssl=self.tls)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        number = self.connections
        try:
            while (request := await self._read(reader, number)) is not None:
                self.seen.append(request)
                told = await self.answering(request)
                if told is None:
                    break
                writer.write(told)
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the client left, or the test is over
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _read(self, reader: asyncio.StreamReader, number: int) -> Seen | None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            return None
        line, *rest = head.decode("latin-1").rstrip("\r\n").split("\r\n")
        headers = tuple((name.lower(), value) for name, _, value in (text.partition(": ") for text in rest))
        length = int(dict(headers).get("content-length", "0"))
        return Seen(number, line, headers, await reader.readexactly(length))


class Dns(asyncio.DatagramProtocol):
    """A DNS server that knows one thing: which IPv4 addresses every name has."""

    def __init__(self, *addresses: str) -> None:
        self.addresses = list(addresses)

    async def __aenter__(self) -> Dns:
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_datagram_endpoint(lambda: self, ("127.0.0.1", 0))
        self._transport = transport
        self.port: int = transport.get_extra_info("sockname")[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._transport.close()

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        end = data.index(b"\0", 12) + 5
        asked = data[12:end]
        found = self.addresses if asked[-4:-2] == b"\0\1" else []
        records = b"".join(
            b"\xc0\x0c\0\1\0\1\0\0\0\1\0\4" + socket.inet_aton(address) for address in found
        )  # a name, type A, class IN, one second to live
        head = data[:2] + b"\x81\x80\0\1" + len(found).to_bytes(2, "big") + b"\0\0\0\0"
        self._transport.sendto(head + asked + records, addr)


@contextmanager
def black_hole(address: str, port: int) -> Iterator[None]:
    """A port that answers nothing, not even with a refusal: Linux throws away what comes to a full queue."""
    with contextlib.ExitStack() as sockets:
        listener = sockets.enter_context(socket.socket())
        listener.bind((address, port))
        listener.listen(0)
        for _ in range(3):
            waiting = sockets.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex((address, port))
        yield
