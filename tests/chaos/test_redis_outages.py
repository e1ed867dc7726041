"""The service while Redis fails: what it answered stays true, and it recovers by itself.

Whole processes throughout, on a Valkey and an S3 server of their own; the
clients are real HTTP clients. Each test breaks one thing while jobs are
queued and running and while exports are asked for, mends it, and looks at
what became of every single answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from redis.asyncio import Redis

from delineate.embedded import redis_command
from tests.chaos.service import Exporter, Follower, Health, Service, check_refusal, http, until
from tests.chaos.tcp_proxy import TcpProxy
from tests.servers import ServerProcess, free_port

OPERATION_TIMEOUT = 3.0  # of the service behind the proxy
AWAY_SECONDS = float(os.environ.get("AWAY_SECONDS", "6"))
# A process that waits for Redis may use so much of one core, and write so many lines a second.
MOST_CPU, MOST_LINES = 0.35, 4.0


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    running = Service(tmp_path_factory.mktemp("service"))
    try:
        running.start()
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="module")
def proxy() -> Iterator[TcpProxy]:
    between = TcpProxy(free_port(), 0)
    between.start()
    yield between
    between.stop()


@pytest.fixture(scope="module")
def proxied(tmp_path_factory: pytest.TempPathFactory, proxy: TcpProxy) -> Iterator[Service]:
    """A service that reaches its Redis through `proxy`, waits 3 s for it, and counts every caller's requests."""
    running = Service(
        tmp_path_factory.mktemp("proxied"),
        proxied_port=proxy.port,
        DELINEATE__REDIS__OPERATION_TIMEOUT=str(OPERATION_TIMEOUT),
        DELINEATE__RATE_LIMIT__ENABLED="true",
        DELINEATE__RATE_LIMIT__REQUESTS="1000000",
    )
    proxy.upstream = running.redis.port
    try:
        running.start()
        yield running
    finally:
        running.stop()


class Scene:
    """A service at work: twenty jobs, twelve of them running, all followed, and exports asked for all the time."""

    def __init__(self, service: Service, session: aiohttp.ClientSession) -> None:
        self.service, self.session = service, session
        self.exporter = Exporter(session)
        self.followers: list[Follower] = []
        self.tokens: dict[str, str] = {}  # of the jobs that were running

    async def begin(self) -> None:
        ids = await asyncio.gather(*(self.exporter.export() for _ in range(20)))
        self.followers = [Follower(self.session, job_id) for job_id in ids if job_id]
        assert len(self.followers) == 20
        await until(lambda: all(follower.events for follower in self.followers), "the first event of every stream")
        await until(
            lambda: sum(follower.events[-1].data["status"] == "processing" for follower in self.followers) >= 12,
            "running jobs",
        )
        records = (await self.service.records()).items()
        self.tokens = {job_id: record["token"] for job_id, record in records if record["status"] == "processing"}

    async def refused(self, seconds: float = 10) -> None:
        """Wait until an export is refused."""
        before = len(self.exporter.refused)
        await until(lambda: len(self.exporter.refused) > before, "a refusal", seconds)

    async def served(self, seconds: float = 10) -> float:
        """Seconds until an export is accepted."""
        before, started = len(self.exporter.accepted), time.monotonic()
        await until(lambda: len(self.exporter.accepted) > before, "an acceptance", seconds)
        return time.monotonic() - started

    async def stream_is_refused(self, job_id: str) -> None:
        async with asyncio.timeout(10), self.session.get(f"/v1/export/{job_id}/progress") as answer:
            assert answer.status == 503
            check_refusal(answer.status, answer.headers, await answer.text())

    async def end(self, *, streams_kept: bool = True) -> None:
        """Every promise: accepted jobs complete, once; refused ones leave nothing; streams end with their job."""
        service, exporter = self.service, self.exporter

        async def all_ended() -> bool:
            records = await service.records()
            return all(records[job_id]["status"] == "completed" for job_id in exporter.accepted)

        await until(all_ended, "the end of every accepted job", 60)
        await until(lambda: all(follower.ended for follower in self.followers), "the end of every stream", 15)
        for follower in self.followers:
            assert follower.events[-1].name == "completed"
            assert "downloadUrl" in follower.events[-1].data
            if streams_kept:
                assert follower.connections == 1, "the outage closed a stream"
                versions = [int(event.id) for event in follower.events]
                assert versions == sorted(set(versions))
        records = await service.records()
        for job_id in exporter.accepted:
            record = records[job_id]
            assert (record["attempts"], record["crashes"]) == ("1", "0"), record
        for job_id, token in self.tokens.items():
            # One claim, so one attempt in one worker: no part was sent twice.
            assert records[job_id]["token"] == token, records[job_id]

        async def nothing_refused_is_there() -> bool:
            asked = {fields["request_id"] for fields in (await service.records()).values()}
            return not asked & set(exporter.refused)

        await until(nothing_refused_is_there, "the withdrawal of what was refused", 10)
        done = {
            line["requestId"]
            for name in service.processes
            for line in service.lines(name)
            if line["message"] == "job completed"
        }
        assert not done & set(exporter.refused), "a refused job ran"

        async def nothing_left() -> bool:
            return not await service.left_over()

        await until(nothing_left, "empty lists", 10)
        for name in service.processes:
            bugs = [line for line in service.lines(name) if line["level"] in ("error", "critical")]
            assert not bugs, (name, bugs[:3])


