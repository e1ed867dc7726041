from __future__ import annotations

import asyncio
import logging

import pytest
from msgspec.structs import replace

from delineate.config import Config, StorageConfig
from delineate.errors import (
    AccessRefused,
    BucketMissing,
    JobError,
    StartupError,
    StorageTimeout,
    StorageUnavailable,
)
from delineate.seed import SAMPLES, make_buckets, seed, seed_when_ready
from delineate.storage import open_storage, wait_for_storage
from tests.servers import ServerProcess, free_port
from tests.storage.conftest import Proxied
from tests.storage.proxy import FaultyProxy, answers, stalls


def elsewhere(store: StorageConfig, **changes: bool) -> StorageConfig:
    """`store` with buckets that are not there yet."""
    unique = store.archive_prefix[8:-1]
    return replace(store, source_bucket=f"new-files-{unique}", archive_bucket=f"new-archives-{unique}", **changes)


async def test_missing_buckets_are_created_once_by_many(store: StorageConfig) -> None:
    async with open_storage(elsewhere(store)) as storage:
        with pytest.raises(BucketMissing):
            await storage.check()
        await asyncio.gather(*(storage.prepare_buckets() for _ in range(4)))
        await storage.check()
        await storage.put_source(70000, b"x", "x")
        assert await storage.probe(70000, 10)


async def test_a_created_bucket_for_archives_forgets_old_ones(
    config: Config, moto_server: ServerProcess, caplog: pytest.LogCaptureFixture
) -> None:
    store = elsewhere(replace(config.storage, endpoint_url=f"http://127.0.0.1:{moto_server.port}"))
    async with open_storage(store) as storage:
        await storage.prepare_buckets()
        client = storage._store.client
        (rule,) = (await client.get_bucket_lifecycle_configuration(Bucket=store.archive_bucket))["Rules"]
        assert rule["Status"] == "Enabled"
        assert rule["Expiration"]["Days"] == rule["AbortIncompleteMultipartUpload"]["DaysAfterInitiation"] == 2
        assert rule["Filter"]["Prefix"] == store.archive_prefix
        assert not caplog.records or "lifecycle" not in caplog.text


async def test_the_command_makes_what_is_missing_and_renews_the_rule(
    config: Config, moto_server: ServerProcess
) -> None:
    store = elsewhere(
        replace(config.storage, endpoint_url=f"http://127.0.0.1:{moto_server.port}"), create_buckets=False
    )
    await make_buckets(replace(config, storage=store))
    # Once more, on buckets that are there, with another number of days.
    await make_buckets(replace(config, storage=replace(store, archive_days=5)))
    async with open_storage(store) as storage:
        await storage.check()
        client = storage._store.client
        (rule,) = (await client.get_bucket_lifecycle_configuration(Bucket=store.archive_bucket))["Rules"]
        assert rule["Expiration"]["Days"] == 5


async def test_samples_wait_for_the_store_and_are_put_once(config: Config, s3_server: ServerProcess) -> None:
    async with FaultyProxy(s3_server.port) as proxy:
        proxy.fail("HEAD", answers(503))
        store = elsewhere(replace(config.storage, endpoint_url=f"http://127.0.0.1:{proxy.port}"))
        await seed_when_ready(replace(config, storage=store))
        async with open_storage(store) as storage:
            assert await storage.probe(SAMPLES[-1].file_id, 10)
            assert await seed(replace(config, storage=store)) == 0


async def test_commands_say_in_one_line_that_access_was_refused(config: Config) -> None:
    wrong = replace(config, storage=replace(config.storage, secret_access_key="wrong-secret"))
    for command in (make_buckets, seed_when_ready):
        with pytest.raises(StartupError, match="refused access"):
            await command(wrong)


async def test_a_store_without_lifecycle_rules_still_gets_its_buckets(
    rclone: StorageConfig, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_storage(elsewhere(rclone)) as storage:
        await storage.prepare_buckets()
        await storage.check()
    assert "takes no lifecycle rule" in caplog.text


async def test_missing_bucket_is_named_where_it_may_not_be_created(store: StorageConfig) -> None:
    async with open_storage(elsewhere(store, create_buckets=False)) as storage:
        with pytest.raises(BucketMissing, match=r"'new-files-.*storage\.create_buckets"):
            await wait_for_storage(storage)


async def test_missing_bucket_fails_a_job_in_words(store: StorageConfig) -> None:
    async with open_storage(elsewhere(store)) as storage:
        with pytest.raises(JobError, match="bucket of the file store was missing"):
            await storage.probe(70000, 10)


async def test_wrong_credentials_end_the_start_at_once(rclone: StorageConfig) -> None:
    async with open_storage(replace(rclone, secret_access_key="wrong-secret")) as storage:
        with pytest.raises(AccessRefused):
            await storage.check()
        with pytest.raises(StartupError, match="refused access"):
            await wait_for_storage(storage)


async def test_store_that_is_down_at_start_is_waited_for(
    rclone: StorageConfig, s3_server: ServerProcess, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "delineate.storage")
    async with FaultyProxy(s3_server.port) as proxy:
        proxy.fail("HEAD", answers(503, "SlowDown"))
        async with open_storage(replace(rclone, endpoint_url=f"http://127.0.0.1:{proxy.port}")) as storage:
            assert await wait_for_storage(storage)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    context = record.__dict__["context"]
    assert context["wait_seconds"] == 1
    assert context["store"] == f"127.0.0.1:{proxy.port}"
    assert "503" in context["cause"]


async def test_waiting_ends_when_the_process_must(rclone: StorageConfig, caplog: pytest.LogCaptureFixture) -> None:
    stop = asyncio.Event()
    async with open_storage(replace(rclone, endpoint_url=f"http://127.0.0.1:{free_port()}")) as storage:
        waiting = asyncio.create_task(wait_for_storage(storage, stop))
        while not caplog.records:
            await asyncio.sleep(0.01)
        stop.set()
        async with asyncio.timeout(0.5):
            assert not await waiting


async def test_check_tells_what_is_wrong_and_does_not_wait(proxied: Proxied) -> None:
    async with proxied() as (proxy, config), open_storage(replace(config, connect_timeout=0.3)) as storage:
        await storage.check()
        proxy.fail("HEAD", answers(503), answers(503))
        with pytest.raises(StorageUnavailable):
            await storage.check()
        proxy.fail("HEAD", stalls, stalls)
        with pytest.raises(StorageTimeout):
            async with asyncio.timeout(2):
                await storage.check()
        await storage.check()
