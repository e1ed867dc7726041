"""The API process: its routes, its life from the first socket to the last open stream.

serve           listen, open Redis and S3, serve until SIGTERM or SIGINT, drain
listening       the sockets' life: serve, linger, close
make_app        the same routes on clients that the caller owns; tests use it
Api             what Tornado's HTTPServer calls for every request
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn, cast

from tornado.http1connection import HTTP1Connection
from tornado.httpserver import HTTPServer
from tornado.httputil import HTTPConnection, HTTPMessageDelegate, HTTPServerConnectionDelegate
from tornado.iostream import IOStream
from tornado.netutil import bind_sockets

from delineate.api import downloads, events, exports, health, pages
from delineate.api.auth import make_caller
from delineate.api.events import Streams
from delineate.api.exchange import Exchange
from delineate.api.feeds import Feeds
from delineate.api.handler import Request, Services
from delineate.api.health import Checks
from delineate.api.limits import Limiter
from delineate.api.links import Links
from delineate.api.routing import Table
from delineate.config import ApiConfig, Config
from delineate.errors import QueueUnavailable, StartupError
from delineate.queue import Queue, open_queue
from delineate.queue.progress import JobEvents, open_job_events
from delineate.ready import ready
from delineate.storage import Storage, open_storage
from delineate.supervision import handed_over
from delineate.telemetry.metrics import expect_requests
from delineate.telemetry.tracing import Sampler

_log = logging.getLogger(__name__)

ROUTES = [*exports.ROUTES, *downloads.ROUTES, *events.ROUTES, *health.ROUTES, *pages.ROUTES]
BACKLOG = 1024  # of own sockets; supervisord.conf has the same for the one it hands over
READY_SECONDS = 0.5
# Tornado's own limit is out of the way: exchange.py has the one that answers in JSON.
_UNLIMITED = 1 << 62
_ALLOWED_HEADERS = "Content-Type, Idempotency-Key, If-None-Match, Last-Event-ID, X-Request-ID, traceparent"
_SHOWN_HEADERS = (
    "ETag, Location, Retry-After, X-Request-ID, RateLimit-Limit, RateLimit-Remaining, RateLimit-Reset, "
    "Idempotency-Replayed, traceresponse"
)


class Api(HTTPServerConnectionDelegate):
    """The application. `run` must be running while it serves; `drain` ends what is open."""

    def __init__(self, services: Services) -> None:
        config = services.config
        self.services = services
        self.table = Table(ROUTES)
        self.caller = make_caller(config.api.trusted_proxies)
        self.max_body_bytes = config.api.max_body_bytes
        self.request_timeout = config.api.request_timeout
        self.sampler = Sampler(config.telemetry.traces)
        self.cors_origins = frozenset(config.api.cors_origins)
        self._tasks: set[asyncio.Task[None]] = set()
        for route in ROUTES:
            expect_requests(route.method, route.path, (200, 500, 503, 504, *((429,) if route.counted else ())))

    @property
    def closing(self) -> bool:
        """Whether connections are to end with their present request."""
        return self.services.draining.is_set()

    def start_request(self, server_conn: object, request_conn: HTTPConnection) -> HTTPMessageDelegate:
        return Exchange(self, cast(HTTP1Connection, request_conn))

    def on_close(self, server_conn: object) -> None:
        """Nothing is kept for a connection; streams notice by themselves."""

    def own(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        """Run a request's work; `drain` waits for it."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("an answer could not be written", exc_info=error)

    def cors_lines(self, request: Request) -> bytes:
        """Only for origins from the configuration; the others get nothing, which browsers take for a no."""
        origin = request.headers.get("Origin", "")
        lines = "Vary: Origin\r\n"
        if origin in self.cors_origins or (origin and "*" in self.cors_origins):
            # "*" is for anonymous use: a browser sends cookies only where the origin was named.
            named = origin in self.cors_origins
            lines += f"Access-Control-Allow-Origin: {origin if named else '*'}\r\n"
            lines += "Access-Control-Allow-Credentials: true\r\n" if named else ""
            lines += f"Access-Control-Expose-Headers: {_SHOWN_HEADERS}\r\n"
            if request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers:
                lines += "Access-Control-Allow-Methods: GET, HEAD, POST, DELETE\r\n"
                lines += f"Access-Control-Allow-Headers: {_ALLOWED_HEADERS}\r\nAccess-Control-Max-Age: 600\r\n"
        return lines.encode("latin-1")

    async def drain(self, server: Server) -> None:
        """End streams at once; give open requests and idle connections until api.drain_timeout.

        A client may send its next request on an idle connection while we decide to
        close it, and would then get a reset for an answer. So idle connections
        stay: what comes is answered with `Connection: close`, and who has not
        come until the end of the timeout is closed without a word.
        """
        self.services.draining.set()
        self.services.feeds.wake_all()
        self.services.streams.end_all()
        with suppress(TimeoutError):
            async with asyncio.timeout(self.services.config.api.drain_timeout):
                await server.unused.wait()
                # Work whose connection is gone, or was taken over for a stream.
                while self._tasks:
                    await asyncio.wait(self._tasks)
        late = tuple(self._tasks)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
        # A stream that was being opened when the others ended.
        self.services.streams.end_all()
        await server.close_all_connections()


