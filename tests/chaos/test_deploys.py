"""Deploys: every process is replaced under load, and nobody notices."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable

import pytest

from delineate.seed import SAMPLES
from tests.chaos.traffic import Traffic
from tests.run.up import ROOT, Up

POSTS_PER_SECOND = 20
STREAMS = 200
POLLERS = 20
SETTLE_SECONDS = 60
FILES = [sample.file_id for sample in SAMPLES]
# Long enough that most jobs see a restart, some longer than the workers' drain_timeout (4 s) and handed back.
LOAD = {
    "DELINEATE__PROCESSING__SIMULATED_DELAY__ENABLED": "true",
    "DELINEATE__PROCESSING__SIMULATED_DELAY__MIN": "0.5",
    "DELINEATE__PROCESSING__SIMULATED_DELAY__MAX": "6",
    "DELINEATE__WORKER__CONCURRENCY": "100",
    "DELINEATE__LOG__LEVEL": "warning",
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


def pids(up: Up) -> dict[str, str]:
    """The pid of each API and worker process, by its name."""
    rows = [line.split() for line in up.supervisorctl("status").splitlines()]
    return {row[0]: row[3].rstrip(",") for row in rows if row[0].startswith(("api:", "worker:"))}


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
    figures = {
        **traffic.counts,
        "jobs": len(traffic.accepted),
        "failed": len(traffic.failures),
        "worst seconds": round(traffic.worst_seconds, 3),
        "restart seconds": round(seconds, 1),
    }
    print(said + json.dumps({"deploy": figures}))
    assert code == 0, said
    assert traffic.failures == []
    assert {traffic.ended[job_id] for job_id in traffic.accepted} == {"completed"}
    assert len(traffic.accepted) > POSTS_PER_SECOND * seconds
    assert traffic.counts["streams resumed"] >= STREAMS
    after = pids(up)
    assert after.keys() == before.keys()
    assert not set(after.values()) & set(before.values())
    assert up.stop() == 0
