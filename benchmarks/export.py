"""How fast files become an archive in S3: delineate's own job runner beside what one would write by hand.

    python -m benchmarks.export [--rounds 3] [--quick]

Both exporters run against the same real S3 server (`rclone serve s3`), each
run in a fresh process, the exporters taking turns. `delineate` is a claimed
job run and finished by the code that workers run, with a real Redis that
records every part. `zipfile` is the
standard library's zipfile on a stream that cannot seek, fed by one GET after
the other and uploaded by aiobotocore in parts of the same size.

Prints a table of medians and one JSON line; a ratio above 1 is in delineate's favour.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from aiobotocore.config import AioConfig
from aiobotocore.session import get_session

from delineate.config import Config, load_config
from delineate.embedded import redis_command, s3_command, s3_environment
from delineate.job import NewJob, new_job_id
from delineate.queue import open_queue
from delineate.storage import open_storage
from delineate.worker.run_job import run_job
from delineate.worker.upload import ArchiveUpload
from tests.servers import ServerProcess, free_port

if TYPE_CHECKING:
    from types_aiobotocore_s3.type_defs import CompletedPartTypeDef

ACCESS_KEY, SECRET_KEY = "delineate-bench", "delineate-bench-secret"
EXPORTERS = ("delineate", "zipfile")


class Case(NamedTuple):
    name: str
    files: int
    size: int
    unit: str


CASES = (Case("40 files of 25 MB", 40, 25_000_000, "MB/s"), Case("1,000 files of 10 KB", 1000, 10_000, "files/s"))
QUICK = (Case("4 files of 12 MB", 4, 12_000_000, "MB/s"), Case("50 files of 10 KB", 50, 10_000, "files/s"))


def file_ids(case: Case, index: int) -> tuple[int, ...]:
    start = 70_000 + index * 10_000
    return tuple(range(start, start + case.files))


async def export_with_delineate(config: Config, ids: tuple[int, ...]) -> tuple[int, float]:
    """Archive bytes, and seconds with the clients open already, as in a worker."""
    async with open_storage(config.storage) as storage, open_queue(config) as queue:
        await storage.check()
        worker = f"bench-{uuid.uuid4().hex}"
        await queue.register(worker)
        await queue.enqueue(NewJob(id=new_job_id(), user="bench", file_ids=ids))
        (lease,) = await queue.claim(worker, 1)
        start = time.perf_counter()
        upload = ArchiveUpload(lease, queue, storage)
        result = await run_job(lease.job, storage, config, upload, lambda progress: None)
        await queue.finish(lease, result)
        return result.size, time.perf_counter() - start


class Unseekable(io.RawIOBase):
    """What zipfile writes to: a buffer that is emptied part by part."""

    def __init__(self) -> None:
        self.buffer = bytearray()

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False

    def write(self, data: Any) -> int:
        self.buffer += data
        return len(data)


async def export_with_zipfile(config: Config, ids: tuple[int, ...]) -> tuple[int, float]:
    """Archive bytes, and seconds with the client open already."""
    storage, part_bytes = config.storage, config.archive.part_bytes
    options = AioConfig(
        signature_version="s3v4",
        s3={"addressing_style": "path", "payload_signing_enabled": False},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    bucket, key = storage.archive_bucket, f"bench/{uuid.uuid4()}.zip"
    async with get_session().create_client(
        "s3",
        endpoint_url=storage.endpoint_url,
        region_name=storage.region,
        aws_access_key_id=storage.access_key_id,
        aws_secret_access_key=storage.secret_access_key,
        config=options,
    ) as client:
        await client.head_bucket(Bucket=bucket)
        start = time.perf_counter()
        upload = (await client.create_multipart_upload(Bucket=bucket, Key=key))["UploadId"]
        parts: list[CompletedPartTypeDef] = []
        stream, total = Unseekable(), 0

        async def send(limit: int) -> None:
            nonlocal total
            while len(stream.buffer) >= max(limit, 1):
                body = bytes(stream.buffer[:part_bytes])
                del stream.buffer[:part_bytes]
                number = len(parts) + 1
                answer = await client.upload_part(Bucket=bucket, Key=key, UploadId=upload, PartNumber=number, Body=body)
                parts.append({"PartNumber": number, "ETag": answer["ETag"]})
                total += len(body)

        with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
            for file_id in ids:
                found = await client.get_object(
                    Bucket=storage.source_bucket, Key=storage.source_key.format(file_id=file_id)
                )
                with archive.open(zipfile.ZipInfo(f"{file_id}.bin"), "w", force_zip64=True) as entry:
                    async with found["Body"] as body:
                        while chunk := await body.read(262_144):
                            entry.write(chunk)
                            await send(part_bytes)
        await send(1)
        await client.complete_multipart_upload(
            Bucket=bucket,
            Key=key,
            UploadId=upload,
            MultipartUpload={"Parts": parts},
        )
        return total, time.perf_counter() - start


def run_one(exporter: str, config: Config, ids: tuple[int, ...]) -> None:
    """In a fresh process: one export, one JSON line about it."""
    import uvloop

    export = export_with_delineate if exporter == "delineate" else export_with_zipfile
    size, seconds = uvloop.run(export(config, ids))
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(
        json.dumps(
            {
                "seconds": seconds,
                "bytes": size,
                "cpu_seconds": used.ru_utime + used.ru_stime,
                "rss_mb": used.ru_maxrss / 1024,
            }
        )
    )


def seed(folder: Path, cases: tuple[Case, ...]) -> None:
    for index, case in enumerate(cases):
        noise = os.urandom(case.size)
        for file_id in file_ids(case, index):
            (folder / str(file_id)).write_bytes(noise)


def environment(port: int, redis_port: int) -> dict[str, str]:
    return {
        "DELINEATE__REDIS__URL": f"redis://127.0.0.1:{redis_port}/0",
        "DELINEATE_ENV": "production",
        "DELINEATE__STORAGE__ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "DELINEATE__STORAGE__ACCESS_KEY_ID": ACCESS_KEY,
        "DELINEATE__STORAGE__SECRET_ACCESS_KEY": SECRET_KEY,
    }


def measure(cases: tuple[Case, ...], rounds: int, quick: bool) -> dict[str, Any]:
    results: dict[str, dict[str, list[dict[str, float]]]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        data = Path(temporary) / "data"
        for bucket in ("files", "archives"):
            (data / bucket).mkdir(parents=True)
        seed(data / "files", cases)
        port = free_port()
        server = ServerProcess(
            s3_command(data, port), port, Path(temporary) / "log", s3_environment(ACCESS_KEY, SECRET_KEY)
        )
        redis_port = free_port()
        redis = ServerProcess(redis_command(Path(temporary), redis_port), redis_port, Path(temporary) / "redis.log")
        server.start()
        redis.start()
        try:
            for _ in range(rounds):
                for index, case in enumerate(cases):
                    for exporter in EXPORTERS:
                        command = [sys.executable, "-m", "benchmarks.export", "--one", exporter, str(index)]
                        done = subprocess.run(
                            [*command, *(["--quick"] if quick else [])],
                            env={**os.environ, **environment(port, redis_port)},
                            capture_output=True,
                            text=True,
                            check=False,
                        )
                        if done.returncode:
                            raise SystemExit(f"{exporter} failed on {case.name}: {done.stderr[-2000:]}")
                        line = json.loads(done.stdout.splitlines()[-1])
                        results.setdefault(case.name, {}).setdefault(exporter, []).append(line)
        finally:
            redis.stop()
            server.stop()
    return {case.name: summary(case, results[case.name]) for case in cases}


def summary(case: Case, runs: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    table: dict[str, Any] = {"unit": case.unit}
    for exporter, lines in runs.items():
        amount = case.files * case.size / 1e6 if case.unit == "MB/s" else case.files
        table[exporter] = {
            "speed": round(statistics.median(amount / line["seconds"] for line in lines), 1),
            "cpu_s": round(statistics.median(line["cpu_seconds"] for line in lines), 2),
            "rss_mb": round(max(line["rss_mb"] for line in lines)),
        }
    table["ratio"] = round(table["delineate"]["speed"] / table["zipfile"]["speed"], 2)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="small inputs, one round: does it run at all")
    parser.add_argument("--one", nargs=2, metavar=("EXPORTER", "CASE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    cases = QUICK if options.quick else CASES
    if options.one:
        exporter, index = options.one
        run_one(exporter, load_config(), file_ids(cases[int(index)], int(index)))
        return
    table = measure(cases, 1 if options.quick else options.rounds, options.quick)
    print(f"{'case':<24}{'exporter':<12}{'speed':>12}  {'CPU s':>7}{'RSS MB':>8}")
    for name, row in table.items():
        for exporter in EXPORTERS:
            run = row[exporter]
            speed = f"{run['speed']:,} {row['unit']}"
            print(f"{name:<24}{exporter:<12}{speed:>14}{run['cpu_s']:>7}{run['rss_mb']:>8}")
        print(f"{'':<24}{'ratio':<12}{row['ratio']:>12}x")
    print(json.dumps({"benchmark": "export", "results": table}))


if __name__ == "__main__":
    main()
