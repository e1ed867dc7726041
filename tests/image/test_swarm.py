"""`docker stack deploy` on the same file: updates and rollbacks under load that no client notices."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import yaml

from delineate.seed import SAMPLES
from tests.chaos.traffic import Traffic
from tests.image.conftest import Image
from tests.image.docker import PAUSE_SECONDS, Docker, DockerError
from tests.image.stack import SERVICES, Checkout
from tests.servers import wait_until

FILES = [sample.file_id for sample in SAMPLES]
POSTS_PER_SECOND, STREAMS, POLLERS = 5, 20, 4
SETTLE_SECONDS = 120
# What has no part in this, and whose images cannot be pulled everywhere.
ABSENT = ("prometheus", "loki", "grafana", "redis-exporter", "nginx-exporter", "jaeger")
GLOBAL = ("alloy", "node-exporter")


class Swarm(Checkout):
    def __init__(self, docker: Docker, image: str, folder: Path) -> None:
        self.stack = f"delineate-{uuid.uuid4().hex[:8]}"
        versions = {f"DELINEATE_{what}_VERSION": self.stack for what in ("CONFIG", "SECRETS")}
        super().__init__(docker, image, folder, DELINEATE_REPLICAS="2", **versions)
        standins = yaml.safe_load((self.folder / "standins.yml").read_text())
        services = standins["services"]
        services |= {name: {"deploy": {"replicas": 0}} for name in ABSENT}
        # One for each machine that fits, which is none.
        services |= {
            name: {"deploy": {"placement": {"constraints": ["node.labels.delineate.none == true"]}}} for name in GLOBAL
        }
        services["buckets"] = {"deploy": {"restart_policy": {"delay": "1s"}}}
        standins["version"] = "3.13"
        (self.folder / "standins.yml").write_text(yaml.safe_dump(standins))

    def deploy(self) -> None:
        files = ("-c", "compose.yml", "-c", "standins.yml")
        self.run("stack", "deploy", "--resolve-image", "never", *files, self.stack)

    def update(self, *options: str) -> str:
        """Update `app` and wait for the outcome; what swarm calls it."""
        self.docker(
            *("service", "update", "--detach", "--quiet", "--no-resolve-image"),
            *("--update-monitor", "5s", "--update-delay", "1s", "--rollback-monitor", "2s"),
            *(*options, f"{self.stack}_app"),
        )

        def ended() -> bool:
            return self.update_state() not in ("updating", "rollback_started")

        wait_until(ended, "the end of the update", 240, pause=PAUSE_SECONDS)
        return self.update_state()

    def update_state(self) -> str:
        return self.docker("service", "inspect", "--format", "{{.UpdateStatus.State}}", f"{self.stack}_app").strip()

    def remove(self) -> None:
        """The stack, its containers and its volumes."""
        self.docker("stack", "rm", self.stack, seconds=120)
        label = f"label=com.docker.stack.namespace={self.stack}"
        for container in self.docker("ps", "--quiet", "--filter", label).split():
            with contextlib.suppress(DockerError):  # its drain would take its time, and ends by itself
                self.docker("kill", container)

        def gone() -> bool:
            return self.docker("ps", "--all", "--quiet", "--filter", label) == ""

        wait_until(gone, "the end of the stack", 120, pause=PAUSE_SECONDS)
        volumes = self.docker("volume", "ls", "--quiet", "--filter", label).split()
        if volumes:
            self.docker("volume", "rm", *volumes)

    def running(self, service: str) -> list[str]:
        """The ids of the containers that run now."""
        label = f"label=com.docker.swarm.service.name={self.stack}_{service}"
        return self.docker("ps", "--quiet", "--no-trunc", "--filter", label).split()

    def wait_until_served(self, seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while True:
            with contextlib.suppress(OSError):
                if self.nginx.get("/health").status == 200:
                    return
            if time.monotonic() > end:
                columns = "{{.Name}} {{.CurrentState}} {{.Error}}"
                tasks = self.docker("stack", "ps", "--no-trunc", "--format", columns, self.stack)
                raise AssertionError(f"not healthy within {seconds:g} s:\n{tasks}")
            time.sleep(0.5)


@pytest.fixture(scope="module")
def swarm(engine: Docker, image: Image, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swarm]:
    """The stack on a swarm of this one engine; an engine that is in a swarm already is left alone."""
    if engine("info", "--format", "{{.Swarm.LocalNodeState}}").strip() != "inactive":
        message = "the Docker engine is part of a swarm already: stacks are not tested on it"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    # Another range each time: an engine may keep networks of a swarm that it was forced to leave.
    pool = f"10.{random.randrange(100, 250)}.0.0/16"
    engine(
        "swarm", "init", "--advertise-addr", "127.0.0.1", "--listen-addr", "127.0.0.1:2377", "--default-addr-pool", pool
    )
    made = Swarm(engine, image.tag, tmp_path_factory.mktemp("swarm"))
    try:
        node = engine("node", "ls", "--quiet").strip()
        engine("node", "update", "--label-add", "delineate.data=true", node)
        made.deploy()
        made.wait_until_served()
        seed(made)
        yield made
    finally:
        made.remove()
        engine("swarm", "leave", "--force", seconds=120)


def seed(swarm: Swarm) -> None:
    """Put the samples as the store's admin, in a container of the stack."""
    admin = {
        "DELINEATE__STORAGE__ACCESS_KEY_ID": swarm.secret("s3_admin_access_key"),
        "DELINEATE__STORAGE__SECRET_ACCESS_KEY": swarm.secret("s3_admin_secret_key"),
    }
    options = [part for name, value in admin.items() for part in ("--env", f"{name}={value}")]
    files = " ".join(f"{name}_FILE" for name in admin)
    swarm.docker("exec", *options, swarm.running("app")[0], "sh", "-c", f"unset {files}; delineate seed")


