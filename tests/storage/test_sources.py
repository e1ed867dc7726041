from __future__ import annotations

import hashlib
import random
import socket

import pytest
from msgspec.structs import replace

from delineate.config import StorageConfig
from delineate.errors import AccessRefused, SourceChanged, StorageTimeout, StorageUnavailable
from delineate.job import SourceFile
from delineate.storage import Storage, open_storage
from tests.storage.conftest import Proxied
from tests.storage.proxy import Fault, answers, cuts, rewrites, stalls

BODY = random.Random(1).randbytes(700_000)


async def planted(storage: Storage, body: bytes = BODY) -> SourceFile:
    """Store `body` as file 70000 and describe it."""
    await storage.prepare_buckets()
    await storage.put_source(70000, body, "seven.bin")
    probe = await storage.probe(70000, 100)
    assert probe is not None
    return probe.file


async def read(storage: Storage, file: SourceFile, start: int = 0, end: int | None = None) -> bytes:
    """What `read` reports, piece after piece; it must equal what it filled in."""
    into = memoryview(bytearray((file.size if end is None else end) - start))
    reported = bytearray()
    await storage.read(file, start, into, reported.extend)
    assert reported == into
    return bytes(reported)


async def test_small_file_comes_whole_with_its_probe(store: StorageConfig) -> None:
    async with open_storage(store) as storage:
        await storage.prepare_buckets()
        for size in (1, 99, 100):
            await storage.put_source(70000, BODY[:size], "Füße & 100%.txt")
            probe = await storage.probe(70000, 100)
            assert probe is not None
            assert probe.body == BODY[:size]
            assert probe.file.size == size
            assert probe.file.name == "Füße & 100%.txt"
            assert probe.file.modified > 1_700_000_000
            assert probe.file.etag == f'"{hashlib.md5(BODY[:size], usedforsecurity=False).hexdigest()}"'


async def test_large_file_is_described_without_its_body(store: StorageConfig) -> None:
    async with open_storage(store) as storage:
        file = await planted(storage)
        probe = await storage.probe(70000, 100)
        assert probe is not None
        assert probe.body is None
        assert file.size == len(BODY)
        key = store.source_key.format(file_id=70000)
        found = await storage.stat_source(70000)
        assert found is not None
        assert (found[0], found[1].size, found[1].etag) == (key, len(BODY), file.etag)


async def test_empty_file_is_found_and_whole(store: StorageConfig) -> None:
    async with open_storage(store) as storage:
        file = await planted(storage, b"")
        probe = await storage.probe(70000, 100)
        assert probe is not None
        assert (probe.body, file.size, file.name) == (b"", 0, "seven.bin")
        assert await read(storage, file) == b""


async def test_missing_file_is_none(store: StorageConfig) -> None:
    async with open_storage(store) as storage:
        await storage.prepare_buckets()
        assert await storage.probe(70000, 100) is None
        assert await storage.stat_source(70000) is None


async def test_has_sources_once_a_file_is_there(store: StorageConfig) -> None:
    async with open_storage(replace(store, source_bucket=f"empty-{store.archive_prefix[8:-1]}")) as storage:
        await storage.prepare_buckets()
        assert not await storage.has_sources()
        await planted(storage)
        assert await storage.has_sources()


async def test_any_range_is_read(store: StorageConfig) -> None:
    async with open_storage(store) as storage:
        file = await planted(storage)
        assert await read(storage, file) == BODY
        assert await read(storage, file, 1, 2) == BODY[1:2]
        assert await read(storage, file, 300_000, 600_000) == BODY[300_000:600_000]
        assert await read(storage, file, len(BODY) - 1) == BODY[-1:]


@pytest.mark.parametrize("key", ["a b/{file_id}+%25&=?#ü~ (1)", "x/../{file_id}/./y//z", "{file_id}'*!:@$,;"])
async def test_odd_keys_are_signed_and_found(rclone: StorageConfig, key: str) -> None:
    plain_folders = key.replace("..", "dots").replace("/./", "/").replace("//", "/")
    prefix = rclone.source_key.partition("/")[0]
    async with open_storage(replace(rclone, source_key=f"{prefix}/{plain_folders}")) as storage:
        assert await read(storage, await planted(storage)) == BODY


@pytest.mark.parametrize("reset", [False, True])
async def test_broken_body_is_continued_where_it_stopped(proxied: Proxied, reset: bool) -> None:
    async with proxied() as (proxy, config), open_storage(config) as storage:
        file = await planted(storage)
        before = len(proxy.seen("GET"))
        proxy.fail("GET", cuts(100_000, reset), cuts(0, reset), cuts(250_001, reset))
        assert await read(storage, file, 50_000) == BODY[50_000:]
        starts = [int(str(get.header("Range"))[6:].split("-")[0]) for get in proxy.seen("GET")[before:]]
        assert starts == [50_000, 150_000, 150_000, 400_001]


async def test_progress_renews_the_tries(proxied: Proxied) -> None:
    async with proxied() as (proxy, config), open_storage(replace(config, retries=1)) as storage:
        file = await planted(storage)
        proxy.fail("GET", *[cuts(100_000)] * 5)
        assert await read(storage, file) == BODY


async def test_body_that_never_grows_ends_the_read(proxied: Proxied) -> None:
    async with proxied() as (proxy, config), open_storage(config) as storage:
        file = await planted(storage)
        proxy.fail("GET", cuts(100_000), *[cuts(0)] * 9)
        before = len(proxy.seen("GET"))
        with pytest.raises(StorageUnavailable):
            await read(storage, file)
        assert len(proxy.seen("GET")) - before == 1 + 3


