"""What the whole service writes while it is used and broken, at level debug: one shape, and nobody's secrets."""

from __future__ import annotations

import asyncio
import json
import os
import re
import secrets
import signal
import uuid
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import aiohttp
import pytest
from msgspec.structs import replace
from redis.asyncio import Redis

from delineate.config import Config
from delineate.embedded import redis_command
from delineate.storage import open_storage
from tests.collector import collecting
from tests.conftest import unique_config
from tests.nginx.test_serve import Serve
from tests.proxies.fronts import end
from tests.servers import ServerProcess, free_port, store_of_its_own, wait_until

PASSWORD, ACCESS_KEY, SECRET_KEY = "redis-password-7f3a", "access-key-7f3a", "secret-key-7f3a"
AGENT, ADDRESS, NAME, QUERY = "Agent-7f3a/1.0", "203.0.113.77", "Kündigung 7f3a.pdf", "query-7f3a"
SHAPE = ["level", "timestamp", "service", "traceId", "spanId", "requestId", "message", "context"]
Sending = Callable[..., Awaitable[tuple[int, Any]]]


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[ServerProcess]:
    port = free_port()
    server = ServerProcess(redis_command(tmp_path, port, "--requirepass", PASSWORD), port, tmp_path / "redis.log")
    server.start()
    yield server
    server.stop()


@pytest.fixture
def s3(tmp_path: Path) -> Iterator[ServerProcess]:
    server = store_of_its_own(tmp_path, ACCESS_KEY, SECRET_KEY)
    server.start()
    yield server
    server.stop()


def configured(redis: ServerProcess, s3: ServerProcess) -> Config:
    config = unique_config(f"redis://:{PASSWORD}@127.0.0.1:{redis.port}/0", s3.port)
    keys = {"access_key_id": ACCESS_KEY, "secret_access_key": SECRET_KEY}
    return replace(config, storage=replace(config.storage, source_key="{file_id}", **keys))


@pytest.mark.timeout(seconds=180)
async def test_every_line_has_the_shape_and_none_has_a_secret(
    redis: ServerProcess, s3: ServerProcess, tmp_path: Path
) -> None:
    config = configured(redis, s3)
    async with open_storage(config.storage) as storage:
        await storage.put_source(70000, b"body" * 100, NAME)
    async with collecting() as collector:
        serve = await asyncio.to_thread(
            Serve,
            config,
            tmp_path / "home",
            DELINEATE__LOG__LEVEL="debug",
            DELINEATE__STORAGE__SOURCE_KEY="{file_id}",
            DELINEATE__STORAGE__PUBLIC_ENDPOINT_URL="http://localhost/downloads",
            DELINEATE__NGINX__TRUSTED_PROXIES="127.0.0.0/8",
            DELINEATE__API__TRUSTED_PROXIES="127.0.0.0/8",
            DELINEATE__QUEUE__ATTEMPTS="1",
            OTEL_EXPORTER_OTLP_ENDPOINT=collector.endpoint,
        )
        cookie = secrets.token_urlsafe(32)
        try:
            hidden = {cookie, PASSWORD, ACCESS_KEY, SECRET_KEY, AGENT, ADDRESS, NAME, "7f3a"}
            async with aiohttp.ClientSession(
                f"http://127.0.0.1:{serve.port}",
                headers={"User-Agent": AGENT, "X-Forwarded-For": ADDRESS, "Referer": f"http://x/?{QUERY}"},
                cookies={"delineate_session": cookie},
            ) as client:
                hidden |= await use(client, config, s3, redis, serve)
            await asyncio.to_thread(shake, serve)
        finally:
            await asyncio.to_thread(end, serve.process)
    written = serve.log.read_text() + serve.errors.read_text() + b"".join(collector.bodies).decode(errors="replace")
    assert {secret for secret in hidden if secret in written or json.dumps(secret)[1:-1] in written} == set()
    assert "X-Amz-" not in written
    assert serve.errors.read_text() == ""
    said = serve.said()
    for line in said:
        assert list(line)[: len(SHAPE)] == SHAPE, line
        assert set(line) <= {*SHAPE, "error"}, line
        assert line["level"] in ("debug", "info", "warning", "error", "critical"), line
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{3})?Z", line["timestamp"]), line
        assert isinstance(line["context"], dict), line
    assert {line["service"].removeprefix("delineate-") for line in said} == {"api", "worker", "nginx", "supervisord"}
    check_story(said)
    # nginx, too, knows the trace that the API has begun.
    (trace,) = {line["traceId"] for line in said if line["requestId"] == "the-post"}
    of_trace = {span.name for span in collector.spans if span.trace_id == trace}
    assert {"POST /v1/export", "process exports", "S3.GetObject"} <= of_trace