@asynccontextmanager
async def unnoticed(swarm: Swarm, what: str) -> AsyncIterator[Traffic]:
    """Load from before the block until after it; every request succeeds, every job completes, no stream is cut."""
    traffic = Traffic(swarm.port, FILES, posts_per_second=POSTS_PER_SECOND, streams=STREAMS, pollers=POLLERS)
    traffic.start()
    await asyncio.sleep(3)
    began = time.monotonic()
    yield traffic
    seconds = time.monotonic() - began
    await asyncio.sleep(2)
    await traffic.stop()
    await traffic.finish(SETTLE_SECONDS)
    figures = {
        **traffic.counts,
        "jobs": len(traffic.accepted),
        "failed": len(traffic.failures),
        "worst seconds": round(traffic.worst_seconds, 2),
        "seconds": round(seconds, 1),
    }
    print(json.dumps({what: figures}))
    assert traffic.failures == []
    assert {traffic.ended[job_id] for job_id in traffic.accepted} == {"completed"}


@pytest.mark.timeout(seconds=400)
async def test_a_rolling_update_under_load_is_not_noticed(swarm: Swarm) -> None:
    before = swarm.running("app")
    assert len(before) == 2
    async with unnoticed(swarm, "update"):
        state = await asyncio.to_thread(swarm.update, "--force", "--env-add", "DELINEATE__LOG__LEVEL=debug")
    assert state == "completed"
    # An update is complete before the last old container has drained.
    wait_until(lambda: not set(swarm.running("app")) & set(before), "the end of the old ones", 90, pause=PAUSE_SECONDS)
    assert len(swarm.running("app")) == 2


@pytest.mark.timeout(seconds=400)
async def test_a_release_that_does_not_work_goes_back_by_itself(swarm: Swarm) -> None:
    before = swarm.running("app")
    async with unnoticed(swarm, "rollback"):
        state = await asyncio.to_thread(swarm.update, "--env-add", "DELINEATE__STORAGE__SOURCE_BUCKET=no-such-bucket")
    assert state == "rollback_completed"
    assert set(before) & set(swarm.running("app"))
    assert swarm.nginx.get("/health").json()["status"] == "healthy"


def test_services_are_those_of_the_stack(swarm: Swarm) -> None:
    listed = swarm.docker("stack", "services", "--format", "{{.Name}}", swarm.stack).split()
    assert {f"{swarm.stack}_{name}" for name in SERVICES} <= set(listed)
    assert len(swarm.running("nginx")) == len(swarm.running("redis")) == len(swarm.running("s3")) == 1
    assert swarm.running("buckets") == []
