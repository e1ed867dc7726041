"""The queue while Redis is away, slow, or loses replies: every answer it gives is true."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
from redis.exceptions import ResponseError

from delineate.config import Config
from delineate.embedded import redis_command
from delineate.errors import QueueUnavailable
from delineate.job import NewJob, new_job_id
from delineate.queue import open_queue
from delineate.queue.connection import connect, unavailable
from delineate.queue.keys import Keys
from tests.servers import ServerProcess, free_port

replace = msgspec.structs.replace


def new_job() -> NewJob:
    return NewJob(id=new_job_id(), user="ann", file_ids=(70000,))


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[ServerProcess]:
    """A Redis that the test may kill; each write is on disk before its reply."""
    port = free_port()
    server = ServerProcess(redis_command(tmp_path, port, "--appendfsync", "always"), port, tmp_path / "log")
    server.start()
    yield server
    server.stop()


def at(config: Config, port: int, **changes: float) -> Config:
    return replace(config, redis=replace(config.redis, url=f"redis://127.0.0.1:{port}/0", **changes))


class ReplyThief:
    """A TCP proxy before Redis; armed, it lets the next command that holds `stolen` through and drops its reply."""

    def __init__(self, upstream: int) -> None:
        self._upstream = upstream
        self.stolen: bytes | None = None
        self.thefts = 0
        self.port = 0

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._upstream)
        armed = False

        async def requests() -> None:
            nonlocal armed
            while data := await reader.read(65536):
                if self.stolen is not None and self.stolen in data:
                    armed, self.stolen = True, None
                up_writer.write(data)
            up_writer.close()

        async def replies() -> None:
            while data := await up_reader.read(65536):
                if armed:
                    self.thefts += 1
                    writer.transport.abort()
                    return
                writer.write(data)
            writer.close()

        await asyncio.gather(requests(), replies(), return_exceptions=True)


@asynccontextmanager
async def thief_before(port: int) -> AsyncIterator[ReplyThief]:
    thief = ReplyThief(port)
    server = await asyncio.start_server(thief.handle, "127.0.0.1", 0)
    thief.port = server.sockets[0].getsockname()[1]
    async with server:
        yield thief


async def test_an_enqueue_whose_reply_is_lost_is_one_job_and_is_confirmed(
    config: Config, redis_server: ServerProcess
) -> None:
    async with thief_before(redis_server.port) as thief, open_queue(at(config, thief.port)) as queue:
        await queue.ping()
        thief.stolen = b"EVAL"
        accepted = await queue.enqueue(new_job())
        assert thief.thefts == 1
        async with connect(config.redis) as redis:
            waiting = await redis.lrange(Keys(config.redis.prefix).wait, 0, -1)
        assert waiting == [accepted.job.id]


async def test_a_claim_whose_reply_is_lost_is_found_in_the_workers_own_list(
    config: Config, redis_server: ServerProcess
) -> None:
    async with thief_before(redis_server.port) as thief, open_queue(at(config, thief.port)) as queue:
        await queue.register("w1")
        ids = [(await queue.enqueue(new_job())).job.id for _ in range(2)]
        assert await queue.claim("w1", 0) == []  # the script is known from here on
        thief.stolen = b"EVALSHA"
        with pytest.raises(QueueUnavailable):
            await queue.claim("w1", 2)
        assert thief.thefts == 1
        assert sorted(await queue.held_ids("w1")) == sorted(ids)
        leases = await queue.claim("w1", 0, job_ids=ids)
        assert [lease.job.attempts for lease in leases] == [1, 1]


async def test_a_wait_for_work_whose_reply_is_lost_moves_one_job_only(
    config: Config, redis_server: ServerProcess
) -> None:
    async with thief_before(redis_server.port) as thief, open_queue(at(config, thief.port)) as queue:
        await queue.register("w1")
        for _ in range(2):
            await queue.enqueue(new_job())
        thief.stolen = b"BLMOVE"
        with pytest.raises(QueueUnavailable):
            await queue.wait_for_work("w1")
        assert len(await queue.held_ids("w1")) == 1
        assert (await queue.stats()).waiting == 1


async def test_without_redis_an_enqueue_is_refused_within_a_second_or_two_and_never_runs(
    config: Config, own_redis: ServerProcess
) -> None:
    async with open_queue(at(config, own_redis.port)) as queue:
        await queue.ping()
        await asyncio.to_thread(own_redis.kill)
        start = time.monotonic()
        with pytest.raises(QueueUnavailable, match="Redis is not available"):
            await queue.enqueue(new_job())
        assert time.monotonic() - start < 3
        await asyncio.to_thread(own_redis.start)
        end = time.monotonic() + 10
        while queue._withdrawals:
            assert time.monotonic() < end, "the refused job was not withdrawn"
            await asyncio.sleep(0.05)
        stats = await queue.stats()
        assert (stats.waiting, stats.delayed) == (0, 0)


async def test_a_job_that_got_in_although_its_enqueue_was_refused_is_taken_back(
    config: Config, redis_server: ServerProcess
) -> None:
    """Redis hangs after it has read the command: the client is told 503, and the command is carried out later."""
    async with open_queue(at(config, redis_server.port, operation_timeout=0.5)) as queue:
        await queue.ping()
        async with connect(config.redis) as redis:
            await redis.client_pause(1500)
            new = new_job()
            with pytest.raises(QueueUnavailable):
                await queue.enqueue(new)
            end = time.monotonic() + 15
            while queue._withdrawals:
                assert time.monotonic() < end, "the refused job was not withdrawn"
                await asyncio.sleep(0.05)
            assert await queue.get(new.id) is None
            assert (await queue.stats()).waiting == 0


async def test_a_job_that_was_accepted_survives_a_kill_of_redis(config: Config, own_redis: ServerProcess) -> None:
    async with open_queue(at(config, own_redis.port)) as queue:
        ids = [(await queue.enqueue(new_job())).job.id for _ in range(20)]
        await asyncio.to_thread(own_redis.kill)
        await asyncio.to_thread(own_redis.start)
        for job_id in ids:
            assert await queue.get(job_id) is not None
        assert (await queue.stats()).waiting == 20


async def test_a_redis_that_cannot_take_writes_is_unavailable_not_a_bug(
    config: Config, own_redis: ServerProcess
) -> None:
    config = at(config, own_redis.port)
    async with open_queue(config) as queue, connect(config.redis) as redis:
        await queue.enqueue(new_job())
        for setting, value, restored in (("maxmemory", 1, 0), ("min-replicas-to-write", 1, 0)):
            await redis.config_set(setting, value)
            with pytest.raises(QueueUnavailable):
                await queue.enqueue(new_job())
            await redis.config_set(setting, restored)
        assert (await queue.stats()).waiting >= 1
        await redis.replicaof("127.0.0.1", str(free_port()))
        with pytest.raises(QueueUnavailable):
            await queue.enqueue(new_job())
        await redis.replicaof("NO", "ONE")


@pytest.mark.parametrize("code", ["OOM", "READONLY", "NOREPLICAS", "MISCONF"])
async def test_what_redis_6_says_from_within_a_script_is_unavailability_too(code: str) -> None:
    said = f"Error running script (call to f_0): @user_script:9: @user_script: 9: -{code} cannot do that now."
    with pytest.raises(QueueUnavailable), unavailable("a test"):
        raise ResponseError(said)
    with pytest.raises(ResponseError), unavailable("a test"):
        raise ResponseError("Error running script (call to f_0): @user_script:9: attempt to index a nil value")


async def test_a_cancel_in_the_middle_of_a_command_is_never_lost(config: Config) -> None:
    async with open_queue(config) as queue:

        async def work() -> None:
            await queue.count_request("1.2.3.4")
            await asyncio.Event().wait()

        for turn in range(400):
            tasks = [asyncio.create_task(work()) for _ in range(4)]
            await asyncio.sleep(turn % 20 * 0.0001)
            for task in tasks:
                task.cancel()
            _, deaf = await asyncio.wait(tasks, timeout=2)
            assert not deaf


async def test_more_commands_than_connections_wait_their_turn(config: Config) -> None:
    few = replace(config, redis=replace(config.redis, max_connections=4))
    async with open_queue(few) as queue:
        await asyncio.gather(*(queue.stats() for _ in range(200)))
