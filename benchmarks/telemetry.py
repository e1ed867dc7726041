"""What telemetry costs: CPU time of an API and of a worker process, with and without it, side by side.

    python -m benchmarks.telemetry [--rounds 6] [--seconds 3]        # needs wrk

Three processes of each kind share one Redis and one S3 server and take turns:

    none       counting, timing and tracing replaced by nothing before the service is imported, logs at error
    default    as shipped: metrics in files that processes share, JSON lines at info, no collector
    traced     as shipped, with a collector; of the exports every job is traced

A process answers as much as its core lets it, so a request's share of CPU time
is its share of throughput; unlike requests a second it does not depend on what
else the machine does. Prints medians of the rounds, in the last line as JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import http.server
import json
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from redis import Redis

from benchmarks.scaling.fleet import TETHER, cpu_seconds, descendants
from benchmarks.scaling.requests import SCRIPT, post, wrk
from delineate.config import Config, load_config
from delineate.embedded import redis_command, s3_command, s3_environment
from delineate.job import NewJob, new_job_id
from delineate.queue import open_queue
from tests.servers import ServerProcess, answers, free_port, wait_until

ACCESS_KEY, SECRET_KEY = "delineate-bench", "delineate-bench-secret"
MODES = ("none", "default", "traced")


class Load(NamedTuple):
    name: str
    first_id: int
    files: int
    size: int
    jobs: int


LOADS = (Load("1,000 files of 10 KB", 70_000, 1_000, 10_000, 4), Load("10 files of 25 MB", 80_000, 10, 25_000_000, 2))


class Pair(NamedTuple):
    """An API process and a worker process of one mode."""

    port: int
    api: subprocess.Popen[bytes]
    worker: subprocess.Popen[bytes]


class Bench(NamedTuple):
    environ: dict[str, str]
    pairs: dict[str, Pair]

    def config(self, mode: str) -> Config:
        return load_config(self.environ | {"DELINEATE__REDIS__PREFIX": mode})


def run_without(command: str) -> None:
    """The process `command` with everything of telemetry replaced by nothing."""
    from opentelemetry.trace import INVALID_SPAN
    from prometheus_client import Counter, Gauge, Histogram

    from delineate.telemetry import logs, metrics, spans

    def nothing(*_: object, **__: object) -> None:
        return None

    for kind, names in ((Counter, ("inc",)), (Gauge, ("inc", "dec", "set")), (Histogram, ("observe",))):
        for name in names:
            setattr(kind, name, nothing)
    for owner, name in ((metrics, "count_request"), (metrics, "count_s3"), (metrics.Timings, "observe")):
        setattr(owner, name, nothing)
    for name, answer in (("begin_request", INVALID_SPAN), ("start_s3", INVALID_SPAN)):
        setattr(spans, name, lambda *_, answer=answer, **__: answer)
    for name in ("end_request", "end_s3", "answered_s3", "about", "sent", "delivered"):
        setattr(spans, name, nothing)
    for name in ("sending", "attempt", "step"):
        setattr(spans, name, lambda *_, **__: nullcontext(INVALID_SPAN))
    logs.working_for = nothing

    from delineate.__main__ import main as delineate

    sys.exit(delineate([command]))


def start(mode: str, folder: Path, environ: dict[str, str]) -> Pair:
    port, metrics = free_port(), folder / "metrics"
    metrics.mkdir(parents=True)
    given = environ | {
        "DELINEATE__API__PORT": str(port),
        "DELINEATE__REDIS__PREFIX": mode,
        "DELINEATE__STORAGE__ARCHIVE_PREFIX": f"exports/{mode}/",
        "DELINEATE__LOG__LEVEL": "error" if mode == "none" else "info",
    }
    if mode != "none":
        given |= {"PROMETHEUS_MULTIPROC_DIR": str(metrics), "DELINEATE__TELEMETRY__METRICS_DIR": str(metrics)}
    if mode != "traced":
        given |= {"DELINEATE__TELEMETRY__TRACES__ENDPOINT": ""}

    def process(command: str) -> subprocess.Popen[bytes]:
        module = ["benchmarks.telemetry", "--without"] if mode == "none" else ["delineate"]
        with (folder / f"{command}.log").open("wb") as out:
            return subprocess.Popen(
                [*TETHER, sys.executable, "-m", *module, command], env=os.environ | given, stdout=out, stderr=out
            )

    return Pair(port, process("api"), process("worker"))


@contextmanager
def running(folder: Path) -> Iterator[Bench]:
    data = folder / "data"
    for bucket in ("files", "archives"):
        (data / bucket).mkdir(parents=True)
    for load in LOADS:
        noise = os.urandom(load.size)
        for file_id in range(load.first_id, load.first_id + load.files):
            (data / "files" / str(file_id)).write_bytes(noise)
    redis_port, s3_port = free_port(), free_port()
    keys = s3_environment(ACCESS_KEY, SECRET_KEY)
    with ExitStack() as stack:
        for server in (
            ServerProcess(redis_command(folder, redis_port), redis_port, folder / "redis.log"),
            ServerProcess(s3_command(data, s3_port), s3_port, folder / "s3.log", keys),
        ):
            server.start()
            stack.callback(server.stop)
        collector = stack.enter_context(collecting())
        environ = {
            "DELINEATE_ENV": "production",
            "DELINEATE__REDIS__URL": f"redis://127.0.0.1:{redis_port}/0",
            "DELINEATE__STORAGE__ENDPOINT_URL": f"http://127.0.0.1:{s3_port}",
            "DELINEATE__STORAGE__ACCESS_KEY_ID": ACCESS_KEY,
            "DELINEATE__STORAGE__SECRET_ACCESS_KEY": SECRET_KEY,
            "DELINEATE__RATE_LIMIT__ENABLED": "false",
            "DELINEATE__QUEUE__MAX_WAITING": "10000000",
            "DELINEATE__QUEUE__MAX_WAITING_OF_USER": "10000000",
            "DELINEATE__TELEMETRY__TRACES__ENDPOINT": f"http://127.0.0.1:{collector}",
        }
        pairs = {}
        for mode in MODES:
            pair = pairs[mode] = start(mode, folder / mode, environ)
            for process in (pair.api, pair.worker):
                stack.callback(process.wait, 40)
                stack.callback(process.terminate)
        for mode, pair in pairs.items():
            wait_until(partial(answers, pair.port), f"the API of {mode}", 60)
        yield Bench(environ, pairs)


class Collector(http.server.BaseHTTPRequestHandler):
    """Takes everything and looks at nothing: what is measured is how it gets there."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def collecting() -> Iterator[int]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def used(process: subprocess.Popen[bytes]) -> float:
    """CPU seconds of what the tether holds."""
    return sum(map(cpu_seconds, descendants(process.pid)))


