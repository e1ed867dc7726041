"""Workers at work: large files, small files, tiny jobs, and nothing at all; what each costs worker, store and Redis."""

from __future__ import annotations

import asyncio
import os
import time
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import msgspec
from redis.asyncio import Redis as AsyncRedis
from redis.asyncio.client import PubSub

from benchmarks.scaling.fleet import Fleet, Meter, Service, memory_bytes
from benchmarks.scaling.requests import pause, resume
from delineate.job import JobStatus, Lease, NewJob, Progress, Stage, new_job_id
from delineate.queue import Queue, open_queue
from delineate.queue.keys import Keys
from delineate.queue.progress import JobEvent

SHOWN_STORE_OPERATIONS = ("GetObject", "UploadPart", "CreateMultipartUpload", "CompleteMultipartUpload", "PutObject")
LONGEST_SECONDS = 180


class Load(NamedTuple):
    """`jobs` exports of the same `files` files of `size` bytes, whose ids begin at `first_id`."""

    name: str
    first_id: int
    jobs: int
    files: int
    size: int

    @property
    def bytes(self) -> int:
        return self.jobs * self.files * self.size


LARGE = Load("large files: 3 jobs of 8 x 25 MB", 70_000, 3, 8, 25_000_000)
SMALL = Load("small files: 3 jobs of 1,000 x 10 KB", 80_000, 3, 1_000, 10_000)
TINY = Load("tiny jobs: 600 of 1 x 1 KB", 90_000, 600, 1, 1_000)


def seed(fleet: Fleet) -> None:
    for load in (LARGE, SMALL, TINY):
        noise = os.urandom(load.size)
        for file_id in range(load.first_id, load.first_id + load.files):
            (fleet.sources / str(file_id)).write_bytes(noise)


async def measure_exports(fleet: Fleet, rounds: int) -> list[dict[str, Any]]:
    """One row a round, load and number of worker processes."""
    seed(fleet)
    rows: list[dict[str, Any]] = []
    resting = await commands_at_rest(fleet)
    plan: list[tuple[Load, Service]] = [
        (LARGE, fleet.one),
        (SMALL, fleet.one),
        (TINY, fleet.one),
        (TINY, fleet.two),
    ]
    for turn in range(rounds):
        for load, service in plan if turn % 2 == 0 else plan[::-1]:
            rows.append(await run_load(fleet, service, load, resting))
    return rows


async def run_load(fleet: Fleet, service: Service, load: Load, resting: Counter[str]) -> dict[str, Any]:
    """`resting` are the commands that Redis gets in 1,000 s anyway; they are taken off, but their CPU is not."""
    async with open_queue(service.config) as queue, listening(service) as ended:
        requests, commands, meter = service.store_requests(), fleet.commands(), Meter(fleet)
        started = time.monotonic()
        await enqueue(queue, load)
        await until_ended(ended, load.jobs)
        took = time.monotonic() - started
    cpu = meter.read()
    used = fleet.commands() - commands
    asked = service.store_requests() - requests
    workers = service.pids("worker")
    row: dict[str, Any] = {
        "load": load.name,
        "worker_processes": len(workers),
        "seconds": took,
        "jobs_per_second": load.jobs / took,
        "mb_per_second": load.bytes / took / 1e6,
        "files_per_second": load.jobs * load.files / took,
        "worker_peak_bytes": memory_bytes(workers, "VmHWM") / len(workers),
        "redis_scripts_per_job": (used["evalsha"] - resting["evalsha"] * took / 1000) / load.jobs,
        "redis_commands_per_job": (used.total() - resting.total() * took / 1000) / load.jobs,
        "store_requests_per_job": {name: asked[name] / load.jobs for name in SHOWN_STORE_OPERATIONS if asked[name]},
    }
    row |= {f"{role}_cpu": seconds for role, seconds in cpu.items() if role in ("worker", "redis", "store")}
    fleet.forget_jobs(service.config.redis.prefix)
    for archive in fleet.archives.rglob("*.zip"):
        archive.unlink()
    return row


async def measure_downloads(fleet: Fleet, rounds: int) -> dict[str, float]:
    """CPU seconds for each GB of archives that leaves through nginx, of nginx and of the store behind it."""
    seed(fleet)
    service = fleet.one
    async with open_queue(service.config) as queue, listening(service) as ended:
        (job_id,) = await enqueue(queue, LARGE._replace(jobs=1))
        await until_ended(ended, 1)
    url = f"http://127.0.0.1:{service.http_port}/v1/export/{job_id}/download?redirect=1"
    meter, total = Meter(fleet), 0
    started = time.monotonic()
    for _ in range(rounds):
        total += await asyncio.to_thread(fetch, url)
    took, cpu = time.monotonic() - started, meter.read()
    fleet.forget_jobs(service.config.redis.prefix)
    return {
        "mb_per_second": total / took / 1e6,
        "nginx_cpu_per_gb": cpu["nginx"] / total * 1e9,
        "store_cpu_per_gb": cpu["store"] / total * 1e9,
    }


