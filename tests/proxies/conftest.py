"""Fixtures of the tests with proxies.

shared_config   a Redis prefix and an archive prefix for all tests of a file
quiet_api       an API process without a heartbeat for as long as a test takes, so that nothing pushes events along
beating_api     one with a heartbeat of 0.5 s, on the same jobs
proxy           HAProxy, then Caddy, in front of quiet_api
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import msgspec
import pytest

from delineate.config import Config, load_config
from tests.conftest import CONF
from tests.proxies.fronts import ARGUMENTS, Api, Front, front
from tests.servers import ACCESS_KEY, SECRET_KEY, ServerProcess


@pytest.fixture(scope="module")
def shared_config(redis_url: str, s3_server: ServerProcess) -> Config:
    loaded, unique, replace = (
        load_config({"DELINEATE_ENV": "test"}, CONF),
        uuid.uuid4().hex[:12],
        msgspec.structs.replace,
    )
    return replace(
        loaded,
        redis=replace(loaded.redis, url=redis_url, prefix=f"test-{unique}"),
        storage=replace(
            loaded.storage,
            endpoint_url=f"http://127.0.0.1:{s3_server.port}",
            access_key_id=ACCESS_KEY,
            secret_access_key=SECRET_KEY,
            archive_prefix=f"exports-{unique}/",
            source_key=f"{unique}/{{file_id}}",
        ),
    )


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
