"""Server-sent events: a job's present state at once, then every change, until it ends.

A stream is a socket and a few fields: no task, no queue. What it has not
been able to send is not kept; when its socket drains it gets the newest
state instead (each event is complete, so nothing is missed by skipping one).
One timer sends the heartbeats of all streams.
"""

from __future__ import annotations

import asyncio
import random
import socket
from typing import NoReturn

from tornado.iostream import IOStream, StreamClosedError

from delineate.api.feeds import Feed, Feeds
from delineate.api.handler import Answer, Request, Route
from delineate.config import SseConfig
from delineate.telemetry.metrics import ACTIVE_SSE_CONNECTIONS, SSE_ENDED, SSE_EVENT

HEARTBEAT = b": heartbeat\n\n"
# A stream whose socket has been full for so many heartbeats has a reader that is gone or asleep.
MAX_BLOCKED_HEARTBEATS = 2
# The heartbeats of thousands of streams are spread over so many moments.
SLICES = 10


class Streams:
    """Every open stream of the process; `run` is the timer, `end_all` is for the drain."""

    def __init__(self, config: SseConfig) -> None:
        self.config = config
        self._slices: list[set[EventStream]] = [set() for _ in range(SLICES)]
        self._next = 0

    def __len__(self) -> int:
        return sum(map(len, self._slices))

    async def run(self) -> NoReturn:
        turn = 0
        while True:
            await asyncio.sleep(self.config.heartbeat / SLICES)
            turn = (turn + 1) % SLICES
            for stream in tuple(self._slices[turn]):
                stream.beat()

    def end_all(self) -> None:
        """End every stream cleanly; its client comes back, to another process."""
        for some in self._slices:
            for stream in tuple(some):
                stream.end_with_retry("drain")

    def add(self, stream: EventStream) -> int:
        self._next = (self._next + 1) % SLICES
        self._slices[self._next].add(stream)
        ACTIVE_SSE_CONNECTIONS.inc()
        return self._next

    def remove(self, stream: EventStream, place: int, reason: str) -> None:
        SSE_ENDED[reason].inc()
        self._slices[place].discard(stream)
        ACTIVE_SSE_CONNECTIONS.dec()


class EventStream(Answer):
    """An answer that goes on. Either `start` or `abandon` is called once, right after it was made."""

    __slots__ = (
        "_blocked_since",
        "_ending",
        "_feed",
        "_feeds",
        "_place",
        "_reason",
        "_sent",
        "_stream",
        "_streams",
        "_timer",
    )
    _stream: IOStream

    def __init__(self, feeds: Feeds, feed: Feed, streams: Streams) -> None:
        super().__init__(
            content_type="text/event-stream",
            # no-transform: a proxy that compresses would collect events first. The third is for nginx.
            headers=(("Cache-Control", "no-cache, no-transform"), ("X-Accel-Buffering", "no")),
        )
        self._feeds, self._feed, self._streams = feeds, feed, streams
        self._sent = (-1, 0)
        self._blocked_since: float | None = None
        self._ending = False
        self._place = -1
        self._reason = "client_gone"  # unless we end it first
        self._timer: asyncio.TimerHandle | None = None

    def abandon(self) -> None:
        self._feeds.leave(self._feed)

    def start(self, stream: IOStream, head: bytes) -> None:
        """Send `head` and the present state in one write, and stay."""
        self._stream = stream
        config = self._streams.config
        self._place = self._streams.add(self)
        self._feed.watchers.add(self.show)
        stream.set_close_callback(self._closed)
        if stream.closed():
            self._closed()
            return
        # What a slow reader leaves unread waits in the kernel, and this bounds it; Linux doubles the number.
        stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, config.max_buffer_bytes // 2)
        stream.set_nodelay(True)
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(config.max_duration, self.end_with_retry, "max_duration")
        self._sent = self._feed.state
        self._write(b"%bretry: %d\n\n%b" % (head, config.retry * 1000, self._feed.frame))
        self._sent_frame()

    def show(self) -> None:
        """Send what the feed has, if it is newer and the socket can take it; else `_drained` does."""
        feed = self._feed
        if feed.gone:
            self.end_with_retry("job_gone")
        elif feed.state != self._sent and self._blocked_since is None and not self._ending:
            self._sent = feed.state
            self._write(feed.frame)
            self._sent_frame()

    def _sent_frame(self) -> None:
        final = self._feed.final
        SSE_EVENT[final.status if final else "progress"].inc()
        if final:
            self._end("job_ended")

    def beat(self) -> None:
        """Once a heartbeat: keep the connection alive, or drop a reader that has long stopped reading."""
        if self._blocked_since is None:
            self._write(HEARTBEAT)
        elif self._now() - self._blocked_since > MAX_BLOCKED_HEARTBEATS * self._streams.config.heartbeat:
            self._reason = "slow_reader"
            self._stream.close()

    def end_with_retry(self, reason: str) -> None:
        """End cleanly before the job does; the jitter keeps a fleet's clients from coming back all at once."""
        if not self._ending:
            if self._blocked_since is None:
                milliseconds = self._streams.config.retry * 1000 * random.uniform(0.5, 1.5)
                self._write(b"retry: %d\n\n" % milliseconds)
            self._end(reason)

    def _write(self, data: bytes) -> None:
        try:
            written = self._stream.write(data)
        except StreamClosedError:
            return  # _closed follows
        if self._stream.writing():
            self._blocked_since = self._now()
            written.add_done_callback(self._drained)

    def _drained(self, written: asyncio.Future[None]) -> None:
        self._blocked_since = None
        if self._stream.closed():
            return
        if self._ending:
            self._stream.close()
        else:
            self.show()

    def _end(self, reason: str) -> None:
        self._ending = True
        self._reason = reason
        if self._blocked_since is None:
            self._stream.close()

    def _closed(self) -> None:
        """The one place where a stream is forgotten, whoever closed it."""
        self._ending = True
        self._streams.remove(self, self._place, self._reason)
        self._feed.watchers.discard(self.show)
        self._feeds.leave(self._feed)
        if self._timer is not None:
            self._timer.cancel()

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()


async def follow_job(request: Request) -> Answer:
    """The stream, or 204 for a client that has seen the end.

    Without Redis the answer is 503. An EventSource takes any status but 200
    for the end and does not come back by itself; a 200 with an empty stream
    would make it, but would tell every other client and every monitor that
    all is well. The page (web/app.js) polls for as long as it gets 503.
    """
    services = request.services
    feed = await services.feeds.join(request.job_id)
    final = feed.final
    if final is not None and request.headers.get("Last-Event-ID") == str(final.version):
        services.feeds.leave(feed)
        return Answer(status=204)  # EventSource stops at 204
    # Otherwise the present state is sent whatever Last-Event-ID says: nothing is older than it.
    return EventStream(services.feeds, feed, services.streams)


ROUTES = [
    Route("GET", "/v1/export/{jobId}/progress", follow_job, streams=True),
    Route("GET", "/v1/download/subscribe/{jobId}", follow_job, streams=True),
]
