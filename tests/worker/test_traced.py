"""A job's trace as a collector gets it: real processes, real requests, attempts that fail and workers that die."""

from __future__ import annotations

import asyncio
import importlib
import itertools
import json
import pkgutil
import re
import time
from pathlib import Path
from typing import Any

import aiohttp
import opentelemetry.semconv._incubating.attributes
import opentelemetry.semconv.attributes
import pytest

from delineate.config import Config
from tests.collector import Collector, Received, collecting
from tests.worker.test_measured import ONE, Container
from tests.worker.test_worker import bench

CLIENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = f"00-{CLIENT[0]}-{CLIENT[1]}-01"
AWAY, BACK = "traces cannot be delivered, and are dropped until they can", "traces are delivered again"
LOST, SENT = 'trace_spans_total{outcome="lost"}', 'trace_spans_total{outcome="sent"}'
DELAYED = {
    "DELINEATE__PROCESSING__SIMULATED_DELAY__ENABLED": "true",
    "DELINEATE__PROCESSING__SIMULATED_DELAY__MIN": "60",
    "DELINEATE__PROCESSING__SIMULATED_DELAY__MAX": "60",
}


def traced(collector: Collector, **more: str) -> dict[str, str]:
    return {
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.endpoint,
        "DELINEATE__LOG__FORMAT": "json",
        "DELINEATE__LOG__LEVEL": "info",
        "DELINEATE__TELEMETRY__TRACES__PER_MINUTE": "1000",
        **more,
    }


def lines(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]


def standard_names() -> set[str]:
    """Every attribute name of the semantic conventions."""
    found = set()
    for package in (opentelemetry.semconv.attributes, opentelemetry.semconv._incubating.attributes):
        for module in pkgutil.iter_modules(package.__path__):
            attributes = importlib.import_module(f"{package.__name__}.{module.name}")
            found |= {value for name, value in vars(attributes).items() if name.isupper() and isinstance(value, str)}
    return found


def child_of(parent: Received, *spans: Received) -> bool:
    return all(span.parent_id == parent.span_id and span.trace_id == parent.trace_id for span in spans)


@pytest.mark.timeout(120)
async def test_one_trace_leads_from_the_clients_span_to_the_last_event(config: Config, tmp_path: Path) -> None:
    async with bench(config) as b, collecting() as collector, aiohttp.ClientSession() as http:
        container = Container(config, tmp_path, http)
        files = [await b.put(70000, 9_000_000), await b.put(70001, 1_000)]
        with container.process("api", **traced(collector)):
            await container.until('dependency_up{dependency="redis"}', 1)
            headers = {
                "traceparent": TRACEPARENT,
                "User-Agent": "agent-of-a-client",
                "Cookie": "sid=cookie-of-a-client",
            }
            url = f"http://127.0.0.1:{container.port}"
            async with http.post(f"{url}/v1/export", json={"file_ids": files}, headers=headers) as answer:
                job_id = (await answer.json())["jobId"]
                response = answer.headers["traceresponse"]
            following = asyncio.create_task(container.ask("GET", f"/v1/export/{job_id}/progress"))
            await container.until("active_sse_connections", 1)
            with container.process("worker", **traced(collector)):
                assert "event: completed" in await following
                await collector.until(
                    lambda c: {"process exports", "deliver completed"} <= {span.name for span in c.spans},
                    "the job's end",
                )

        ours = [span for span in collector.spans if span.trace_id == CLIENT[0]]
        (server,) = (span for span in ours if span.name == "POST /v1/export")
        (sent,) = (span for span in ours if span.name == "send exports")
        (attempt,) = (span for span in ours if span.name == "process exports")
        (delivered,) = (span for span in ours if span.name == "deliver completed")
        below = sorted((span for span in ours if span.parent_id == attempt.span_id), key=lambda span: span.began)
        steps = {span.name: span for span in below if span is not delivered}
        assert (server.kind, sent.kind, attempt.kind) == ("SERVER", "PRODUCER", "CONSUMER")
        assert (server.service, attempt.service, delivered.service) == (
            "delineate-api", "delineate-worker", "delineate-api",
        )  # fmt: skip
        assert server.parent_id == CLIENT[1]
        assert child_of(server, sent)
        assert child_of(sent, attempt)
        assert child_of(attempt, delivered)
        assert list(steps) == ["look up files", "build archive", "finish"]
        assert response == f"00-{CLIENT[0]}-{server.span_id}-01"

        calls = [span for span in ours if span.name.startswith("S3.")]
        assert {span.kind for span in calls} == {"CLIENT"}
        of_steps = {
            step: sorted(span.name for span in calls if span.parent_id == steps[step].span_id) for step in list(steps)
        }
        assert of_steps["look up files"] == ["S3.GetObject"] * 2
        assert of_steps["build archive"] == [
            *("S3.CompleteMultipartUpload", "S3.CreateMultipartUpload"),
            *["S3.GetObject"] * of_steps["build archive"].count("S3.GetObject"),
            *("S3.HeadObject", "S3.UploadPart", "S3.UploadPart"),
        ]
        assert {span.attributes.get("aws.s3.part_number") for span in calls} == {None, 1, 2}
        assert len(calls) == sum(map(len, of_steps.values()))
        assert all(span.attributes["http.response.status_code"] in (200, 206) for span in calls)

        assert server.attributes["http.route"] == "/v1/export"
        assert server.attributes["http.response.status_code"] == 200
        assert attempt.attributes["messaging.message.id"] == job_id
        assert attempt.attributes["delineate.attempt.outcome"] == "completed"
        assert delivered.attributes["delineate.streams"] == 1
        assert not any(span.failed for span in ours)
        for outer, inner in ((server, sent), (attempt, steps["finish"])):
            assert outer.began <= inner.began <= inner.ended <= outer.ended
        assert attempt.ended - 0.5 < delivered.began <= delivered.ended

        known = standard_names()
        used = {name for span in collector.spans for name in span.attributes if not name.startswith("delineate.")}
        assert used <= known, used - known
        for secret in (b"agent-of-a-client", b"cookie-of-a-client", b"127.0.0.1:" + str(container.port).encode()):
            assert not any(secret in body for body in collector.bodies)
        assert not any(b"X-Amz-" in body or b"uploadId" in body for body in collector.bodies)

        # Log lines have the ids of the span they were written in.
        claimed = next(line for line in lines(tmp_path / "worker.log") if line["message"] == "job claimed")
        assert (claimed["traceId"], claimed["spanId"]) == (CLIENT[0], attempt.span_id)


