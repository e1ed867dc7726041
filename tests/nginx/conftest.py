"""Fixtures of the tests with nginx. They end with these tests: later ones break the Redis that all share.

shared_config   a Redis prefix and an archive prefix for all tests of a run
api             an API process of its own
front           nginx in front of it, with the configuration that users get
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from delineate.config import Config
from tests.conftest import unique_config
from tests.nginx.door import Door, door
from tests.proxies.fronts import Api
from tests.servers import ServerProcess


@pytest.fixture(scope="package")
def shared_config(redis_url: str, s3_server: ServerProcess) -> Config:
    return unique_config(redis_url, s3_server.port)


@pytest.fixture(scope="package")
def api(shared_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    started = Api(shared_config, tmp_path_factory.mktemp("api"), DELINEATE__SSE__HEARTBEAT="60")
    yield started
    started.stop()


@pytest.fixture(scope="package")
def front(shared_config: Config, api: Api, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    with door(shared_config, tmp_path_factory.mktemp("nginx"), api=api.port) as started:
        yield started
