"""Fixtures of the image tests.

engine      the Docker engine, as a Docker. Without one the tests are skipped; with CI=true they fail
image       the repository's Dockerfile, built once: an Image with its tag and the seconds the build took
network     a bridge network, one for each module, as the next three
redis       a Redis with a password, `redis:6379` on the network
s3          an S3 store with the buckets `files` and `archives`, `s3:9000` on the network
app         the image, running and healthy, for all tests of the module that leave it as it is
make_app    starts apps of the test's own, which share one queue, see AppMaker; removed when the test ends

DELINEATE_TEST_IMAGE: `skip` skips all of it, `keep` leaves the built image there as delineate:test, any other value
is the name of an image that is tested instead of a built one.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from tests.image.app import App, AppMaker
from tests.image.docker import Docker
from tests.image.standins import RedisContainer, S3Container, build_redis, build_s3, start_redis, start_s3

ROOT = Path(__file__).resolve().parent.parent.parent
CHOICE = os.environ.get("DELINEATE_TEST_IMAGE", "")
NO_ENGINE = 'no Docker engine answers; `eval "$(tests/image/engine up)"` starts one'


@dataclass(frozen=True)
class Image:
    """The image under test; `build_seconds` is None if it was there already."""

    tag: str
    build_seconds: float | None


class Skipped(pytest.Module):
    """A test file that is not even read. All of them skip on this line, so the summary has one for all."""

    def collect(self) -> Iterator[pytest.Item | pytest.Collector]:
        pytest.skip(why_not(), allow_module_level=True)


@cache
def why_not() -> str:
    """Why the image tests are skipped, or nothing. CI skips them only when told to."""
    if CHOICE == "skip":
        return "image tests: DELINEATE_TEST_IMAGE=skip"
    return "" if os.environ.get("CI") == "true" or Docker().answers() else f"image tests: {NO_ENGINE}"


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    return Skipped.from_parent(parent, path=module_path) if why_not() else None


@pytest.fixture(scope="session")
def engine() -> Iterator[Docker]:
    docker = Docker()
    if not docker.answers():
        pytest.fail(f"{NO_ENGINE}; DELINEATE_TEST_IMAGE=skip does without", pytrace=False)
    yield docker
    docker.clean_up()


@pytest.fixture(scope="session")
def image(engine: Docker) -> Image:
    if CHOICE not in ("", "keep"):
        return Image(CHOICE, None)
    tag = "delineate:test" if CHOICE == "keep" else engine.unique("image")
    seconds = engine.build(ROOT, tag=tag)
    if CHOICE == "keep":
        engine.keep(tag)
    return Image(tag, seconds)


@pytest.fixture(scope="module")
def network(engine: Docker) -> Iterator[str]:
    name = engine.network()
    yield name
    engine.remove_network(name)


@pytest.fixture(scope="session")
def redis_image(engine: Docker) -> str:
    return build_redis(engine)


@pytest.fixture(scope="session")
def s3_image(engine: Docker) -> str:
    return build_s3(engine)


@pytest.fixture(scope="module")
def redis(engine: Docker, redis_image: str, network: str) -> Iterator[RedisContainer]:
    container = start_redis(engine, redis_image, network)
    yield container
    container.remove()


@pytest.fixture(scope="module")
def s3(engine: Docker, s3_image: str, network: str) -> Iterator[S3Container]:
    container = start_s3(engine, s3_image, network)
    yield container
    container.remove()


@pytest.fixture(scope="module")
def app(engine: Docker, image: Image, network: str, redis: RedisContainer, s3: S3Container) -> Iterator[App]:
    maker = AppMaker(engine, image.tag, network, redis, s3, prefix="module")
    yield maker()
    maker.remove_all()


@pytest.fixture
def make_app(engine: Docker, image: Image, network: str, redis: RedisContainer, s3: S3Container) -> Iterator[AppMaker]:
    maker = AppMaker(engine, image.tag, network, redis, s3, prefix=f"test-{uuid.uuid4().hex[:8]}")
    yield maker
    maker.remove_all()
