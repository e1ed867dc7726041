"""What each part of a fleet costs, in CPU seconds, bytes and commands: the figures of docs/scaling.md.

    python -m benchmarks.scaling [--rounds 2] [--seconds 1.5] [--streams 1000,4000] [--part requests,...]

A real Redis, `rclone serve s3`, two services as the container runs them, one
with one API and one worker process and one with two of each, and an nginx in
front of the first. Needs nginx and wrk (apt-get install nginx wrk).

Parts: rest (nobody wants anything), requests (GET and POST), streams, exports
(large and small files, tiny jobs), downloads (archives through nginx), redis
(bytes of a job, CPU of a progress update). All of them take three minutes.
DELINEATE__ variables of the environment count for all services: set
RATE_LIMIT__ENABLED=true and RATE_LIMIT__REQUESTS=1000000000 to see the limit's cost.

Prints a table of medians over the rounds and one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.scaling.exports import (
    measure_downloads,
    measure_exports,
    measure_progress,
    measure_records,
    measure_rest,
)
from benchmarks.scaling.fleet import running_fleet
from benchmarks.scaling.requests import measure_requests
from benchmarks.scaling.streams import EVENTS_PER_SECOND, measure_streams
from delineate.launch import allow_many_open_files

PARTS = ("rest", "requests", "streams", "exports", "downloads", "redis")
Rows = list[dict[str, Any]]


async def measure(
    folder: Path, parts: Iterable[str], rounds: int, seconds: float, streams: list[int]
) -> dict[str, Any]:
    extra = {name: value for name, value in os.environ.items() if name.startswith("DELINEATE__")}
    results: dict[str, Any] = {}
    with running_fleet(folder, extra) as fleet:
        for part in parts:
            if part == "rest":
                results[part] = await measure_rest(fleet, 3 * seconds)
            elif part == "requests":
                rows = await measure_requests(fleet, folder, rounds, seconds)
                results[part] = medians(rows, ("way", "method"))
            elif part == "streams":
                results[part] = await measure_streams(fleet, streams, 2 * seconds)
            elif part == "exports":
                results[part] = medians(await measure_exports(fleet, rounds), ("load", "worker_processes"))
            elif part == "downloads":
                results[part] = await measure_downloads(fleet, 2 * rounds)
            else:
                results[part] = await measure_records(fleet) | await measure_progress(fleet, seconds)
    return results


def medians(rows: Rows, keys: tuple[str, ...]) -> Rows:
    """One row for each combination of `keys`, in the order of the first round; its floats are medians."""
    groups: dict[tuple[Any, ...], Rows] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return [
        {
            name: statistics.median(row[name] for row in some) if isinstance(value, float) else value
            for name, value in some[-1].items()
        }
        for some in groups.values()
    ]


def table(results: dict[str, Any]) -> Iterator[str]:
    """Lines for people; the JSON has the rest."""
    for row in results.get("requests", ()):
        costs = ", ".join(f"{role} {row[f'{role}_cpu']:.2f}" for role in ("api", "nginx", "edge", "redis"))
        yield f"{row['method']:<5}{row['way']:<31}{row['per_second']:>7,.0f} /s   CPU s for 1,000: {costs}"
    for row in results.get("streams", ()):
        yield (
            f"{row['streams']:>5} streams, {row['watchers_of_job']:>2} of each job, {row['way']:<7} "
            f"MB for 1,000: api {per_thousand(row, 'api'):.1f}, nginx {per_thousand(row, 'nginx'):.1f}   "
            f"CPU %: silent api {row['api_idle_percent']:.1f}, nginx {row['nginx_idle_percent']:.1f}; "
            f"{EVENTS_PER_SECOND} events/s api {row['api_percent']:.1f}, nginx {row['nginx_percent']:.1f}   "
            f"lost {row['lost']}"
        )
    for row in results.get("exports", ()):
        yield (
            f"{row['load']:<37}{row['worker_processes']} workers {row['mb_per_second']:>6.0f} MB/s "
            f"{row['files_per_second']:>6,.0f} files/s {row['jobs_per_second']:>5.1f} jobs/s   "
            f"CPU s: worker {row['worker_cpu']:.2f}, store {row['store_cpu']:.2f}, redis {row['redis_cpu']:.2f}   "
            f"peak {row['worker_peak_bytes'] / 1e6:.0f} MB   for one job: {row['redis_scripts_per_job']:.1f} scripts, "
            f"{row['redis_commands_per_job']:.0f} commands, {row['store_requests_per_job']}"
        )
    for part in ("rest", "downloads", "redis"):
        for name, value in results.get(part, {}).items():
            yield f"{part}: {name:<28}{value:>14,.2f}"


def per_thousand(row: dict[str, Any], role: str) -> float:
    megabytes: float = row[f"{role}_bytes"] / row["streams"] * 1000 / 1e6
    return megabytes


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1.5)
    parser.add_argument("--streams", default="1000,4000", help="how many streams to open, smallest first")
    parser.add_argument("--part", default=",".join(PARTS), help="what to measure")
    options = parser.parse_args()
    parts = options.part.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"unknown part {unknown.pop()}; there are {', '.join(PARTS)}")
    for tool in ("nginx", "wrk"):
        if shutil.which(tool, path=f"{os.environ.get('PATH')}:/usr/sbin") is None:
            parser.error(f"there is no {tool}; on Debian and Ubuntu: apt-get install nginx wrk")
    allow_many_open_files()
    streams = [int(count) for count in options.streams.split(",")]
    with tempfile.TemporaryDirectory(prefix="scaling-") as folder:
        results = asyncio.run(measure(Path(folder), parts, options.rounds, options.seconds, streams))
    print(f"{os.cpu_count()} cores, {options.rounds} rounds of {options.seconds:g} s")
    for line in table(results):
        print(line)
    print(json.dumps({"benchmark": "scaling", "results": results}))


if __name__ == "__main__":
    main()
