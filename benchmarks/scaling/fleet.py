"""The servers that are measured, and a meter that says what each kind of process has used.

One Redis and one S3 store; beside them services as the container runs them
(`delineate serve`: supervisord, nginx, API, workers) and an nginx in front
(`delineate edge`). Every service has its own prefixes, so each has its own
queue on the shared servers.
"""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redis import Redis

from delineate.config import Config, load_config
from delineate.embedded import redis_command, s3_command, s3_environment
from tests.servers import ServerProcess, answers, free_port, wait_until

ROOT = Path(__file__).resolve().parent.parent.parent
ACCESS_KEY, SECRET_KEY = "delineate-bench", "delineate-bench-secret"
START_SECONDS, STOP_SECONDS = 60, 40
# Whatever ends the benchmark ends its servers.
TETHER = (sys.executable, "-m", "delineate.tether", "-")
TICKS = os.sysconf("SC_CLK_TCK")


class Child:
    """`delineate serve` or `delineate edge`; every process it started can be found, and ends with it."""

    def __init__(self, command: str, home: Path, environ: dict[str, str]) -> None:
        self.http_port, self.internal_port, self.home = steady_port(), steady_port(), home
        self.environ = environ | {
            "DELINEATE_HOME": str(home),
            "DELINEATE__NGINX__HTTP_PORT": str(self.http_port),
            "DELINEATE__NGINX__INTERNAL_PORT": str(self.internal_port),
            "DELINEATE__NGINX__CERTIFICATE": "/none",
            "DELINEATE__STORAGE__PUBLIC_ENDPOINT_URL": f"http://127.0.0.1:{self.http_port}/downloads",
            "DELINEATE__NGINX__CONNECTIONS_OF_ADDRESS": "60000",
        }
        self.log = home.with_name(f"{home.name}.log")
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                [*TETHER, sys.executable, "-m", "delineate", command],
                cwd=ROOT,
                env=clean_environment() | self.environ,
                stdout=out,
                stderr=out,
                stdin=subprocess.DEVNULL,
            )

    def wait(self, ready_files: int) -> None:
        def ready() -> bool:
            if self.process.poll() is not None:
                raise SystemExit(f"{self.home.name} ended: {self.log.read_text()[-2000:]}")
            return answers(self.http_port) and len([*(self.home / "run").glob("*.ready")]) >= ready_files

        wait_until(ready, f"start of {self.home.name}", START_SECONDS)

    def pids(self, role: str) -> list[int]:
        """Processes by what they are: nginx (its workers and master), api, worker."""
        return [pid for pid in descendants(self.process.pid) if role_of(pid) == role]

    def end(self) -> None:
        started = descendants(self.process.pid)
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(10)
        for pid in started:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