@pytest.mark.timeout(120)
async def test_a_further_attempt_is_linked_to_the_one_before_and_a_lost_one_is_recorded(
    config: Config, tmp_path: Path
) -> None:
    async with bench(config) as b, collecting() as collector, aiohttp.ClientSession() as http:
        container = Container(config, tmp_path, http)
        files = [await b.put(70000, 1_000)]
        with container.process("api", **traced(collector)):
            await container.until('dependency_up{dependency="redis"}', 1)
            job_id = await container.export(*files)
            # Too slow for its time limit: an attempt that fails and is tried again.
            with container.process(
                "worker", **traced(collector), **ONE, **DELAYED, DELINEATE__WORKER__JOB_TIMEOUT="0.3"
            ):
                await collector.until(lambda c: bool(c.named("process exports")), "a failed attempt")
            with container.process("worker", **traced(collector), **ONE, **DELAYED) as doomed:
                await container.until("downloads_active", 1, 1)
                killed = time.time()
                doomed.kill()
                doomed.wait()
            with container.process("worker", **traced(collector)):
                assert (await b.ended(job_id, 40)).status == "completed"
                await collector.until(lambda c: len(c.named("process exports")) >= 3, "three attempts")

        attempts = sorted(collector.named("process exports"), key=lambda span: span.began)
        *failures, lost, last = attempts
        failed = failures[0]  # others may have been handed back
        assert failed.failed
        assert failed.attributes["error.type"] == "job_timeout"
        assert "not ready within" in failed.description
        assert failed.events[0]["name"] == "exception"
        assert lost.failed
        assert lost.attributes["error.type"] == "worker_lost"
        assert lost.attributes["delineate.attempt.outcome"] == "lost"
        assert lost.began < killed < lost.ended
        assert not last.failed
        assert last.links == [lost.span_id]
        for before, after in itertools.pairwise(failures):
            assert after.links == [before.span_id]
        assert len({span.span_id for span in attempts}) == len(attempts)
        assert len({span.trace_id for span in attempts}) == 1
        assert len({span.parent_id for span in attempts}) == 1


@pytest.mark.timeout(120)
async def test_failed_requests_to_the_store_are_spans_with_the_error(config: Config, tmp_path: Path) -> None:
    async with bench(config) as b, collecting() as collector, aiohttp.ClientSession() as http:
        container = Container(config, tmp_path, http)
        with container.process("api", **traced(collector)), container.process("worker", **traced(collector)):
            await container.until("workers_live", 1)
            job = await b.ended(await container.export(70009), 40)
            assert job.status == "failed"
            await collector.until(lambda c: bool(c.named("process exports")), "the failed attempt")
        (call,) = collector.named("S3.GetObject")
        assert (call.failed, call.attributes["http.response.status_code"]) == (True, 404)
        assert (call.attributes["error.type"], call.description) == ("404", "")
        assert call.attributes["aws.s3.key"] == config.storage.source_key.format(file_id=70009)
        (attempt,) = collector.named("process exports")
        assert (attempt.failed, attempt.attributes["error.type"]) == (True, "files_missing")
        assert attempt.attributes["delineate.attempt.outcome"] == "failed"


