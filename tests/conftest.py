"""Fixtures that every test may use.

    redis_server, redis_url   a real Valkey or Redis, one for the whole run
    s3_server                 a real `rclone serve s3`, one for the whole run, with its two buckets
    config                    conf/ with DELINEATE_ENV=test, pointed at those servers; a Redis prefix and
                              an archive prefix of its own for each test
    io_loop                   the event loop of an async test (pytest-tornasync runs the test on it)

Async tests open what they need with `async with`; nothing flushes a server.
"""

from __future__ import annotations

import asyncio
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from tornado.ioloop import IOLoop

from delineate.config import Config, load_config
from delineate.embedded import redis_command, s3_command, s3_environment
from tests.servers import ACCESS_KEY, SECRET_KEY, ServerProcess, free_port

TESTS = Path(__file__).resolve().parent
CONF = TESTS.parent / "conf"
# What takes longest, most of it in waiting for servers to die and come back.
LONG = ("worker/", "chaos/", "run/", "dashboards/")

# A script that starts the tests in the background has them ignore Ctrl-C, and every child with them.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes long, so that no long file is left to a single worker in the end (see `make test`)."""

    def place(item: pytest.Item) -> int:
        path = item.path.relative_to(TESTS).as_posix()
        return next((number for number, start in enumerate(LONG) if path.startswith(start)), len(LONG))

    items.sort(key=place)


@pytest.fixture(autouse=True)
def io_loop() -> Iterator[IOLoop]:
    """A fresh loop for each test; replaces pytest-tornasync's, which uses deprecated calls."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    tornado_loop = IOLoop(asyncio_loop=loop, make_current=False)
    yield tornado_loop
    pending = asyncio.all_tasks(loop)
    for task in pending:
        task.cancel()
    if pending:
        loop.run_until_complete(asyncio.gather(*pending, return_exceptions=True))
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.run_until_complete(loop.shutdown_default_executor())
    tornado_loop.close(all_fds=True)
    asyncio.set_event_loop(None)


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("redis")
    port = free_port()
    server = ServerProcess(redis_command(folder, port), port, folder / "log")
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def redis_url(redis_server: ServerProcess) -> str:
    return f"redis://127.0.0.1:{redis_server.port}/0"


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("s3")
    for bucket in ("files", "archives"):
        (folder / "data" / bucket).mkdir(parents=True)
    port = free_port()
    server = ServerProcess(
        s3_command(folder / "data", port), port, folder / "log", s3_environment(ACCESS_KEY, SECRET_KEY)
    )
    server.start()
    yield server
    server.stop()


@pytest.fixture
def config(redis_url: str, s3_server: ServerProcess) -> Config:
    return unique_config(redis_url, s3_server.port)


def unique_config(redis_url: str, s3_port: int) -> Config:
    """A configuration with prefixes that nobody else has."""
    loaded = load_config({"DELINEATE_ENV": "test"}, CONF)
    unique = uuid.uuid4().hex[:12]
    replace = msgspec.structs.replace
    return replace(
        loaded,
        redis=replace(loaded.redis, url=redis_url, prefix=f"test-{unique}"),
        storage=replace(
            loaded.storage,
            endpoint_url=f"http://127.0.0.1:{s3_port}",
            access_key_id=ACCESS_KEY,
            secret_access_key=SECRET_KEY,
            archive_prefix=f"exports-{unique}/",
            source_key=f"{unique}/{{file_id}}",
        ),
    )
