"""What is known of the jobs that somebody watches; one Feed a job, however many streams show it.

A feed subscribes first and reads the job second. From then on events bring
it up to date; the job is read again when it ends (the link is not in the
event) and when events may have been missed. The frame is encoded once and
written to every stream as it is.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Coroutine
from contextvars import Context

from delineate.api.documents import event_document, job_document, progress_document
from delineate.api.handler import encode_json
from delineate.api.links import Link, Links
from delineate.errors import DelineateError, JobNotFound, QueueUnavailable
from delineate.job import Job, JobStatus
from delineate.queue import Queue
from delineate.queue.progress import JobEvent, JobEvents
from delineate.telemetry import spans

_log = logging.getLogger(__name__)

REREAD_BACKOFF_SECONDS = 1.0
# When Redis is back every feed reads its job again; the others' requests need connections too meanwhile.
REREADS_AT_ONCE = 16


class Feed:
    """One job's present state: `frame` is its SSE event, `version` that event's id, `gone` that its record ended.

    `state` differs for every transition, also where versions go back because the
    clock of a new master is behind. `watchers` are called, on the event
    loop, whenever there is something newer.
    """

    __slots__ = (
        "dirty",
        "frame",
        "gone",
        "job",
        "job_id",
        "link",
        "opened",
        "reader",
        "state",
        "users",
        "version",
        "watchers",
    )
    opened: asyncio.Task[None]

    def __init__(self, job_id: str) -> None:
        self.job_id = job_id
        self.version = -1
        self.state = (-1, 0)  # version and time (ms)
        self.frame = b""
        self.gone = False
        self.job: Job | None = None  # as it was last read; the final state, once it is final
        self.link: Link | None = None
        self.users = 0
        self.watchers: set[Callable[[], None]] = set()
        self.dirty = False
        self.reader: asyncio.Task[None] | None = None

    @property
    def final(self) -> Job | None:
        """The job, if it has ended and that is still its newest version."""
        job = self.job
        return job if job is not None and job.version == self.version and job.status.is_final else None

    def show(self) -> None:
        for watcher in tuple(self.watchers):
            watcher()


class Feeds:
    """Made once a process; `aclose` ends what still reads."""

    def __init__(self, queue: Queue, events: JobEvents, links: Links) -> None:
        self._queue = queue
        self._events = events
        self._links = links
        self._feeds: dict[str, Feed] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._rereads = asyncio.Semaphore(REREADS_AT_ONCE)
        # One listener a job, kept because unsubscribe needs the same object again.
        self._listeners: dict[str, Callable[[JobEvent | None], None]] = {}

    def __len__(self) -> int:
        return len(self._feeds)

    async def join(self, job_id: str) -> Feed:
        """The job's feed, with its present state in it; every join needs a `leave`.

        Raises JobNotFound, and QueueUnavailable if it can be neither read nor followed.
        """
        feed = self._feeds.get(job_id)
        if feed is None:
            feed = self._feeds[job_id] = Feed(job_id)
            feed.opened = self._own(self._open(feed))
        else:
            self._events.check()  # what it shows may be old by now; those who have it already are told when it changes
        feed.users += 1
        try:
            # Shielded: others wait for the same first reading.
            await asyncio.shield(feed.opened)
        except BaseException:
            self.leave(feed)
            raise
        return feed

    def leave(self, feed: Feed) -> None:
        feed.users -= 1
        if feed.users:
            return
        self._forget(feed)
        feed.opened.cancel()
        if feed.reader is not None:
            feed.reader.cancel()

    def wake_all(self) -> None:
        """Have every watcher look again, for instance at whether the process is to end."""
        for feed in tuple(self._feeds.values()):
            feed.show()

    async def aclose(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _forget(self, feed: Feed) -> None:
        if self._feeds.get(feed.job_id) is feed:
            del self._feeds[feed.job_id]
            listener = self._listeners.pop(feed.job_id, None)
            if listener is not None:
                self._events.unsubscribe(feed.job_id, listener)

    async def _open(self, feed: Feed) -> None:
        def hear(event: JobEvent | None) -> None:
            self._hear(feed, event)

        try:
            await self._events.subscribe(feed.job_id, hear)
            self._listeners[feed.job_id] = hear
            await self._read(feed)
            if feed.gone:
                raise JobNotFound("there is no such job")
            if feed.dirty:
                feed.reader = self._own(self._reread(feed))
        except BaseException:
            # The next one who asks begins anew, instead of inheriting this failure.
            self._forget(feed)
            raise

    def _hear(self, feed: Feed, event: JobEvent | None) -> None:
        if event is not None and event.version <= feed.version:
            return
        if event is None or event.status.is_final:
            if event is None:
                # This may be another master, whose clock is behind: from here on its versions
                # count, or the job's end would pass for old.
                feed.version = -1
            feed.dirty = True
            if feed.reader is None and feed.opened.done():
                feed.reader = self._own(self._reread(feed))
            return
        feed.version, feed.state = event.version, (event.version, event.updated_at)
        feed.frame = _frame(event.version, "progress", event_document(feed.job_id, event))
        feed.show()

    async def _reread(self, feed: Feed) -> None:
        """Read until a reading succeeds that began after the last reason to read."""
        try:
            while feed.dirty:
                feed.dirty = False
                try:
                    async with self._rereads:
                        await self._read(feed)
                except Exception as error:
                    # Whatever it was, the streams still wait for the end of the job.
                    bug = None if isinstance(error, DelineateError) else error
                    context = {"jobId": feed.job_id}
                    # An outage is reported where it is noticed, once, and not for every job that is followed.
                    level = logging.DEBUG if isinstance(error, QueueUnavailable) else logging.WARNING
                    _log.log(
                        level, "a followed job cannot be read: %s", error, exc_info=bug, extra={"context": context}
                    )
                    feed.dirty = True
                    await asyncio.sleep(REREAD_BACKOFF_SECONDS * random.uniform(0.5, 1.5))
        finally:
            feed.reader = None

    async def _read(self, feed: Feed) -> None:
        job = await self._queue.get(feed.job_id)
        if job is None:
            feed.gone = True
            feed.show()
            return
        link = await self._links.link(job) if job.status is JobStatus.COMPLETED else None
        if job.version < feed.version:
            return  # an event overtook this reading
        before, streams = feed.state, len(feed.watchers)
        feed.job, feed.link, feed.version = job, link, job.version
        feed.state = (job.version, round(job.updated_at * 1000))
        if job.status.is_final:
            document = job_document(job, link=link, with_filename=True)
            feed.frame = _frame(job.version, job.status.value, document)
        else:
            feed.frame = _frame(job.version, "progress", progress_document(job))
        feed.show()
        if job.status.is_final and streams and feed.state != before:
            spans.delivered(job, streams)

    def _own(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        # A context of its own: a reading is for all who follow the job, not for the request that made it begin.
        task = asyncio.create_task(work, context=Context())
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # was given to whoever waited; nobody may be left


def _frame(version: int, event: str, document: object) -> bytes:
    return b"id: %d\nevent: %b\ndata: %b\n\n" % (version, event.encode(), encode_json(document))
