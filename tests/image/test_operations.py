"""What docs/operations.md tells an operator to do, done to a stack with jobs in it."""

from __future__ import annotations

import subprocess
import threading
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from delineate.seed import SAMPLES
from tests.image.app import Served
from tests.image.conftest import Image
from tests.image.docker import Docker
from tests.image.stack import SERVICES, Checkout, objects

SAMPLE = {sample.file_id: sample.body() for sample in SAMPLES}
RUNNING = tuple(service for service in SERVICES if service != "buckets")


class Operated(Checkout):
    """Compose reads .env here as it does for an operator, so that the scripts under conf/ find the same stack."""

    project = f"delineate-{uuid.uuid4().hex[:8]}"

    def environment(self) -> Mapping[str, str]:
        return {
            **super().environment(),
            "COMPOSE_PROJECT_NAME": self.project,
            "COMPOSE_PROFILES": "seaweedfs",
            "COMPOSE_FILE": "compose.yml:compose.override.yml:standins.yml",
        }

    def up(self) -> None:
        self.run("compose", "up", "--detach", "--no-build", "--wait", *RUNNING)

    def seed(self) -> None:
        self.run("compose", "run", "--rm", "--no-deps", "buckets", "seed")

    def inside(self, *command: str) -> str:
        return self.run("compose", "exec", "-T", "app", *command)

    def script(self, name: str, *words: str) -> subprocess.CompletedProcess[str]:
        """`sh conf/NAME WORDS`, whatever its exit code."""
        return subprocess.run(
            ["sh", f"conf/{name}", *words],
            cwd=self.folder,
            env=dict(self.environment()),
            capture_output=True,
            text=True,
            timeout=180,
        )

    def containers(self, service: str) -> list[str]:
        return self.run("compose", "ps", "--all", "--quiet", service).split()

    def redis_says(self, command: str, password: str) -> str:
        """What Redis answers to somebody with this password."""
        told = "read -r word; export REDISCLI_AUTH=$word; redis-cli 2>&1"
        done = subprocess.run(
            ["docker", "compose", "exec", "-T", "redis", "sh", "-c", told],
            cwd=self.folder,
            env=dict(self.environment()),
            input=f"{password}\n{command}\n",
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.stdout


@pytest.fixture(scope="module")
def stack(engine: Docker, image: Image, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operated]:
    # One of each: whatever has to carry on without it is noticed.
    settings = {"DELINEATE_API_PROCESSES": "1", "DELINEATE_WORKER_PROCESSES": "1"}
    made = Operated(engine, image.tag, tmp_path_factory.mktemp("operations"), **settings)
    try:
        made.up()
        made.seed()
        yield made
    finally:
        made.run("compose", "down", "--volumes", "--timeout", "10", "--remove-orphans")


class Asking:
    """Asks for exports until the block ends; `jobs` are those that were accepted, `refused` every other answer."""

    def __init__(self, app: Served) -> None:
        self.app = app
        self.jobs: list[str] = []
        self.refused: list[str] = []
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._ask)

    def __enter__(self) -> Asking:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _ask(self) -> None:
        while not self._end.wait(0.5):  # a worker does two of these a second, and all are waited for
            try:
                answer = self.app.post("/v1/export", {"file_ids": [70001]})
            except OSError as error:
                self.refused.append(str(error))
                continue
            if answer.status == 200:
                self.jobs.append(str(answer.json()["jobId"]))
            else:
                self.refused.append(str(answer))

    def all_complete(self, stack: Operated) -> None:
        assert self.jobs
        assert not self.refused
        for job_id in self.jobs:
            stack.nginx.completed(job_id)


def test_supervisorctl_needs_no_options(stack: Operated) -> None:
    assert {line.split()[1] for line in stack.inside("supervisorctl", "status").splitlines()} == {"RUNNING"}
    assert "signalled" in stack.inside("supervisorctl", "signal", "HUP", "nginx")


def test_a_restart_inside_loses_nothing(stack: Operated) -> None:
    with Asking(stack.nginx) as asking:
        assert "2 processes replaced" in stack.inside("delineate", "restart")
    asking.all_complete(stack)


def test_redis_gets_a_new_password_while_jobs_run(stack: Operated) -> None:
    old = stack.secret("redis_password")
    with Asking(stack.nginx) as asking:
        done = stack.script("rotate-redis-password")
        assert done.returncode == 0, done.stderr
    asking.all_complete(stack)
    new = stack.secret("redis_password")
    assert new != old
    assert new in stack.secret("redis_exporter.json")
    assert new not in done.stdout + done.stderr
    assert "PONG" in stack.redis_says("ping", new)
    assert "NOAUTH" in stack.redis_says("ping", old)


def test_app_is_replaced_while_it_serves(stack: Operated) -> None:
    old = stack.containers("app")
    with Asking(stack.nginx) as asking:
        done = stack.script("roll")
        assert done.returncode == 0, done.stderr
    asking.all_complete(stack)
    new = stack.containers("app")
    assert len(new) == 1
    assert new != old
    # Compose sees nothing that is left to do.
    stack.run("compose", "up", "--detach", "--no-build", *RUNNING)
    assert stack.containers("app") == new


def test_an_app_that_does_not_start_replaces_none(stack: Operated) -> None:
    old, processes = stack.containers("app"), stack.settings["DELINEATE_API_PROCESSES"]
    stack.settings["DELINEATE_API_PROCESSES"] = "none"
    with Asking(stack.nginx) as asking:
        done = stack.script("roll")
    stack.settings["DELINEATE_API_PROCESSES"] = processes
    assert done.returncode == 1
    assert "DELINEATE_API_PROCESSES" in done.stderr
    asking.all_complete(stack)
    assert stack.containers("app") == old


def test_a_backup_brings_back_every_job(stack: Operated, tmp_path: Path) -> None:
    done_before = stack.nginx.export([70002])
    stack.nginx.completed(done_before)
    stack.inside("delineate", "queue", "pause")
    queued = stack.nginx.export([70003, 70011])
    assert stack.script("backup", str(tmp_path)).returncode == 0
    assert stack.script("backup", str(tmp_path)).returncode == 1, "it wrote over a backup"
    assert stack.script("restore", str(tmp_path)).returncode == 1, "it restored into a running service"
    later = stack.nginx.export([70004])

    stack.run("compose", "down", "--volumes")
    for name in ("redis_password", "s3_secret_key"):
        (stack.folder / "secrets" / name).unlink()
    subprocess.run(["tar", "-xf", tmp_path / "settings.tar"], cwd=stack.folder, check=True, timeout=30)
    restored = stack.script("restore", str(tmp_path))
    assert restored.returncode == 0, restored.stderr
    assert stack.script("restore", str(tmp_path)).returncode == 1, "it restored over data"
    stack.up()
    stack.seed()

    listed = stack.inside("delineate", "jobs", "list", "--status", "queued", "--status", "completed", "--limit", "999")
    assert queued in listed
    assert done_before in listed
    assert stack.nginx.get(f"/v1/export/{later}").status == 404
    stack.inside("delineate", "queue", "resume")
    stack.nginx.completed(queued)
    assert list(stack.nginx.archive(queued).values()) == [SAMPLE[70003], SAMPLE[70011]]
    # The record came back, the archive did not.
    assert stack.nginx.get(f"/v1/export/{done_before}/download").status == 410
    assert {one["Health"] for one in objects(stack.run("compose", "ps", "--format", "json"))} == {"healthy"}
