from __future__ import annotations

import asyncio
import random
import time
from urllib.parse import quote

import aiohttp
import pytest
from msgspec.structs import replace
from yarl import URL

from delineate.config import StorageConfig
from delineate.errors import AccessRefused, StorageUnavailable
from delineate.storage import Storage, open_storage, store_address
from tests.storage.conftest import Proxied
from tests.storage.proxy import answers, loses

PART = random.Random(2).randbytes(5 * 1024 * 1024)
LAST = PART[:1000]
NAME = "Füße & 100%.zip"


def key_in(config: StorageConfig) -> str:
    return config.archive_prefix + "ä b+c%25.zip"


async def upload(storage: Storage, key: str) -> tuple[str, list[tuple[int, str]]]:
    """An upload of two parts, not completed yet."""
    await storage.prepare_buckets()
    upload_id = await storage.start_upload(key, NAME)
    parts = [(1, await storage.put_part(key, upload_id, 1, memoryview(PART)))]
    parts.append((2, await storage.put_part(key, upload_id, 2, memoryview(LAST))))
    return upload_id, parts


async def fetched(url: str, method: str = "GET", **headers: str) -> tuple[int, bytes, aiohttp.ClientResponse]:
    async with (
        aiohttp.ClientSession() as session,
        session.request(method, URL(url, encoded=True), headers=headers) as response,
    ):
        return response.status, await response.read(), response


async def test_parts_become_an_archive(store: StorageConfig) -> None:
    key, size = key_in(store), len(PART) + len(LAST)
    async with open_storage(store) as storage:
        upload_id, parts = await upload(storage, key)
        assert await storage.stat_archive(key) is None
        await storage.complete_upload(key, upload_id, parts, size)
        found = await storage.stat_archive(key)
        assert found is not None
        assert found.size == size
        status, body, _ = await fetched(await storage.presign(key, NAME, 60))
        assert (status, body) == (200, PART + LAST)


async def test_stored_parts_are_listed_for_whoever_takes_over(store: StorageConfig) -> None:
    key = key_in(store)
    async with open_storage(store) as storage:
        upload_id, parts = await upload(storage, key)
    async with open_storage(store) as storage:
        assert await storage.list_parts(key, upload_id) == [(*parts[0], len(PART)), (*parts[1], len(LAST))]
        await storage.abort_upload(key, upload_id)
        assert await storage.list_parts(key, upload_id) is None
        await storage.abort_upload(key, upload_id)


async def test_every_page_of_parts_is_listed(rclone: StorageConfig) -> None:
    key, numbers = key_in(rclone), range(1, 1004)  # a page has 1,000
    async with open_storage(rclone) as storage:
        await storage.prepare_buckets()
        upload_id = await storage.start_upload(key, NAME)
        await asyncio.gather(*(storage.put_part(key, upload_id, number, memoryview(LAST)) for number in numbers))
        listed = await storage.list_parts(key, upload_id)
        assert listed is not None
        assert [part.number for part in listed] == list(numbers)
        await storage.abort_upload(key, upload_id)


async def test_unfinished_uploads_are_listed_until_they_are_ended(store: StorageConfig) -> None:
    key = key_in(store)
    async with open_storage(store) as storage:
        await storage.prepare_buckets()
        assert await storage.list_uploads() == []
        upload_id, parts = await upload(storage, key)
        given_up = await storage.start_upload(key + "2", NAME)
        elsewhere = await storage.start_upload("other/x.zip", NAME)
        listed = await storage.list_uploads()
        assert listed is not None
        assert {(found.key, found.upload_id) for found in listed} == {(key, upload_id), (key + "2", given_up)}
        await storage.complete_upload(key, upload_id, parts, len(PART) + len(LAST))
        await storage.abort_upload(key + "2", given_up)
        assert await storage.list_uploads() == []
        await storage.abort_upload("other/x.zip", elsewhere)


async def test_every_page_of_unfinished_uploads_is_listed(rclone: StorageConfig) -> None:
    key = key_in(rclone)
    async with open_storage(rclone) as storage:
        # A page has 1,000, and rclone refuses to keep so many.
        def two(params: dict[str, object], **_: object) -> None:
            params["MaxUploads"] = 2

        storage._store.client.meta.events.register("provide-client-params.s3.ListMultipartUploads", two)
        await storage.prepare_buckets()
        begun = [await storage.start_upload(f"{key}{number // 3}", NAME) for number in range(7)]
        listed = await storage.list_uploads()
        assert listed is not None
        assert sorted(found.upload_id for found in listed) == sorted(begun)
        assert all(abs(time.time() - found.initiated) < 10 for found in listed)
        for found in listed:
            await storage.abort_upload(found.key, found.upload_id)


