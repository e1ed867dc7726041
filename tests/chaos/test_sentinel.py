"""A failover of Redis under load, with real servers, sentinels, worker and API: nothing that was accepted is lost."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
from redis.asyncio import Redis

from delineate.config import Config
from delineate.embedded import find_redis, redis_command
from delineate.errors import QueueUnavailable
from delineate.job import JobStatus, NewJob, new_job_id
from delineate.queue import open_queue
from delineate.queue.keys import Keys
from tests.api.running import RunningApi, changed, next_event, running_api
from tests.servers import ServerProcess, free_port
from tests.worker.test_worker import slow, worker_process

replace = msgspec.structs.replace
CONNECTIONS = 8
GROUP, PASSWORD, SENTINEL_PASSWORD = "exports", "master-secret", "sentinel-secret"


class Replicated:
    """One master, one replica and three sentinels, all of them with passwords."""

    def __init__(self, folder: Path) -> None:
        ports = [free_port() for _ in range(5)]
        self.nodes = [self._node(folder / f"redis{port}", port) for port in ports[:2]]
        self.nodes[1].command += ["--replicaof", "127.0.0.1", str(ports[0])]
        self.sentinels = [self._sentinel(folder / f"sentinel{port}", port, ports[0]) for port in ports[2:]]

    @staticmethod
    def _node(folder: Path, port: int) -> ServerProcess:
        folder.mkdir()
        options = ("--requirepass", PASSWORD, "--masterauth", PASSWORD, "--repl-diskless-sync-delay", "0")
        return ServerProcess(redis_command(folder, port, *options), port, folder / "log")

    @staticmethod
    def _sentinel(folder: Path, port: int, master: int) -> ServerProcess:
        folder.mkdir()
        conf = folder / "sentinel.conf"  # the sentinel rewrites it
        conf.write_text(
            f"""port {port}