async def measure(rounds: int, seconds: float) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as temporary, running(Path(temporary)) as bench:
        script = Path(temporary) / "post.lua"
        script.write_text(SCRIPT)
        rows = []
        for turn in range(rounds):
            # Each mode is first, second and last as often: the first finds the caches full of other things.
            order = MODES[turn % 3 :] + MODES[: turn % 3]
            for mode in order:
                rows += [{"mode": mode, **row} for row in await measure_requests(bench, mode, script, seconds)]
            for mode in order:
                rows += [{"mode": mode, **row} for row in await measure_exports(bench, mode)]
            print(f"round {turn + 1} of {rounds}", file=sys.stderr)
    return rows


async def measure_requests(bench: Bench, mode: str, script: Path, seconds: float) -> list[dict[str, Any]]:
    pair, rows = bench.pairs[mode], []
    async with open_queue(bench.config(mode)) as queue:
        await queue.pause()
        for what in ("GET", "POST"):
            path = f"/v1/export/{post(pair.port)}" if what == "GET" else "/v1/export"
            before = used(pair.api)
            count, took = wrk(pair.port, path, script if what == "POST" else None, seconds)
            rows.append({"what": f"{what}, 1,000 requests", "cpu": (used(pair.api) - before) / count * 1000})
            rows[-1]["seconds"] = took / count * 1000
    with Redis.from_url(bench.environ["DELINEATE__REDIS__URL"]) as redis:
        redis.flushall()  # also the pause; workers register again
    return rows


async def measure_exports(bench: Bench, mode: str) -> list[dict[str, Any]]:
    pair, rows = bench.pairs[mode], []
    async with open_queue(bench.config(mode)) as queue:
        for load in LOADS:
            before, started = used(pair.worker), time.perf_counter()
            jobs = [
                (await queue.enqueue(new_job(tuple(range(load.first_id, load.first_id + load.files))))).job.id
                for _ in range(load.jobs)
            ]
            for job_id in jobs:
                while (job := await queue.get(job_id)) is None or not job.status.is_final:
                    await asyncio.sleep(0.05)
                if job.status != "completed":
                    raise SystemExit(f"{load.name}: {job.failure}")
            seconds = time.perf_counter() - started
            await asyncio.sleep(1.5)  # the last spans are sent within a second
            rows.append({"what": load.name, "cpu": (used(pair.worker) - before) / load.jobs, "seconds": seconds})
    return rows


def new_job(file_ids: tuple[int, ...]) -> NewJob:
    traceparent = f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-01"
    return NewJob(id=new_job_id(), user="bench", file_ids=file_ids, traceparent=traceparent)


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians by what was asked, and the ratio of each mode to none, taken round by round."""
    results = []
    for what in dict.fromkeys(row["what"] for row in rows):
        result: dict[str, Any] = {"what": what}
        by_mode = {mode: [row for row in rows if (row["what"], row["mode"]) == (what, mode)] for mode in MODES}
        for mode, found in by_mode.items():
            result[mode] = round(statistics.median(row["cpu"] for row in found), 4)
            ratios = [row["cpu"] / base["cpu"] for row, base in zip(found, by_mode["none"], strict=True)]
            result[f"{mode}_ratio"] = round(statistics.median(ratios), 3)
            result[f"{mode}_seconds"] = round(statistics.median(row["seconds"] for row in found), 3)
        results.append(result)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=3, help="of each wrk run")
    parser.add_argument("--without", metavar="COMMAND", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.without:
        run_without(options.without)
    results = summary(asyncio.run(measure(options.rounds, options.seconds)))
    print(f"{'CPU seconds':<24}" + "".join(f"{mode:>10}" for mode in MODES) + "   default/none  traced/none")
    for row in results:
        figures = "".join(f"{row[mode]:>10.3f}" for mode in MODES)
        print(f"{row['what']:<24}{figures}{row['default_ratio']:>15.3f}{row['traced_ratio']:>13.3f}")
    print(json.dumps({"benchmark": "telemetry", "results": results}))


if __name__ == "__main__":
    main()
