"""Large exports through a real worker process: bounded memory, and an entry of more than 4 GiB.

The sources are sparse files in the S3 server's own folder, and the archives are looked at there.
"""

from __future__ import annotations

import asyncio
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from delineate.config import Config
from delineate.embedded import s3_command, s3_environment
from delineate.job import JobStatus
from tests.servers import ACCESS_KEY, SECRET_KEY, ServerProcess, free_port
from tests.worker.test_worker import bench, worker_process

replace = msgspec.structs.replace
MAX_RSS_KB = 250 * 1024
GB = 1_000_000_000
# Half a minute on a free machine; a busy one may take its time.
SECONDS = 600
# Six gigabytes can keep a slow disk busy for longer than one request may take. What is tested is memory and ZIP64, and
# not what comes of a part that was sent twice.
PATIENCE = {"DELINEATE__WORKER__JOB_TIMEOUT": str(SECONDS), "DELINEATE__STORAGE__OPERATION_TIMEOUT": str(SECONDS)}


@pytest.fixture
def big_store(tmp_path: Path, config: Config) -> Iterator[tuple[Config, Path]]:
    """A store of its own, so that gigabytes are gone right after the test."""
    data = tmp_path / "data"
    for bucket in ("files", "archives"):
        (data / bucket).mkdir(parents=True)
    port = free_port()
    # Several jobs at full speed: the server's own limit of buffered bytes must not be what is tested.
    # Without its MD5s of everything, which took half of these tests' time on the processor.
    command = s3_command(data, port, ("--ignore-checksum", "--etag-hash", ""))
    server = ServerProcess(command, port, tmp_path / "log", s3_environment(ACCESS_KEY, SECRET_KEY))
    server.start()
    storage = replace(config.storage, endpoint_url=f"http://127.0.0.1:{port}", source_key="{file_id}")
    yield replace(config, storage=storage), data
    server.stop()
    for file in data.rglob("*"):
        if file.is_file():
            file.unlink()


def sparse(path: Path, size: int, marks: dict[int, bytes]) -> None:
    """A file of `size` bytes, zeros but for `marks` (offset -> bytes)."""
    with path.open("wb") as file:
        file.truncate(size)
        for offset, mark in marks.items():
            file.seek(offset)
            file.write(mark)


def peak_rss_kb(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1])
    raise AssertionError("no VmHWM")


@pytest.mark.timeout(seconds=SECONDS)
async def test_three_jobs_of_two_gigabytes_stay_under_250_megabytes(
    big_store: tuple[Config, Path], tmp_path: Path
) -> None:
    config, data = big_store
    for file_id in (70000, 70001):
        sparse(data / "files" / str(file_id), GB, {0: b"start", GB // 2: b"middle", GB - 3: b"end"})
    async with bench(config) as b:
        process = worker_process(config, tmp_path / "worker.log", **PATIENCE)
        try:
            jobs = [await b.export(70000, 70001) for _ in range(3)]
            ended = await asyncio.gather(*(b.ended(job_id, SECONDS) for job_id in jobs))
            assert [(job.status, job.attempts, job.failure) for job in ended] == [(JobStatus.COMPLETED, 1, None)] * 3
            peak = peak_rss_kb(process.pid)
        finally:
            process.terminate()
            process.wait(10)
    print(f"the worker had {peak} KB at most")
    assert peak < MAX_RSS_KB, f"{peak} KB"
    result = ended[0].result
    assert result is not None
    with zipfile.ZipFile(data / "archives" / result.key) as archive:
        assert [entry.file_size for entry in archive.infolist()] == [GB, GB]
        assert archive.testzip() is None


@pytest.mark.timeout(seconds=SECONDS)
async def test_a_file_of_more_than_four_gibibytes_arrives_whole(big_store: tuple[Config, Path], tmp_path: Path) -> None:
    config, data = big_store
    size = (4 << 30) + 12_345
    sparse(data / "files/70000", size, {0: b"start", (4 << 30) - 2: b"border", size - 3: b"end"})
    (data / "files/70001").write_bytes(os.urandom(5_000))
    async with bench(config) as b:
        process = worker_process(config, tmp_path / "worker.log", **PATIENCE)
        try:
            job = await b.ended(await b.export(70000, 70001), SECONDS)
        finally:
            process.terminate()
            process.wait(10)
    assert (job.status, job.failure) == (JobStatus.COMPLETED, None)
    assert job.result is not None
    with zipfile.ZipFile(data / "archives" / job.result.key) as archive:
        big, small = archive.infolist()
        assert (big.file_size, small.header_offset > 4 << 30) == (size, True)
        assert archive.testzip() is None
        assert archive.read(small) == (data / "files/70001").read_bytes()
        with archive.open(big) as entry:
            assert entry.read(5) == b"start"