def fetch(url: str) -> int:
    """Bytes that came, none of which is kept."""
    total = 0
    with urllib.request.urlopen(url, timeout=60) as answer:  # noqa: S310
        while piece := answer.read(1_048_576):
            total += len(piece)
    return total


async def measure_records(fleet: Fleet) -> dict[str, float]:
    """Redis' bytes for a job of one file that waits, and for one that is completed, each of its own caller."""
    seed(fleet)
    service = fleet.one
    fleet.forget_jobs(service.config.redis.prefix)
    await pause((service,))
    async with open_queue(service.config) as queue, listening(service) as ended:
        empty = int(fleet.info("memory")["used_memory"])
        await enqueue(queue, TINY)
        waiting = int(fleet.info("memory")["used_memory"])
        await resume((service,))
        await until_ended(ended, TINY.jobs)
        completed = int(fleet.info("memory")["used_memory"])
    fleet.forget_jobs(service.config.redis.prefix)
    return {"waiting_bytes": (waiting - empty) / TINY.jobs, "completed_bytes": (completed - empty) / TINY.jobs}


async def measure_rest(fleet: Fleet, seconds: float) -> dict[str, float]:
    """What the fleet asks of Redis, and of the CPU, while nobody wants anything; of one worker process each."""
    workers = len(fleet.one.pids("worker") + fleet.two.pids("worker"))
    await asyncio.sleep(2)
    meter = Meter(fleet)
    commands = await commands_at_rest(fleet, seconds)
    cpu = meter.read()
    return {
        "redis_scripts_per_second": commands["evalsha"] / 1000 / workers,
        "redis_commands_per_second": commands.total() / 1000 / workers,
        "redis_cpu_percent": 100 * cpu["redis"] / seconds / workers,
        "worker_cpu_percent": 100 * cpu["worker"] / seconds / workers,
        "worker_bytes": memory_bytes(fleet.one.pids("worker")),
        "api_bytes": memory_bytes(fleet.one.pids("api")),
    }


async def measure_progress(fleet: Fleet, seconds: float) -> dict[str, float]:
    """Redis' CPU milliseconds for one progress update, 50 of them under way at a time as from a large fleet.

    In a queue of its own, where no janitor misses the worker's heartbeat. Updates that
    come one by one cost more: each wakes Redis, and its file is written for each.
    """
    config, worker, count = fleet.one.config, "bench", 0
    config = msgspec.structs.replace(config, redis=msgspec.structs.replace(config.redis, prefix="progress"))
    async with open_queue(config) as queue:
        await queue.register(worker)
        await enqueue(queue, LARGE._replace(jobs=50))
        leases = await queue.claim(worker, 50)
        end = time.monotonic() + seconds

        async def report(lease: Lease) -> None:
            nonlocal count
            while time.monotonic() < end:
                count += 1
                progress = Progress(
                    percent=count % 100, current_file=1, stage=Stage.PACKING, message="Packing", bytes_done=count
                )
                await queue.progress(lease, progress)

        meter = Meter(fleet)
        await asyncio.gather(*map(report, leases))
        cpu = meter.read()
    fleet.forget_jobs("progress")
    return {"progress_per_second": count / seconds, "progress_redis_cpu_ms": 1000 * cpu["redis"] / count}


async def enqueue(queue: Queue, load: Load) -> list[str]:
    """The new jobs' ids; each job has a caller of its own."""
    files = tuple(range(load.first_id, load.first_id + load.files))
    ids = [new_job_id() for _ in range(load.jobs)]
    for job_id in ids:
        await queue.enqueue(NewJob(id=job_id, user=job_id, file_ids=files))
    return ids


@asynccontextmanager
async def listening(service: Service) -> AsyncIterator[PubSub]:
    """Every event of every job of a service, so that nothing has to be asked while it works."""
    async with AsyncRedis.from_url(service.config.redis.url) as client, client.pubsub() as events:
        await events.psubscribe(Keys(service.config.redis.prefix).channel("*"))
        yield events


async def until_ended(events: PubSub, jobs: int) -> None:
    """Wait for the end of so many jobs; one that fails ends the benchmark."""
    async with asyncio.timeout(LONGEST_SECONDS):
        while jobs:
            message = await events.get_message(ignore_subscribe_messages=True, timeout=1)
            if message is None or not message["data"]:
                continue
            event = msgspec.json.decode(message["data"], type=JobEvent)
            if event.status is JobStatus.FAILED:
                raise SystemExit(f"an export failed: {event.message}")
            jobs -= event.status is JobStatus.COMPLETED


async def commands_at_rest(fleet: Fleet, seconds: float = 3) -> Counter[str]:
    """Commands that Redis gets in 1,000 s while nobody wants anything."""
    before, started = fleet.commands(), time.monotonic()
    await asyncio.sleep(seconds)
    took = time.monotonic() - started
    return Counter({name: round(count * 1000 / took) for name, count in (fleet.commands() - before).items()})