bind 127.0.0.1
dir {folder}
requirepass {SENTINEL_PASSWORD}
sentinel sentinel-pass {SENTINEL_PASSWORD}
sentinel monitor {GROUP} 127.0.0.1 {master} 2
sentinel auth-pass {GROUP} {PASSWORD}
sentinel down-after-milliseconds {GROUP} 1000
sentinel failover-timeout {GROUP} 5000
"""
        )
        return ServerProcess([find_redis(), str(conf), "--sentinel"], port, folder / "log")

    def __enter__(self) -> Replicated:
        try:
            for server in (*self.nodes, *self.sentinels):
                server.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for server in (*self.sentinels, *self.nodes):
            server.kill()

    def config(self, config: Config) -> Config:
        sentinels = tuple(f"127.0.0.1:{server.port}" for server in self.sentinels)
        return replace(
            config,
            redis=replace(
                config.redis,
                # Nothing listens on this port: it must not be asked.
                url="redis://127.0.0.1:1/3",
                password=PASSWORD,
                sentinels=sentinels,
                sentinel_master=GROUP,
                sentinel_password=SENTINEL_PASSWORD,
            ),
        )

    @staticmethod
    def environment(config: Config) -> dict[str, str]:
        return {
            "DELINEATE__REDIS__PASSWORD": PASSWORD,
            "DELINEATE__REDIS__SENTINELS": ",".join(config.redis.sentinels),
            "DELINEATE__REDIS__SENTINEL_MASTER": GROUP,
            "DELINEATE__REDIS__SENTINEL_PASSWORD": SENTINEL_PASSWORD,
        }

    @contextlib.asynccontextmanager
    async def client(self, node: ServerProcess) -> AsyncIterator[Redis]:
        async with Redis(port=node.port, db=3, password=PASSWORD, decode_responses=True, protocol=2) as client:
            yield client

    async def ready(self) -> None:
        """The replica follows, and every sentinel knows it and the other two."""
        for sentinel in self.sentinels:
            async with Redis(
                port=sentinel.port, password=SENTINEL_PASSWORD, decode_responses=True, protocol=2
            ) as client:
                await until_true(partial(self._knows_all, client), "sentinels that know each other")
        async with self.client(self.nodes[1]) as replica:
            await until_true(partial(self._follows, replica), "a replica in step")

    @staticmethod
    async def _knows_all(client: Redis) -> bool:
        state = cast(dict[str, Any], await client.sentinel_master(GROUP))
        return (state["num-slaves"], state["num-other-sentinels"]) == (1, 2)

    @staticmethod
    async def _follows(replica: Redis) -> bool:
        return bool((await replica.info("replication")).get("master_link_status") == "up")

    async def replicate(self, master: ServerProcess) -> None:
        """Return when everything written so far is on the replica, too."""
        async with self.client(master) as client, client.pipeline(transaction=False) as pipe:
            # WAIT is about the writes of its own connection, so it needs one.
            pipe.set("marker", time.time())
            pipe.wait(1, 10_000)
            assert (await pipe.execute())[1] == 1


async def until_true(condition: Callable[[], Awaitable[bool]], what: str, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not await condition():
        assert time.monotonic() < end, f"no {what}"
        await asyncio.sleep(0.05)


async def post(api: RunningApi) -> str | None:
    """The id of an accepted job; None if the API answered 503."""
    reply = await api.fetch("POST", "/v1/export", {"file_ids": [70000]})
    assert reply.status in (200, 503), reply.text
    return str(reply.json["jobId"]) if reply.status == 200 else None


async def posts_until_accepted(api: RunningApi, killed: float) -> tuple[str, float, float]:
    """The first job accepted after an outage, and when, in seconds after the kill, POST was first and last refused."""
    refused: list[float] = []
    while True:
        job_id = await post(api)
        if job_id is None:
            refused.append(time.monotonic() - killed)
        elif refused:
            return job_id, refused[0], time.monotonic() - killed
        assert time.monotonic() - killed < 60, "POST was not accepted again"
        await asyncio.sleep(0.05)


@pytest.mark.timeout(seconds=180)
async def test_a_failover_loses_no_replicated_job_and_the_service_goes_on(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Replicated(tmp_path) as redis:
        config = slow(redis.config(config), 4)
        master, replica = redis.nodes
        await redis.ready()
        async with running_api(config) as api:
            await api.storage.put_source(70000, b"content", "a.bin")
            worker = worker_process(config, tmp_path / "worker.log", **redis.environment(config))
            try:
                # More than the worker's three slots: some run, the others wait.
                accepted = [job_id for _ in range(6) if (job_id := await post(api))]
                assert len(accepted) == 6
                running = accepted[0]

                async def is_processing() -> bool:
                    return (await api.job(running)).status is JobStatus.PROCESSING

                await until_true(is_processing, "running job")
                async with api.stream(running) as events:
                    await next_event(events)
                    await redis.replicate(master)
                    await asyncio.to_thread(master.kill)
                    job_id, first, last = await posts_until_accepted(api, time.monotonic())
                    with capsys.disabled():
                        print(f"\nPOST was refused from {first:.2f} s to {last:.2f} s after the kill of the master")
                    accepted.append(job_id)
                    async with asyncio.timeout(60):
                        names = [event.name async for event in events]
                    assert names[-1] == "completed"
                    assert set(names) <= {"retry", "heartbeat", "progress", "completed"}
                async with redis.client(replica) as promoted:
                    assert (await promoted.role())[0] == "master"

                await asyncio.to_thread(master.start)
                async with redis.client(master) as old:
                    await until_true(partial(is_replica, old), "old master that follows the new one")
                    accepted += [job_id for _ in range(2) if (job_id := await post(api))]
                    assert len(accepted) == 9
                    for job_id in accepted:
                        await until_true(partial(has_completed, api, job_id), f"end of {job_id}", 60)
                    assert await clients_of_delineate(old) == 0
                    async with redis.client(replica) as promoted:
                        assert await clients_of_delineate(promoted) > 3
                # What was refused meanwhile did not run, and what was accepted ran.
                await until_true(partial(withdrawn, api), "withdrawal of refused jobs")
                async with redis.client(replica) as promoted:
                    keys = [key async for key in promoted.scan_iter(f"{config.redis.prefix}:*:job:*", 1000)]
                    states = [await promoted.hget(key, "status") for key in keys]
                assert states.count("completed") == len(accepted)
                assert set(states) <= {"completed", "withdrawn"}
            finally:
                worker.kill()
                worker.wait()


async def is_replica(client: Redis) -> bool:
    return bool(
        (await client.role())[0] == "slave" and (await client.info("replication"))["master_link_status"] == "up"
    )


async def has_completed(api: RunningApi, job_id: str) -> bool:
    job = await api.job(job_id)
    assert job.failure is None
    return job.status is JobStatus.COMPLETED


async def withdrawn(api: RunningApi) -> bool:
    return not api.queue._withdrawals


async def clients_of_delineate(client: Redis) -> int:
    """Those of this server, without the one that asks, the sentinels, and the other server (flags M and S)."""
    me = await client.client_id()
    others = [other for other in await client.client_list() if int(other["id"]) != me]
    return sum(not other["name"].startswith("sentinel-") and not set(other["flags"]) & {"M", "S"} for other in others)


@pytest.mark.parametrize("how", ["demoted", "cut off"])
async def test_an_old_master_and_an_outage_of_the_sentinels_are_unavailability(
    config: Config, tmp_path: Path, how: str
) -> None:
    with Replicated(tmp_path) as redis:
        config = changed(redis.config(config), "redis", max_connections=CONNECTIONS)
        master, replica = redis.nodes
        await redis.ready()
        async with open_queue(config) as queue, redis.client(master) as old, redis.client(replica) as new:
            await asyncio.gather(*(queue.enqueue(new_job()) for _ in range(200)))
            assert await clients_of_delineate(old) == CONNECTIONS
            for sentinel in redis.sentinels:
                await asyncio.to_thread(sentinel.kill)
            await queue.enqueue(new_job())  # they are needed for new connections alone
            await redis.replicate(master)
            # By hand: a sentinel would also have cut the connections of the old master.
            await new.replicaof("NO", "ONE")
            if how == "demoted":
                await old.replicaof("127.0.0.1", str(replica.port))
            else:
                await old.config_set("min-replicas-to-write", 1)
            with pytest.raises(QueueUnavailable, match=r"no sentinel names a master for 'exports' \(127.0.0.1:"):
                await queue.enqueue(new_job())
            assert await clients_of_delineate(old) < CONNECTIONS
            for sentinel in redis.sentinels:
                conf = Path(sentinel.command[1])
                conf.write_text(conf.read_text().replace(f" {master.port} 2", f" {replica.port} 2"))
                await asyncio.to_thread(sentinel.start)
            job_id = (await queue.enqueue(new_job())).job.id
            assert await new.exists(Keys(config.redis.prefix).job(job_id))
            await asyncio.gather(*(queue.get(job_id) for _ in range(200)))
            assert await clients_of_delineate(old) == 0


async def test_a_sentinel_that_names_a_replica_is_not_believed(config: Config, tmp_path: Path) -> None:
    with Replicated(tmp_path) as redis:
        config = redis.config(config)
        await redis.ready()
        misled = redis._sentinel(tmp_path / "misled", free_port(), redis.nodes[1].port)
        await asyncio.to_thread(misled.start)
        try:
            alone = replace(config, redis=replace(config.redis, sentinels=(f"127.0.0.1:{misled.port}",)))
            async with open_queue(alone) as queue:
                with pytest.raises(QueueUnavailable, match="is not a master"):
                    await queue.stats()
        finally:
            misled.kill()
        for change, says in (
            ({"sentinel_master": "other"}, "does not know it"),
            ({"sentinel_password": "wrong"}, "WRONGPASS|invalid username-password"),
            ({"password": "wrong"}, "WRONGPASS|invalid username-password"),
        ):
            wrong = replace(config, redis=replace(config.redis, **change))
            async with open_queue(wrong) as queue:
                with pytest.raises(QueueUnavailable, match=says) as caught:
                    await queue.stats()
                assert "secret" not in str(caught.value)


def new_job() -> NewJob:
    return NewJob(id=new_job_id(), user="ann", file_ids=(70000,))