@pytest.mark.parametrize(
    "fault", [answers(503, "SlowDown"), answers(500), answers(429), answers(502), answers(400, "RequestTimeout")]
)
async def test_passing_error_is_tried_again(proxied: Proxied, fault: Fault) -> None:
    async with proxied() as (proxy, config), open_storage(config) as storage:
        file = await planted(storage)
        proxy.fail("GET", fault, fault)
        assert await read(storage, file) == BODY
        proxy.fail("GET", fault)
        assert await storage.probe(70000, 100)
        proxy.fail("HEAD", answers(503))
        assert await storage.stat_source(70000)
        proxy.fail("PUT", fault, fault)
        await storage.put_source(70001, BODY, "x")


async def test_tries_are_bounded(proxied: Proxied) -> None:
    async with proxied() as (proxy, config), open_storage(replace(config, retries=2)) as storage:
        proxy.fail("GET", *[answers(503, "SlowDown")] * 9)
        with pytest.raises(StorageUnavailable, match="503 SlowDown"):
            await storage.probe(70000, 100)
        assert len(proxy.seen("GET")) == 3


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        ("AccessDenied", "allowed to list and read"),
        ("InvalidAccessKeyId", "storage.access_key_id"),
        ("SignatureDoesNotMatch", "storage.secret_access_key"),
        ("RequestTimeTooSkewed", "clock"),
    ],
)
async def test_refusal_is_not_tried_again(proxied: Proxied, code: str, advice: str) -> None:
    async with proxied() as (proxy, config), open_storage(config) as storage:
        file = await planted(storage)
        before = len(proxy.seen("GET"))
        proxy.fail("GET", answers(403, code), answers(403, code))
        with pytest.raises(AccessRefused, match=advice):
            await read(storage, file)
        with pytest.raises(AccessRefused, match=code):
            await storage.probe(70000, 100)
        assert len(proxy.seen("GET")) - before == 2


async def test_wrong_secret_is_refused_by_the_store(rclone: StorageConfig) -> None:
    async with open_storage(replace(rclone, secret_access_key="wrong-secret")) as storage:
        with pytest.raises(AccessRefused) as caught:
            await storage.probe(70000, 100)
        for secret in ("wrong-secret", "http://", "Signature=", "AWS4"):
            assert secret not in str(caught.value)


async def test_file_that_changed_is_noticed(store: StorageConfig) -> None:
    async with open_storage(store) as storage:
        file = await planted(storage)
        await storage.put_source(70000, BODY[::-1], "seven.bin")
        with pytest.raises(SourceChanged, match="70000"):
            await read(storage, file)
        with pytest.raises(SourceChanged):
            await read(storage, file, 300, 400)


async def test_file_that_changed_between_two_ranges_is_noticed(proxied: Proxied) -> None:
    async with proxied() as (proxy, config), open_storage(config) as storage:
        file = await planted(storage)
        proxy.fail("GET", cuts(1000), rewrites(rb"etag: [^\r]*", b'ETag: "other"'))
        with pytest.raises(SourceChanged):
            await read(storage, file)


async def test_file_that_vanished_has_changed(store: StorageConfig) -> None:
    async with open_storage(store) as storage:
        file = await planted(storage)
        with pytest.raises(SourceChanged):
            await read(storage, replace(file, key=file.key + "-gone"))


@pytest.mark.parametrize(
    ("pattern", "replacement"),
    [(rb"content-range: [^\r]*", b"X-Ignored: 1"), (rb"bytes 100-199/", b"bytes 0-99/")],
)
async def test_other_bytes_than_asked_for_are_never_taken(proxied: Proxied, pattern: bytes, replacement: bytes) -> None:
    async with proxied() as (proxy, config), open_storage(config) as storage:
        file = await planted(storage)
        proxy.fail("GET", *[rewrites(pattern, replacement)] * 2)
        assert await read(storage, file, 100, 200) == BODY[100:200]
        assert len(proxy.seen("GET")) == 1 + 3


async def test_silent_store_times_out(proxied: Proxied) -> None:
    async with (
        proxied() as (proxy, config),
        open_storage(replace(config, operation_timeout=0.3, retries=1)) as storage,
    ):
        file = await planted(storage)
        proxy.fail("GET", stalls, stalls)
        with pytest.raises(StorageTimeout):
            await read(storage, file)
        proxy.fail("PUT", stalls, stalls)
        with pytest.raises(StorageTimeout):
            await storage.put_source(70001, BODY, "x")


async def test_store_that_stops_reading_times_out(rclone: StorageConfig) -> None:
    with socket.create_server(("127.0.0.1", 0)) as never_accepts:
        port = never_accepts.getsockname()[1]
        stalled = replace(rclone, endpoint_url=f"http://127.0.0.1:{port}", operation_timeout=0.3, retries=0)
        async with open_storage(stalled) as storage:
            with pytest.raises(StorageTimeout):
                await storage.put_archive("exports/x.zip", memoryview(bytes(30_000_000)), "x.zip")


async def test_store_that_is_down_is_unavailable(rclone: StorageConfig) -> None:
    async with open_storage(replace(rclone, endpoint_url="http://127.0.0.1:9", retries=1)) as storage:
        with pytest.raises(StorageUnavailable) as caught:
            await storage.probe(70000, 100)
        assert "127.0.0.1" not in str(caught.value)
