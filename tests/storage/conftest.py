"""Fixtures of the storage tests.

moto_server    a real `moto_server`, the second S3 server, one for the whole run
store          a StorageConfig for each of the two servers; the test runs once with each
rclone         a StorageConfig for rclone alone, which checks signatures (moto does not)
proxied        runs a FaultyProxy before rclone: `async with proxied() as (proxy, config)`
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest
from msgspec.structs import replace

from delineate.config import Config, StorageConfig
from tests.servers import ServerProcess, free_port
from tests.storage.proxy import FaultyProxy

Proxied = Callable[[], AbstractAsyncContextManager[tuple[FaultyProxy, StorageConfig]]]


@pytest.fixture(scope="session")
def moto_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    port = free_port()
    command = [str(Path(sys.executable).parent / "moto_server"), "-p", str(port)]
    server = ServerProcess(command, port, tmp_path_factory.mktemp("moto") / "log")
    server.start()
    yield server
    server.stop()


@pytest.fixture
def rclone(config: Config) -> StorageConfig:
    return replace(config.storage, retries=3)


@pytest.fixture(params=["rclone", "moto"])
def store(request: pytest.FixtureRequest, rclone: StorageConfig) -> StorageConfig:
    if request.param == "rclone":
        return rclone
    port = request.getfixturevalue("moto_server").port
    return replace(rclone, endpoint_url=f"http://127.0.0.1:{port}")


@pytest.fixture
def proxied(rclone: StorageConfig, s3_server: ServerProcess) -> Proxied:
    @asynccontextmanager
    async def run() -> AsyncIterator[tuple[FaultyProxy, StorageConfig]]:
        async with FaultyProxy(s3_server.port) as proxy:
            yield proxy, replace(rclone, endpoint_url=f"http://127.0.0.1:{proxy.port}")

    return run
