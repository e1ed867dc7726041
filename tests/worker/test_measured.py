"""The metrics of a container as a person on call sees them: real processes, jobs that go well and jobs that do not."""

from __future__ import annotations

import asyncio
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from delineate.config import Config
from tests.promtool import promtool_check
from tests.servers import free_port
from tests.worker.test_worker import bench, worker_process

ONE = {
    "DELINEATE__WORKER__DRAIN_TIMEOUT": "0.1",
    "DELINEATE__WORKER__CONCURRENCY": "1",
    "DELINEATE__QUEUE__ATTEMPTS": "20",
}


class Container:
    """Processes that share one metrics folder, and the API of one of them."""

    def __init__(self, config: Config, folder: Path, http: aiohttp.ClientSession) -> None:
        self._config, self._folder, self._http = config, folder, http
        self.port = free_port()
        self.metrics = folder / "metrics"
        self.metrics.mkdir()
        self.text = ""

    @contextmanager
    def process(self, command: str, **environ: str) -> Iterator[subprocess.Popen[bytes]]:
        shared = {
            "DELINEATE__TELEMETRY__METRICS_DIR": str(self.metrics),
            "PROMETHEUS_MULTIPROC_DIR": str(self.metrics),
            "DELINEATE__API__PORT": str(self.port),
        }
        process = worker_process(self._config, self._folder / f"{command}.log", command, **shared, **environ)
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(20)
            finally:
                process.kill()
                process.wait()

    async def ask(self, method: str, path: str, **options: Any) -> Any:
        async with self._http.request(method, f"http://127.0.0.1:{self.port}{path}", **options) as answer:
            return await (answer.json() if answer.content_type == "application/json" else answer.text())

    async def export(self, *file_ids: int) -> str:
        created = await self.ask("POST", "/v1/export", json={"file_ids": list(file_ids)})
        return str(created["jobId"])

    async def until(self, sample: str, least: float, most: float = float("inf"), seconds: float = 40) -> None:
        """Ask until the sample, which may match several, is in that range."""
        end = time.monotonic() + seconds
        while True:
            try:
                self.text = await self.ask("GET", "/metrics")
            except aiohttp.ClientConnectionError:
                self.text = ""  # not there yet
            if self.text and least <= self.value(sample) <= most:
                return
            assert time.monotonic() < end, f"{sample} is {self.value(sample)} in {self.text}"
            await asyncio.sleep(0.1)

    def value(self, sample: str) -> float:
        return sum(float(found) for found in re.findall(rf"^{sample} (\S+)$", self.text, re.MULTILINE))

    def pids(self, role: str) -> set[int]:
        found = re.findall(rf'^process_cpu_seconds_total{{pid="(\d+)",role="{role}"}}', self.text, re.MULTILINE)
        return set(map(int, found))


@pytest.mark.timeout(180)
async def test_a_container_shows_jobs_that_succeed_fail_are_retried_and_lose_their_worker(
    config: Config, tmp_path: Path
) -> None:
    delayed = {
        f"DELINEATE__PROCESSING__SIMULATED_DELAY__{name}": value
        for name, value in (("ENABLED", "true"), ("MIN", "60"), ("MAX", "60"))
    }
    async with bench(config) as b, aiohttp.ClientSession() as http:
        container = Container(config, tmp_path, http)
        until, value = container.until, container.value
        files = [await b.put(70000, 1_000), await b.put(70001, 9_000_000)]
        with container.process("api") as api:
            await until('dependency_up{dependency="redis"}', 1)
            assert value('dependency_up{dependency="workers"}') == 0
            assert value('export_jobs_total{status="completed"}') == 0
            assert value('http_requests_total{method="POST",path="/v1/export",status="200"}') == 0

            first = await container.export(*files)
            unwanted = await container.export(files[0])
            await container.ask("DELETE", f"/v1/export/{unwanted}")
            await until('export_jobs_total{status="cancelled"}', 1, 1)
            await until("export_queue_oldest_seconds", 0.1)
            assert value('export_queue_size{state="waiting"}') == 1

            with container.process("worker", **ONE, **delayed, DELINEATE__WORKER__JOB_TIMEOUT="0.2"):
                await until('export_attempt_failures_total{error_class="timeout",outcome="retried"}', 2)

            with container.process("worker", **ONE, **delayed) as doomed:
                second = await container.export(files[0])
                await until("downloads_active", 1, 1)
                assert container.pids("worker") == {doomed.pid}
                assert container.pids("api") == {api.pid}
                doomed.send_signal(signal.SIGKILL)
                doomed.wait()
            await until("downloads_active", 0, 0)
            assert container.pids("worker") == set()

            with container.process("worker"):
                third = await container.export(70002)  # does not exist
                statuses = [(await b.ended(job_id, 40)).status for job_id in (first, second, third)]
                assert statuses == ["completed", "completed", "failed"]
                assert "event: completed" in await container.ask("GET", f"/v1/export/{second}/progress")
                await until("workers_live", 1)
                await until('export_jobs_total{status="completed"}', 2, 2)
                await until('export_jobs_total{status="failed"}', 1, 1)
                await until('export_crashes_recovered_total{outcome="requeued"}', 1, 1)
                await until('sse_events_total{event="completed"}', 1, 1)
                await until('sse_streams_ended_total{reason="job_ended"}', 1, 1)
            # The worker has gone, its counts have not.
            await until("workers_live", 0, 0)
            check_totals(container)
            assert len(list(container.metrics.glob("*.db"))) == 2 + 3
        assert not list(container.metrics.glob("process_*"))
        assert promtool_check("metrics", text=container.text) == ""


def check_totals(container: Container) -> None:
    value = container.value
    assert value('export_attempt_failures_total{error_class="not_found",outcome="final"}') == 1
    assert value('http_requests_total{method="POST",path="/v1/export",status="200"}') == 4
    assert value("export_job_wait_seconds_count") == 3, "retries and crashes do not count again"
    assert value('archive_parts_total{outcome="uploaded"}') == 2
    assert value("source_bytes_read_total") >= 9_002_000
    assert 9_002_000 <= value("archive_bytes_written_total") < 9_010_000
    assert value('downloads_total{status="completed"}') == 2
    assert value('downloads_total{status="failed"}') >= 3
    assert value('download_processing_seconds_count{status="completed",tier="fast"}') == 2
    assert value('export_job_duration_seconds_count{status="completed"}') == 2
    assert value('s3_operations_total{operation="UploadPart",status="ok"}') == 2
    for kind in ("script", "command", "wait", "connect"):
        assert value(f'redis_operation_duration_seconds_count{{kind="{kind}"}}') >= 1, kind
