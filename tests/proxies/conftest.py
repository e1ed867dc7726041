"""Fixtures of the tests with proxies.

shared_config   a Redis prefix and an archive prefix for all tests of a file
quiet_api       an API process without a heartbeat for as long as a test takes, so that nothing pushes events along
beating_api     one with a heartbeat of 0.5 s, on the same jobs
proxy           HAProxy, then Caddy, in front of quiet_api
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from delineate.config import Config
from tests.conftest import unique_config
from tests.proxies.fronts import ARGUMENTS, Api, Front, front
from tests.servers import ServerProcess


@pytest.fixture(scope="module")
def shared_config(redis_url: str, s3_server: ServerProcess) -> Config:
    return unique_config(redis_url, s3_server.port)


@pytest.fixture(scope="module")
def quiet_api(shared_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    api = Api(shared_config, tmp_path_factory.mktemp("quiet"), DELINEATE__SSE__HEARTBEAT="60")
    yield api
    api.stop()


@pytest.fixture(scope="module")
def beating_api(shared_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    api = Api(shared_config, tmp_path_factory.mktemp("beating"), DELINEATE__SSE__HEARTBEAT="0.5")
    yield api
    api.stop()


@pytest.fixture(scope="module", params=list(ARGUMENTS))
def proxy(request: pytest.FixtureRequest, quiet_api: Api, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    with front(request.param, quiet_api.port, tmp_path_factory.mktemp("proxy")) as started:
        yield started
