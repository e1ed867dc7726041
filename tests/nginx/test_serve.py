"""nginx and the API processes behind it: kept connections, and restarts that nobody notices."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from delineate.config import Config
from tests.chaos.tcp_proxy import TcpProxy
from tests.nginx.certificates import make_certificate
from tests.nginx.door import door, steady_port
from tests.nginx.test_answers import get
from tests.proxies.fronts import Api, end, find
from tests.run.up import ROOT
from tests.servers import answers, wait_until


async def test_connections_to_the_api_are_kept(shared_config: Config, tmp_path: Path, api: Api) -> None:
    port = steady_port()
    between = TcpProxy(port, api.port)
    between.start()
    try:
        with door(shared_config, tmp_path / "n", api=port) as nginx:
            for _ in range(100):
                assert (await nginx.raw(get("/health/live"))).status == 200
            # One, and another after each pause of a second.
            assert between.connected <= 5
            for _ in range(10):
                await asyncio.gather(*(nginx.raw(get("/health/live")) for _ in range(20)))
            assert between.connected <= 40
    finally:
        between.stop()


class Serve:
    """One `delineate serve`; `home` is its DELINEATE_HOME, `log` its stdout and `errors` its stderr."""

    def __init__(self, config: Config, home: Path, **given: str) -> None:
        find("nginx")
        self.home, self.log, self.errors = home, home.with_name("log"), home.with_name("errors")
        self.port, self.internal_port = steady_port(), steady_port()
        environ = {name: value for name, value in os.environ.items() if not name.startswith("DELINEATE")}
        self.environ = environ | {
            "DELINEATE_ENV": "test",
            "DELINEATE_HOME": str(home),
            "DELINEATE_WORKER_PROCESSES": "1",
            "DELINEATE__API__PORT": str(steady_port()),
            "DELINEATE__NGINX__HTTP_PORT": str(self.port),
            "DELINEATE__NGINX__INTERNAL_PORT": str(self.internal_port),
            "DELINEATE__REDIS__URL": config.redis.url,
            "DELINEATE__REDIS__PREFIX": config.redis.prefix,
            "DELINEATE__STORAGE__ENDPOINT_URL": config.storage.endpoint_url,
            "DELINEATE__STORAGE__ACCESS_KEY_ID": config.storage.access_key_id,
            "DELINEATE__STORAGE__SECRET_ACCESS_KEY": config.storage.secret_access_key,
            **given,
        }
        with self.log.open("ab") as out, self.errors.open("ab") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "delineate", "serve"], cwd=ROOT, env=self.environ, stdout=out, stderr=errors
            )

        def ready() -> bool:
            assert self.process.poll() is None, self.errors.read_text() + self.log.read_text()
            return answers(self.port) and len([*(home / "run").glob("api_*.ready")]) == 2

        wait_until(ready, "the start", 30)

    def said(self) -> list[dict[str, Any]]:
        """Every line of stdout, each of them an object."""
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def control(self, *words: str) -> str:
        command = [str(Path(sys.executable).with_name("supervisorctl")), "-c", str(ROOT / "supervisord.conf")]
        sock = f"unix://{self.home}/run/supervisor.sock"
        return subprocess.run([*command, "-s", sock, *words], capture_output=True, text=True, timeout=20).stdout

    def restart(self, *names: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "delineate", "restart", *names],
            cwd=ROOT,
            env=self.environ,
            stdout=subprocess.DEVNULL,
        )


@pytest.fixture
def serve(shared_config: Config, tmp_path: Path) -> Iterator[Serve]:
    files = make_certificate(tmp_path)
    started = Serve(
        shared_config,
        tmp_path / "home",
        DELINEATE__NGINX__CERTIFICATE=str(files.certificate),
        DELINEATE__NGINX__CERTIFICATE_KEY=str(files.key),
        DELINEATE__NGINX__HTTPS_PORT=str(steady_port()),
    )
    yield started
    end(started.process)
    assert started.errors.read_text() == ""
    # The workers complain about files that are not there.
    serious = [line for line in started.said() if line["level"] not in ("debug", "info")]
    assert [line for line in serious if line["service"] != "delineate-worker"] == []


async def test_restarts_and_crashes_cost_no_request(serve: Serve) -> None:
    """Steady callers while every API process is replaced; all get what they asked for, also those who post."""
    failed: list[str] = []
    done = 0
    stop = asyncio.Event()

    async def caller(method: str, path: str) -> None:
        nonlocal done
        async with aiohttp.ClientSession(f"http://127.0.0.1:{serve.port}") as client:
            while not stop.is_set():
                async with client.request(
                    method, path, json={"file_ids": [70000]} if method == "POST" else None
                ) as reply:
                    text = await reply.text()
                    if reply.status != 200:
                        failed.append(f"{method} {path} {reply.status} {text}")
                    done += 1
                await asyncio.sleep(0.02)

    callers = [
        asyncio.create_task(caller(method, path))
        for method, path in (("GET", "/v1/exports"), ("GET", "/health/live"), ("GET", "/docs"), ("POST", "/v1/export"))
        * 2
    ]
    restarting = serve.restart("api")
    try:
        code = await asyncio.to_thread(restarting.wait, 60)
    finally:
        stop.set()
        await asyncio.gather(*callers)
    assert code == 0
    assert failed == []
    assert done > 100
    assert (await asyncio.to_thread(hang_up_and_ask, serve)) == 200


def hang_up_and_ask(serve: Serve) -> int:
    """`supervisorctl signal HUP nginx`, as the README says about new certificates."""
    assert "signalled" in serve.control("signal", "HUP", "nginx")
    with urllib.request.urlopen(f"http://127.0.0.1:{serve.port}/health/live", timeout=10) as reply:
        return int(reply.status)