@asynccontextmanager
async def at_work(service: Service, *, streams_kept: bool = True) -> AsyncIterator[Scene]:
    async with http(service) as session:
        scene = Scene(service, session)
        await scene.begin()
        async with scene.exporter.running():
            yield scene
        await scene.end(streams_kept=streams_kept)
        print(f"accepted {len(scene.exporter.accepted)}, refused {len(scene.exporter.refused)}", end=", ")
        print(f"slowest answer {scene.exporter.slowest:.2f} s")


async def test_a_restart_loses_nothing(service: Service) -> None:
    async with at_work(service) as scene:
        await asyncio.to_thread(service.redis.stop)
        await asyncio.to_thread(service.redis.start)
        print(f"accepts again after {await scene.served():.2f} s", end=", ")


async def test_a_long_absence_loses_nothing_and_costs_nothing(service: Service) -> None:
    async with at_work(service) as scene:
        await asyncio.to_thread(service.redis.kill)
        await scene.refused()
        # Also where a stream of the same job is open in the same process: its last state is not the present one.
        for follower in scene.followers[:5]:
            await scene.stream_is_refused(follower.job_id)
        await scene.stream_is_refused(str(uuid.uuid4()))
        cpu, lines, started = service.cpu_seconds(), service.complaints(), time.monotonic()
        await asyncio.sleep(AWAY_SECONDS)
        away = time.monotonic() - started
        for name in service.processes:
            busy = (service.cpu_seconds()[name] - cpu[name]) / away
            said = (service.complaints()[name] - lines[name]) / away
            print(f"{name} {busy:.2f} cores {said:.1f} lines/s", end=", ")
            # An API process says once for each request that it was refused; the clients here ask ten times a second.
            assert busy < MOST_CPU, name
            assert said < (MOST_LINES if name.startswith("worker") else 12), name
        await asyncio.to_thread(service.redis.start)
        print(f"accepts again after {await scene.served():.2f} s", end=", ")
    assert scene.exporter.slowest < 3


async def test_health_tells_the_truth_within_five_seconds(service: Service) -> None:
    async with http(service) as session:
        health = Health(session)
        assert service.redis.process is not None
        assert service.s3.process is not None
        await health.says()
        took = {}
        await asyncio.to_thread(service.redis.kill)
        took["redis killed"] = await health.says(redis="error")
        await asyncio.to_thread(service.redis.start)
        took["redis back"] = await health.says()
        service.redis.process.send_signal(signal.SIGSTOP)
        took["redis hangs"] = await health.says(redis="error")
        service.redis.process.send_signal(signal.SIGCONT)
        took["redis goes on"] = await health.says()
        await asyncio.to_thread(service.s3.kill)
        took["s3 killed"] = await health.says(storage="error", redis="ok", workers="ok")
        await asyncio.to_thread(service.s3.start)
        took["s3 back"] = await health.says()
        service.s3.process.send_signal(signal.SIGSTOP)
        took["s3 hangs"] = await health.says(storage="error", redis="ok", workers="ok")
        service.s3.process.send_signal(signal.SIGCONT)
        took["s3 goes on"] = await health.says()
        for name in ("worker0", "worker1"):
            await asyncio.to_thread(service.kill, name)
        took["last worker killed"] = await health.says(workers="error", redis="ok", storage="ok")
        for name in ("worker0", "worker1"):
            service.launch(name)
        took["workers back"] = await health.says()
        await health.stop()
        print({what: round(seconds, 2) for what, seconds in took.items()})


