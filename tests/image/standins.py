"""What the image needs around it: containers with a Redis and an S3 store, made of Debian's and PyPI's packages.

Stand-ins, because the images that people use for the two cannot be pulled everywhere.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import botocore.client
import botocore.session
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from delineate.embedded import find_rclone
from tests.image.docker import Container, Docker
from tests.servers import ACCESS_KEY, SECRET_KEY

PASSWORD = "delineate-test-password"
REDIS = """\
FROM debian:trixie-slim
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends redis-server && rm -rf /var/lib/apt/lists/*
VOLUME /data
ENTRYPOINT ["redis-server", "--dir", "/data", "--appendonly", "yes", "--bind", "0.0.0.0"]
"""
S3 = """\
FROM debian:trixie-slim
COPY rclone /usr/local/bin/rclone
RUN mkdir -p /data/files /data/archives
VOLUME /data
ENTRYPOINT ["rclone", "serve", "s3", "/data", "--addr", ":9000", "--config", "", "--log-level", "ERROR", \
"--vfs-cache-mode", "off"]
"""


class RedisContainer(Container):
    """`url` is for containers of its network, `client()` for this machine. Keeps its data over a restart."""

    url = "redis://redis:6379/0"
    password = PASSWORD

    @contextmanager
    def client(self, password: str | None = PASSWORD) -> Iterator[Redis]:
        once = Retry(NoBackoff(), 0)
        client = Redis(host=self.docker.host, port=self.ports[6379], password=password, socket_timeout=5, retry=once)
        try:
            yield client
        finally:
            client.close()

    def answers(self) -> bool:
        with self.client() as client:
            try:
                return bool(client.ping())
            except RedisError:
                return False

    def start(self) -> None:
        super().start()
        self.wait_until(self.answers, "an answer of Redis")


class S3Container(Container):
    """`url` is for containers of its network, `client()` for this machine; the buckets are `files` and `archives`.

    Objects stay over a restart, their metadata does not: rclone keeps that in memory.
    """

    url = "http://s3:9000"
    access_key_id = ACCESS_KEY
    secret_access_key = SECRET_KEY

    @contextmanager
    def client(self, secret_access_key: str = SECRET_KEY) -> Iterator[Any]:
        client = botocore.session.Session().create_client(
            "s3",
            region_name="us-east-1",
            endpoint_url=f"http://{self.address(9000)}",
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=secret_access_key,
            config=botocore.client.Config(
                s3={"addressing_style": "path"}, retries={"total_max_attempts": 1}, proxies={}, connect_timeout=5
            ),
        )
        try:
            yield client
        finally:
            client.close()

    def put_file(self, file_id: int, body: bytes, filename: str = "") -> None:
        """Put a file that can be exported; `filename` is its name in the archive."""
        metadata = {"filename": quote(filename)} if filename else {}
        with self.client() as client:
            client.put_object(Bucket="files", Key=str(file_id), Body=body, Metadata=metadata)

    def keys(self, bucket: str = "archives") -> list[str]:
        with self.client() as client:
            return sorted(one["Key"] for one in client.list_objects_v2(Bucket=bucket).get("Contents", ()))

    def answers(self) -> bool:
        """Whether it takes requests and has both buckets."""
        with self.client() as client:
            try:
                return {"files", "archives"} <= {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}
            except Exception:  # botocore has a dozen for "not yet"
                return False

    def start(self) -> None:
        super().start()
        self.wait_until(self.answers, "an answer of S3")


def build_redis(docker: Docker) -> str:
    """The image of the Redis stand-in; a second build takes it from the engine's cache."""
    return _build(docker, "redis", REDIS)


def build_s3(docker: Docker) -> str:
    """The image of the S3 stand-in, with the rclone of this environment in it."""
    return _build(docker, "s3", S3, Path(find_rclone()))


def _build(docker: Docker, what: str, dockerfile: str, *files: Path) -> str:
    tag = docker.unique(f"image-{what}")
    with tempfile.TemporaryDirectory() as name:
        context = Path(name)
        (context / "Dockerfile").write_text(dockerfile)
        for file in files:
            shutil.copy2(file, context / file.name)
        docker.build(context, tag=tag)
    return tag


def start_redis(docker: Docker, image: str, network: str) -> RedisContainer:
    """Start a Redis that is called `redis` on `network`, and wait until it answers."""
    options = ("--volume", f"{docker.volume()}:/data")
    made = docker.start(
        image,
        *options,
        what="redis",
        command=("--requirepass", PASSWORD),
        network=network,
        alias="redis",
        publish=[6379],
    )
    container = RedisContainer(docker, made.name, made.ports)
    container.wait_until(container.answers, "an answer of Redis")
    return container


def start_s3(docker: Docker, image: str, network: str) -> S3Container:
    """Start an S3 store that is called `s3` on `network`, and wait until it answers."""
    options = ("--volume", f"{docker.volume()}:/data")
    env = {"RCLONE_AUTH_KEY": f'"{ACCESS_KEY},{SECRET_KEY}"'}
    made = docker.start(image, *options, what="s3", env=env, network=network, alias="s3", publish=[9000])
    container = S3Container(docker, made.name, made.ports)
    container.wait_until(container.answers, "an answer of S3")
    return container
