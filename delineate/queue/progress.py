"""What happens to jobs, heard as it happens: one pub/sub connection for every listener of a process.

Every transition publishes on its job's channel (lua/*.lua). A stream of the
API subscribes here first and reads the job second, so that nothing falls
between the two; the version in each event says which of them is newer.

Why one connection: a browser tab costs a dictionary entry here, not a
connection and not a poll. `run` owns that connection; a reader hears events
and acknowledgements, a writer sends what `subscribe` and `unsubscribe` left
for it, many channels in one command. A caller that is cancelled while it
waits therefore never breaks a command in two.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, NoReturn

import msgspec
import redis.exceptions
from redis.asyncio import Redis
from redis.asyncio.client import PubSub

from delineate.config import Config
from delineate.errors import QueueUnavailable
from delineate.job import JobStatus, Stage
from delineate.queue.connection import connect
from delineate.queue.keys import Keys

_log = logging.getLogger(__name__)

FIRST_BACKOFF_SECONDS, LONGEST_BACKOFF_SECONDS = 0.05, 2.0
# One command names this many channels at most: bounded memory on both ends.
CHANNELS_PER_COMMAND = 500
# A flood of events must not keep the loop from the streams that carry them.
EVENTS_PER_TURN = 200


class JobEvent(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """One transition as it was published; `version` orders them, `updated_at` is Unix milliseconds."""

    version: int
    status: JobStatus
    progress: int
    current_file: int
    total_files: int
    stage: Stage
    message: str
    attempts: int
    bytes_done: int
    bytes_total: int
    updated_at: int


# Called with None when events may have been missed: the listener reads the job again.
Listener = Callable[[JobEvent | None], None]


class _Topic:
    """Everyone who listens to one job; `confirmed` is done once Redis has acknowledged the subscription."""

    __slots__ = ("confirmed", "listeners")

    def __init__(self, confirmed: asyncio.Future[None]) -> None:
        self.confirmed = confirmed
        self.listeners: list[Listener] = []


class JobEvents:
    """Subscriptions of one process; made by `open_job_events`, which also ends it."""

    def __init__(self, client: Redis, keys: Keys, timeout_seconds: float) -> None:
        self._client = client
        self._keys = keys
        self._timeout = timeout_seconds
        self._topics: dict[str, _Topic] = {}
        self._changed: set[str] = set()  # channels whose subscription may differ from what _topics wants
        self._sent: set[str] = set()  # channels that Redis was told to send on this connection
        self._unacknowledged: Counter[str] = Counter()
        self._wake = asyncio.Event()
        self._ping_due = False
        self._stopping = asyncio.Event()
        self._outage: QueueUnavailable | None = None
        self._backoff = FIRST_BACKOFF_SECONDS
        # Always subscribed, never published on: the connection stays in pub/sub mode, so reading always works.
        self._idle_channel = keys.channel("-")

    async def subscribe(self, job_id: str, listener: Listener) -> None:
        """Call `listener` with every event of the job published after this returns.

        It is called on the event loop and must not block. Undo it with `unsubscribe`.

        Raises QueueUnavailable if Redis is away or does not acknowledge in time.
        """
        await self._subscribe(self._keys.channel(job_id), listener)

    async def subscribe_worker(self, worker: str, listener: Listener) -> None:
        """Call `listener`, always with None, when a lease of `worker` was taken away; as `subscribe` otherwise."""
        await self._subscribe(self._keys.worker_channel(worker), listener)

    async def _subscribe(self, channel: str, listener: Listener) -> None:
        self.check()
        topic = self._topics.get(channel)
        if topic is None:
            topic = self._topics[channel] = _Topic(asyncio.get_running_loop().create_future())
            self._change(channel)
        topic.listeners.append(listener)
        try:
            async with asyncio.timeout(self._timeout):
                # Shielded: another caller may be waiting for the same acknowledgement.
                await asyncio.shield(topic.confirmed)
        except TimeoutError as error:
            self._remove(channel, topic, listener)
            raise QueueUnavailable("following a job: Redis did not acknowledge the subscription") from error
        except BaseException:
            self._remove(channel, topic, listener)
            raise

    def unsubscribe(self, job_id: str, listener: Listener) -> None:
        """Stop calling `listener`; the last one to leave ends the subscription. Never waits, never fails."""
        self._unsubscribe(self._keys.channel(job_id), listener)

    def unsubscribe_worker(self, worker: str, listener: Listener) -> None:
        self._unsubscribe(self._keys.worker_channel(worker), listener)

    def _unsubscribe(self, channel: str, listener: Listener) -> None:
        topic = self._topics.get(channel)
        if topic is not None:
            self._remove(channel, topic, listener)

    def check(self) -> None:
        """Raises QueueUnavailable if events are known not to arrive now."""
        if self._outage is not None:
            raise QueueUnavailable(str(self._outage)) from self._outage

    @property
    def jobs(self) -> int:
        """How many jobs are listened to."""
        return len(self._topics)

    def _remove(self, channel: str, topic: _Topic, listener: Listener) -> None:
        with suppress(ValueError):
            topic.listeners.remove(listener)
        if not topic.listeners and self._topics.get(channel) is topic:
            del self._topics[channel]
            self._change(channel)

    def _change(self, channel: str) -> None:
        self._changed.add(channel)
        self._wake.set()

    async def run(self) -> None:
        """Keep one connection until `stop`; owned by `open_job_events`."""
        while not self._stopping.is_set():
            pubsub = self._client.pubsub()
            try:
                await self._resubscribe(pubsub)
                if self._stopping.is_set():
                    return
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._read(pubsub))
                    group.create_task(self._write(pubsub))
            except* Exception as errors:
                # Broad, because nobody would notice if this loop ended: every stream would just fall silent.
                self._lose(errors.exceptions[0])
            finally:
                with suppress(redis.exceptions.RedisError, OSError):
                    await pubsub.aclose()  # type: ignore[no-untyped-call]
            # Jitter, so that the processes of a fleet do not all come back in the same instant.
            await asyncio.sleep(self._backoff * random.uniform(0.5, 1.0))
            self._backoff = min(self._backoff * 2, LONGEST_BACKOFF_SECONDS)

    async def stop(self, owner: asyncio.Task[None]) -> None:
        self._stopping.set()  # beside the cancellation, which may be lost: see _end_if_cancelled
        owner.cancel()
        await asyncio.gather(owner, return_exceptions=True)

    async def _resubscribe(self, pubsub: PubSub) -> None:
        """Ask for everything that is wanted; the reader confirms, and tells listeners to look again."""
        self._sent.clear()
        self._unacknowledged.clear()
        self._changed.clear()
        await self._tell(pubsub, "SUBSCRIBE", [self._idle_channel, *self._topics])

    def _recover(self) -> None:
        """Redis has answered. That a connection was opened and written to says nothing: a Redis
        that hangs and a proxy whose Redis is away let that happen too."""
        self._backoff = FIRST_BACKOFF_SECONDS
        if self._outage is not None:
            _log.info("progress events: Redis is back", extra={"context": {"jobs": len(self._topics)}})
            self._outage = None

    def _lose(self, error: BaseException) -> None:
        reason = str(error) or type(error).__name__
        if not isinstance(error, (redis.exceptions.RedisError, OSError)):
            _log.error("progress events: starting again after an error", exc_info=error)
        elif self._outage is None:
            _log.warning("progress events: lost Redis: %s", reason)
        self._outage = QueueUnavailable(f"following a job: Redis is not available: {reason}")
        for channel, topic in list(self._topics.items()):
            if not topic.confirmed.done():
                # Its callers are told now rather than after their timeout; they leave by themselves.
                topic.confirmed.set_exception(self._outage)
                topic.confirmed.exception()
                del self._topics[channel]

    async def _tell(self, pubsub: PubSub, command: str, channels: list[str]) -> None:
        # execute_command rather than pubsub.subscribe: redis-py's own list of channels, which it
        # subscribes again behind our back after an error, would be a second truth beside `_topics`.
        for start in range(0, len(channels), CHANNELS_PER_COMMAND):
            some = channels[start : start + CHANNELS_PER_COMMAND]
            if command == "SUBSCRIBE":
                self._sent.update(some)
                self._unacknowledged.update(some)
            else:
                self._sent.difference_update(some)
            await pubsub.execute_command(command, *some)

    async def _write(self, pubsub: PubSub) -> NoReturn:
        while True:
            await self._wake.wait()
            self._wake.clear()
            changed, self._changed = self._changed, set()
            wanted = [channel for channel in changed if channel in self._topics]
            unwanted = [channel for channel in changed if channel not in self._topics and channel in self._sent]
            if unwanted:
                await self._tell(pubsub, "UNSUBSCRIBE", unwanted)
            if wanted:
                # Even if it was sent before: the answer is what a new caller waits for.
                await self._tell(pubsub, "SUBSCRIBE", wanted)
            if self._ping_due:
                self._ping_due = False
                await pubsub.execute_command("PING")
            _end_if_cancelled()

    async def _read(self, pubsub: PubSub) -> NoReturn:
        silent = True  # asked already: SUBSCRIBE has an answer
        events = 0
        while True:
            reply: list[Any] | None = await pubsub.parse_response(block=False, timeout=self._timeout)
            _end_if_cancelled()
            if reply is None:
                # A connection that died without a word (a cable, a firewall) is silent like an idle one: ask.
                if silent:
                    raise TimeoutError("no answer")
                silent = self._ping_due = True
                self._wake.set()
                continue
            silent = False
            self._recover()
            kind, channel, data = (*reply, "", "")[:3]
            if kind == "message":
                self._publish(channel, data)
            elif kind == "subscribe":
                self._confirm(channel)
            events += 1
            if events % EVENTS_PER_TURN == 0:
                await asyncio.sleep(0)

    def _confirm(self, channel: str) -> None:
        self._unacknowledged[channel] -= 1
        if self._unacknowledged[channel] > 0:
            return  # an answer to an earlier SUBSCRIBE, which an UNSUBSCRIBE may have undone since
        del self._unacknowledged[channel]
        topic = self._topics.get(channel)
        if topic is None or channel in self._changed:
            return
        if not topic.confirmed.done():
            topic.confirmed.set_result(None)
        else:
            self._call(topic, None)  # subscribed anew: events of the meantime are lost

    def _publish(self, channel: str, data: str) -> None:
        topic = self._topics.get(channel)
        if topic is None:
            return
        if not data:
            self._call(topic, None)
            return
        try:
            event = _EVENT(data)
        except msgspec.DecodeError:
            # Another version of delineate may publish what this one cannot read: the hash has the truth.
            _log.warning("progress events: unreadable event", extra={"context": {"channel": channel}})
            self._call(topic, None)
            return
        self._call(topic, event)

    def _call(self, topic: _Topic, event: JobEvent | None) -> None:
        for listener in tuple(topic.listeners):
            try:
                listener(event)
            except Exception:
                # One listener's bug must not take the events from all others.
                _log.exception("progress events: a listener failed")


def _end_if_cancelled() -> None:
    """redis-py sends within asyncio.wait_for, which up to Python 3.11 loses a cancellation that comes as it ends.

    Seen here: a writer that went on for ever, and a process that could not stop.
    Source: https://github.com/python/cpython/issues/86296
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


_EVENT = msgspec.json.Decoder(JobEvent).decode


@asynccontextmanager
async def open_job_events(config: Config) -> AsyncIterator[JobEvents]:
    """Listen for as long as the `async with` lasts; works, and recovers by itself, whether or not Redis is there."""
    timeout = config.redis.operation_timeout
    # Its own client: `run` reads with a timeout of its own, and never more than one connection is needed.
    client = connect(config.redis, reply_timeout=timeout)
    events = JobEvents(client, Keys(config.redis.prefix), timeout)
    owner = asyncio.create_task(events.run(), name="job events")
    try:
        yield events
    finally:
        await events.stop(owner)
        await client.aclose()
