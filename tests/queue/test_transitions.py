"""Each transition on a real server: its effect in one step, and the refusal of an old token."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
from redis.asyncio import Redis

from delineate.config import Config
from delineate.errors import (
    IdempotencyConflict,
    JobFinished,
    JobNotFound,
    JobNotRetryable,
    JobUnfinished,
    LeaseLost,
    QueueFull,
    QueuePaused,
    QueueUnavailable,
    TooManyJobs,
)
from delineate.job import (
    ArchiveResult,
    ErrorClass,
    Failure,
    JobStatus,
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

RESULT = ArchiveResult(key="exports/a.zip", size=1234, filename="a.zip", skipped_file_ids=(70009,))
FAILURE = Failure(code="storage_timeout", error_class=ErrorClass.TIMEOUT, message="The store did not answer.")


def new_job(user: str = "ann", **changes: object) -> NewJob:
    return msgspec.structs.replace(NewJob(id=new_job_id(), user=user, file_ids=(70000, 70001)), **changes)


def progress(percent: int, files: int = 0, done: int = 0) -> Progress:
    return Progress(
        percent=percent, current_file=files, stage=Stage.PACKING, message="Packing", bytes_done=done, bytes_total=1000
    )


class Bench:
    """A queue with two workers, and a client to look at what is really in Redis."""

    def __init__(self, config: Config, queue: Queue, redis: Redis) -> None:
        self.config, self.queue, self.redis, self.keys = config, queue, redis, Keys(config.redis.prefix)

    async def accepted(self, **changes: object) -> str:
        return (await self.queue.enqueue(new_job(**changes))).job.id  # type: ignore[arg-type]

    async def claimed(self, worker: str = "w1", **changes: object) -> Lease:
        await self.accepted(**changes)
        (lease,) = await self.queue.claim(worker, 1)
        return lease

    async def waiting(self) -> list[str]:
        return await self.redis.lrange(self.keys.wait, 0, -1)  # type: ignore[return-value]

    async def active(self, worker: str = "w1") -> list[str]:
        return await self.redis.lrange(self.keys.active(worker), 0, -1)  # type: ignore[return-value]

    async def status(self, job_id: str) -> JobStatus:
        job = await self.queue.get(job_id)
        assert job is not None
        return job.status

    async def kill_worker(self, worker: str) -> None:
        """Let its lease have ended, as if it had sent no heartbeat."""
        await self.redis.zadd(self.keys.workers, {worker: 1})


@asynccontextmanager
async def bench(config: Config) -> AsyncIterator[Bench]:
    async with connect(config.redis) as redis, open_queue(config) as queue:
        for worker in ("w1", "w2"):
            await queue.register(worker)
        yield Bench(config, queue, redis)


async def test_enqueue_puts_record_list_entry_and_user_entry_at_once(config: Config) -> None:
    async with bench(config) as b:
        new = new_job(traceparent="00-1", request_id="r1", on_missing="skip")
        accepted = await b.queue.enqueue(new)
        job = accepted.job
        assert (job.id, job.status, job.attempts) == (new.id, JobStatus.QUEUED, 0)
        assert (job.file_ids, job.on_missing, job.traceparent, job.request_id) == ((70000, 70001), "skip", "00-1", "r1")
        assert await b.waiting() == [job.id]
        assert await b.redis.zrange(b.keys.user_jobs("ann"), 0, -1) == [job.id]
        assert await b.redis.ttl(b.keys.job(job.id)) == -1, "an unfinished job never expires"


async def test_enqueue_repeated_with_the_same_id_makes_one_job(config: Config) -> None:
    async with bench(config) as b:
        new = new_job()
        first, second = await b.queue.enqueue(new), await b.queue.enqueue(new)
        assert first.job.id == second.job.id
        assert len(await b.waiting()) == 1


async def test_idempotency_key_replays_refuses_other_bodies_and_is_per_user(config: Config) -> None:
    async with bench(config) as b:
        first = await b.queue.enqueue(new_job(idempotency_key="k", fingerprint="f1"))
        again = await b.queue.enqueue(new_job(idempotency_key="k", fingerprint="f1"))
        assert (again.job.id, again.replayed, first.replayed) == (first.job.id, True, False)
        with pytest.raises(IdempotencyConflict):
            await b.queue.enqueue(new_job(idempotency_key="k", fingerprint="f2"))
        other = await b.queue.enqueue(new_job(user="bob", idempotency_key="k", fingerprint="f2"))
        assert other.job.id != first.job.id
        assert len(await b.waiting()) == 2


async def test_a_full_queue_refuses_and_leaves_nothing_behind(config: Config) -> None:
    config = msgspec.structs.replace(config, queue=msgspec.structs.replace(config.queue, max_waiting=2))
    async with bench(config) as b:
        for _ in range(2):
            await b.accepted()
        new = new_job(idempotency_key="k", fingerprint="f")
        with pytest.raises(QueueFull) as refused:
            await b.queue.enqueue(new)
        assert refused.value.retry_after
        assert await b.queue.get(new.id) is None
        assert not await b.redis.exists(b.keys.idempotency("ann", "k"))


async def test_a_user_with_too_many_waiting_jobs_is_told_and_others_are_not(config: Config) -> None:
    config = msgspec.structs.replace(config, queue=msgspec.structs.replace(config.queue, max_waiting_of_user=3))
    async with bench(config) as b:
        ids = [await b.accepted() for _ in range(3)]
        with pytest.raises(TooManyJobs) as refused:
            await b.accepted()
        assert refused.value.retry_after
        await b.accepted(user="bob")
        await b.queue.claim("w1", 1)
        ids.append(await b.accepted())
        for waiting in ids[1:]:
            await b.queue.cancel(waiting)
        for _ in range(3):
            await b.accepted()


async def test_users_take_turns_and_keep_their_own_order(config: Config) -> None:
    async with bench(config) as b:
        ann = [await b.accepted() for _ in range(500)]
        bob = [await b.accepted(user="bob") for _ in range(3)]
        eve = [await b.accepted(user="eve")]
        stats = await b.queue.stats()
        assert stats.waiting == 504
        assert stats.oldest_waiting_seconds > 0
        claimed = []
        for _ in range(168):
            claimed += [lease.job.id for lease in await b.queue.claim("w1", 3)]
        assert claimed[:7] == [ann[0], bob[0], eve[0], ann[1], bob[1], ann[2], bob[2]]
        assert [job_id for job_id in claimed if job_id in set(ann)] == ann
        assert len(claimed) == 504
        assert await b.redis.keys(f"{b.keys.base}user:*:waiting") == []
        assert not await b.redis.exists(b.keys.turns, b.keys.backlog, b.keys.wait)


async def test_a_turn_is_passed_on_however_its_job_leaves_the_line(config: Config) -> None:
    async with bench(config) as b:
        first, second, third, fourth, fifth = [new_job() for _ in range(5)]
        for new in (first, second, third, fourth, fifth):
            await b.queue.enqueue(new)
        assert await b.waiting() == [first.id]
        await b.queue.cancel(first.id)
        assert await b.waiting() == [second.id]
        await b.queue._withdraw(second)
        assert await b.waiting() == [third.id]
        await b.queue.cancel(fourth.id)
        assert await b.queue.wait_for_work("w1") == third.id
        await b.queue.cancel(third.id)
        assert await b.waiting() == [fifth.id]
        assert await b.queue.claim("w1", 2, job_ids=[third.id]) != []
        assert await b.waiting() == []
        assert await b.accepted() in await b.waiting()


async def test_a_turn_that_a_damaged_record_holds_is_passed_on(config: Config) -> None:
    async with bench(config) as b:
        ids = [await b.accepted() for _ in range(3)]
        await b.redis.lrem(b.keys.wait, 1, ids[0])
        await b.redis.delete(b.keys.job(ids[0]))
        ids.append(await b.accepted())
        assert await b.waiting() == [ids[1]]
        assert [lease.job.id for lease in await b.queue.claim("w1", 9)] == ids[1:]


async def test_a_turn_that_died_with_its_worker_keeps_no_worker_idle(config: Config) -> None:
    async with bench(config) as b:
        ids = [await b.accepted() for _ in range(3)]
        assert await b.queue.wait_for_work("w1") == ids[0]
        assert [lease.job.id for lease in await b.queue.claim("w2", 9)] == ids[1:]
        await b.kill_worker("w1")
        await b.queue.reap()
        (lease,) = await b.queue.claim("w2", 9)
        assert lease.job.id == ids[0]
        assert not await b.redis.exists(b.keys.turns, b.keys.backlog, b.keys.wait)


async def test_a_paused_queue_keeps_what_waits_and_lets_go_on_what_runs(config: Config) -> None:
    async with bench(config) as b:
        running = await b.claimed()
        await b.queue.pause()
        assert (await b.queue.stats()).paused
        job_id, behind = await b.accepted(), await b.accepted()
        with pytest.raises(QueuePaused):
            await b.queue.claim("w1", 2)
        assert await b.queue.wait_for_work("w1") == job_id  # it was blocked when the queue was paused
        with pytest.raises(QueuePaused):
            await b.queue.claim("w1", 2, job_ids=[job_id])
        assert await b.active() == [running.job.id]
        (again,) = await b.queue.claim("w1", 0, job_ids=[running.job.id])
        await b.queue.finish(again, RESULT)
        await b.queue.resume()
        assert [lease.job.id for lease in await b.queue.claim("w1", 2)] == [job_id, behind]


async def test_a_failover_that_loses_a_claim_gives_no_token_twice(config: Config) -> None:
    async with bench(config) as b:
        job_id = await b.accepted()
        record, waiting = await b.redis.dump(b.keys.job(job_id)) or b"", await b.waiting()
        (lost,) = await b.queue.claim("w1", 1)
        await b.queue.progress(lost, progress(50))
        seen = await b.queue.get(job_id)
        # What a replica that had not heard of the claim would know; no failover takes less time.
        await asyncio.sleep(0.02)
        await b.redis.restore(b.keys.job(job_id), 0, record, replace=True)
        await b.redis.delete(b.keys.active("w1"))
        await b.redis.rpush(b.keys.wait, *waiting)
        (again,) = await b.queue.claim("w2", 1)
        with pytest.raises(LeaseLost):
            await b.queue.finish(lost, RESULT)
        assert seen is not None
        assert again.job.version > seen.version, "or a stream would wait for what it has seen already"


async def test_claim_takes_the_oldest_and_gives_token_and_attempt(config: Config) -> None:
    async with bench(config) as b:
        ids = [await b.accepted() for _ in range(3)]
        leases = await b.queue.claim("w1", 2)
        assert [lease.job.id for lease in leases] == ids[:2]
        for lease in leases:
            assert (lease.job.attempts, lease.job.status) == (1, JobStatus.PROCESSING)
            assert lease.job.worker == "w1"
            assert lease.job.started_at is not None
        assert sorted(await b.active()) == sorted(ids[:2])
        assert await b.waiting() == [ids[2]]


async def test_a_blocking_wait_moves_a_job_to_its_owner_and_claim_by_name_takes_it(config: Config) -> None:
    async with bench(config) as b:
        waiting = asyncio.create_task(b.queue.wait_for_work("w1"))
        await asyncio.sleep(0.05)
        job_id = await b.accepted()
        assert await waiting == job_id
        assert await b.active() == [job_id]
        assert await b.status(job_id) == JobStatus.QUEUED
        (lease,) = await b.queue.claim("w1", 1, job_ids=[job_id])
        assert lease.job.id == job_id
        assert await b.queue.wait_for_work("w1") is None


async def test_a_claim_whose_reply_was_lost_is_claimed_again_uncharged_with_a_new_token(config: Config) -> None:
    async with bench(config) as b:
        lost = await b.claimed()
        assert await b.queue.held_ids("w1") == [lost.job.id]
        (again,) = await b.queue.claim("w1", 1, job_ids=[lost.job.id])
        assert again.token > lost.token
        assert again.job.attempts == 1
        with pytest.raises(LeaseLost):
            await b.queue.finish(lost, RESULT)
        await b.queue.finish(again, RESULT)


async def test_a_worker_that_is_unknown_or_declared_dead_claims_nothing(config: Config) -> None:
    async with bench(config) as b:
        await b.accepted()
        with pytest.raises(LeaseLost):
            await b.queue.claim("stranger", 1)
        await b.kill_worker("w1")
        await b.queue.reap()
        with pytest.raises(LeaseLost):
            await b.queue.claim("w1", 1)
        with pytest.raises(LeaseLost):
            await b.queue.heartbeat("w1", [])
        assert len(await b.waiting()) == 1


async def test_progress_never_goes_back_and_refuses_an_old_token(config: Config) -> None:
    async with bench(config) as b:
        lease = await b.claimed()
        await b.queue.progress(lease, progress(50, 1, 500))
        await b.queue.progress(lease, progress(40, 0, 400))
        job = await b.queue.get(lease.job.id)
        assert job is not None
        assert (job.progress.percent, job.progress.current_file, job.progress.bytes_done) == (50, 1, 500)
        assert job.version > lease.job.version
        stale = msgspec.structs.replace(lease, token=lease.token - 1)
        with pytest.raises(LeaseLost):
            await b.queue.progress(stale, progress(99))
        assert (await b.queue.get(lease.job.id)) == job


async def test_finish_publishes_once_and_starts_the_records_life(config: Config) -> None:
    async with bench(config) as b:
        lease = await b.claimed()
        await b.queue.finish(lease, RESULT)
        await b.queue.finish(lease, RESULT)  # the first reply was lost
        job = await b.queue.get(lease.job.id)
        assert job is not None
        assert (job.status, job.progress.percent, job.progress.current_file) == (JobStatus.COMPLETED, 100, 2)
        assert job.result == RESULT
        assert job.completed_at is not None
        assert await b.active() == []
        assert 0 < await b.redis.ttl(b.keys.job(job.id)) <= 86400


@pytest.mark.parametrize("settle", ["finish", "retry", "release", "bury"])
async def test_every_settling_refuses_an_old_token_and_changes_nothing(config: Config, settle: str) -> None:
    async with bench(config) as b:
        lease = await b.claimed()
        before = await b.redis.hgetall(b.keys.job(lease.job.id))
        stale = msgspec.structs.replace(lease, token=lease.token - 1)
        calls = {
            "finish": lambda: b.queue.finish(stale, RESULT),
            "retry": lambda: b.queue.retry(stale, FAILURE, 1),
            "release": lambda: b.queue.release(stale),
            "bury": lambda: b.queue.bury(stale, FAILURE),
        }
        with pytest.raises(LeaseLost):
            await calls[settle]()
        assert await b.redis.hgetall(b.keys.job(lease.job.id)) == before
        assert await b.active() == [lease.job.id]


async def test_retry_waits_in_delayed_and_promote_puts_it_back_in_line(config: Config) -> None:
    async with bench(config) as b:
        lease = await b.claimed()
        await b.queue.retry(lease, FAILURE, 0.3)
        await b.queue.retry(lease, FAILURE, 0.3)  # the first reply was lost
        job = await b.queue.get(lease.job.id)
        assert job is not None
        assert (job.status, job.failure, job.attempts) == (JobStatus.QUEUED, FAILURE, 1)
        assert job.due_at is not None
        has_turn, younger = await b.accepted(), await b.accepted()
        assert await b.queue.promote() == 0
        await asyncio.sleep(0.35)
        assert await b.queue.promote() == 1
        first, second, third = await b.queue.claim("w2", 3)
        # Behind the user's job whose turn it is, before those that were asked for later.
        assert [lease.job.id for lease in (first, third)] == [has_turn, younger]
        assert (second.job.id, second.job.attempts, second.job.progress.percent) == (lease.job.id, 2, 0)
        assert second.job.due_at is None


async def test_release_charges_nothing_and_the_job_is_next(config: Config) -> None:
    async with bench(config) as b:
        lease = await b.claimed()
        younger = await b.accepted()
        await b.queue.release(lease)
        await b.queue.release(lease)  # the first reply was lost
        assert await b.waiting() == [younger, lease.job.id]
        (again,) = await b.queue.claim("w2", 1)
        assert (again.job.id, again.job.attempts) == (lease.job.id, 1)


async def test_bury_makes_a_dead_letter_that_stays_for_its_time(config: Config) -> None:
    async with bench(config) as b:
        lease = await b.claimed()
        await b.queue.bury(lease, FAILURE)
        await b.queue.bury(lease, FAILURE)  # the first reply was lost
        job = await b.queue.get(lease.job.id)
        assert job is not None
        assert (job.status, job.failure) == (JobStatus.FAILED, FAILURE)
        assert await b.redis.lrange(b.keys.failed, 0, -1) == [job.id]
        assert 86400 < await b.redis.ttl(b.keys.job(job.id)) <= 604800
        assert await b.queue.sweep() == 0
        await b.redis.delete(b.keys.job(job.id))
        assert await b.queue.sweep() == 1
        assert await b.redis.llen(b.keys.failed) == 0


async def test_cancel_of_a_waiting_a_delayed_and_a_running_job(config: Config) -> None:
    async with bench(config) as b:
        waiting = await b.accepted()
        await b.queue.cancel(waiting)
        delayed = await b.claimed()
        await b.queue.retry(delayed, FAILURE, 60)
        await b.queue.cancel(delayed.job.id)
        running = await b.claimed()
        cancelled = await b.queue.cancel(running.job.id)
        assert cancelled == await b.queue.cancel(running.job.id), "cancelling again changes nothing"
        for job_id in (waiting, delayed.job.id, running.job.id):
            assert await b.status(job_id) == JobStatus.CANCELLED
            assert await b.redis.ttl(b.keys.job(job_id)) > 0
        stats = await b.queue.stats()
        assert (stats.waiting, stats.active, stats.delayed) == (0, 0, 0)
        with pytest.raises(LeaseLost):
            await b.queue.finish(running, RESULT)
        assert await b.queue.heartbeat("w1", [running]) == {(running.job.id, running.token)}


async def test_cancel_after_finish_is_too_late_and_unknown_jobs_are_not_found(config: Config) -> None:
    async with bench(config) as b:
        lease = await b.claimed()
        await b.queue.finish(lease, RESULT)
        with pytest.raises(JobFinished):
            await b.queue.cancel(lease.job.id)
        with pytest.raises(JobNotFound):
            await b.queue.cancel(new_job_id())


async def test_a_job_cancelled_between_move_and_claim_is_dropped_by_claim(config: Config) -> None:
    async with bench(config) as b:
        job_id = await b.accepted()
        assert await b.queue.wait_for_work("w1") == job_id
        await b.queue.cancel(job_id)
        assert await b.queue.claim("w1", 1, job_ids=[job_id]) == []
        assert await b.active() == []


@pytest.mark.parametrize("end", ["bury", "cancel"])
async def test_requeue_starts_a_failed_or_cancelled_job_over(config: Config, end: str) -> None:
    async with bench(config) as b:
        lease = await b.claimed()
        if end == "bury":
            await b.queue.bury(lease, FAILURE)
        else:
            await b.queue.cancel(lease.job.id)
        job = await b.queue.requeue(lease.job.id)
        assert (job.status, job.attempts, job.failure, job.completed_at) == (JobStatus.QUEUED, 0, None, None)
        assert await b.waiting() == [job.id]
        assert await b.redis.llen(b.keys.failed) == 0
        assert await b.redis.ttl(b.keys.job(job.id)) == -1
        with pytest.raises(JobNotRetryable):
            await b.queue.requeue(job.id)
        (again,) = await b.queue.claim("w2", 1)
        assert again.token > lease.token, "an older lease stays fenced out"


@pytest.mark.parametrize(
    "damage",
    [
        {"traceparent": b"\xff\xfe"},
        {"span": b"z" * 16},
        {"attempt_started_at": b"9" * 400},
        {"span_token": b"1"},  # of another lease
        {},
    ],
    ids=lambda damage: " ".join(damage) or "whole",
)
async def test_reap_tells_the_trace_of_the_lost_attempt_and_nothing_damaged(
    config: Config, damage: dict[str, bytes]
) -> None:
    async with bench(config) as b:
        lease = await b.claimed()
        fields = {"traceparent": f"00-{'a' * 32}-{'b' * 16}-01", "span": "c" * 16}
        for name, value in {**fields, "span_token": str(lease.token), **damage}.items():
            await b.redis.hset(b.keys.job(lease.job.id), name, value)  # type: ignore[arg-type]  # bytes that are no text
        await b.kill_worker("w1")
        (reaped,) = await b.queue.reap()
        told = (reaped.traceparent, reaped.span, reaped.started_at)
        assert told == (("", "", None) if damage else (*fields.values(), lease.job.attempt_started_at))
        assert await b.waiting() == [lease.job.id]


async def test_reap_takes_a_dead_workers_jobs_and_charges_no_attempt(config: Config) -> None:
    async with bench(config) as b:
        lease = await b.claimed("w1")
        moved = await b.accepted()
        assert await b.queue.wait_for_work("w1") == moved
        alive = await b.claimed("w2")
        await b.kill_worker("w1")
        reaped = await b.queue.reap()
        assert {(r.worker, r.job_id, r.buried) for r in reaped} == {
            ("w1", lease.job.id, False),
            ("w1", moved, False),
        }
        for job_id, crashes in ((lease.job.id, 1), (moved, 0)):
            job = await b.queue.get(job_id)
            assert job is not None
            assert (job.status, job.attempts, job.crashes) == (JobStatus.QUEUED, 0, crashes)
        assert await b.status(alive.job.id) == JobStatus.PROCESSING
        with pytest.raises(LeaseLost):
            await b.queue.progress(lease, progress(10))
        claimed = await b.queue.claim("w2", 2)
        assert {c.job.id for c in claimed} == {lease.job.id, moved}


async def test_a_move_that_lands_in_a_dead_workers_list_is_found_later(config: Config) -> None:
    async with bench(config) as b:
        await b.kill_worker("w1")
        await b.queue.reap()
        job_id = await b.accepted()
        assert await b.queue.wait_for_work("w1") == job_id  # a BLMOVE that was on its way
        assert [r.job_id for r in await b.queue.reap()] == [job_id]
        assert await b.waiting() == [job_id]


async def test_a_job_that_loses_its_worker_too_often_is_buried(config: Config) -> None:
    config = msgspec.structs.replace(config, queue=msgspec.structs.replace(config.queue, max_crashes=2))
    async with bench(config) as b:
        job_id = await b.accepted()
        for crash in range(3):
            worker = f"crash{crash}"
            await b.queue.register(worker)
            assert [lease.job.id for lease in await b.queue.claim(worker, 1)] == [job_id]
            await b.kill_worker(worker)
            (reaped,) = await b.queue.reap()
            assert reaped.buried == (crash == 2)
        job = await b.queue.get(job_id)
        assert job is not None
        assert (job.status, job.failure and job.failure.code) == (JobStatus.FAILED, "worker_lost")
        assert await b.redis.lrange(b.keys.failed, 0, -1) == [job_id]


async def test_retire_hands_everything_back_and_late_moves_are_still_found(config: Config) -> None:
    async with bench(config) as b:
        lease = await b.claimed("w1")
        assert await b.queue.retire("w1") == [lease.job.id]
        job = await b.queue.get(lease.job.id)
        assert job is not None
        assert (job.status, job.attempts) == (JobStatus.QUEUED, 0)
        assert (await b.queue.stats()).workers == 1
        with pytest.raises(LeaseLost):
            await b.queue.finish(lease, RESULT)
        assert await b.queue.wait_for_work("w1") == lease.job.id
        assert [r.job_id for r in await b.queue.reap()] == [lease.job.id]


async def test_positions_count_from_the_oldest(config: Config) -> None:
    async with bench(config) as b:
        ids = [await b.accepted() for _ in range(3)]
        assert [await b.queue.position(job_id) for job_id in ids] == [1, 2, 3]
        await b.queue.claim("w1", 1)
        assert [await b.queue.position(job_id) for job_id in ids] == [None, 1, 2]


async def test_a_place_behind_other_users_is_never_better_than_it_looks(config: Config) -> None:
    async with bench(config) as b:
        ann = [await b.accepted() for _ in range(4)]
        bob = [await b.accepted(user="bob") for _ in range(2)]
        places = {job_id: await b.queue.position(job_id) for job_id in (*ann, *bob)}
        assert (places[ann[0]], places[bob[0]]) == (1, 2)
        for claimed in range(1, 7):
            (lease,) = await b.queue.claim("w1", 1)
            place = places[lease.job.id]
            assert place is not None
            assert claimed <= place <= 6
            assert await b.queue.position(lease.job.id) is None


async def test_operators_see_every_job_by_its_status(config: Config) -> None:
    async with bench(config) as b:
        done, failed, running, delayed = [await b.claimed() for _ in range(4)]
        await b.queue.finish(done, RESULT)
        await b.queue.bury(failed, FAILURE)
        await b.queue.retry(delayed, FAILURE, 60)
        await b.queue.save_part(running, SavedPart(number=1, etag="e", crcs=(1,)))
        cancelled, *queued = [await b.accepted() for _ in range(4)]
        await b.queue.cancel(cancelled)
        await b.queue.wait_for_work("w2")
        wanted = {
            JobStatus.QUEUED: [*queued, delayed.job.id],
            JobStatus.PROCESSING: [running.job.id],
            JobStatus.COMPLETED: [done.job.id],
            JobStatus.FAILED: [failed.job.id],
            JobStatus.CANCELLED: [cancelled],
        }
        for status, ids in wanted.items():
            assert [job.id for job in await b.queue.jobs_by_status(status)] == ids
        await b.redis.hset(b.keys.job(done.job.id), "progress", "x")
        assert await b.queue.jobs_by_status(JobStatus.COMPLETED) == []


async def test_purge_forgets_an_ended_job_and_no_other(config: Config) -> None:
    async with bench(config) as b:
        failed, done, running = [await b.claimed() for _ in range(3)]
        await b.queue.bury(failed, FAILURE)
        await b.queue.finish(done, RESULT)
        for lease in (failed, done):
            await b.queue.purge(lease.job.id)
            with pytest.raises(JobNotFound):
                await b.queue.purge(lease.job.id)
        with pytest.raises(JobUnfinished):
            await b.queue.purge(running.job.id)
        assert (await b.queue.stats()).failed == 0
        assert await b.redis.zrange(b.keys.user_jobs("ann"), 0, -1) == [running.job.id]


async def test_a_callers_jobs_are_listed_newest_first_page_by_page(config: Config) -> None:
    async with bench(config) as b:
        ids = [await b.accepted() for _ in range(40)]
        await b.accepted(user="bob")
        await b.redis.delete(b.keys.job(ids[3]))
        seen: list[str] = []
        cursor, pages = None, 0
        while True:
            jobs, cursor = await b.queue.list_jobs("ann", 2, cursor)
            seen += [job.id for job in jobs]
            pages += 1
            if cursor is None:
                break
        # Several are of the same millisecond.
        assert seen == [job_id for job_id in reversed(ids) if job_id != ids[3]]
        assert pages >= 3
        with pytest.raises(ValueError, match="cursor"):
            await b.queue.list_jobs("ann", 2, "x'; DROP")


async def test_every_change_raises_the_version_and_is_published(config: Config) -> None:
    async with bench(config) as b:
        job_id = await b.accepted()
        async with b.redis.pubsub() as pubsub:
            await pubsub.subscribe(b.keys.channel(job_id))
            await pubsub.get_message(timeout=2)
            (lease,) = await b.queue.claim("w1", 1)
            await b.queue.progress(lease, progress(10))
            await b.queue.finish(lease, RESULT)
            events: list[dict[str, Any]] = []
            while len(events) < 3:
                message = await pubsub.get_message(ignore_subscribe_messages=True, timeout=2)
                if message:
                    events.append(msgspec.json.decode(message["data"]))
        assert [(e["status"], e["progress"]) for e in events] == [
            ("processing", 0),
            ("processing", 10),
            ("completed", 100),
        ]
        assert len({e["version"] for e in events}) == 3
        assert events == sorted(events, key=lambda e: e["version"])
        assert set(events[0]) == {
            "version", "status", "progress", "currentFile", "totalFiles", "stage", "message", "attempts",
            "bytesDone", "bytesTotal", "updatedAt",
        }  # fmt: skip
        assert abs(events[0]["updatedAt"] / 1000 - time.time()) < 5


async def test_a_rate_limit_lets_a_burst_through_and_then_says_when(config: Config) -> None:
    limits = msgspec.structs.replace(config.rate_limit, requests=5, window=60)
    config = msgspec.structs.replace(config, rate_limit=limits)
    async with bench(config) as b:
        answers = [await b.queue.count_request("1.2.3.4") for _ in range(6)]
        assert [a.allowed for a in answers] == [True] * 5 + [False]
        assert [a.remaining for a in answers] == [4, 3, 2, 1, 0, 0]
        assert 10 < answers[5].retry_after <= 12
        assert 55 < answers[5].reset_seconds <= 60
        assert (await b.queue.count_request("5.6.7.8")).allowed


async def test_scripts_survive_a_flush_of_the_script_cache(config: Config) -> None:
    async with bench(config) as b:
        await b.accepted()
        await b.redis.script_flush()
        lease = (await b.queue.claim("w1", 1))[0]
        await b.queue.finish(lease, RESULT)


async def test_a_damaged_record_is_buried_and_does_not_stop_the_worker(
    config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    async with bench(config) as b:
        damaged, good = await b.accepted(), await b.accepted()
        await b.redis.hset(b.keys.job(damaged), "file_ids", "{not json")
        leases = await b.queue.claim("w1", 2)
        assert [lease.job.id for lease in leases] == [good]
        assert await b.redis.hget(b.keys.job(damaged), "status") == "failed"
        assert await b.active() == [good]
        assert damaged in caplog.text


@pytest.mark.parametrize("field", ["attempts", "token", "version"])
async def test_a_record_with_a_damaged_counter_is_buried_too(config: Config, field: str) -> None:
    async with bench(config) as b:
        damaged, good = await b.accepted(), await b.accepted()
        await b.redis.hset(b.keys.job(damaged), field, "many")
        leases = await b.queue.claim("w1", 2)
        assert [lease.job.id for lease in leases] == [good]
        assert await b.redis.lrange(b.keys.failed, 0, -1) == [damaged]
        assert await b.active() == [good]
        assert await b.redis.ttl(b.keys.job(damaged)) > 0


async def test_a_job_that_a_client_was_given_by_its_key_is_not_withdrawn(config: Config) -> None:
    """The first request got 503 because its reply was lost; the client repeated it and got the job."""
    async with bench(config) as b:
        new = new_job(idempotency_key="k", fingerprint="f")
        await b.queue.enqueue(new)
        replayed = await b.queue.enqueue(new_job(idempotency_key="k", fingerprint="f"))
        assert replayed.job.id == new.id
        assert not await b.queue._scripts.withdraw(new.id, new.user, "k", 60)
        assert await b.waiting() == [new.id]


async def test_a_cancelled_job_shows_no_failure_of_an_earlier_attempt(config: Config) -> None:
    async with bench(config) as b:
        lease = await b.claimed()
        await b.queue.retry(lease, FAILURE, 60)
        assert (await b.queue.cancel(lease.job.id)).failure is None


async def test_uploads_are_recorded_replaced_and_given_up_with_their_job(config: Config) -> None:
    async with bench(config) as b:
        lease = await b.claimed()
        first, second = (Upload(key="k", upload_id=upload_id, digest="d") for upload_id in ("u1", "u2"))
        await b.queue.begin_upload(lease, first)
        await b.queue.save_part(lease, SavedPart(number=1, etag='"e"', crcs=(7,)))
        assert await b.queue.saved_parts(lease.job.id) == [SavedPart(number=1, etag='"e"', crcs=(7,))]
        await b.queue.begin_upload(lease, second)
        assert await b.queue.saved_parts(lease.job.id) == []
        assert await b.queue.abandoned_uploads(9) == [first]
        stale = msgspec.structs.replace(lease, token=lease.token - 1)
        with pytest.raises(LeaseLost):
            await b.queue.begin_upload(stale, first)
        with pytest.raises(LeaseLost):
            await b.queue.save_part(stale, SavedPart(number=2, etag='"e"', crcs=()))
        await b.queue.retry(lease, FAILURE, 0)
        await b.queue.promote()
        (again,) = await b.queue.claim("w2", 1)
        assert again.job.upload == second, "a retry goes on with the same upload"
        await b.queue.bury(again, FAILURE)
        assert {u.upload_id for u in await b.queue.abandoned_uploads(9)} == {"u1", "u2"}
        for upload in (first, second):
            await b.queue.forget_upload(upload)
        assert await b.queue.abandoned_uploads(9) == []


async def test_a_refused_job_never_runs_even_if_its_enqueue_comes_late(config: Config) -> None:
    async with bench(config) as b:
        new = new_job(idempotency_key="k", fingerprint="f")
        await b.queue.enqueue(new)
        scripts = b.queue._scripts
        assert await scripts.withdraw(new.id, new.user, "k", 60)
        assert await b.waiting() == []
        assert await b.queue.get(new.id) is None
        with pytest.raises(QueueUnavailable):
            await b.queue.enqueue(new)
        assert await b.waiting() == []
        assert not await b.redis.exists(b.keys.idempotency("ann", "k"))
        assert (await b.queue.list_jobs("ann", 10, None))[0] == []
