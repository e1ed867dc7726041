"""What `queue.durability: always` costs: jobs accepted by a Redis that syncs every second, and by one that syncs first.

    python -m benchmarks.durability [--rounds 5] [--seconds 3] [--folder /var/tmp]

Two real servers, the same but for appendfsync, take turns; each round has one
caller and then fifty at once, all through the queue as the API uses it. The
servers write to `--folder`: choose one on the disk that matters, since a tmpfs
makes both the same.

Prints medians over the rounds, the file system, and one JSON line. A ratio is
that of jobs per second, everysec over always.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import msgspec

from delineate.config import Config, load_config
from delineate.embedded import redis_command
from delineate.job import NewJob, new_job_id
from delineate.queue import Queue, open_queue
from tests.servers import ServerProcess, free_port

POLICIES = ("everysec", "always")
CALLERS = (1, 50)
FILE_IDS = tuple(range(70_000, 70_010))


class Round(NamedTuple):
    jobs_per_second: float
    p50_ms: float
    p99_ms: float


async def measure(queue: Queue, callers: int, seconds: float) -> Round:
    waits: list[float] = []
    start = time.perf_counter()

    async def call() -> None:
        while (before := time.perf_counter()) < start + seconds:
            await queue.enqueue(NewJob(id=new_job_id(), user="bench", file_ids=FILE_IDS))
            waits.append(time.perf_counter() - before)

    await asyncio.gather(*(call() for _ in range(callers)))
    took = time.perf_counter() - start
    centiles = statistics.quantiles(waits, n=100)
    return Round(len(waits) / took, centiles[49] * 1000, centiles[98] * 1000)


def config_for(port: int) -> Config:
    config = load_config({"DELINEATE_ENV": "test", "DELINEATE__QUEUE__MAX_WAITING": "100000000"})
    return msgspec.structs.replace(
        config, redis=msgspec.structs.replace(config.redis, url=f"redis://127.0.0.1:{port}/0")
    )


async def one_round(port: int, seconds: float) -> dict[int, Round]:
    async with open_queue(config_for(port)) as queue:
        await measure(queue, max(CALLERS), 0.2)  # opens the connections
        found = {callers: await measure(queue, callers, seconds) for callers in CALLERS}
        await queue._commands.flushall()
        return found


def run(rounds: int, seconds: float, folder: Path) -> dict[tuple[str, int], Round]:
    """The median round of each policy and number of callers."""
    servers = {}
    found: dict[tuple[str, int], list[Round]] = {}
    try:
        for policy in POLICIES:
            port = free_port()
            (folder / policy).mkdir()
            # Without the forks for snapshots and rewrites, which come at moments of their own.
            options = ("--appendfsync", policy, "--save", "", "--auto-aof-rewrite-percentage", "0")
            servers[policy] = ServerProcess(
                redis_command(folder / policy, port, *options), port, folder / policy / "log"
            )
            servers[policy].start()
        for turn in range(rounds):
            # Each goes first as often as the other.
            for policy in POLICIES if turn % 2 == 0 else POLICIES[::-1]:
                for callers, one in asyncio.run(one_round(servers[policy].port, seconds)).items():
                    found.setdefault((policy, callers), []).append(one)
    finally:
        for server in servers.values():
            server.stop()
    return {case: Round(*map(statistics.median, zip(*some, strict=True))) for case, some in found.items()}


def file_system(folder: Path) -> str:
    command = ["df", "--output=fstype", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--folder", type=Path, help="where the servers write; default: the folder for temporary files")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        kind = file_system(Path(folder))
        medians = run(options.rounds, options.seconds, Path(folder))
    print(f"{os.cpu_count()} cores, {kind}, medians of {options.rounds} rounds of {options.seconds:g} s")
    print(f"{'callers':>8}{'appendfsync':>13}{'jobs/s':>10}{'p50 ms':>9}{'p99 ms':>9}{'ratio':>7}")
    for callers in CALLERS:
        for policy in POLICIES:
            one = medians[policy, callers]
            ratio = medians["everysec", callers].jobs_per_second / one.jobs_per_second
            print(
                f"{callers:>8}{policy:>13}{one.jobs_per_second:>10.0f}{one.p50_ms:>9.2f}{one.p99_ms:>9.2f}{ratio:>7.2f}"
            )
    results = [{"policy": policy, "callers": callers, **one._asdict()} for (policy, callers), one in medians.items()]
    print(json.dumps({"benchmark": "durability", "file_system": kind, "results": results}))


if __name__ == "__main__":
    main()