async def test_a_redis_that_takes_no_writes_is_away(service: Service) -> None:
    """A demoted master (READONLY) and a full memory (OOM) under noeviction: reads work, and the queue does not."""

    async def demote(redis: Redis) -> None:
        await redis.replicaof("127.0.0.1", str(free_port()))

    async def promote(redis: Redis) -> None:
        await redis.replicaof("NO", "ONE")

    async def fill(redis: Redis) -> None:
        await redis.config_set("maxmemory", 1)

    async def empty(redis: Redis) -> None:
        await redis.config_set("maxmemory", 0)

    async with service.client() as redis, at_work(service) as scene:
        health = Health(scene.session)
        for fail, mend in ((demote, promote), (fill, empty)):
            await fail(redis)
            await scene.refused()
            said = await health.says(redis="error")
            # Longer than a lease: nobody can renew it meanwhile, and nobody may lose a job for that.
            await asyncio.sleep(3)
            await mend(redis)
            print(f"{fail.__name__}: /health {said:.2f} s, accepts again after {await scene.served():.2f} s", end=", ")
            await health.says()
            assert await scene.exporter.export()
        await health.stop()


async def test_a_loading_redis_is_away_and_comes_back(service: Service) -> None:
    async with service.client() as redis, redis.pipeline(transaction=False) as pipe:
        for number in range(1500):
            pipe.set(f"filler:{number}", number)
        await pipe.execute()
        # As RDB: while that is loaded Redis answers, LOADING; a log of commands would only make it hang.
        await redis.bgrewriteaof()

        async def rewritten() -> bool:
            state = await redis.info("persistence")
            return not (state["aof_rewrite_in_progress"] or state["aof_rewrite_scheduled"])

        await until(rewritten, "the rewriting of the log")
    command = service.redis.command
    slowly = ["--key-load-delay", "1500", "--loading-process-events-interval-bytes", "1024"]
    try:
        async with at_work(service) as scene:
            await asyncio.to_thread(service.redis.stop)
            service.redis.command = [*command, *slowly]
            await asyncio.to_thread(service.redis.start)
            async with service.client() as redis:
                assert (await redis.info("persistence"))["loading"] == 1
                await scene.refused()
                assert (await redis.info("persistence"))["loading"] == 1
            print(f"accepts again after {await scene.served(20):.2f} s", end=", ")
        assert any("loading" in line["message"] for name in ("api0", "api1") for line in service.lines(name))
    finally:
        service.redis.command = command
        async with service.client() as redis:
            await redis.delete(*(f"filler:{number}" for number in range(1500)))


async def test_forgotten_scripts_are_loaded_again(service: Service) -> None:
    async with at_work(service) as scene, service.client() as redis:
        end = time.monotonic() + 3
        while time.monotonic() < end:
            await redis.script_flush()
            await asyncio.sleep(0.01)
        await scene.served()
    assert not scene.exporter.refused


async def test_a_full_disk_refuses_exports_and_loses_none(service: Service) -> None:
    if not service.on_tmpfs:
        pytest.skip("a disk of its own for Redis could not be mounted: that needs root and CAP_SYS_ADMIN")
    ballast = service.redis_folder / "ballast"
    async with at_work(service) as scene:
        health = Health(scene.session)
        try:
            with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(bytes(4096))
            await scene.refused()
            said = await health.says(redis="error")
            # Longer than a lease.
            await asyncio.sleep(3.5)
        finally:
            ballast.unlink()
        print(f"/health after {said:.2f} s, accepts again after {await scene.served():.2f} s", end=", ")
        await health.says()
        await health.stop()


async def test_a_hanging_redis_is_told_from_a_slow_one(service: Service) -> None:
    """Within redis.operation_timeout everybody waits; after it requests are refused, and what they left is undone."""
    async with at_work(service) as scene:
        process = service.redis.process
        assert process is not None
        for seconds in (4.0, 6.5):
            process.send_signal(signal.SIGSTOP)
            try:
                if seconds > 5:
                    await asyncio.gather(scene.refused(), scene.stream_is_refused(str(uuid.uuid4())))
                await asyncio.sleep(seconds if seconds < 5 else seconds - 5)
            finally:
                process.send_signal(signal.SIGCONT)
            await scene.served()
    assert scene.exporter.slowest < 6.5


async def test_a_redis_that_comes_back_empty_is_served_anyway(service: Service) -> None:
    async with http(service) as session:
        exporter, health = Exporter(session), Health(session)
        forgotten = [Follower(session, job_id) for _ in range(8) if (job_id := await exporter.export())]
        await until(lambda: all(follower.events for follower in forgotten), "the first event of every stream")
        await asyncio.to_thread(service.redis.kill)
        await health.says(redis="error")
        shutil.rmtree(service.redis_folder / "appendonlydir")
        await asyncio.to_thread(service.redis.start)
        print(f"healthy after {await health.says():.2f} s")
        await health.stop()
        job_id = await exporter.export()
        assert job_id
        await Follower(session, job_id).task
        await until(
            lambda: all(follower.gone or follower.ended for follower in forgotten), "the end of the old streams"
        )


