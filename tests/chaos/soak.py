"""Chaos: clients ask for exports at a steady rate while everything behind them is killed, paused and restarted.

    make soak MINUTES=10        or: python -m tests.chaos.soak --minutes 10 --seed 1

Real processes throughout: two API processes, three workers, a Redis, an S3
server. Clients repeat a POST with its Idempotency-Key until it is answered
with 200, and follow half of the jobs by SSE. Faults are drawn at random, one
after the other; they stop the run if one of them finds something wrong. Each
completed archive is compared byte by byte with its files, and then removed: a
long run makes more of them than a disk holds. At the end everything is left
alone until every accepted job has ended.
Prints a summary and exits with 1 if a job was lost, doubled, stuck, wrong or
failed, or if a stream did not show the end of its job.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import signal
import sys
import tempfile
import time
import uuid
import zipfile
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import redis.exceptions

from delineate.errors import QueueUnavailable
from delineate.job import Job, JobStatus
from delineate.queue import Queue, open_queue
from tests.chaos.service import Follower, Service, http
from tests.servers import ServerProcess
from tests.worker.test_worker import content

APIS = ("api0", "api1")
WORKERS = ("worker0", "worker1", "worker2")
# How long nothing may happen at the end before what is unfinished counts as stuck.
SETTLE_SECONDS = 60
# Clients wait while more jobs than this are unfinished: what is measured is recovery, and not a line that only grows.
MAX_UNFINISHED = 40
# A zombie that writes an archive again, after its job was completed elsewhere, has had its chance by then.
VERIFY_AFTER_SECONDS = 10
# A run shorter than this has no long outages: they would be all of it.
LONG_RUN_SECONDS = 60
# Small ones are one PUT; the large ones take several parts and are what a crash interrupts.
SIZES = [0, 1_000, 300_000, 9_000_000, 26_000_000]
FILES = {70_100 + number: size for number, size in enumerate(SIZES * 2)}


class Fleet(Service):
    """A service whose processes come back, as supervisord would have it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(
            folder,
            DELINEATE__LOG__LEVEL="debug",
            # Patient with a store that is away for seconds: what is tested here is crashes, not giving up.
            DELINEATE__QUEUE__ATTEMPTS="50",
            DELINEATE__QUEUE__MAX_CRASHES="1000",
            DELINEATE__WORKER__CONCURRENCY="3",
            DELINEATE__WORKER__DRAIN_TIMEOUT="5",
            # Slow enough that most faults hit jobs in the middle.
            DELINEATE__PROCESSING__SIMULATED_DELAY__MIN="0",
            DELINEATE__PROCESSING__SIMULATED_DELAY__MAX="1.5",
        )
        self.files = {file_id: content(file_id, size) for file_id, size in FILES.items()}
        for file_id, body in self.files.items():
            (folder / "s3" / "files" / str(file_id)).write_bytes(body)

        self._written: dict[str, int] = {}

    def _mount_tmpfs(self) -> bool:
        return False  # a long run fills a small disk

    def launch(self, name: str) -> None:
        log = self.log(name)
        self._written[name] = log.stat().st_size if log.exists() else 0
        super().launch(name)

    def has_spoken(self, name: str) -> bool:
        """Whether a process has logged anything since it was launched; until then it has no signal handlers."""
        return self.log(name).stat().st_size > self._written[name]

    def replace(self, name: str) -> None:
        self.kill(name)
        self.launch(name)

    def restore(self) -> None:
        """After an interrupted fault: everything runs."""
        for server in (self.redis, self.s3):
            if server.process is None:
                server.start()
            else:
                server.process.send_signal(signal.SIGCONT)
        for name in (*APIS, *WORKERS):
            process = self.processes.get(name)
            if process is not None and process.poll() is None:
                process.send_signal(signal.SIGCONT)
            else:
                self.launch(name)


