"""The permissions that docs/redis.md names are enough for everything that delineate does."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from redis.asyncio import Redis

from delineate.config import Config
from delineate.embedded import redis_command
from delineate.job import JobStatus
from tests.api.running import changed, running_api
from tests.servers import ServerProcess, free_port
from tests.worker.test_worker import bench, working

ROOT = Path(__file__).resolve().parent.parent.parent
DOCUMENT = (ROOT / "docs" / "redis.md").read_text()


def groups(config: Config) -> list[str]:
    (line,) = re.findall(r"^    user delineate (on .*)$", DOCUMENT, re.MULTILINE)
    return str(line).replace("delineate:", f"{config.redis.prefix}:").split()


def listed_commands() -> list[str]:
    text = DOCUMENT.partition("Single commands instead of groups")[2]
    return [name.lower().replace(" ", "|") for name in re.findall(r"`([A-Z ]+)`", text)]


def single_commands(config: Config) -> list[str]:
    user_and_keys = [word for word in groups(config) if not word.startswith(("+", "-"))]
    commands = (*listed_commands(), "config|get", "role")
    return [*user_and_keys, "-@all", *(f"+{name}" for name in commands)]


def test_every_command_of_the_scripts_is_listed() -> None:
    for file in (ROOT / "delineate" / "queue" / "lua").glob("*.lua"):
        for name in re.findall(r"redis\.call\('(\w+)'", file.read_text()):
            assert name.lower() in listed_commands(), f"{file.name}: {name} is not in docs/redis.md"


@pytest.mark.parametrize("rules", [groups, single_commands])
async def test_the_documented_permissions_are_enough(
    config: Config, tmp_path: Path, rules: Callable[[Config], list[str]]
) -> None:
    port = free_port()
    server = ServerProcess(
        redis_command(tmp_path, port, "--appendfsync", "always", "--user", "delineate", *rules(config)),
        port,
        tmp_path / "log",
    )
    await asyncio.to_thread(server.start)
    try:
        config = changed(config, "redis", url=f"redis://delineate@127.0.0.1:{port}/1", password="change-me")
        config = changed(config, "queue", durability="always")
        config = changed(config, "rate_limit", enabled=True)
        await everything(config)
        async with Redis(port=port, decode_responses=True, protocol=2) as admin:
            refused = {str(entry["object"]).partition("|")[0] for entry in await admin.acl_log()}
        assert refused <= {"client"}  # CLIENT SETINFO, whose refusal redis-py ignores
    finally:
        await asyncio.to_thread(server.stop)


async def everything(config: Config) -> None:
    async with running_api(config) as api, bench(config) as b:
        await b.queue.check_server()
        await b.put(70000, 12_000_000)
        cancelled = (await api.fetch("POST", "/v1/export", {"file_ids": [70000]})).json["jobId"]
        assert (await api.fetch("DELETE", f"/v1/export/{cancelled}")).status == 200
        body = {"file_ids": [70000]}
        for _ in range(2):
            reply = await api.fetch("POST", "/v1/export", body, Idempotency_Key="once")
            assert reply.status == 200
        job_id = reply.json["jobId"]
        async with working(b), api.stream(job_id) as events:
            assert [event.name async for event in events][-1] == "completed"
            missing = await b.ended((await api.fetch("POST", "/v1/export", {"file_ids": [99999]})).json["jobId"])
            assert missing.status is JobStatus.FAILED
            for again in (missing.id, cancelled):
                assert (await api.fetch("POST", f"/v1/export/{again}/retry")).status == 200
            assert (await b.ended(cancelled)).status is JobStatus.COMPLETED
            assert (await api.fetch("GET", f"/v1/export/{cancelled}")).status == 200
            assert (await api.fetch("GET", "/v1/exports")).status == 200
            assert (await api.fetch("GET", "/health")).status == 200
            await b.ended(missing.id)
