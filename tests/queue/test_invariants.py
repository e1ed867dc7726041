"""A random walk over every transition, with crashes between any two, against a real server.

After each step the invariants of docs/queue.md must hold; at the end, with
workers that work, every accepted job must end. A worker "crashes" by never
being heard of again, at any point between BLMOVE, claim and settling; "late"
calls are made with leases that may be lost long since.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import msgspec
import pytest
from redis.asyncio import Redis

from delineate.config import Config
from delineate.errors import (
    JobFinished,
    JobNotFound,
    JobNotRetryable,
    JobUnfinished,
    LeaseLost,
    QueueFull,
    QueuePaused,
    TooManyJobs,
)
from delineate.job import (
    ArchiveResult,
    ErrorClass,
    Failure,
    Lease,
    NewJob,
    Progress,
    SavedPart,
    Stage,
    Upload,
    new_job_id,
)
from delineate.queue import Queue, open_queue
from delineate.queue.connection import connect
from delineate.queue.keys import Keys

STEPS = 600
FAILURE = Failure(code="storage_timeout", error_class=ErrorClass.TIMEOUT, message="The store did not answer.")
USERS = ("ann", "bob", "eve")
REFUSALS = (
    LeaseLost,
    JobNotFound,
    JobFinished,
    JobNotRetryable,
    JobUnfinished,
    QueueFull,
    QueuePaused,
    TooManyJobs,
)


class Walk:
    def __init__(self, seed: int, config: Config, queue: Queue, redis: Redis) -> None:
        self.random = random.Random(seed)
        self.config, self.queue, self.redis, self.keys = config, queue, redis, Keys(config.redis.prefix)
        self.jobs: list[NewJob] = []
        self.withdrawn: set[str] = set()
        self.purged: set[str] = set()
        self.workers: list[str] = []
        self.leases: list[Lease] = []
        self.moved: list[tuple[str, str]] = []
        self.finished: dict[str, str] = {}

    async def step(self) -> str:
        name = self.random.choice([name for name in dir(self) if name.startswith("do_")])
        action: Callable[[], Awaitable[None]] = getattr(self, name)
        with suppress(*REFUSALS):
            await action()
        return name

    def _worker(self) -> str:
        return self.random.choice(self.workers[-4:])

    def _lease(self) -> Lease:
        """Any lease there ever was, the recent ones more often."""
        if not self.leases:
            raise LeaseLost("there is none yet")
        return self.random.choice(self.leases[-12:])

    def _job_id(self) -> str:
        if not self.jobs:
            raise JobNotFound("there is none yet")
        return self.random.choice(self.jobs[-15:]).id

    async def do_enqueue(self) -> None:
        new = NewJob(id=new_job_id(), user=self.random.choice(USERS), file_ids=(70000,))
        await self.queue.enqueue(new)
        self.jobs.append(new)

    do_enqueue_too = do_enqueue

    async def do_enqueue_again(self) -> None:
        if self.jobs:
            new = self.random.choice(self.jobs[-5:])
            if new.id not in self.withdrawn and new.id not in self.purged:
                await self.queue.enqueue(new)

    async def do_start_worker(self) -> None:
        if len(self.workers) < 2 or self.random.random() < 0.2:
            self.workers.append(f"w{len(self.workers)}")
            await self.queue.register(self.workers[-1])

    async def do_claim(self) -> None:
        self.leases += await self.queue.claim(self._worker(), self.random.randint(1, 3))

    do_claim_too = do_claim

    async def do_move(self) -> None:
        """A BLMOVE, after which the worker may crash."""
        worker = self._worker()
        moved = await self.redis.lmove(self.keys.wait, self.keys.active(worker), "RIGHT", "LEFT")
        if moved:
            self.moved.append((worker, str(moved)))

    async def do_claim_moved(self) -> None:
        if self.moved:
            worker, job_id = self.moved.pop(self.random.randrange(len(self.moved)))
            self.leases += await self.queue.claim(worker, 0, job_ids=[job_id])

    async def do_audit(self) -> None:
        worker = self._worker()
        self.leases += await self.queue.claim(worker, 0, job_ids=await self.queue.held_ids(worker))

    async def do_progress(self) -> None:
        percent = self.random.randint(0, 99)
        progress = Progress(percent=percent, current_file=0, stage=Stage.PACKING, message="Packing")
        await self.queue.progress(self._lease(), progress)

    async def do_upload(self) -> None:
        lease = self._lease()
        await self.queue.begin_upload(lease, Upload(key="k", upload_id=f"u{self.random.random()}", digest="d"))
        await self.queue.save_part(lease, SavedPart(number=1, etag="e", crcs=(1,)))

    async def do_finish(self) -> None:
        lease = self._lease()
        key = f"{lease.job.id}/{lease.token}"
        await self.queue.finish(lease, ArchiveResult(key=key, size=1, filename="a.zip"))
        self.finished[lease.job.id] = key

    async def do_retry(self) -> None:
        await self.queue.retry(self._lease(), FAILURE, self.random.choice([0, 0.01]))

    async def do_release(self) -> None:
        await self.queue.release(self._lease())

    async def do_bury(self) -> None:
        await self.queue.bury(self._lease(), FAILURE)

    async def do_cancel(self) -> None:
        await self.queue.cancel(self._job_id())

    async def do_requeue(self) -> None:
        await self.queue.requeue(self._job_id())

    async def do_withdraw(self) -> None:
        if self.jobs and self.random.random() < 0.3:
            new = self.random.choice(self.jobs[-15:])
            if new.id not in self.purged:
                await self.queue._withdraw(new)
                self.withdrawn.add(new.id)

    async def do_purge(self) -> None:
        if self.random.random() < 0.3:
            job_id = self._job_id()
            await self.queue.purge(job_id)
            self.purged.add(job_id)

    async def do_pause(self) -> None:
        if self.random.random() < 0.2:
            await self.queue.pause()

    async def do_resume(self) -> None:
        await self.queue.resume()

    async def do_crash(self) -> None:
        """A worker's lease runs out; its process may not know yet."""
        await self.redis.zadd(self.keys.workers, {self._worker(): 1}, xx=True)

    async def do_retire(self) -> None:
        if self.random.random() < 0.3:
            await self.queue.retire(self._worker())

    async def do_promote(self) -> None:
        await self.queue.promote()

    async def do_reap(self) -> None:
        await self.queue.reap()

    do_reap_too = do_reap

    async def do_sweep(self) -> None:
        await self.queue.sweep()

    async def check(self, after: str) -> None:
        """The invariants, by the numbers of docs/queue.md."""
        keys, redis, recent = self.keys, self.redis, self.jobs[-30:]
        # In one round trip: a walk looks at everything 600 times.
        async with redis.pipeline(transaction=False) as pipe:
            for line in (keys.wait, keys.failed, *map(keys.active, self.workers)):
                pipe.lrange(line, 0, -1)
            for line in (keys.backlog, keys.delayed, keys.workers, *map(keys.user_waiting, USERS)):
                pipe.zrange(line, 0, -1)
            pipe.hgetall(keys.turns)
            for new in recent:
                pipe.hgetall(keys.job(new.id))
                pipe.ttl(keys.job(new.id))
                pipe.exists(keys.parts(new.id))
            answers = iter(await pipe.execute())
        waiting, failed = next(answers), next(answers)
        held = {worker: next(answers) for worker in self.workers}
        backlog, delayed, remembered = next(answers), next(answers), next(answers)
        behind = {user: next(answers) for user in USERS}
        turns = next(answers)
        assert sorted(backlog) == sorted(job_id for ids in behind.values() for job_id in ids), after  # 2
        assert len({*waiting, *backlog}) == len(waiting) + len(backlog), after  # 2
        assert {user for user in USERS if behind[user]} <= turns.keys(), after  # 10
        for job_id in turns.values():
            assert await redis.hget(keys.job(str(job_id)), "status") == "queued", after  # 10
        for new in recent:
            job_id = new.id
            record, expires_in, parts = next(answers), next(answers), next(answers)
            status, where = record.get("status"), (after, new.id, record)
            holders = [worker for worker in self.workers if job_id in held[worker]]
            # A token: it was claimed, or moved, before, and had left its turn behind already.
            assert new.user in turns or job_id not in waiting or int(record.get("token", 0)), where  # 10
            if job_id in self.purged:
                assert not record, where
                continue
            assert status, where  # 1
            if status == "queued":  # 2
                in_line = job_id in waiting or job_id in backlog or job_id in delayed
                assert in_line != bool(holders), where
                assert all(worker in remembered for worker in holders), where
            if status == "processing":  # 3
                assert record["worker"] in holders, where
                assert record["worker"] in remembered, where
            assert (expires_in == -1) == (status in ("queued", "processing")), where  # 4
            assert failed.count(job_id) == (status == "failed"), where  # 5
            if job_id in self.finished and status == "completed":  # 6
                assert self.finished[job_id] in record["result"], where
            if status in ("completed", "failed", "cancelled", "withdrawn"):  # 7
                assert "upload" not in record, where
                assert not parts, where
            if status != "withdrawn":  # 8
                assert int(record["attempts"]) >= 0, where
                assert (int(record["progress"]) == 100) == (status == "completed"), where
            assert (job_id in self.withdrawn) == (status == "withdrawn"), where  # 9

    async def work_off(self) -> None:
        """No more crashes: one worker, the janitor, and everything must end."""
        for worker in self.workers:
            await self.redis.zadd(self.keys.workers, {worker: 1}, xx=True)
        await self.queue.register("last")
        await self.queue.resume()
        for _ in range(300):
            await self.queue.promote()
            await self.queue.reap()
            for lease in await self.queue.claim("last", 5):
                await self.queue.finish(lease, ArchiveResult(key="k", size=1, filename="a.zip"))
            stats = await self.queue.stats()
            if not (stats.waiting or stats.active or stats.delayed):
                break
        for new in self.jobs:
            status = await self.redis.hget(self.keys.job(new.id), "status")
            ended = status in ("completed", "failed", "cancelled", "withdrawn")
            assert ended or new.id in self.purged, (new.id, status)
        assert not await self.redis.exists(self.keys.turns, self.keys.backlog, self.keys.wait)


@asynccontextmanager
async def walk(seed: int, config: Config) -> AsyncIterator[Walk]:
    # Leases that do not run out by themselves: only do_crash decides who is dead, so a seed is a fixed story.
    patient = msgspec.structs.replace(
        config.queue, dead_after=600, max_crashes=2, max_waiting=40, max_waiting_of_user=20
    )
    config = msgspec.structs.replace(config, queue=patient)
    async with connect(config.redis) as redis, open_queue(config) as queue:
        made = Walk(seed, config, queue, redis)
        for worker in ("w0", "w1"):
            made.workers.append(worker)
            await queue.register(worker)
        yield made


@pytest.mark.parametrize("seed", range(6))
async def test_no_walk_loses_doubles_or_sticks_a_job(config: Config, seed: int) -> None:
    async with walk(seed, config) as walking:
        for _ in range(STEPS):
            await walking.check(await walking.step())
        await walking.work_off()
        assert len(walking.jobs) > 10
