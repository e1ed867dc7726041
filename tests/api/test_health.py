"""Health, metrics, and what clients are told while Redis or S3 is away."""

from __future__ import annotations

import socket
import uuid

import pytest

from delineate.api import health
from delineate.config import Config
from tests.api.running import changed, running_api
from tests.api.test_validation import check_error
from tests.servers import free_port


async def test_health_needs_storage_redis_and_a_worker(config: Config) -> None:
    async with running_api(config) as running:
        reply = await running.fetch("GET", "/health")
        assert reply.status == 503
        assert reply.json == {
            "status": "unhealthy",
            "checks": {"storage": "ok", "redis": "ok", "workers": "error"},
        }
    async with running_api(config) as running:
        await running.queue.register(running.worker)
        reply = await running.fetch("GET", "/health")
        assert reply.status == 200
        assert reply.json == {"status": "healthy", "checks": {"storage": "ok", "redis": "ok", "workers": "ok"}}


async def test_many_health_requests_look_once(config: Config) -> None:
    async with running_api(config) as running:
        looked = 0
        check = running.storage.check

        async def counting() -> None:
            nonlocal looked
            looked += 1
            await check()

        running.storage.check = counting  # type: ignore[method-assign]
        for _ in range(30):
            await running.fetch("GET", "/health")
        assert looked == 1


async def test_without_storage_the_process_serves_and_says_so(config: Config) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    async with running_api(changed(config, "storage", endpoint_url=url, retries=0)) as running:
        reply = await running.fetch("GET", "/health")
        assert (reply.status, reply.json["checks"]["storage"], reply.json["checks"]["redis"]) == (503, "error", "ok")
        reply = await running.fetch("POST", "/v1/download/check", {"file_id": 70000})
        assert (reply.status, reply.json["code"]) == (503, "storage_unavailable")
        assert int(reply.headers["Retry-After"]) >= 1
        assert (await running.fetch("POST", "/v1/export", {"file_ids": [70000]})).status == 200


async def test_an_outage_is_logged_once_however_many_ask(
    config: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(health, "CACHE_SECONDS", 0)
    url = f"http://127.0.0.1:{free_port()}"
    async with running_api(changed(config, "storage", endpoint_url=url, retries=0)) as running:
        for _ in range(5):
            assert (await running.fetch("GET", "/health")).json["checks"]["storage"] == "error"
    assert len([message for message in caplog.messages if message.startswith("a health check failed")]) == 1


@pytest.mark.parametrize("hangs", [False, True])
async def test_without_redis_the_process_serves_and_says_so(config: Config, hangs: bool) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        port = silent.getsockname()[1]
        if hangs:
            silent.listen()
        else:
            silent.close()
        away = changed(
            changed(config, "redis", url=f"redis://127.0.0.1:{port}/0", operation_timeout=0.5, connect_timeout=0.3),
            "rate_limit",
            enabled=True,
        )
        async with running_api(away) as running:
            job_id = uuid.uuid4()
            for method, path, body in (
                ("POST", "/v1/export", {"file_ids": [70000]}),
                ("GET", f"/v1/export/{job_id}", None),
                ("GET", f"/v1/export/{job_id}/progress", None),
                ("GET", f"/v1/export/{job_id}/download", None),
                ("DELETE", f"/v1/export/{job_id}", None),
                ("POST", f"/v1/export/{job_id}/retry", None),
                ("GET", "/v1/exports", None),
                ("POST", "/v1/download/start", {"file_id": 70000}),
            ):
                reply = await running.fetch(method, path, body)
                assert (reply.status, reply.json["code"]) == (503, "queue_unavailable"), path
                assert int(reply.headers["Retry-After"]) >= 1
                check_error(reply.json, "Service Unavailable")
            reply = await running.fetch("GET", "/health")
            assert (reply.status, reply.json["checks"]["redis"], reply.json["checks"]["workers"]) == (
                503,
                "error",
                "error",
            )
            assert (await running.fetch("GET", "/health/live")).status == 200
            assert (await running.fetch("GET", "/metrics")).status == 200


async def test_stream_without_redis_is_503_also_when_the_limit_is_off(config: Config) -> None:
    url = f"redis://127.0.0.1:{free_port()}/0"
    async with running_api(changed(config, "redis", url=url, operation_timeout=0.5)) as running:
        reply = await running.fetch("GET", f"/v1/export/{uuid.uuid4()}/progress")
        assert (reply.status, reply.json["code"]) == (503, "queue_unavailable")


async def test_requests_are_counted_once_by_template(config: Config) -> None:
    async with running_api(config) as running:
        template = "/v1/export/{jobId}/download"
        sample = f'http_requests_total{{method="GET",path="{template}",status="409"}}'

        async def count() -> float:
            text = (await running.fetch("GET", "/metrics")).text
            return next((float(line.split()[-1]) for line in text.splitlines() if line.startswith(sample)), 0.0)

        before = await count()
        job = await running.queued()
        for _ in range(3):
            await running.fetch("GET", f"/v1/export/{job.id}/download")
        assert await count() == before + 3
        await running.fetch("BREW", f"/{uuid.uuid4()}")
        text = (await running.fetch("GET", "/metrics")).text
        assert 'http_requests_total{method="OTHER",path="(none)",status="404"}' in text
        assert job.id not in text
        for name in (
            *("http_request_duration_seconds_bucket", "active_sse_connections", "downloads_total", "downloads_active"),
            *("export_jobs_total", "export_job_duration_seconds", "s3_operations_total"),
            *("s3_operation_duration_seconds", "export_queue_size"),
        ):
            assert f"\n{name}" in text or f"# TYPE {name}" in text, name


async def test_queue_is_measured(config: Config) -> None:
    async with running_api(config) as running:
        await running.queued()
        assert 'export_queue_size{state="waiting"} 1.0' in (await running.fetch("GET", "/metrics")).text


async def test_open_streams_are_counted(config: Config) -> None:
    async with running_api(config) as running:
        job = await running.queued()
        async with running.stream(job.id) as events:
            await anext(events)
            assert "\nactive_sse_connections 1.0" in (await running.fetch("GET", "/metrics")).text
