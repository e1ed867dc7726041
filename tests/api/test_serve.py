"""The process: it starts without its neighbours, shares its port with its own kind only, and ends politely."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest

from delineate.api import app
from delineate.config import Config
from delineate.embedded import redis_command
from delineate.ready import is_ready
from tests.api.running import changed, next_event, parse_events, until
from tests.servers import ServerProcess, free_port

CHECKOUT = Path(__file__).resolve().parent.parent.parent


def environment(config: Config, port: int, **more: str) -> dict[str, str]:
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("DELINEATE")},
        "DELINEATE_ENV": "test",
        "DELINEATE_CONF_DIR": str(CHECKOUT / "conf"),
        "DELINEATE__API__PORT": str(port),
        "DELINEATE__REDIS__URL": config.redis.url,
        "DELINEATE__REDIS__PREFIX": config.redis.prefix,
        "DELINEATE__STORAGE__ENDPOINT_URL": config.storage.endpoint_url,
        "DELINEATE__STORAGE__ACCESS_KEY_ID": config.storage.access_key_id,
        "DELINEATE__STORAGE__SECRET_ACCESS_KEY": config.storage.secret_access_key,
        "PYTHONWARNINGS": "error",
        **more,
    }


@asynccontextmanager
async def api_process(
    env: dict[str, str], port: int, *options: str, stdin: int = asyncio.subprocess.DEVNULL
) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "delineate", "api", *options),
        env=env,
        stdin=stdin,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(15):
            async for line in process.stdout:
                if b'"serving"' in line:
                    break
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


def client(port: int) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(f"http://127.0.0.1:{port}", cookie_jar=aiohttp.DummyCookieJar())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_signal_drains_and_ends_with_0(config: Config, number: signal.Signals) -> None:
    port = free_port()
    async with api_process(environment(config, port), port) as process, client(port) as http:
        async with http.post("/v1/export", json={"file_ids": [70000]}) as answer:
            job_id = (await answer.json())["jobId"]
        waiting = asyncio.create_task(http.post("/v1/download/start", json={"file_id": 70000}))
        async with http.get(f"/v1/export/{job_id}/progress") as stream:
            events = parse_events(stream)
            await next_event(events)
            process.send_signal(number)
            assert [event.name async for event in events] == ["retry"]
        async with await waiting as answer:
            assert answer.status == 202
        assert await asyncio.wait_for(process.wait(), 8) == 0
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", port)


async def test_process_starts_and_answers_without_redis_and_storage(config: Config) -> None:
    port = free_port()
    env = environment(
        config,
        port,
        DELINEATE__REDIS__URL=f"redis://127.0.0.1:{free_port()}/0",
        DELINEATE__STORAGE__ENDPOINT_URL=f"http://127.0.0.1:{free_port()}",
    )
    async with api_process(env, port) as process, client(port) as http:
        async with http.get("/health") as answer:
            assert answer.status == 503
            assert (await answer.json())["checks"] == {"storage": "error", "redis": "error", "workers": "error"}
        async with http.get("/health/live") as answer:
            assert answer.status == 200
        process.terminate()
        assert await asyncio.wait_for(process.wait(), 8) == 0


async def test_a_redis_that_comes_later_is_looked_at_as_well(config: Config, tmp_path: Path) -> None:
    port, redis_port = free_port(), free_port()
    env = environment(
        config,
        port,
        DELINEATE__REDIS__URL=f"redis://127.0.0.1:{redis_port}/0",
        DELINEATE__QUEUE__DURABILITY="always",
    )
    redis = ServerProcess(redis_command(tmp_path, redis_port), redis_port, tmp_path / "log")
    async with api_process(env, port) as process, client(port) as http:
        async with http.get("/health") as answer:
            assert (await answer.json())["checks"]["redis"] == "error"
        try:
            await asyncio.to_thread(redis.start)
            output, _ = await asyncio.wait_for(process.communicate(), 20)
        finally:
            await asyncio.to_thread(redis.stop)
        assert process.returncode == 2
        message = json.loads(output.decode().splitlines()[-1])["message"]
        assert message.startswith("queue.durability is always, but this Redis has appendfsync everysec;")


async def test_processes_of_delineate_share_a_port(config: Config) -> None:
    port = free_port()
    env = environment(config, port)
    async with api_process(env, port) as first, api_process(env, port), client(port) as http:
        first.terminate()
        assert await asyncio.wait_for(first.wait(), 8) == 0
        async with http.get("/health/live") as answer:
            assert answer.status == 200


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()


async def test_a_socket_that_is_handed_over_keeps_its_clients_when_a_process_ends(config: Config) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=100) as listener:
        port = listener.getsockname()[1]
        env = environment(config, port)
        async with api_process(env, port, stdin=listener.fileno()) as first, client(port) as http:
            async with http.get("/health/live") as answer:
                assert answer.status == 200
            await http.close()
            first.terminate()
            assert await asyncio.wait_for(first.wait(), 8) == 0
        clients = [await asyncio.open_connection("127.0.0.1", port) for _ in range(50)]
        for _, writer in clients:
            writer.write(get("/health/live"))
        async with api_process(env, port, stdin=listener.fileno()) as second:
            for reader, writer in clients:
                assert (await asyncio.wait_for(reader.readuntil(b"}"), 8)).startswith(b"HTTP/1.1 200")
                writer.close()
            second.terminate()
            assert await asyncio.wait_for(second.wait(), 8) == 0


def test_a_changed_port_counts_from_the_next_start_of_the_whole_service(
    config: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as held:
        monkeypatch.setattr(app, "handed_over", lambda: held)
        assert app.listen(changed(config, "api", port=1).api) == [held]
        assert f"still on {held.getsockname()[1]}" in caplog.text


async def test_a_socket_of_another_kind_on_stdin_is_left_alone(config: Config, tmp_path: Path) -> None:
    port = free_port()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(tmp_path / "socket"))
        other.listen()
        async with (
            api_process(environment(config, port), port, stdin=other.fileno()),
            client(port) as http,
            http.get("/health/live") as answer,
        ):
            assert answer.status == 200


async def test_an_idle_connection_is_served_while_the_process_drains(config: Config) -> None:
    port = free_port()
    env = environment(config, port, DELINEATE__API__DRAIN_TIMEOUT="60")
    async with api_process(env, port) as process:
        async with client(port) as http, http.post("/v1/export", json={"file_ids": [70000]}) as answer:
            job_id = (await answer.json())["jobId"]
        new = await asyncio.open_connection("127.0.0.1", port)
        used, follower, following = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
        used[1].write(get("/health/live"))
        await used[0].readuntil(b"}")
        following[1].write(get(f"/v1/export/{job_id}/progress"))
        await following[0].readuntil(b"data")
        process.terminate()
        # It has noticed when its streams end.
        assert (await following[0].read()).endswith(b"\n\n")
        for reader, writer in (new, used):
            writer.write(get("/health/live"))
            answered = await reader.read()
            assert answered.startswith(b"HTTP/1.1 200")
            assert b"\r\nConnection: close\r\n" in answered
        # A stream shows the present state and sends its client on to another process.
        follower[1].write(get(f"/v1/export/{job_id}/progress"))
        followed = await follower[0].read()
        assert b"\r\nConnection: close\r\n" in followed
        assert b'"status":"queued"' in followed
        assert followed.rpartition(b"\n\nretry: ")[2].strip().isdigit()
        # With the last connection gone there is nothing to wait for.
        assert await asyncio.wait_for(process.wait(), 8) == 0
        for _, writer in (new, used, follower, following):
            writer.close()


async def test_a_connection_that_stays_idle_is_closed_when_the_drain_is_over(config: Config) -> None:
    port = free_port()
    env = environment(config, port, DELINEATE__API__DRAIN_TIMEOUT="0.5")
    async with api_process(env, port) as process:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        process.terminate()
        assert await reader.read() == b""
        writer.close()
        assert await asyncio.wait_for(process.wait(), 8) == 0


async def test_ready_file_says_that_redis_and_storage_were_reached(config: Config, tmp_path: Path) -> None:
    port = free_port()
    file = tmp_path / "api.ready"
    away = environment(config, port, DELINEATE__REDIS__URL=f"redis://127.0.0.1:{free_port()}/0")
    async with api_process(away, port, "--ready", str(file)) as process, client(port) as http:
        async with http.get("/health") as answer:
            assert answer.status == 503
        assert not file.exists()
        process.kill()
        await process.wait()
    async with api_process(environment(config, port), port, "--ready", str(file)) as process:
        await until(lambda: is_ready(file, process.pid), "readiness")
        process.terminate()
        assert await asyncio.wait_for(process.wait(), 8) == 0
        assert not file.exists()


async def test_port_of_another_program_ends_with_one_line(config: Config) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "delineate", "api"),
            # Tornado forgets to close the socket that it could not bind; Python only warns of it if told to.
            env=environment(config, port, PYTHONWARNINGS=""),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        said, _ = await asyncio.wait_for(process.communicate(), 15)
    assert process.returncode == 2
    assert f"api.port {port}" in json.loads(said)["message"]


async def test_processes_of_a_container_count_together(config: Config, tmp_path: Path) -> None:
    port = free_port()
    shared = {"DELINEATE__TELEMETRY__METRICS_DIR": str(tmp_path), "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    env = environment(config, port, **shared)
    async with api_process(env, port), api_process(env, port):
        for _ in range(20):
            async with client(port) as http, http.get("/health/live"):
                pass
        async with client(port) as http, http.get("/metrics") as answer:
            text = await answer.text()
    assert 'http_requests_total{method="GET",path="/health/live",status="200"} 20.0' in text


async def test_half_shared_metrics_end_with_one_line(config: Config, tmp_path: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "delineate", "api"),
        env=environment(config, free_port(), DELINEATE__TELEMETRY__METRICS_DIR=str(tmp_path)),
        stdout=asyncio.subprocess.PIPE,
    )
    said, _ = await asyncio.wait_for(process.communicate(), 15)
    assert process.returncode == 2
    assert "PROMETHEUS_MULTIPROC_DIR" in json.loads(said)["message"]