async def test_uploads_are_not_listed_by_a_store_that_cannot(proxied: Proxied) -> None:
    async with proxied() as (proxy, config), open_storage(config) as storage:
        for refusal in (
            answers(501, "NotImplemented"),
            answers(405, "MethodNotAllowed"),
            answers(400, "NotImplemented"),
        ):
            proxy.fail("ListMultipartUploads", refusal)
            assert await storage.list_uploads() is None
        proxy.fail("ListMultipartUploads", answers(503, "SlowDown"))
        assert await storage.list_uploads() == []
        proxy.fail("ListMultipartUploads", answers(403, "AccessDenied"))
        with pytest.raises(AccessRefused):
            await storage.list_uploads()


async def test_part_that_failed_is_sent_again_whole(proxied: Proxied) -> None:
    async with proxied() as (proxy, config), open_storage(config) as storage:
        key = key_in(config)
        await storage.prepare_buckets()
        upload_id = await storage.start_upload(key, NAME)
        proxy.fail("PUT", answers(503, "SlowDown"), loses())
        etag = await storage.put_part(key, upload_id, 1, memoryview(PART))
        assert [put.body == PART for put in proxy.seen("PUT")] == [True] * 3
        await storage.complete_upload(key, upload_id, [(1, etag)], len(PART))


async def test_part_of_an_unknown_upload_fails(store: StorageConfig) -> None:
    async with open_storage(store) as storage:
        await storage.prepare_buckets()
        with pytest.raises(StorageUnavailable):
            await storage.put_part(key_in(store), "12345", 1, memoryview(LAST))


async def test_completion_with_a_lost_answer_is_a_success(proxied: Proxied) -> None:
    async with proxied() as (proxy, config), open_storage(config) as storage:
        key = key_in(config)
        upload_id, parts = await upload(storage, key)
        proxy.fail("POST", loses())
        before = len(proxy.seen("POST"))
        await storage.complete_upload(key, upload_id, parts, len(PART) + len(LAST))
        assert len(proxy.seen("POST")) - before == 2  # the second one got NoSuchUpload


async def test_completion_that_is_refused_says_why(proxied: Proxied) -> None:
    async with proxied() as (proxy, config), open_storage(config) as storage:
        key = key_in(config)
        upload_id, parts = await upload(storage, key)
        proxy.fail("POST", answers(403, "InvalidAccessKeyId"))
        proxy.fail("HEAD", answers(403))
        with pytest.raises(AccessRefused, match=r"storage\.access_key_id"):
            await storage.complete_upload(key, upload_id, parts, len(PART) + len(LAST))
        await storage.abort_upload(key, upload_id)


async def test_completion_that_failed_after_status_200_is_tried_again(proxied: Proxied) -> None:
    async with proxied() as (proxy, config), open_storage(config) as storage:
        key = key_in(config)
        upload_id, parts = await upload(storage, key)
        proxy.fail("POST", answers(200, "InternalError"))
        await storage.complete_upload(key, upload_id, parts, len(PART) + len(LAST))
        found = await storage.stat_archive(key)
        assert found is not None


async def test_completion_of_an_unknown_upload_fails(store: StorageConfig) -> None:
    async with open_storage(store) as storage:
        await storage.prepare_buckets()
        with pytest.raises(StorageUnavailable):
            await storage.complete_upload(key_in(store), "12345", [(1, '"0"')], 10)


async def test_archive_of_another_size_is_no_success(store: StorageConfig) -> None:
    async with open_storage(store) as storage:
        upload_id, parts = await upload(storage, key_in(store))
        with pytest.raises(StorageUnavailable, match="holds 5243880 bytes in place of 7"):
            await storage.complete_upload(key_in(store), upload_id, parts, 7)