@pytest.mark.timeout(120)
async def test_nobody_waits_for_a_collector_that_is_away_or_hangs(config: Config, tmp_path: Path) -> None:
    async with bench(config) as b, collecting() as collector, aiohttp.ClientSession() as http:
        await collector.stop()
        container = Container(config, tmp_path, http)
        files = [await b.put(70000, 1_000)]
        settings = traced(collector)
        with container.process("api", **settings) as api:
            await container.until('dependency_up{dependency="redis"}', 1)
            with container.process("worker", **settings) as worker:
                await container.until("workers_live", 1)
                for _ in range(3):
                    began = time.monotonic()
                    job_id = await container.export(*files)
                    assert time.monotonic() - began < 2
                    assert (await b.ended(job_id, 20)).status == "completed"
                # A job for each second's batch, until two batches of both processes are lost.
                while min(counted(tmp_path, AWAY).values()) < 1 or container.value(LOST) < 20:
                    await container.export(*files)
                    await container.until(LOST, 0)
                    await asyncio.sleep(1)
                assert counted(tmp_path, AWAY) == {"api.log": 1, "worker.log": 1}
                assert container.value(SENT) == 0

                await collector.start()
                while min(counted(tmp_path, BACK).values()) < 1:
                    await container.export(*files)
                    await asyncio.sleep(0.5)
                await container.until(SENT, 1)

                collector.hangs = True
                assert (await b.ended(await container.export(*files), 20)).status == "completed"
                await collector.until(lambda c: c.held == 2, "a batch of each process that gets no answer")
                began = time.monotonic()
                for process in (worker, api):
                    process.terminate()
                assert (worker.wait(10), api.wait(10)) == (0, 0)
                assert time.monotonic() - began < 5
                collector.hangs = False
        assert counted(tmp_path, AWAY) == counted(tmp_path, BACK) == {"api.log": 1, "worker.log": 1}
        said = next(line for line in lines(tmp_path / "api.log") if line["message"] == AWAY)
        assert said["level"] == "warning"
        assert said["context"]["endpoint"] == collector.endpoint
        assert "refused" in said["context"]["cause"].lower()
        others = [line["message"] for line in lines(tmp_path / "api.log") if line != said]
        assert not any("exporting" in message for message in others)


def counted(folder: Path, message: str) -> dict[str, int]:
    """How often each process has said it."""
    return {log: [line["message"] for line in lines(folder / log)].count(message) for log in ("api.log", "worker.log")}


@pytest.mark.timeout(60)
async def test_without_a_collector_a_clients_trace_still_reaches_the_log(config: Config, tmp_path: Path) -> None:
    json_lines = {"DELINEATE__LOG__FORMAT": "json"}
    async with bench(config) as b, aiohttp.ClientSession() as http:
        container = Container(config, tmp_path, http)
        files = [await b.put(70000, 1_000)]
        with container.process("api", **json_lines), container.process("worker", **json_lines):
            await container.until("workers_live", 1)
            url = f"http://127.0.0.1:{container.port}/v1/export"
            async with http.post(url, json={"file_ids": files}, headers={"traceparent": TRACEPARENT}) as answer:
                job_id = (await answer.json())["jobId"]
            job = await b.ended(job_id, 40)
            assert job.traceparent == TRACEPARENT
        of_job = [line for line in lines(tmp_path / "worker.log") if line["context"].get("jobId") == job_id]
        assert {line["traceId"] for line in of_job} == {CLIENT[0]}
        assert not re.search("opentelemetry", (tmp_path / "worker.log").read_text())


@pytest.mark.timeout(60)
async def test_the_client_and_the_configuration_decide_what_is_traced(config: Config, tmp_path: Path) -> None:
    async with bench(config) as b, collecting() as collector, aiohttp.ClientSession() as http:
        container = Container(config, tmp_path, http)
        few = traced(collector, DELINEATE__TELEMETRY__TRACES__RATIO="0", DELINEATE__TELEMETRY__TRACES__PER_MINUTE="2")
        with container.process("api", **few):
            await container.until('dependency_up{dependency="redis"}', 1)

            async def post(**headers: str) -> str:
                url = f"http://127.0.0.1:{container.port}/v1/export"
                async with http.post(url, json={"file_ids": [70000]}, headers=headers) as answer:
                    job = await b.queue.get((await answer.json())["jobId"])
                    assert job is not None
                    return job.traceparent

            assert await post() == ""
            assert await post(traceparent=f"00-{CLIENT[0]}-{CLIENT[1]}-00") == f"00-{CLIENT[0]}-{CLIENT[1]}-00"
            assert await post(traceparent="00-not-a-context-01") == ""
            recorded = [await post(traceparent=TRACEPARENT) for _ in range(4)]
            assert [text[-2:] for text in recorded] == ["01", "01", "00", "00"], "two a minute"
            assert all(text[3:35] == CLIENT[0] for text in recorded)
            await collector.until(lambda c: len(c.named("send exports")) == 2, "two jobs")