async def test_a_slow_network_delays_and_breaks_nothing(proxied: Service, proxy: TcpProxy) -> None:
    async with at_work(proxied) as scene:
        proxy.latency = 1.0
        try:
            await asyncio.sleep(4)
        finally:
            proxy.heal()
    assert scene.exporter.slowest < 2 * OPERATION_TIMEOUT


async def test_replies_cut_in_the_middle_are_asked_for_again(proxied: Service, proxy: TcpProxy) -> None:
    async with at_work(proxied) as scene:
        for _ in range(10):
            proxy.cuts = 5
            await until(lambda: proxy.cuts == 0, "the cuts")
        await scene.served()


async def test_a_proxy_without_a_redis_behind_it_is_not_stormed(proxied: Service, proxy: TcpProxy) -> None:
    async with at_work(proxied) as scene:
        lines, connected = proxied.complaints(), proxy.connected
        proxy.refuses = True
        try:
            proxy.hang_up()
            await scene.refused()
            await asyncio.sleep(3)
            tries = (proxy.connected - connected) / 3
            said = proxied.complaints() - lines
        finally:
            proxy.heal()
        print(f"{tries:.0f} connections/s, lines in 3 s: {dict(said)}", end=", ")
        await scene.served()
    assert tries < 200
    assert all(said[name] < 3 * MOST_LINES for name in ("worker0", "worker1")), said


async def test_a_black_hole_is_noticed_in_time(proxied: Service, proxy: TcpProxy) -> None:
    """Nothing arrives and nothing is reset, as behind a firewall that forgot its connections."""
    async with at_work(proxied) as scene:
        proxy.swallow()
        try:
            job_id = scene.exporter.accepted[0]
            started = time.monotonic()

            async def refused(method: str, path: str, body: object = None) -> None:
                async with scene.session.request(method, path, json=body) as answer:
                    check_refusal(answer.status, answer.headers, await answer.text())

            await asyncio.gather(
                refused("POST", "/v1/export", {"file_ids": [70_000]}),
                refused("POST", "/v1/download/start", {"file_id": 70_000}),
                refused("GET", f"/v1/export/{job_id}"),
                refused("GET", f"/v1/export/{job_id}/progress"),
                refused("GET", f"/v1/export/{job_id}/download"),
                refused("DELETE", f"/v1/export/{job_id}"),
                refused("GET", "/v1/exports"),
            )
            took = time.monotonic() - started
            await scene.refused()
        finally:
            proxy.heal()
        print(f"all refused after {took:.2f} s, accepts again after {await scene.served():.2f} s", end=", ")
        # Connections that were idle then are as dead as the others.
        assert all(await asyncio.gather(*(scene.exporter.export() for _ in range(20))))
    assert took < OPERATION_TIMEOUT + 0.7
    assert scene.exporter.slowest < OPERATION_TIMEOUT + 0.7


async def test_a_failover_behind_one_address_is_followed(proxied: Service, proxy: TcpProxy, tmp_path: Path) -> None:
    """The address leads to the new master, and the old one lives on as its replica with every connection open."""
    port = free_port()
    old, new = proxied.redis.port, ServerProcess(redis_command(tmp_path, port), port, tmp_path / "log")
    new.start()

    async def fail_over(master: int, replica: int) -> None:
        # Waits until the replica has everything, and swaps their parts.
        async with Redis(port=master) as demoted:
            await demoted.execute_command("FAILOVER", "TO", "127.0.0.1", replica)  # type: ignore[no-untyped-call]
        proxy.upstream = proxied.redis.port = replica

    try:
        async with Redis(port=port) as replica:
            await replica.replicaof("127.0.0.1", str(old))
            await until(lambda: in_step(replica), "the replica in step")
            async with at_work(proxied) as scene:
                await fail_over(old, port)
                print(f"accepts again after {await scene.served():.2f} s", end=", ")
        async with http(proxied) as session, Redis(port=old) as replica:
            await until(lambda: in_step(replica), "the old master in step")
            await fail_over(port, old)
            exporter = Exporter(session)

            async def burst() -> bool:
                return all(await asyncio.gather(*(exporter.export() for _ in range(20))))

            await until(burst, "twenty acceptances at once", 5)
    finally:
        proxy.upstream = proxied.redis.port = old
        new.stop()


async def in_step(replica: Redis) -> bool:
    return bool((await replica.info("replication")).get("master_link_status") == "up")
