"""A real Prometheus that has watched a real service through good and bad minutes.

The service is what a container runs: nginx, API processes and workers under supervisord, with a Valkey and an S3 server
beside it. Prometheus has the configuration that users get, but for the addresses of its targets and the time between
two looks. The exporters of Redis, nginx and the machine are Debian's.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import yaml

from delineate.config import Config, load_config
from delineate.embedded import redis_command, s3_command, s3_environment
from tests.collector import collecting
from tests.compose.stack import ROOT
from tests.conftest import CONF
from tests.dashboards.traffic import FILES, Pace, Traffic
from tests.nginx.test_serve import Serve
from tests.proxies.fronts import end, find
from tests.servers import ACCESS_KEY, SECRET_KEY, ServerProcess, free_port, wait_until
from tests.storage.proxy import FaultyProxy
from tests.worker.test_worker import content

# Jobs of the configuration whose programs Debian does not have.
ELSEWHERE = {"s3": "SeaweedFS", "minio": "MinIO", "observability": "Loki, Alloy and Grafana"}


class Recording(NamedTuple):
    """Prometheus' address, and from when to when (Unix time) there was something to see.

    From `busy_until` on nothing new was asked for; by `end` all jobs had ended.
    """

    url: str
    start: float
    busy_until: float
    end: float


@contextmanager
def recording(folder: Path, pace: Pace) -> Iterator[Recording]:
    """Watch a service under traffic; then nothing but Prometheus is left, until the block ends."""
    for program in ("nginx", "prometheus"):  # before anything runs that a skip would leave behind
        find(program)
    redis_port, s3_port, port = free_port(), free_port(), free_port()
    exporters = {name: free_port() for name in ("redis", "nginx", "node")}
    for name in ("redis", "s3/files", "s3/archives", "prometheus"):
        (folder / name).mkdir(parents=True)
    for file_id, size in FILES.items():
        (folder / "s3" / "files" / str(file_id)).write_bytes(content(file_id, size))
    servers = [
        ServerProcess(redis_command(folder / "redis", redis_port), redis_port, folder / "redis.log"),
        ServerProcess(
            s3_command(folder / "s3", s3_port), s3_port, folder / "s3.log", s3_environment(ACCESS_KEY, SECRET_KEY)
        ),
        exporter("prometheus-node-exporter", exporters["node"], folder),
        exporter("prometheus-redis-exporter", exporters["redis"], folder, f"redis.addr=redis://127.0.0.1:{redis_port}"),
    ]
    with contextlib.ExitStack() as stack:

        async def watched() -> Recording:
            """In threads what blocks: the proxy has to answer meanwhile."""
            async with (
                FaultyProxy(s3_port) as proxy,
                collecting() as collector,
                contextlib.AsyncExitStack() as service,
            ):
                for server in servers:
                    await asyncio.to_thread(server.start)
                    service.push_async_callback(asyncio.to_thread, server.stop)
                given = _config(redis_port, proxy.port)
                traced = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.endpoint}
                serve = await asyncio.to_thread(Serve, given, folder / "home", **pace.environ, **traced)
                service.push_async_callback(asyncio.to_thread, end, serve.process)
                status = f"nginx.scrape-uri=http://127.0.0.1:{serve.internal_port}/nginx_status"
                nginx = exporter("prometheus-nginx-exporter", exporters["nginx"], folder, status)
                await asyncio.to_thread(nginx.start)
                service.push_async_callback(asyncio.to_thread, nginx.stop)
                targets = exporters | {"prometheus": port, "delineate": serve.internal_port}
                prometheus = _prometheus(folder, port, targets, pace.scrape_seconds)
                await asyncio.to_thread(prometheus.start)
                stack.callback(prometheus.stop)
                await asyncio.to_thread(wait_until, lambda: _has_looked(port), "Prometheus' second look", 60)
                start = time.time()
                busy_until = await Traffic(serve, proxy, pace).run()
                # Of the last change, too, there are to be two samples.
                await asyncio.sleep(3 * pace.scrape_seconds)
                return Recording(f"http://127.0.0.1:{port}", start, busy_until, time.time())

        yield asyncio.run(watched())


def _has_looked(port: int) -> bool:
    """Whether what happens from now on is an increase: it begins some seconds after its start."""
    query = urllib.parse.quote('count_over_time(up{job="delineate"}[1m]) > 1')
    address = f"http://127.0.0.1:{port}/api/v1/query?query={query}"
    with contextlib.suppress(urllib.error.HTTPError), urllib.request.urlopen(address, timeout=10) as answer:
        return bool(json.loads(answer.read())["data"]["result"])
    return False  # it listens before it answers


def _config(redis_port: int, s3_port: int) -> Config:
    loaded = load_config({"DELINEATE_ENV": "test"}, CONF)
    replace = msgspec.structs.replace
    store = replace(
        loaded.storage,
        endpoint_url=f"http://127.0.0.1:{s3_port}",
        access_key_id=ACCESS_KEY,
        secret_access_key=SECRET_KEY,
    )
    return replace(loaded, redis=replace(loaded.redis, url=f"redis://127.0.0.1:{redis_port}/0"), storage=store)


def exporter(program: str, port: int, folder: Path, *options: str) -> ServerProcess:
    command = [find(program), f"--web.listen-address=127.0.0.1:{port}", *(f"--{option}" for option in options)]
    return ServerProcess(command, port, folder / f"{program}.log")


def prometheus_file() -> Path:
    """Where the stack's Prometheus has its configuration from."""
    configs = yaml.safe_load((ROOT / "compose.yml").read_text())["configs"]
    return ROOT / str(configs["prometheus"]["file"])


def rule_files() -> list[Path]:
    """The files of rules that the configuration names."""
    names = yaml.safe_load(prometheus_file().read_text()).get("rule_files", [])
    files = [file for name in names for file in prometheus_file().parent.glob(Path(name).name)]
    assert len(files) >= len(names), names
    return files


def _prometheus(folder: Path, port: int, targets: dict[str, int], scrape_seconds: int) -> ServerProcess:
    every = f"{scrape_seconds}s"
    given = yaml.safe_load(prometheus_file().read_text())
    given["global"] = {"scrape_interval": every, "scrape_timeout": every, "evaluation_interval": every}
    given["scrape_configs"] = [_here(job, targets[job["job_name"]]) for job in given["scrape_configs"] if _known(job)]
    given["rule_files"] = []
    for file in rule_files():
        rules = yaml.safe_load(file.read_text())
        for group in rules["groups"]:
            group["interval"] = every
        (folder / file.name).write_text(yaml.safe_dump(rules))
        given["rule_files"].append(file.name)
    (folder / "prometheus.yml").write_text(yaml.safe_dump(given))
    command = [
        find("prometheus"),
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'prometheus'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    return ServerProcess(command, port, folder / "prometheus.log")


def _known(job: dict[str, Any]) -> bool:
    return job["job_name"] not in ELSEWHERE


def _here(job: dict[str, Any], port: int) -> dict[str, Any]:
    kept = {name: value for name, value in job.items() if not name.endswith("_sd_configs")}
    kept.pop("scrape_interval", None)
    kept.pop("scrape_timeout", None)
    return kept | {"static_configs": [{"targets": [f"127.0.0.1:{port}"]}]}
