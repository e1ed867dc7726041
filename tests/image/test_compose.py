"""`docker compose up` on the real files: one port, several containers behind it, jobs that any of them finishes."""

from __future__ import annotations

import json
import re
import shutil
import socket
import ssl
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from delineate.seed import SAMPLES
from tests.image.app import Served
from tests.image.conftest import Image
from tests.image.docker import Docker
from tests.image.stack import SERVICES, Checkout, objects
from tests.nginx.certificates import make_certificate
from tests.servers import free_port, wait_until

SAMPLE = {sample.file_id: sample for sample in SAMPLES}


class Compose(Checkout):
    def __init__(self, docker: Docker, image: str, folder: Path) -> None:
        super().__init__(docker, image, folder)
        self.project = f"delineate-{uuid.uuid4().hex[:8]}"

    def __call__(self, *words: str, tls: bool = False, seconds: float = 300) -> str:
        files = ["compose.yml", "compose.override.yml", *(["compose.tls.yml"] if tls else []), "standins.yml"]
        named = [part for file in files for part in ("-f", file)]
        return self.run(
            "compose", "--project-name", self.project, "--profile", "seaweedfs", *named, *words, seconds=seconds
        )

    def inside(self, index: int, *command: str) -> str:
        return self("exec", "-T", "--index", str(index), "app", *command)


@pytest.fixture(scope="module")
def compose(engine: Docker, image: Image, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compose]:
    made = Compose(engine, image.tag, tmp_path_factory.mktemp("compose"))
    try:
        made("up", "--detach", "--no-build", "--scale", "app=2", "--wait", *(s for s in SERVICES if s != "buckets"))
        made("run", "--rm", "--no-deps", "buckets", "seed")
        yield made
    finally:
        made("down", "--volumes", "--timeout", "10", "--remove-orphans")


def content(app: Served, job_id: str) -> dict[str, bytes]:
    link = app.get(f"/v1/export/{job_id}/download").json()["downloadUrl"]
    assert link.startswith(f"{app.base}/downloads/")
    return app.archive(job_id)


def test_everything_is_healthy_and_one_port_is_published(compose: Compose) -> None:
    found = objects(compose("ps", "--format", "json"))
    assert sorted(one["Service"] for one in found if one["Service"] != "jaeger") == [
        "app",
        "app",
        "nginx",
        "redis",
        "s3",
    ]
    assert {one["Health"] for one in found if one["Service"] != "jaeger"} == {"healthy"}
    published = {one["Service"] for one in found for port in one["Publishers"] or () if port["PublishedPort"]}
    assert published == {"nginx"}
    assert compose.nginx.get("/health").json()["status"] == "healthy"
    assert compose.nginx.get("/metrics").status == 404


def test_a_job_is_one_trace_through_all_containers(compose: Compose) -> None:
    job_id = compose.nginx.export([70001])
    compose.nginx.completed(job_id)

    def names() -> set[str]:
        # Compose says something to the terminal before the first line.
        lines = compose("logs", "--no-log-prefix", "--no-color", "jaeger").splitlines()
        spans = [json.loads(line[line.index("{") :]) for line in lines if "{" in line]
        traces = {span["trace_id"] for span in spans if span["attributes"].get("delineate.job.id") == job_id}
        return {f"{span['service']} {span['name']}" for span in spans if span["trace_id"] in traces}

    expected = {
        *("delineate-api POST /v1/export", "delineate-api send exports", "delineate-worker process exports"),
        *("delineate-worker S3.GetObject", "delineate-worker S3.PutObject"),
    }
    wait_until(lambda: expected <= names(), "the job's trace", 20, pause=0.5)


def test_jobs_of_one_container_are_finished_by_the_other(compose: Compose) -> None:
    supervisorctl = ("supervisorctl", "-c", "/app/supervisord.conf", "-s", "unix:///tmp/delineate/run/supervisor.sock")
    jobs = [compose.nginx.export([70000 + number]) for number in range(8)]
    # Whatever the first has begun it hands back within its drain; the second does the rest.
    compose.inside(1, *supervisorctl, "stop", "worker:*")
    jobs += [compose.nginx.export([70000 + number]) for number in range(8)]
    for number, job_id in enumerate(jobs):
        compose.nginx.completed(job_id)
        sample = SAMPLE[70000 + number % 8]
        assert list(content(compose.nginx, job_id).values()) == [sample.body()]
    compose.inside(1, *supervisorctl, "start", "worker:*")


def test_no_secret_shows_where_others_look(compose: Compose) -> None:
    """Not in an environment, not on a command line, not in `docker inspect`."""
    secrets = [compose.secret(name) for name in ("redis_password", "s3_secret_key", "s3_admin_secret_key")]
    ids = compose("ps", "--quiet", "app", "redis", "nginx").split()
    shown = compose.run("inspect", *ids) + "".join(compose.run("top", one, "-eo", "pid,args") for one in ids)
    assert not [secret for secret in secrets if secret in shown]


def test_a_container_that_is_killed_is_not_missed(compose: Compose) -> None:
    first = compose("ps", "--quiet", "app").split()[0]
    job_id = compose.nginx.export([70010, 70011])
    compose.run("kill", "--signal", "KILL", first)
    assert [compose.nginx.get("/v1/exports").status for _ in range(10)] == [200] * 10
    compose.nginx.completed(job_id)
    assert list(content(compose.nginx, job_id).values()) == [SAMPLE[70010].body(), SAMPLE[70011].body()]
    compose("up", "--detach", "--no-build", "--no-recreate", "--scale", "app=2", "--wait", "app")


def test_everything_stops_in_order_and_starts_with_its_jobs(compose: Compose) -> None:
    job_id = compose.nginx.export([70005])
    compose.nginx.completed(job_id)
    compose("stop")
    ended = objects(compose("ps", "--all", "--format", "json"))
    assert {one["ExitCode"] for one in ended if one["Service"] in ("app", "nginx", "redis")} == {0}
    compose("up", "--detach", "--no-build", "--no-recreate", "--scale", "app=2", "--wait", *SERVICES[:2])
    assert list(content(compose.nginx, job_id).values()) == [SAMPLE[70005].body()]


def test_a_certificate_in_secrets_is_all_that_https_takes(compose: Compose, tmp_path: Path) -> None:
    made = make_certificate(tmp_path)
    for file, name in ((made.certificate, "tls.crt"), (made.key, "tls.key")):
        secret = compose.folder / "secrets" / name
        shutil.copy(file, secret)
        secret.chmod(0o444)
    port = compose.settings["DELINEATE_HTTPS_PORT"] = str(free_port())
    compose("up", "--detach", "--no-build", "--no-deps", "--wait", "nginx", tls=True)
    assert compose.nginx.get("/v1/exports").status == 308
    context = ssl.create_default_context(cafile=str(made.certificate))
    with (
        socket.create_connection((compose.docker.host, int(port)), timeout=10) as connection,
        context.wrap_socket(connection, server_hostname="localhost") as secure,
    ):
        secure.sendall(b"GET /v1/exports HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        answer = b"".join(iter(lambda: secure.recv(65536), b"")).decode()
    assert answer.startswith("HTTP/1.1 200 ")
    assert re.search(r"^Set-Cookie: .*; Secure\r$", answer, re.MULTILINE | re.IGNORECASE)
    assert "Strict-Transport-Security: max-age=" in answer