class Clients:
    """`accepted` has what each accepted job asked for; every client is a task of its own until it is served."""

    def __init__(self, session: aiohttp.ClientSession, dice: random.Random, counts: Counter[str]) -> None:
        self._session, self._random, self._counts = session, dice, counts
        self._tasks: set[asyncio.Task[None]] = set()
        self.accepted: dict[str, tuple[int, ...]] = {}
        self.followers: list[Follower] = []

    async def export_until(self, end: float, ended: Collection[str]) -> None:
        while time.monotonic() < end:
            if len(self.accepted) + len(self._tasks) - len(ended) > MAX_UNFINISHED:
                await asyncio.sleep(0.1)
                continue
            ids = tuple(self._random.sample(sorted(FILES), self._random.randint(1, 5)))
            task = asyncio.create_task(self._export(ids, follow=self._random.random() < 0.5))
            self._tasks.add(task)
            task.add_done_callback(self._served)
            await asyncio.sleep(self._random.uniform(0.1, 0.5))

    def _served(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        task.result()

    async def _export(self, ids: tuple[int, ...], *, follow: bool) -> None:
        key = str(uuid.uuid4())
        while True:
            try:
                body, headers = {"file_ids": ids}, {"Idempotency-Key": key}
                async with self._session.post("/v1/export", json=body, headers=headers) as answer:
                    document = await answer.json()
            except (aiohttp.ClientError, TimeoutError):
                self._counts["POSTs cut off"] += 1
            else:
                if answer.status == 200:
                    break
                assert answer.status == 503, document
                assert "Retry-After" in answer.headers
                self._counts["POSTs refused with 503"] += 1
            await asyncio.sleep(self._random.uniform(0.2, 0.6))
        job_id: str = document["jobId"]
        assert job_id not in self.accepted, "two keys, one job"
        self.accepted[job_id] = ids
        if follow:
            self.followers.append(Follower(self._session, job_id))

    async def all_served(self) -> None:
        while self._tasks:
            await asyncio.wait(self._tasks, timeout=SETTLE_SECONDS)

    async def all_told(self) -> None:
        """Every stream has shown its job's end."""
        waiting = {follower.task for follower in self.followers if not follower.task.done()}
        if waiting:
            await asyncio.wait(waiting, timeout=30)


class Recoveries:
    """How long it takes from a worker's end until another one has its job."""

    def __init__(self, queue: Queue, counts: Counter[str]) -> None:
        self._queue, self._counts = queue, counts
        self._tasks: set[asyncio.Task[None]] = set()
        self.longest = 0.0
        # Without those during which Redis or S3 was away, too: the promise of five seconds is about these.
        self.longest_alone = 0.0
        self.outages = 0

    async def watch(self, pid: int) -> None:
        """Call it right before the end of the worker with that pid."""
        jobs = []
        with contextlib.suppress(QueueUnavailable):
            jobs = await self._queue.jobs_by_status(JobStatus.PROCESSING)
        for job in jobs:
            if f"-{pid}-" in (job.worker or ""):
                self._counts["jobs that lost their worker"] += 1
                task = asyncio.create_task(self._until_claimed(job, time.monotonic(), self.outages))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _until_claimed(self, lost: Job, began: float, outages: int) -> None:
        while True:
            await asyncio.sleep(0.05)
            with contextlib.suppress(QueueUnavailable):
                job = await self._queue.get(lost.id)
                if job is None or job.status.is_final or (job.worker and job.token > lost.token):
                    break
        taken = time.monotonic() - began
        self.longest = max(self.longest, taken)
        if outages == self.outages:
            self.longest_alone = max(self.longest_alone, taken)


class Faults:
    """One after the other, for ever."""

    def __init__(self, fleet: Fleet, recoveries: Recoveries, dice: random.Random, counts: Counter[str]) -> None:
        self._fleet, self._recoveries, self._random, self._counts = fleet, recoveries, dice, counts

    async def run(self, *, long_ones: bool) -> None:
        faults: list[Callable[[], Awaitable[None]]] = [
            *(self._kill_worker, self._kill_worker, self._kill_worker, self._pause_worker, self._drain_worker),
            *(self._kill_api, self._drain_api),
            *(self._kill_redis, self._pause_redis, self._forget_scripts, self._restart_s3),
        ]
        turns = 0
        while True:
            await asyncio.sleep(self._random.uniform(0.3, 1.5))
            turns += 1
            if long_ones and turns % 15 == 0:
                await self._random.choice((self._redis_away, self._s3_away))()
            else:
                await self._random.choice(faults)()

    async def _kill_worker(self) -> None:
        name = self._random.choice(WORKERS)
        await self._recoveries.watch(self._fleet.processes[name].pid)
        await asyncio.to_thread(self._fleet.replace, name)
        self._counts["workers killed"] += 1

    async def _pause_worker(self) -> None:
        process = self._fleet.processes[self._random.choice(WORKERS)]
        seconds = self._random.uniform(0.5, 6)
        process.send_signal(signal.SIGSTOP)
        try:
            await asyncio.sleep(seconds)
        finally:
            process.send_signal(signal.SIGCONT)
        self._counts["workers paused"] += 1

    async def _drain_worker(self) -> None:
        await self._drain(self._random.choice(WORKERS), "workers drained")

    async def _drain_api(self) -> None:
        await self._drain(self._random.choice(APIS), "API processes drained")

    async def _drain(self, name: str, counted: str) -> None:
        process = self._fleet.processes[name]
        process.terminate()
        code = await asyncio.to_thread(process.wait, 40)
        # A process that is still loading its modules has begun nothing that it could drain.
        assert code == 0 or (code == -signal.SIGTERM and not self._fleet.has_spoken(name)), f"{name} ended with {code}"
        self._fleet.launch(name)
        self._counts[counted] += 1

    async def _kill_api(self) -> None:
        await asyncio.to_thread(self._fleet.replace, self._random.choice(APIS))
        self._counts["API processes killed"] += 1

    @asynccontextmanager
    async def _outage(self, counted: str) -> AsyncIterator[None]:
        self._recoveries.outages += 1
        yield
        self._recoveries.outages += 1
        self._counts[counted] += 1

    async def _kill_redis(self) -> None:
        async with self._outage("Redis killed"):
            await self._away(self._fleet.redis, self._fleet.redis.kill, self._random.choice([0, 0.5, 3]))

    async def _pause_redis(self) -> None:
        async with self._outage("Redis paused"):
            process = self._fleet.redis.process
            assert process is not None
            process.send_signal(signal.SIGSTOP)
            try:
                await asyncio.sleep(self._random.uniform(0.5, 7))
            finally:
                process.send_signal(signal.SIGCONT)

    async def _forget_scripts(self) -> None:
        with contextlib.suppress(redis.exceptions.RedisError, OSError):
            async with self._fleet.client() as client:
                await client.script_flush()
        self._counts["scripts flushed"] += 1

    async def _restart_s3(self) -> None:
        how = self._random.choice([self._fleet.s3.kill, self._fleet.s3.stop])
        async with self._outage("S3 restarted"):
            await self._away(self._fleet.s3, how, self._random.choice([0, 1]))

    async def _redis_away(self) -> None:
        async with self._outage("Redis away for 10 to 30 s"):
            await self._away(self._fleet.redis, self._fleet.redis.kill, self._random.uniform(10, 30))

    async def _s3_away(self) -> None:
        async with self._outage("S3 away for 10 to 30 s"):
            await self._away(self._fleet.s3, self._fleet.s3.kill, self._random.uniform(10, 30))

    @staticmethod
    async def _away(server: ServerProcess, end: Callable[[], None], seconds: float) -> None:
        await asyncio.to_thread(end)
        await asyncio.sleep(seconds)
        await asyncio.to_thread(server.start)


class Archives:
    """Verifies and removes archives: `ended` are the jobs that have, `right` has the outcome of those completed."""

    def __init__(self, fleet: Fleet, queue: Queue, accepted: Mapping[str, tuple[int, ...]]) -> None:
        self._fleet, self._queue, self._accepted = fleet, queue, accepted
        self._paths: dict[str, tuple[Path, int]] = {}
        self.ended: set[str] = set()
        self.right: dict[str, bool] = {}

    async def verify_until(self, stop: asyncio.Event) -> None:
        """Look at archives as they get old enough; the one at hand is finished after `stop`."""
        while not stop.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), 1)
            for job_id in [job_id for job_id in self._accepted if job_id not in self.right]:
                if stop.is_set():
                    break
                with contextlib.suppress(QueueUnavailable):
                    job = await self._queue.get(job_id)
                    if job is None or not job.status.is_final:
                        continue
                    self.ended.add(job_id)
                    if job.status is JobStatus.COMPLETED and time.time() - job.updated_at > VERIFY_AFTER_SECONDS:
                        await self.verify(job)

    async def verify(self, job: Job) -> None:
        if job.result is not None:
            self._paths[job.id] = self._fleet.folder / "s3" / "archives" / job.result.key, job.result.size
        self.right[job.id] = job.result is not None and await asyncio.to_thread(self._is_right, job.id)

    async def verify_again(self) -> int:
        """Look at those that were written again after they had been removed; how many there are."""
        again = [job_id for job_id, (path, _) in self._paths.items() if path.exists()]
        for job_id in again:
            self.right[job_id] = self.right[job_id] and await asyncio.to_thread(self._is_right, job_id)
        return len(again)

    def _is_right(self, job_id: str) -> bool:
        path, size = self._paths[job_id]
        wanted = [self._fleet.files[file_id] for file_id in self._accepted[job_id]]
        with contextlib.suppress(OSError, zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
            if path.stat().st_size == size and [archive.read(name) for name in archive.namelist()] == wanted:
                path.unlink()
                return True
        return False  # it stays, to be looked at


class Soak:
    def __init__(self, folder: Path, seed: int) -> None:
        self.fleet = Fleet(folder)
        self.random = random.Random(seed)
        self.counts: Counter[str] = Counter()

    async def run(self, seconds: float) -> bool:
        """Whether every promise was kept."""
        try:
            await asyncio.to_thread(self.fleet.start)
            self.fleet.launch(WORKERS[-1])
            async with open_queue(self.fleet.config) as queue, http(self.fleet) as session:
                clients = Clients(session, self.random, self.counts)
                recoveries = Recoveries(queue, self.counts)
                faults = Faults(self.fleet, recoveries, self.random, self.counts)
                archives = Archives(self.fleet, queue, clients.accepted)
                exporting = asyncio.create_task(clients.export_until(time.monotonic() + seconds, archives.ended))
                breaking = asyncio.create_task(faults.run(long_ones=seconds >= LONG_RUN_SECONDS))
                exported = asyncio.Event()
                verifying = asyncio.create_task(archives.verify_until(exported))
                tasks = (exporting, breaking, verifying)
                try:
                    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        task.result()
                    exported.set()
                    await verifying
                finally:
                    for task in tasks:
                        task.cancel()
                    await asyncio.gather(*tasks, return_exceptions=True)
                await asyncio.to_thread(self.fleet.restore)
                await clients.all_served()
                jobs = await self._all_ended(queue, clients.accepted)
                await clients.all_told()
                for job in jobs.values():
                    if job is not None and job.status is JobStatus.COMPLETED and job.id not in archives.right:
                        await archives.verify(job)
                self.counts["archives written again"] = await archives.verify_again()
                kept = self._judge(jobs, clients, archives)
                self._report(len(jobs), recoveries)
                return kept
        finally:
            await asyncio.to_thread(self.fleet.stop)

    async def _all_ended(self, queue: Queue, accepted: dict[str, tuple[int, ...]]) -> dict[str, Job | None]:
        end, before = time.monotonic() + SETTLE_SECONDS, len(accepted)
        while True:
            jobs = {job_id: await queue.get(job_id) for job_id in accepted}
            unfinished = sum(job is not None and not job.status.is_final for job in jobs.values())
            if not unfinished or time.monotonic() > end:
                break
            if unfinished < before:
                end, before = time.monotonic() + SETTLE_SECONDS, unfinished
            await asyncio.sleep(0.3)
        self.counts["doubled"] = len((await self.fleet.records()).keys() - accepted.keys())
        # Nothing may be left in the lists when every job has ended; janitors get a moment for it.
        for _ in range(100):
            stats = await queue.stats()
            left = (stats.waiting, stats.active, stats.delayed, len(await queue.abandoned_uploads(10)))
            if not any(left):
                break
            await asyncio.sleep(0.1)
        self.counts["left in lists"] = sum(left)
        return jobs

    def _judge(self, jobs: dict[str, Job | None], clients: Clients, archives: Archives) -> bool:
        for job_id, job in jobs.items():
            if job is None:
                self.counts["lost"] += 1
            elif not job.status.is_final:
                self.counts["stuck"] += 1
            elif job.status is not JobStatus.COMPLETED:
                self.counts[f"{job.status}: {job.failure and job.failure.code}"] += 1
            elif not archives.right[job_id]:
                self.counts["wrong"] += 1
            else:
                self.counts["completed and verified"] += 1
                self.counts["crashes recovered from"] += job.crashes
        for follower in clients.followers:
            follower.task.cancel()
            job = jobs[follower.job_id]
            told = follower.last is not None and job is not None and follower.last.name == job.status
            self.counts["streams that showed the end" if told else "streams that did not show the end"] += 1
            self.counts["streams resumed"] += follower.connections - 1
        broken = ("doubled", "left in lists", "streams that did not show the end")
        return self.counts["completed and verified"] == len(jobs) > 0 and not any(map(self.counts.get, broken))

    def _report(self, accepted: int, recoveries: Recoveries) -> None:
        sent: Counter[tuple[str, int]] = Counter()
        for name in WORKERS:
            for line in self.fleet.lines(name):
                if line["message"] == "part stored":
                    sent[line["context"]["uploadId"], line["context"]["part"]] += 1
        figures: dict[str, float] = {
            "accepted": accepted,
            "lost": 0,
            "parts stored": sum(sent.values()),
            "parts uploaded twice": sum(sent.values()) - len(sent),
            "longest recovery (s)": round(recoveries.longest, 2),
            "longest without an outage (s)": round(recoveries.longest_alone, 2),
            **self.counts,
        }
        for name in sorted(figures):
            print(f"{name:<34}{figures[name]:>10}")
        print(json.dumps({"soak": figures}))


def soak(seconds: float, seed: int, folder: Path) -> bool:
    return asyncio.run(Soak(folder, seed).run(seconds))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1_000_000))
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        kept = soak(options.minutes * 60, options.seed, Path(folder))
    print("every promise was kept" if kept else "a promise was broken")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
