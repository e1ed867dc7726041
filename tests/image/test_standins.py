"""The stand-ins that the image is tested against do what a Redis and an S3 store do."""

from __future__ import annotations

import botocore.exceptions
import pytest
from redis.exceptions import AuthenticationError

from tests.image.docker import Docker, DockerError
from tests.image.standins import RedisContainer, S3Container


def test_redis_answers_those_who_know_the_password(redis: RedisContainer) -> None:
    with redis.client() as client:
        assert client.ping()
    with redis.client(password=None) as client, pytest.raises(AuthenticationError):
        client.ping()


def test_redis_keeps_its_data_when_it_starts_again(redis: RedisContainer) -> None:
    with redis.client() as client:
        client.set("standins:kept", "yes")
    redis.stop()
    assert not redis.answers()
    redis.start()
    with redis.client() as client:
        assert client.get("standins:kept") == b"yes"


def test_s3_checks_signatures(s3: S3Container) -> None:
    with s3.client(secret_access_key="wrong") as client, pytest.raises(botocore.exceptions.ClientError) as refused:
        client.list_objects_v2(Bucket="files")
    assert refused.value.response["ResponseMetadata"]["HTTPStatusCode"] == 403


def test_s3_keeps_objects_when_it_is_killed_and_starts_again(s3: S3Container) -> None:
    body = bytes(range(256)) * 1000
    s3.put_file(70000, body, "Übersicht.txt")
    with s3.client() as client:
        found = client.get_object(Bucket="files", Key="70000")
        assert found["Body"].read() == body
        assert {name.lower(): value for name, value in found["Metadata"].items()} == {"filename": "%C3%9Cbersicht.txt"}
    s3.kill()
    assert s3.wait() == 137
    s3.start()
    with s3.client() as client:
        assert client.get_object(Bucket="files", Key="70000")["Body"].read() == body
    assert s3.keys("files") == ["70000"]
    assert s3.keys("archives") == []


def test_containers_of_the_network_reach_both_by_name(
    engine: Docker, network: str, redis: RedisContainer, s3: S3Container
) -> None:
    del redis, s3  # they only have to be there
    reach = "timeout 10 bash -c '</dev/tcp/redis/6379' && timeout 10 bash -c '</dev/tcp/s3/9000'"
    visitor = engine.start("debian:trixie-slim", network=network, command=("sh", "-c", reach))
    assert visitor.wait() == 0, visitor.logs()
    visitor.remove()


def test_a_container_that_ends_is_not_waited_for(engine: Docker) -> None:
    container = engine.start("debian:trixie-slim", command=("sh", "-c", "echo why; exit 3"))
    with pytest.raises(DockerError, match=r"(?s)it ended with 3.*why"):
        container.wait_healthy()


def test_a_command_that_fails_says_why(engine: Docker) -> None:
    with pytest.raises(DockerError, match=r"(?i)no such.*nobody"):
        engine("inspect", "nobody")


def test_nothing_of_a_run_is_left_behind(engine: Docker) -> None:
    other = Docker()
    options = ("--volume", f"{other.volume()}:/data")
    other.start("debian:trixie-slim", *options, network=other.network(), command=("sleep", "600"))
    other.clean_up()
    for listing in (("ps", "--all"), ("network", "ls"), ("volume", "ls")):
        assert other.run_id not in engine(*listing)