async def use(
    client: aiohttp.ClientSession, config: Config, s3: ServerProcess, redis: ServerProcess, serve: Serve
) -> set[str]:
    """A user's day, with everything going wrong once; the signatures that were seen."""

    async def send(method: str, path: str, body: object = None, **headers: str) -> tuple[int, Any]:
        async with client.request(
            method, path, json=body, headers={"X-Request-ID": f"story-{uuid.uuid4()}"} | headers, allow_redirects=False
        ) as answer:
            return answer.status, answer.headers.get("Location") or (await answer.json(content_type=None))

    status, created = await send("POST", f"/v1/export?{QUERY}", {"file_ids": [70000]}, **{"X-Request-ID": "the-post"})
    assert status == 200
    job = created["jobId"] if isinstance(created, dict) else created.rpartition("/")[2]
    await ended(send, job, "completed")
    status, location = await send("GET", f"/v1/export/{job}/download?redirect=1")
    assert status == 302
    link = urlsplit(location)
    (signature,) = parse_qs(link.query)["X-Amz-Signature"]
    assert (await send("HEAD", f"{link.path}?{link.query}"))[0] == 200
    assert (await send("GET", f"{link.path}?{link.query.replace(signature, signature[::-1])}"))[0] == 403
    assert (await send("GET", f"/v1/nothing?{QUERY}"))[0] == 404

    # A file that does not exist, and a job that is cancelled at once.
    _, missing = await send("POST", "/v1/export", {"file_ids": [70000, 79999]})
    await ended(send, missing.rpartition("/")[2], "failed")

    # The store is away.
    await asyncio.to_thread(s3.kill)
    assert (await send("POST", "/v1/download/check", {"file_id": 70000}))[0] in (503, 504)
    assert (await send("GET", f"{link.path}?{link.query}"))[0] == 502
    _, waiting = await send("POST", "/v1/export", {"file_ids": [70000]})
    await until(serve, "the job waits for the S3 store")
    assert (await send("DELETE", f"/v1/export/{waiting.rpartition('/')[2]}"))[0] == 200
    await asyncio.to_thread(s3.start)

    # Redis has another password than everybody thinks, and is away.
    async with Redis.from_url(config.redis.url) as admin:
        await admin.config_set("requirepass", "another-7f3a")
        await admin.client_kill_filter(_type="normal", skipme=False)
    assert (await send("GET", f"/v1/export/{job}"))[0] >= 500
    await asyncio.to_thread(redis.kill)
    assert (await send("POST", "/v1/export", {"file_ids": [70000]}))[0] == 503
    await asyncio.to_thread(redis.start)

    # Nobody's HTTP, to nginx and to the API itself.
    for port in (serve.port, int(serve.environ["DELINEATE__API__PORT"])):
        for nonsense in (f"{QUERY} /?{QUERY}\r\n\r\n", f"GET /?{QUERY} HTTP/1.1\r\n{QUERY}\r\n\r\n"):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(nonsense.encode())
            await asyncio.wait_for(reader.read(), 15)
            writer.close()
    return {signature, signature[::-1]}


async def ended(send: Sending, job: str, status: str) -> None:
    async with asyncio.timeout(30):
        while (await send("GET", f"/v1/export/{job}"))[1]["status"] != status:
            await asyncio.sleep(0.1)


async def until(serve: Serve, words: str) -> None:
    async with asyncio.timeout(30):
        while words not in serve.log.read_text():
            await asyncio.sleep(0.1)


def shake(serve: Serve) -> None:
    """Signals for levels, and a worker that is killed."""
    for number in ("USR1", "USR2"):
        assert serve.control("signal", number, "api:*", "worker:*").count("signalled") == 3
    os.kill(int(serve.control("pid", "worker:worker_00")), signal.SIGKILL)
    wait_until(lambda: serve.log.read_text().count("worker started") == 2, "its successor", 30)


def check_story(said: list[dict[str, Any]]) -> None:
    accepted = next(line for line in said if line["message"] == "job accepted")
    job, user = accepted["context"]["jobId"], accepted["context"]["userId"]
    assert re.fullmatch(r"session-[0-9a-f]{32}", user)
    of_job = [line for line in said if line["requestId"] == "the-post"]
    messages = [line["message"] for line in of_job if line["level"] == "info"]
    assert set(messages) == {"job accepted", "job claimed", "job completed", "POST /v1/export 200"}
    for line in of_job:
        if line["service"] == "delineate-worker":
            context = line["context"]
            assert (context["jobId"], context["userId"], context["fileId"]) == (job, user, 70000)
    found = {line["message"].partition(" with pid ")[0]: line for line in reversed(said)}
    assert {"job failed", "job cancelled", "answered"} <= found.keys()
    killed = found["exited: worker_00 (terminated by SIGKILL; not expected)"]
    pid = found["spawned: 'worker_00'"]["context"]["pid"]
    assert (killed["level"], killed["context"]) == (
        "warning",
        {"program": "worker_00", "pid": pid, "signal": "SIGKILL"},
    )