async def test_concurrent_parts_all_arrive(store: StorageConfig) -> None:
    key = key_in(store)
    async with open_storage(store) as storage:
        await storage.prepare_buckets()
        upload_id = await storage.start_upload(key, NAME)
        bodies = [PART, PART[::-1], PART]
        etags = await asyncio.gather(
            *(storage.put_part(key, upload_id, n, memoryview(body)) for n, body in enumerate(bodies, 1))
        )
        await storage.complete_upload(key, upload_id, list(enumerate(etags, 1)), 3 * len(PART))
        _, body, _ = await fetched(await storage.presign(key, NAME, 60))
        assert body == b"".join(bodies)


async def test_link_works_with_ranges_and_the_true_name(store: StorageConfig) -> None:
    key = key_in(store)
    async with open_storage(store) as storage:
        await storage.prepare_buckets()
        await storage.put_archive(key, memoryview(PART), NAME)
        url = await storage.presign(key, NAME, 60)
    status, body, response = await fetched(url)
    assert (status, body) == (200, PART)
    assert response.headers["Content-Type"] == "application/zip"
    disposition = response.headers["Content-Disposition"]
    assert disposition.startswith("attachment; filename=")
    assert disposition.endswith("filename*=UTF-8''F%C3%BC%C3%9Fe%20%26%20100%25.zip")
    _, part, response = await fetched(url, Range="bytes=10-19")
    assert part == PART[10:20]
    assert response.headers["Content-Range"] == f"bytes 10-19/{len(PART)}"


async def test_link_is_for_one_archive_one_method_and_a_while(rclone: StorageConfig) -> None:
    key = key_in(rclone)
    async with open_storage(rclone) as storage:
        await storage.prepare_buckets()
        await storage.put_archive(key, memoryview(LAST), NAME)
        await storage.put_archive(key + "2", memoryview(LAST), NAME)
        url = await storage.presign(key, NAME, 1)
        assert (await fetched(url))[0] == 200
        assert (await fetched(url, "PUT"))[0] == 403
        assert (await fetched(url, "DELETE"))[0] == 403
        assert (await fetched(url.replace("c%2525.zip", "c%2525.zip2")))[0] == 403
        assert (await fetched(url.replace("Expires=1&", "Expires=999&")))[0] == 403
        assert (await fetched(url.split("?")[0]))[0] in (400, 403)
        async with asyncio.timeout(10):
            while (await fetched(url))[0] == 200:
                await asyncio.sleep(0.2)  # the store's clock is the event to wait for
        assert (await fetched(url))[0] in (400, 403)  # rclone says 400, AWS 403


async def test_link_names_the_store_as_clients_reach_it(rclone: StorageConfig) -> None:
    public = replace(rclone, public_endpoint_url=rclone.endpoint_url.replace("127.0.0.1", "localhost"))
    key = key_in(public)
    async with open_storage(public) as storage:
        await storage.prepare_buckets()
        await storage.put_archive(key, memoryview(LAST), NAME)
        url = await storage.presign(key, NAME, 60)
    assert url.startswith(public.public_endpoint_url)
    assert (await fetched(url))[:2] == (200, LAST)
    assert (await fetched(url.replace("localhost", "127.0.0.1")))[0] == 403


async def test_link_through_a_proxy_is_signed_for_the_store_itself(rclone: StorageConfig) -> None:
    public = replace(rclone, public_endpoint_url="https://dl.example.org/downloads/")
    key = key_in(public)
    async with open_storage(public) as storage:
        await storage.prepare_buckets()
        await storage.put_archive(key, memoryview(LAST), NAME)
        url = await storage.presign(key, NAME, 60)
    proxied, address = "https://dl.example.org/downloads", await store_address(public)
    assert url.startswith(f"{proxied}/{quote(key)}?")
    # What nginx makes of it: the path of the bucket in place of its own, and the Host that was signed.
    assert (await fetched(url.replace(proxied, address.archives_url)))[:2] == (200, LAST)
    assert (await fetched(url.replace(proxied, address.archives_url).replace("127.0.0.1", "localhost")))[0] == 403


async def test_refused_upload_is_not_tried_again(rclone: StorageConfig) -> None:
    async with open_storage(replace(rclone, secret_access_key="wrong-secret")) as storage:
        with pytest.raises(AccessRefused):
            await storage.start_upload("x", NAME)
        with pytest.raises(AccessRefused):
            await storage.put_archive("x", memoryview(PART), NAME)
