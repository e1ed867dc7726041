"""What Redis must promise before a job counts as accepted, and that it keeps it when it is killed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from delineate.config import Config
from delineate.embedded import redis_command, redis_conf, redis_file_command
from delineate.errors import StartupError
from delineate.job import NewJob, new_job_id
from delineate.queue import Queue, open_queue
from tests.api.running import changed
from tests.api.test_serve import api_process, client, environment
from tests.servers import ServerProcess, free_port
from tests.worker.test_worker import bench, working

ALWAYS = ("--appendfsync", "always")


@asynccontextmanager
async def redis(folder: Path, *options: str) -> AsyncIterator[ServerProcess]:
    port = free_port()
    server = ServerProcess(redis_command(folder, port, *options), port, folder / "log")
    await asyncio.to_thread(server.start)
    try:
        yield server
    finally:
        await asyncio.to_thread(server.stop)


def at(config: Config, server: ServerProcess, durability: str, user: str = "") -> Config:
    config = changed(config, "redis", url=f"redis://{user}127.0.0.1:{server.port}/0")
    return changed(config, "queue", durability=durability)


@asynccontextmanager
async def queue_with(config: Config, folder: Path, durability: str, *options: str) -> AsyncIterator[Queue]:
    async with redis(folder, *options) as server, open_queue(at(config, server, durability)) as queue:
        yield queue


async def test_always_is_content_with_a_redis_that_syncs_every_write(config: Config, tmp_path: Path) -> None:
    async with queue_with(config, tmp_path, "always", *ALWAYS) as queue:
        await queue.check_server()


@pytest.mark.parametrize(
    ("options", "has", "wanted"),
    [
        (("--appendfsync", "everysec"), "has appendfsync everysec;", "set appendfsync always there"),
        (("--appendonly", "no", *ALWAYS), "has appendonly no;", "set appendonly yes there"),
        ((*ALWAYS, "--no-appendfsync-on-rewrite", "yes"), "has no-appendfsync-on-rewrite yes;", "on-rewrite no there"),
        (
            ("--appendonly", "no", "--appendfsync", "no"),
            "has appendonly no, appendfsync no;",
            "set appendonly yes, appendfsync always there",
        ),
    ],
)
async def test_always_refuses_a_redis_that_answers_before_it_syncs(
    config: Config, tmp_path: Path, options: tuple[str, ...], has: str, wanted: str
) -> None:
    async with queue_with(config, tmp_path, "always", *options) as queue:
        with pytest.raises(StartupError) as caught:
            await queue.check_server()
    line = str(caught.value)
    assert has in line
    assert wanted in line
    assert "\n" not in line


@pytest.mark.parametrize("how", ["acl", "renamed"])
async def test_a_redis_that_does_not_show_its_settings_is_refused_by_always_alone(
    config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    hidden = {
        "acl": ("--user", "app", "on", "nopass", "~*", "&*", "+@all", "-config"),
        "renamed": ("--rename-command", "CONFIG", ""),
    }
    async with redis(tmp_path, *hidden[how], *ALWAYS) as server:
        user = "app:any@" if how == "acl" else ""
        async with open_queue(at(config, server, "always", user)) as queue:
            with pytest.raises(StartupError, match="cannot be verified: this Redis does not allow CONFIG GET"):
                await queue.check_server()
        async with open_queue(at(config, server, "everysec", user)) as queue:
            await queue.check_server()
    assert not warnings(caplog)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--appendonly", "no"), "appendonly no: a crash of it loses every accepted job since its last snapshot"),
        (("--appendfsync", "no"), "appendfsync no: a crash of its machine may lose"),
        (("--appendfsync", "everysec"), None),
        (ALWAYS, None),
    ],
)
async def test_everysec_warns_once_of_a_redis_that_promises_less(
    config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture, options: tuple[str, ...], says: str | None
) -> None:
    async with queue_with(config, tmp_path, "everysec", *options) as queue:
        await queue.check_server()
    if says is None:
        assert not warnings(caplog)
    else:
        (line,) = warnings(caplog)
        assert says in line


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("durability", ["everysec", "always"])
async def test_the_embedded_redis_keeps_the_configured_promise(
    config: Config, tmp_path: Path, durability: str, caplog: pytest.LogCaptureFixture
) -> None:
    port = free_port()
    conf = tmp_path / "redis.conf"
    conf.write_text(redis_conf(tmp_path, port, "secret", durability))
    server = ServerProcess(redis_file_command(conf), port, tmp_path / "log")
    await asyncio.to_thread(server.start)
    try:
        async with open_queue(at(config, server, durability, ":secret@")) as queue:
            await queue.check_server()
            assert await queue._commands.config_get("appendfsync") == {"appendfsync": durability}
    finally:
        await asyncio.to_thread(server.stop)
    assert not warnings(caplog)


async def test_what_always_accepted_survives_a_kill_right_after(config: Config, tmp_path: Path) -> None:
    async with redis(tmp_path, *ALWAYS) as server, open_queue(at(config, server, "always")) as queue:
        for _ in range(20):
            new = NewJob(id=new_job_id(), user="ann", file_ids=(70000,))
            await queue.enqueue(new)
            # Not through a thread or a wait: nothing may come between the answer and the kill.
            assert server.process is not None
            server.process.kill()
            await asyncio.to_thread(server.kill)
            await asyncio.to_thread(server.start)
            assert await queue.get(new.id) is not None
        assert (await queue.stats()).waiting == 20


async def test_a_job_answered_with_200_runs_although_redis_was_killed(config: Config, tmp_path: Path) -> None:
    async with redis(tmp_path, *ALWAYS) as server:
        config = at(config, server, "always")
        port = free_port()
        env = environment(config, port, DELINEATE__QUEUE__DURABILITY="always")
        accepted = []
        async with api_process(env, port), client(port) as http, bench(config) as b:
            await b.put(70000, 10)
            for _ in range(5):
                async with http.post("/v1/export", json={"file_ids": [70000]}) as answer:
                    assert answer.status == 200
                    assert server.process is not None
                    server.process.kill()
                    accepted.append((await answer.json())["jobId"])
                await asyncio.to_thread(server.kill)
                await asyncio.to_thread(server.start)
            async with working(b):
                for job_id in accepted:
                    job = await b.ended(job_id)
                    assert job.failure is None
                    await b.check(job, 70000)
