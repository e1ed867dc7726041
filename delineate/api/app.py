"""The API process: its routes, its life from the first socket to the last open stream.

serve           listen, open Redis and S3, serve until SIGTERM or SIGINT, drain
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
from typing import cast

from tornado.http1connection import HTTP1Connection
from tornado.httpserver import HTTPServer
from tornado.httputil import HTTPConnection, HTTPMessageDelegate, HTTPServerConnectionDelegate
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
from delineate.storage import Storage, open_storage
from delineate.telemetry.metrics import check_metrics

_log = logging.getLogger(__name__)

ROUTES = [*exports.ROUTES, *downloads.ROUTES, *events.ROUTES, *health.ROUTES, *pages.ROUTES]
BACKLOG = 1024
# How often a Redis that is away at the start is tried again, until its settings have been looked at.
CHECK_SECONDS = 1.0
# Tornado's own limit is out of the way: exchange.py has the one that answers in JSON.
_UNLIMITED = 1 << 62
_ALLOWED_HEADERS = "Content-Type, Idempotency-Key, If-None-Match, Last-Event-ID, X-Request-ID"
_SHOWN_HEADERS = (
    "ETag, Location, Retry-After, X-Request-ID, RateLimit-Limit, RateLimit-Remaining, RateLimit-Reset, "
    "Idempotency-Replayed"
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
        self.cors_origins = frozenset(config.api.cors_origins)
        self._tasks: set[asyncio.Task[None]] = set()

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

    async def drain(self) -> None:
        """End streams at once, and give open requests until api.drain_timeout."""
        self.services.draining.set()
        self.services.feeds.wake_all()
        self.services.streams.end_all()
        loop = asyncio.get_running_loop()
        end = loop.time() + self.services.config.api.drain_timeout
        # Again and again: a connection that is kept alive may begin another request meanwhile.
        while self._tasks and (left := end - loop.time()) > 0:
            await asyncio.wait(self._tasks, timeout=left)
        late = tuple(self._tasks)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
        # A stream that was being opened when the others ended.
        self.services.streams.end_all()


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
async def listening(api: Api, sockets: list[socket.socket]) -> AsyncIterator[None]:
    """Serve on `sockets`; the end of the block is the drain."""
    config = api.services.config.api
    server = HTTPServer(
        api,
        idle_connection_timeout=config.idle_timeout,
        body_timeout=config.request_timeout,
        max_body_size=_UNLIMITED,
        chunk_size=65536,
    )
    server.add_sockets(sockets)
    try:
        yield
    finally:
        server.stop()
        server.conn_params.no_keep_alive = True
        await api.drain()
        # Only idle connections are left; a client of a proxy never sees these.
        await server.close_all_connections()


def listen(config: ApiConfig) -> list[socket.socket]:
    """Sockets on api.host:port that several processes of delineate may share.

    Raises StartupError if another program has the port, or it may not be used.
    """
    try:
        return bind_sockets(config.port, config.host, backlog=BACKLOG, reuse_port=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise StartupError(f"cannot listen on api.host {config.host}, api.port {config.port}: {reason}") from error


async def _check_redis(queue: Queue) -> None:
    """Look at Redis as soon as it is there; until then POST answers 503. Raises StartupError."""
    while True:
        with suppress(QueueUnavailable):
            return await queue.check_server()
        await asyncio.sleep(CHECK_SECONDS)


async def serve(config: Config) -> None:
    """Answer requests until SIGTERM or SIGINT; with Redis or S3 away it answers 503 and recovers by itself.

    Raises StartupError for what an operator has to change.
    """
    check_metrics(config.telemetry)
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
        checking = asyncio.create_task(_check_redis(queue))
        stopping = asyncio.create_task(stop.wait())
        _log.info("serving", extra={"context": {"host": config.api.host, "port": config.api.port}})
        try:
            await asyncio.wait({checking, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if checking.done():
                checking.result()
            await stopping
        finally:
            checking.cancel()
            stopping.cancel()
            await asyncio.gather(checking, stopping, return_exceptions=True)
        _log.info("draining", extra={"context": {"streams": len(api.services.streams)}})
    _log.info("stopped")