class Service(Child):
    """One container's worth: nginx, `processes` API and as many worker processes."""

    def __init__(self, name: str, processes: int, home: Path, environ: dict[str, str]) -> None:
        self.processes, self.api_port = processes, steady_port()
        given = {
            "DELINEATE_API_PROCESSES": str(processes),
            "DELINEATE_WORKER_PROCESSES": str(processes),
            "DELINEATE__API__PORT": str(self.api_port),
            "DELINEATE__REDIS__PREFIX": name,
            "DELINEATE__STORAGE__ARCHIVE_PREFIX": f"exports/{name}/",
        }
        super().__init__("serve", home, environ | given)

    @property
    def config(self) -> Config:
        return load_config(self.environ, ROOT / "conf")

    def store_requests(self) -> Counter[str]:
        """Requests to the store so far, by operation, as /metrics has them."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.internal_port}/metrics", timeout=30) as answer:
            text = answer.read().decode()
        found: Counter[str] = Counter()
        for operation, count in re.findall(r'^s3_operations_total\{operation="(\w+)"[^}]*\} (\S+)', text, re.MULTILINE):
            found[operation] += round(float(count))
        return found


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """`one` has one API and one worker process, `two` has two of each; `edge` stands before the nginx of `one`."""

    one: Service
    two: Service
    edge: Child
    redis: Redis
    redis_pid: int
    store_pid: int
    sources: Path
    archives: Path

    def pids(self) -> dict[str, list[int]]:
        services = (self.one, self.two)
        return {
            "api": [pid for service in services for pid in service.pids("api")],
            "worker": [pid for service in services for pid in service.pids("worker")],
            "nginx": [pid for service in services for pid in service.pids("nginx")],
            "edge": self.edge.pids("nginx"),
            "redis": [self.redis_pid],
            "store": [self.store_pid],
        }

    def info(self, section: str) -> dict[str, Any]:
        found: dict[str, Any] = self.redis.info(section)
        return found

    def commands(self) -> Counter[str]:
        """Calls of each command so far, those inside scripts included."""
        stats = self.info("commandstats")
        return Counter({name.removeprefix("cmdstat_"): int(values["calls"]) for name, values in stats.items()})

    def forget_jobs(self, prefix: str) -> None:
        """Remove every job of a service, but neither its workers nor its pause."""
        kept = ("queue:workers", "queue:paused")
        keys = [key for key in self.redis.scan_iter(f"{prefix}:*", 1000) if not key.decode().endswith(kept)]
        for start in range(0, len(keys), 1000):
            self.redis.unlink(*keys[start : start + 1000])


class Meter:
    """CPU seconds of each kind of process between `start` and `read`."""

    def __init__(self, fleet: Fleet) -> None:
        self._pids = fleet.pids()
        self.start()

    def start(self) -> None:
        self._before = self._now()

    def read(self) -> dict[str, float]:
        return {role: used - self._before[role] for role, used in self._now().items()}

    def _now(self) -> dict[str, float]:
        return {role: sum(map(cpu_seconds, pids)) for role, pids in self._pids.items()}


@contextmanager
def running_fleet(folder: Path, extra: dict[str, str]) -> Iterator[Fleet]:
    """A fleet in `folder`; `extra` are settings of all services."""
    sources, archives = folder / "s3" / "files", folder / "s3" / "archives"
    for path in (sources, archives, folder / "redis"):
        path.mkdir(parents=True)
    redis_port, store_port = free_port(), free_port()
    environ = {
        "DELINEATE_ENV": "production",
        "DELINEATE__LOG__LEVEL": "warning",
        "DELINEATE__RATE_LIMIT__ENABLED": "false",
        "DELINEATE__QUEUE__MAX_WAITING": "100000000",
        "DELINEATE__REDIS__URL": f"redis://127.0.0.1:{redis_port}/0",
        "DELINEATE__STORAGE__ENDPOINT_URL": f"http://127.0.0.1:{store_port}",
        "DELINEATE__STORAGE__ACCESS_KEY_ID": ACCESS_KEY,
        "DELINEATE__STORAGE__SECRET_ACCESS_KEY": SECRET_KEY,
    } | extra
    redis_line = [*TETHER, *redis_command(folder / "redis", redis_port, "--save", "")]
    store_line = [*TETHER, *s3_command(folder / "s3", store_port)]
    store_environ = s3_environment(ACCESS_KEY, SECRET_KEY)
    redis = ServerProcess(redis_line, redis_port, folder / "redis.log")
    store = ServerProcess(store_line, store_port, folder / "s3.log", store_environ)
    with ExitStack() as stack:
        for server in (redis, store):
            server.start()
            stack.callback(server.stop)
        client = stack.enter_context(Redis(port=redis_port))
        services = []
        for name, processes in (("one", 1), ("two", 2)):
            services.append(Service(name, processes, folder / name, environ))
            stack.callback(services[-1].end)
        upstream = {"DELINEATE__NGINX__UPSTREAM": f"127.0.0.1:{services[0].http_port}"}
        edge = Child("edge", folder / "edge", environ | upstream)
        stack.callback(edge.end)
        for service in services:
            service.wait(ready_files=2 * service.processes)
        edge.wait(ready_files=0)
        assert redis.process
        assert store.process
        yield Fleet(
            one=services[0],
            two=services[1],
            edge=edge,
            redis=client,
            redis_pid=redis.process.pid,
            store_pid=store.process.pid,
            sources=sources,
            archives=archives,
        )


def clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("DELINEATE")}


def steady_port() -> int:
    """One that Linux gives to no outgoing connection, of which there will be many."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port


def descendants(pid: int) -> list[int]:
    """`pid` and all that came from it."""
    parents = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents[int(file.parent.name)] = int(file.read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for parent in found:  # grows while it is walked
        found += [child for child, its in parents.items() if its == parent]
    return found


def role_of(pid: int) -> str:
    try:
        line = Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "replace").rstrip("\0")
    except OSError:
        return ""
    # Not its cache loader, which ends after a minute.
    if line.startswith(("nginx: worker", "nginx: master")):
        return "nginx"
    found = re.search(r"\0-m\0delineate\0(api|worker)(\0|$)", line)
    return found[1] if found else ""


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def memory_bytes(pids: Iterable[int], field: str = "VmRSS") -> int:
    """What /proc says under `field`, of all of them together."""
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                total += int(line.split()[1]) * 1024
    return total
