"""GET and POST through wrk: requests a second, and CPU seconds of every process for a thousand of them.

The queue is paused, so that what is asked for waits and no worker is in the
way. GET asks for the one job in line; POST asks for an export of ten files as
a caller without a cookie. Client and servers share the machine, so the
requests a second are those of a crowded one; the CPU seconds are not.
"""

from __future__ import annotations

import json
import re
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

from benchmarks.scaling.fleet import Fleet, Meter, Service
from delineate.queue import open_queue

CONNECTIONS = 32
BODY = json.dumps({"file_ids": list(range(70_000, 70_010))})
SCRIPT = f"""
wrk.method = "POST"
wrk.body = '{BODY}'
wrk.headers["Content-Type"] = "application/json"
"""


async def measure_requests(fleet: Fleet, folder: Path, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """One row a round, way and method."""
    script = folder / "post.lua"
    script.write_text(SCRIPT)
    services = (fleet.one, fleet.two)
    ways = [
        ("1 API process, direct", fleet.one, fleet.one.api_port),
        ("1 API process, nginx", fleet.one, fleet.one.http_port),
        ("1 API process, edge and nginx", fleet.one, fleet.edge.http_port),
        ("2 API processes, direct", fleet.two, fleet.two.api_port),
        ("2 API processes, nginx", fleet.two, fleet.two.http_port),
    ]
    rows = []
    await pause(services)
    for turn in range(rounds):
        for way, service, port in ways if turn % 2 == 0 else ways[::-1]:
            for method in ("GET", "POST"):
                job = post(port)
                path = f"/v1/export/{job}" if method == "GET" else "/v1/export"
                scripts = fleet.commands()["evalsha"]
                meter = Meter(fleet)
                count, took = wrk(port, path, script if method == "POST" else None, seconds)
                row: dict[str, Any] = {"way": way, "method": method, "per_second": count / took}
                row |= {f"{role}_cpu": used * 1000 / count for role, used in meter.read().items()}
                row["scripts"] = (fleet.commands()["evalsha"] - scripts) / count
                rows.append(row)
                fleet.forget_jobs(service.config.redis.prefix)
    await resume(services)
    return rows


async def pause(services: tuple[Service, ...]) -> None:
    for service in services:
        async with open_queue(service.config) as queue:
            await queue.pause()


async def resume(services: tuple[Service, ...]) -> None:
    for service in services:
        async with open_queue(service.config) as queue:
            await queue.resume()


def post(port: int) -> str:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/export", BODY.encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310
        return str(json.loads(answer.read())["jobId"])


def wrk(port: int, path: str, script: Path | None, seconds: float) -> tuple[int, float]:
    """Requests answered with 200, and the seconds they took. Any other answer ends the benchmark."""
    command = ["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{seconds:g}s", *(("-s", str(script)) if script else ())]
    done = subprocess.run(
        [*command, f"http://127.0.0.1:{port}{path}"], capture_output=True, text=True, timeout=seconds + 30, check=True
    )
    found = re.search(r"(\d+) requests in ([\d.]+)s", done.stdout)
    if found is None or "Non-2xx" in done.stdout or "Socket errors" in done.stdout:
        raise SystemExit(f"wrk {path}: {done.stdout}{done.stderr}")
    return int(found[1]), float(found[2])
