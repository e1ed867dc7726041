"""Deploys: every process is replaced under load, and nobody notices."""

from __future__ import annotations

import asyncio
import fcntl
import json
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from delineate.home import supervisor_socket
from delineate.restart import ORDER, supervisor_at
from delineate.seed import SAMPLES
from tests.chaos.traffic import Connection, Traffic
from tests.run.up import ROOT, Up

POSTS_PER_SECOND = 20
STREAMS = 200
POLLERS = 20
SETTLE_SECONDS = 60
FILES = [sample.file_id for sample in SAMPLES]
# Long enough that most jobs see a restart, some longer than the workers' drain_timeout (3 s) and handed back.
LOAD = {
    "DELINEATE__PROCESSING__SIMULATED_DELAY__ENABLED": "true",
    "DELINEATE__PROCESSING__SIMULATED_DELAY__MIN": "0.5",
    "DELINEATE__PROCESSING__SIMULATED_DELAY__MAX": "5",
    "DELINEATE__WORKER__CONCURRENCY": "60",
}

MakeUp = Callable[..., Up]


async def restart(up: Up, *processes: str) -> tuple[int, str]:
    """Run `delineate restart`; its exit code and all that it said."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "delineate", "restart", *processes),
        cwd=ROOT,
        env=up.environ,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode()


def pids(up: Up) -> dict[str, int]:
    """The pid of each API and worker process, by its name."""
    with supervisor_at(supervisor_socket(up.home)) as supervisor:
        infos = supervisor.getAllProcessInfo()
    return {f"{info['group']}:{info['name']}": info["pid"] for info in infos if info["group"] in ORDER}


async def hammer(port: int, stop: asyncio.Event, *, keep: bool) -> tuple[int, float]:
    """Request after request without a pause: how many, and the seconds of the slowest. Raises Failed."""
    connection, count, worst = Connection(port, keep=keep), 0, 0.0
    while not stop.is_set():
        began = time.monotonic()
        await connection.request("GET", "/health/live")
        count, worst = count + 1, max(worst, time.monotonic() - began)
    connection.close()
    return count, worst


@pytest.mark.timeout(seconds=300)
async def test_all_processes_are_replaced_under_load_and_no_request_job_or_stream_is_lost(make_up: MakeUp) -> None:
    up = make_up(**LOAD)
    await asyncio.to_thread(up.start)
    before = pids(up)
    traffic = Traffic(up.port, FILES, posts_per_second=POSTS_PER_SECOND, streams=STREAMS, pollers=POLLERS)
    traffic.start()
    await asyncio.sleep(5)  # until as many jobs run as will at this rate
    began = time.monotonic()
    code, said = await restart(up)
    seconds = time.monotonic() - began
    await asyncio.sleep(2)
    await traffic.stop()
    await traffic.finish(SETTLE_SECONDS)
    figures: dict[str, float] = {
        **traffic.counts,
        "jobs": len(traffic.accepted),
        "failed": len(traffic.failures),
        "handed back": up.log.read_text().count("job handed back"),
        "worst seconds": round(traffic.worst_seconds, 3),
        "restart seconds": round(seconds, 1),
    }
    print(said + json.dumps({"deploy": figures}))
    assert code == 0, said
    assert traffic.failures == []
    assert {traffic.ended[job_id] for job_id in traffic.accepted} == {"completed"}
    assert len(traffic.accepted) > POSTS_PER_SECOND * seconds
    assert traffic.counts["streams resumed"] >= STREAMS
    assert figures["handed back"] > 0
    after = pids(up)
    assert after.keys() == before.keys()
    assert not set(after.values()) & set(before.values())
    assert up.stop() == 0


async def test_not_even_the_restart_of_the_only_api_process_refuses_or_resets_a_connection(make_up: MakeUp) -> None:
    up = make_up(DELINEATE_API_PROCESSES="1", DELINEATE_WORKER_PROCESSES="1")
    await asyncio.to_thread(up.start)
    stop = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        clients = [group.create_task(hammer(up.port, stop, keep=number % 4 == 0)) for number in range(16)]
        for _ in range(2):
            code, said = await restart(up, "api")
            assert code == 0, said
        # What the README names as the plain alternative.
        said = await asyncio.to_thread(up.supervisorctl, "restart", "api:*")
        assert "api:api_00: started" in said
        stop.set()
    requests, worst = sum(client.result()[0] for client in clients), max(client.result()[1] for client in clients)
    print(json.dumps({"hammer": {"requests": requests, "worst seconds": round(worst, 3)}}))
    assert requests > 1000
    assert up.stop() == 0


async def test_a_restart_brings_what_is_on_disk_now(make_up: MakeUp, tmp_path: Path) -> None:
    conf = tmp_path / "conf"
    shutil.copytree(ROOT / "conf", conf)
    up = make_up(DELINEATE_CONF_DIR=str(conf), DELINEATE_API_PROCESSES="1", DELINEATE_WORKER_PROCESSES="1")
    # So deep that the socket is elsewhere.
    up.home = up.folder / "deep" / ("er" * 60)
    up.environ["DELINEATE_HOME"] = str(up.home)
    await asyncio.to_thread(up.start)
    before = pids(up)
    overlay = conf / "development.yml"
    original = overlay.read_text()

    overlay.write_text("rate_limit:\n  request: 77\n")
    code, said = await restart(up)
    assert (code, said.count("\n")) == (2, 1)
    assert "development.yml: rate_limit.request: no such key" in said
    assert pids(up) == before

    # Nothing is wrong with this for the configuration, but no worker can start with it.
    overlay.write_text("storage:\n  create_buckets: false\n  source_bucket: nowhere\n")
    code, said = await restart(up)
    assert code == 1
    assert "worker:worker_00 did not stay up and was stopped" in said
    assert said.endswith("; still as before: api:api_00\n")
    assert pids(up)["api:api_00"] == before["api:api_00"]
    assert "STOPPED" in up.supervisorctl("status", "worker:worker_00")

    overlay.write_text(f"{original}rate_limit:\n  requests: 77\n")
    code, said = await restart(up)
    assert code == 0, said
    reply = await Connection(up.port, keep=False).request("GET", "/health/live")
    assert reply.headers["ratelimit-limit"] == "77"
    assert up.stop() == 0


async def test_what_cannot_be_restarted_is_said_in_one_line(make_up: MakeUp) -> None:
    up = make_up(DELINEATE_API_PROCESSES="1", DELINEATE_WORKER_PROCESSES="1")
    code, said = await restart(up)
    assert (code, said.count("\n")) == (2, 1)
    assert f"no service answers at {up.home}/run/supervisor.sock" in said
    await asyncio.to_thread(up.start)
    before = pids(up)
    code, said = await restart(up, "redis")
    assert (code, said.count("\n")) == (2, 1)
    assert "redis is no process that can be restarted here; there are worker, api, api:api_00, worker:worker_00" in said
    with (up.home / "run" / "restart.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert await restart(up) == (2, "delineate restart: another restart is under way\n")
    assert pids(up) == before


async def test_an_interrupted_restart_leaves_no_process_stopped(make_up: MakeUp) -> None:
    up = make_up(DELINEATE_API_PROCESSES="2", DELINEATE_WORKER_PROCESSES="1")
    await asyncio.to_thread(up.start)
    before = pids(up)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "delineate", "restart", "api"),
        cwd=ROOT,
        env=up.environ,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    await process.stdout.readuntil(b"starting")
    process.send_signal(signal.SIGINT)
    _, errors = await process.communicate()
    assert process.returncode == 130
    assert errors.decode().endswith("interrupted; still as before: api:api_01\n")
    after = pids(up)
    assert [name for name in after if after[name] != before[name]] == ["api:api_00"]
    assert "RUNNING" in up.supervisorctl("status", "api:api_00")
