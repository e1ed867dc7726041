"""The image under test as a running container, and how tests talk to it."""

from __future__ import annotations

import io
import json
import re
import time
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tests.image.docker import PAUSE_SECONDS, Answer, Container, Docker, DockerError, http
from tests.image.standins import RedisContainer, S3Container
from tests.servers import free_port, wait_until

PUBLIC, INTERNAL = 80, 8081


class Served(ABC):
    """The service as its clients have it, at `base`, whatever is behind that."""

    @property
    @abstractmethod
    def base(self) -> str: ...

    def wait_until(self, condition: Callable[[], bool], what: str, seconds: float = 60) -> float:
        """Wait for a condition; the seconds it took. Raises TimeoutError."""
        started = time.monotonic()
        wait_until(condition, what, seconds, pause=PAUSE_SECONDS)
        return time.monotonic() - started

    def request(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> Answer:
        """One request to the public port; `path` may be a whole URL, a download's for instance.

        Any status is an answer, and redirects are not followed. Raises OSError if there is none.
        """
        return http(method, path if path.startswith("http") else self.base + path, body, headers)

    def get(self, path: str, headers: Mapping[str, str] | None = None) -> Answer:
        return self.request("GET", path, headers=headers)

    def post(self, path: str, body: Any = None, headers: Mapping[str, str] | None = None) -> Answer:
        """POST `body` as JSON."""
        sent = json.dumps(body).encode()
        return self.request("POST", path, sent, {"Content-Type": "application/json", **(headers or {})})

    def export(self, file_ids: Sequence[int]) -> str:
        """Ask for an export; its job's id."""
        answer = self.post("/v1/export", {"file_ids": list(file_ids)})
        assert answer.status == 200, answer
        return str(answer.json()["jobId"])

    def completed(self, job_id: str, seconds: float = 60) -> dict[str, Any]:
        """Wait until the job has completed, and return it."""
        job: dict[str, Any] = {}

        def done() -> bool:
            job.clear()
            job.update(self.get(f"/v1/export/{job_id}").json())
            assert job.get("status") in ("queued", "processing", "completed"), job
            return bool(job["status"] == "completed")

        self.wait_until(done, f"job {job_id}", seconds)
        return job

    def archive(self, job_id: str) -> dict[str, bytes]:
        """The job's archive, fetched through the nginx that is asked: name -> content."""
        link = self.get(f"/v1/export/{job_id}/download").json()["downloadUrl"]
        address, path, key = link.partition("/downloads/")
        assert re.fullmatch(r"http://[\d.]+:\d+", address)
        answer = self.get(path + key)
        assert answer.status == 200, answer
        with zipfile.ZipFile(io.BytesIO(answer.body)) as archive:
            return {name: archive.read(name) for name in archive.namelist()}


class App(Container, Served):
    """`base` is the URL of its public port, `internal` that of /metrics, /nginx_status and /health."""

    @property
    def base(self) -> str:
        return f"http://{self.address(PUBLIC)}"

    @property
    def internal(self) -> str:
        return f"http://{self.address(INTERNAL)}"

    def get_internal(self, path: str) -> Answer:
        return http("GET", self.internal + path)


def settings(redis: RedisContainer, s3: S3Container, public_url: str, prefix: str) -> dict[str, str]:
    """The environment of an app on the stand-ins; apps with the same `prefix` share queue and archives."""
    return {
        "DELINEATE__REDIS__URL": redis.url,
        "DELINEATE__REDIS__PASSWORD": redis.password,
        "DELINEATE__REDIS__PREFIX": prefix,
        "DELINEATE__STORAGE__ENDPOINT_URL": s3.url,
        "DELINEATE__STORAGE__ACCESS_KEY_ID": s3.access_key_id,
        "DELINEATE__STORAGE__SECRET_ACCESS_KEY": s3.secret_access_key,
        "DELINEATE__STORAGE__CREATE_BUCKETS": "false",
        "DELINEATE__STORAGE__ARCHIVE_PREFIX": f"exports/{prefix}/",
        # Links lead through the image's nginx.
        "DELINEATE__STORAGE__PUBLIC_ENDPOINT_URL": f"{public_url}/downloads",
        "DELINEATE__RATE_LIMIT__ENABLED": "false",
    }


class AppMaker:
    """Call it to start an app: `make_app()`, `make_app(env={...})`, `make_app("--stop-timeout", "60")`."""

    def __init__(
        self, docker: Docker, image: str, network: str, redis: RedisContainer, s3: S3Container, prefix: str
    ) -> None:
        self.docker, self.image, self.network, self.redis, self.s3 = docker, image, network, redis, s3
        self.prefix = prefix
        self._made: list[App] = []

    def __call__(
        self,
        *options: str,
        command: Sequence[str] = (),
        env: Mapping[str, str | None] | None = None,
        read_only: bool = True,
        healthy: bool = True,
    ) -> App:
        """Start the image and wait until it is healthy, unless told not to.

        `options` go to `docker run`, `command` is given to the entry point instead of `serve`, `env` is added to
        `settings` (None takes one away). Its root is read-only, with a tmpfs at /tmp, unless told otherwise.
        """
        port = free_port()
        made = {**settings(self.redis, self.s3, f"http://{self.docker.host}:{port}", self.prefix), **(env or {})}
        root = ("--read-only", "--tmpfs", "/tmp") if read_only else ()
        # The image looks every ten seconds, and tests would wait for its first look.
        options = ("--health-interval", "1s", *options)
        started = self.docker.start(
            self.image,
            *(*root, *options),
            what="app",
            command=command,
            network=self.network,
            env={name: value for name, value in made.items() if value is not None},
            publish={PUBLIC: port, INTERNAL: free_port()},
        )
        app = App(self.docker, started.name, started.ports)
        self._made.append(app)
        if healthy:
            app.wait_healthy()
        return app

    def remove_all(self) -> None:
        for app in self._made:
            try:
                app.remove()
            except DockerError as error:  # the test has removed it
                if "No such container" not in str(error):
                    raise
        self._made.clear()
