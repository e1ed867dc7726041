"""Chaos: jobs go in at a steady rate while workers, Redis and the S3 server are killed, stopped and restarted.

    make soak MINUTES=10        or: python -m tests.chaos.soak --minutes 10 --seed 1

Real processes throughout. Faults are drawn at random from FAULTS, one after
the other. At the end everything is left alone until every accepted job has
ended; each completed archive is then compared byte by byte with its files.
Prints a summary and exits with 1 if a job was lost, stuck, wrong, or failed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec

from delineate.config import Config, load_config
from delineate.embedded import redis_command, s3_command, s3_environment
from delineate.errors import QueueUnavailable
from delineate.job import Job, JobStatus, NewJob, new_job_id
from delineate.queue import Queue, open_queue
from tests.conftest import CONF
from tests.servers import ACCESS_KEY, SECRET_KEY, ServerProcess, free_port
from tests.worker.test_worker import content, worker_process

replace = msgspec.structs.replace
WORKERS = 3
SETTLE_SECONDS = 120
# Small ones are one PUT; the large ones take several parts and are what a crash interrupts.
SIZES = [0, 1_000, 300_000, 9_000_000, 26_000_000]


class Soak:
    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        self.data = folder / "s3"
        for bucket in ("files", "archives"):
            (self.data / bucket).mkdir(parents=True)
        redis_port, s3_port = free_port(), free_port()
        (folder / "redis").mkdir()
        # "always": what was answered is on disk, so a killed Redis may lose nothing.
        command = redis_command(folder / "redis", redis_port, "--appendfsync", "always")
        self.redis = ServerProcess(command, redis_port, folder / "redis.log")
        keys = s3_environment(ACCESS_KEY, SECRET_KEY)
        self.s3 = ServerProcess(s3_command(self.data, s3_port), s3_port, folder / "s3.log", keys)
        self.config = self._config(redis_port, s3_port)
        self.workers: list[subprocess.Popen[bytes]] = []
        self.accepted: dict[str, tuple[int, ...]] = {}
        self.counts: Counter[str] = Counter()
        self.files = {70_000 + i: content(70_000 + i, size) for i, size in enumerate(SIZES * 2)}

    def _config(self, redis_port: int, s3_port: int) -> Config:
        loaded = load_config({"DELINEATE_ENV": "test"}, CONF)
        return replace(
            loaded,
            redis=replace(loaded.redis, url=f"redis://127.0.0.1:{redis_port}/0"),
            storage=replace(
                loaded.storage,
                endpoint_url=f"http://127.0.0.1:{s3_port}",
                access_key_id=ACCESS_KEY,
                secret_access_key=SECRET_KEY,
            ),
        )

    async def run(self, seconds: float) -> bool:
        """Whether every promise was kept."""
        for file_id, body in self.files.items():
            (self.data / "files" / str(file_id)).write_bytes(body)
        try:
            self.redis.start()
            self.s3.start()
            self.workers = [self._new_worker(number) for number in range(WORKERS)]
            async with open_queue(self.config) as queue:
                faults = asyncio.create_task(self._break_things())
                await self._export_until(queue, time.monotonic() + seconds)
                faults.cancel()
                await asyncio.gather(faults, return_exceptions=True)
                if faults.done() and not faults.cancelled() and (error := faults.exception()):
                    raise error
                await asyncio.to_thread(self._restore)
                return self._judge(await self._all_ended(queue))
        finally:
            for worker in self.workers:
                worker.kill()
                worker.wait()
            self.redis.stop()
            self.s3.stop()

    def _new_worker(self, number: int) -> subprocess.Popen[bytes]:
        # Patient with a store that is away for seconds: what is tested here is crashes, not giving up.
        return worker_process(
            self.config,
            self.folder / f"worker{number}.log",
            DELINEATE__QUEUE__ATTEMPTS="50",
            DELINEATE__QUEUE__MAX_CRASHES="1000",
            DELINEATE__LOG__LEVEL="info",
            DELINEATE__ARCHIVE__PART_BYTES="5242880",
            # Slow enough that most faults hit jobs in the middle.
            DELINEATE__PROCESSING__SIMULATED_DELAY__ENABLED="true",
            DELINEATE__PROCESSING__SIMULATED_DELAY__MIN="0",
            DELINEATE__PROCESSING__SIMULATED_DELAY__MAX="1.5",
        )

    async def _export_until(self, queue: Queue, end: float) -> None:
        while time.monotonic() < end:
            ids = tuple(self.random.sample(sorted(self.files), self.random.randint(1, 5)))
            new = NewJob(id=new_job_id(), user=f"user{self.random.randint(1, 5)}", file_ids=ids)
            try:
                await queue.enqueue(new)
                self.accepted[new.id] = ids
            except QueueUnavailable:
                self.counts["refused"] += 1
            await asyncio.sleep(self.random.uniform(0.1, 0.5))

    async def _break_things(self) -> None:
        faults: list[Callable[[], Awaitable[None]]] = [
            self._kill_worker,
            self._kill_worker,
            self._stop_worker,
            self._drain_worker,
            self._kill_redis,
            self._restart_s3,
        ]
        while True:
            await asyncio.sleep(self.random.uniform(0.3, 1.5))
            await self.random.choice(faults)()

    async def _kill_worker(self) -> None:
        number = self.random.randrange(WORKERS)
        self.workers[number].kill()
        await asyncio.to_thread(self.workers[number].wait)
        self.workers[number] = self._new_worker(number)
        self.counts["workers killed"] += 1

    async def _stop_worker(self) -> None:
        worker = self.random.choice(self.workers)
        worker.send_signal(signal.SIGSTOP)
        try:
            await asyncio.sleep(self.random.uniform(0.5, 3))
        finally:
            worker.send_signal(signal.SIGCONT)
        self.counts["workers paused"] += 1

    async def _drain_worker(self) -> None:
        number = self.random.randrange(WORKERS)
        self.workers[number].terminate()
        code = await asyncio.to_thread(self.workers[number].wait, 30)
        self.counts["workers drained" if code == 0 else f"workers ended with {code}"] += 1
        self.workers[number] = self._new_worker(number)

    async def _kill_redis(self) -> None:
        await asyncio.to_thread(self.redis.kill)
        await asyncio.sleep(self.random.choice([0, 0.5, 3]))
        await asyncio.to_thread(self.redis.start)
        self.counts["redis killed"] += 1

    async def _restart_s3(self) -> None:
        await asyncio.to_thread(self.random.choice([self.s3.kill, self.s3.stop]))
        await asyncio.sleep(self.random.choice([0, 1]))
        await asyncio.to_thread(self.s3.start)
        self.counts["s3 restarted"] += 1

    def _restore(self) -> None:
        """After an interrupted fault: everything runs again."""
        for server in (self.redis, self.s3):
            if server.process is None:
                server.start()
        for number, worker in enumerate(self.workers):
            if worker.poll() is not None:
                self.workers[number] = self._new_worker(number)

    async def _all_ended(self, queue: Queue) -> dict[str, Job | None]:
        end = time.monotonic() + SETTLE_SECONDS
        while True:
            jobs = {job_id: await queue.get(job_id) for job_id in self.accepted}
            unfinished = [job for job in jobs.values() if job and not job.status.is_final]
            if not unfinished or time.monotonic() > end:
                await self._leftovers(queue)
                return jobs
            await asyncio.sleep(0.3)

    async def _leftovers(self, queue: Queue) -> None:
        """Nothing may be left in the lists when every job has ended; janitors get a moment for it."""
        for _ in range(50):
            stats = await queue.stats()
            left = (stats.waiting, stats.active, stats.delayed, len(await queue.abandoned_uploads(10)))
            if not any(left):
                return
            await asyncio.sleep(0.1)
        self.counts["left in lists"] = sum(left)

    def _judge(self, jobs: dict[str, Job | None]) -> bool:
        bad = self.counts["left in lists"]
        recoveries = 0
        for job_id, job in jobs.items():
            if job is None:
                self.counts["lost"] += 1
            elif not job.status.is_final:
                self.counts["stuck"] += 1
            elif job.status is not JobStatus.COMPLETED:
                self.counts[f"{job.status}: {job.failure and job.failure.code}"] += 1
            elif not self._archive_is_right(job, self.accepted[job_id]):
                self.counts["wrong"] += 1
            else:
                self.counts["completed and verified"] += 1
                recoveries += job.crashes
                continue
            bad += 1
        self.counts["accepted"] = len(jobs)
        self.counts["crashes recovered from"] = recoveries
        for name in sorted(self.counts):
            print(f"{name:<28}{self.counts[name]:>8}")
        print(json.dumps({"soak": dict(self.counts)}))
        return not bad and bool(jobs)

    def _archive_is_right(self, job: Job, file_ids: tuple[int, ...]) -> bool:
        if job.result is None:
            return False
        path = self.data / "archives" / job.result.key
        with contextlib.suppress(OSError, zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
            return path.stat().st_size == job.result.size and [archive.read(name) for name in archive.namelist()] == [
                self.files[file_id] for file_id in file_ids
            ]
        return False


def soak(seconds: float, seed: int, folder: Path) -> bool:
    return asyncio.run(Soak(folder, seed).run(seconds))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1_000_000))
    options = parser.parse_args()
    print(f"seed {options.seed}")
    with tempfile.TemporaryDirectory() as folder:
        kept = soak(options.minutes * 60, options.seed, Path(folder))
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