class Server(HTTPServer):
    """Tornado's server, which also tells when it has no connections; streams, which left it, do not count."""

    def initialize(self, *args: Any, **kwargs: Any) -> None:
        super().initialize(*args, **kwargs)
        self.unused = asyncio.Event()
        self.unused.set()

    def handle_stream(self, stream: IOStream, address: tuple[Any, ...]) -> None:
        self.unused.clear()
        super().handle_stream(stream, address)

    def on_close(self, server_conn: object) -> None:
        super().on_close(server_conn)
        if not self._connections:
            self.unused.set()


@asynccontextmanager
async def make_app(config: Config, queue: Queue, storage: Storage, job_events: JobEvents) -> AsyncIterator[Api]:
    """The application on clients that the caller owns; its timers and readings end with the block."""
    links = Links(storage, config.storage.link_lifetime)
    feeds = Feeds(queue, job_events, links)
    streams = Streams(config.sse)
    services = Services(
        config=config,
        queue=queue,
        storage=storage,
        links=links,
        feeds=feeds,
        streams=streams,
        limiter=Limiter(config.rate_limit, queue),
        checks=Checks(queue, storage),
        draining=asyncio.Event(),
    )
    api = Api(services)
    heartbeats = asyncio.create_task(streams.run(), name="heartbeats")
    try:
        yield api
    finally:
        heartbeats.cancel()
        await asyncio.gather(heartbeats, return_exceptions=True)
        await feeds.aclose()


@asynccontextmanager
async def listening(api: Api, sockets: list[socket.socket]) -> AsyncIterator[Server]:
    """Serve on `sockets`; the end of the block is the drain.

    The sockets are closed at once. One that supervisord holds goes on to take
    connections for the other processes.
    """
    config = api.services.config.api
    server = Server(
        api,
        idle_connection_timeout=config.idle_timeout,
        body_timeout=config.request_timeout,
        max_body_size=_UNLIMITED,
        chunk_size=65536,
    )
    server.add_sockets(sockets)
    try:
        yield server
    finally:
        server.stop()
        server.conn_params.no_keep_alive = True
        await api.drain(server)


def listen(config: ApiConfig) -> list[socket.socket]:
    """The socket that supervisord hands to all API processes, else own ones on api.host:port.

    Raises StartupError if another program has the port, or it may not be used.
    """
    shared = handed_over()
    if shared is not None:
        port: int = shared.getsockname()[1]
        if port != config.port:
            _log.warning("api.port %d counts from the next start of the whole service: still on %d", config.port, port)
        return [shared]
    try:
        return bind_sockets(config.port, config.host, backlog=BACKLOG, reuse_port=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise StartupError(f"cannot listen on api.host {config.host}, api.port {config.port}: {reason}") from error


async def serve(config: Config, ready_file: Path | None = None) -> None:
    """Answer requests until SIGTERM or SIGINT; with Redis or S3 away it answers 503 and recovers by itself.

    `ready_file` appears once both have answered. Raises StartupError for what an operator has to change.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    sockets = listen(config.api)
    async with (
        open_queue(config) as queue,
        open_storage(config.storage, service="api") as storage,
        open_job_events(config) as job_events,
        make_app(config, queue, storage, job_events) as api,
        listening(api, sockets),
    ):
        _log.info("serving", extra={"context": {"host": config.api.host, "port": config.api.port}})
        announcing = asyncio.create_task(_announce(queue, Checks(queue, storage), ready_file))
        stopping = asyncio.create_task(stop.wait())
        try:
            # Announcing never ends, but for an error.
            await asyncio.wait({announcing, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if announcing.done():
                announcing.result()
        finally:
            announcing.cancel()
            stopping.cancel()
            await asyncio.gather(announcing, stopping, return_exceptions=True)
        _log.info("draining", extra={"context": {"streams": len(api.services.streams)}})
    _log.info("stopped")


async def _announce(queue: Queue, checks: Checks, ready_file: Path | None) -> NoReturn:
    """Say that this process works, once storage and Redis have answered: without them it is no good successor.

    Raises StartupError: a Redis that was away at the start is looked at as soon as it is there.
    """
    while True:
        with suppress(QueueUnavailable):  # then POST answers 503
            await queue.check_server()
            break
        await asyncio.sleep(READY_SECONDS)
    # `checks` are its own: those of /health would remember for a second that there were no workers yet.
    needed = {"storage": "ok", "redis": "ok"}.items()
    while not needed <= (await checks.look()).items():  # noqa: ASYNC110  # other machines' state has no event
        await asyncio.sleep(READY_SECONDS)
    with ready(ready_file):
        while True:
            await asyncio.Event().wait()
