"""Progress events: nothing published after `subscribe` returned is missed, and nobody is listened to for nothing."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
from redis.asyncio import Redis

from delineate.config import Config
from delineate.errors import QueueUnavailable
from delineate.queue.connection import connect
from delineate.queue.keys import Keys
from delineate.queue.progress import JobEvent, JobEvents, open_job_events
from tests.servers import ServerProcess, free_port


def event(version: int) -> bytes:
    return msgspec.json.encode(
        JobEvent(
            version=version,
            status="processing",  # type: ignore[arg-type]
            progress=1,
            current_file=0,
            total_files=1,
            stage="packing",  # type: ignore[arg-type]
            message="",
            attempts=1,
            bytes_done=0,
            bytes_total=0,
            updated_at=0,
        )
    )


class Heard:
    """A listener that remembers; `turn` waits until it has heard so many."""

    def __init__(self) -> None:
        self.events: list[int | None] = []
        self._more = asyncio.Event()

    def __call__(self, event: JobEvent | None) -> None:
        self.events.append(event.version if event else None)
        self._more.set()

    async def turn(self, wanted: Any) -> None:
        async with asyncio.timeout(10):
            while not wanted(self.events):
                self._more.clear()
                await self._more.wait()


@asynccontextmanager
async def listening(config: Config) -> AsyncIterator[tuple[JobEvents, Redis, Keys]]:
    client = connect(config.redis)
    try:
        async with open_job_events(config) as events:
            yield events, client, Keys(config.redis.prefix)
    finally:
        await client.aclose()


async def subscribers(client: Redis, channel: str) -> int:
    return dict(await client.pubsub_numsub(channel))[channel]


async def no_subscribers(client: Redis, channel: str) -> None:
    async with asyncio.timeout(5):
        while await subscribers(client, channel):
            await asyncio.sleep(0.01)


async def test_everything_after_subscribe_is_heard_in_order(config: Config) -> None:
    async with listening(config) as (events, client, keys):
        heard = {f"job-{number}": Heard() for number in range(200)}
        await asyncio.gather(*(events.subscribe(job_id, listener) for job_id, listener in heard.items()))
        for version in range(3):
            async with client.pipeline(transaction=False) as pipe:
                for job_id in heard:
                    pipe.publish(keys.channel(job_id), event(version))
                await pipe.execute()
        for listener in heard.values():
            await listener.turn(lambda versions: versions == [0, 1, 2])
        assert events.jobs == 200


async def test_one_connection_serves_everyone(config: Config) -> None:
    async with listening(config) as (events, client, keys):
        listeners = [Heard() for _ in range(5)]
        for listener in listeners:
            await events.subscribe("job", listener)
        assert await subscribers(client, keys.channel("job")) == 1
        await client.publish(keys.channel("job"), event(1))
        for listener in listeners:
            await listener.turn(lambda versions: versions == [1])
        for listener in listeners[1:]:
            events.unsubscribe("job", listener)
        assert await subscribers(client, keys.channel("job")) == 1
        events.unsubscribe("job", listeners[0])
        events.unsubscribe("job", listeners[0])
        await no_subscribers(client, keys.channel("job"))
        assert events.jobs == 0


async def test_coming_and_going_loses_no_event(config: Config) -> None:
    async with listening(config) as (events, client, keys):
        for version in range(200):
            heard, passing = Heard(), Heard()
            hurried = asyncio.create_task(events.subscribe("job", passing))
            if version % 3:
                await asyncio.sleep(0)
            hurried.cancel()
            await asyncio.gather(hurried, return_exceptions=True)
            await events.subscribe("job", heard)
            await client.publish(keys.channel("job"), event(version))
            await heard.turn(lambda versions, version=version: versions == [version])
            assert passing.events == []
            events.unsubscribe("job", heard)
        await no_subscribers(client, keys.channel("job"))


async def test_lost_connection_is_made_again_and_listeners_are_told(config: Config) -> None:
    async with listening(config) as (events, client, keys):
        heard = [Heard() for _ in range(600)]
        for number, listener in enumerate(heard):
            await events.subscribe(f"job-{number}", listener)
        await client.client_kill_filter(_type="pubsub")
        for listener in heard:
            await listener.turn(lambda versions: None in versions)
        await client.publish(keys.channel("job-599"), event(7))
        await heard[599].turn(lambda versions: versions[-1] == 7)


async def test_unreadable_event_makes_listeners_look_themselves(config: Config) -> None:
    async with listening(config) as (events, client, keys):
        heard, broken = Heard(), Heard()

        def fails(_: JobEvent | None) -> None:
            raise ZeroDivisionError

        await events.subscribe("job", fails)
        await events.subscribe("job", heard)
        for text in (b"{", b'{"version":"x"}', event(3)):
            await client.publish(keys.channel("job"), text)
        await heard.turn(lambda versions: versions == [None, None, 3])
        assert broken.events == []


async def test_outage_is_told_at_once_and_ends_by_itself(config: Config, redis_server: ServerProcess) -> None:
    port = free_port()
    away = msgspec.structs.replace(config.redis, url=f"redis://127.0.0.1:{port}/0", operation_timeout=2.0)
    async with open_job_events(msgspec.structs.replace(config, redis=away)) as events:
        heard = Heard()
        with pytest.raises(QueueUnavailable, match="Redis"):
            await events.subscribe("job", heard)
        loop = asyncio.get_running_loop()
        began = loop.time()
        with pytest.raises(QueueUnavailable):
            await events.subscribe("job", heard)
        assert loop.time() - began < 0.1
        assert events.jobs == 0
        # Redis comes up, as a proxy to the real one.
        proxy = await asyncio.start_server(
            lambda reader, writer: _forward(reader, writer, redis_server.port), port=port
        )
        try:
            async with asyncio.timeout(10):
                while True:
                    try:
                        await events.subscribe("job", heard)
                        break
                    except QueueUnavailable:
                        await asyncio.sleep(0.02)
        finally:
            proxy.close()  # without waiting: from Python 3.12 on that would wait for `events` to hang up
        events.unsubscribe("job", heard)


async def test_connection_that_falls_silent_is_given_up(config: Config) -> None:
    connections = 0

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await reader.read()
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    redis = msgspec.structs.replace(config.redis, url=f"redis://127.0.0.1:{port}/0", operation_timeout=0.2)
    async with server, open_job_events(msgspec.structs.replace(config, redis=redis)) as events:
        with pytest.raises(QueueUnavailable):
            await events.subscribe(str(uuid.uuid4()), Heard())
        async with asyncio.timeout(5):
            while connections < 2:
                await asyncio.sleep(0.02)


async def _forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, port: int) -> None:
    there, back = await asyncio.open_connection("127.0.0.1", port)

    async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        while data := await source.read(65536):
            sink.write(data)
        sink.close()

    await asyncio.gather(pump(reader, back), pump(there, writer))
