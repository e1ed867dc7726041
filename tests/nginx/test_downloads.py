"""Archives through nginx: what a link allows and nothing more, at any size, and no signature in any log."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import re
import signal
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
from msgspec.structs import replace

from delineate.config import Config, StorageConfig
from delineate.nginx import Machine, Store
from delineate.storage import open_storage
from tests.nginx.certificates import make_certificate
from tests.nginx.door import CA_FILE, Dns, Door, Seen, Upstream, answer, black_hole, door, steady_port
from tests.nginx.test_answers import ERROR_KEYS, check_error, get
from tests.proxies.fronts import Api
from tests.servers import ServerProcess
from tests.storage.conftest import moto_server
from tests.storage.proxy import FaultyProxy, stalls

__all__ = ["moto_server"]
BODY = bytes(range(256)) * 200
NAME = "Füße & 100%.zip"
NO_SIGNATURE = "X-Amz-Signature=" + "0" * 64


class Archive(NamedTuple):
    """`link` is the path with its query, as the API gives it."""

    key: str
    link: str


def through(config: StorageConfig, nginx: Door) -> StorageConfig:
    return replace(config, public_endpoint_url=f"{nginx.base}/downloads")


async def archived(config: StorageConfig, nginx: Door, body: bytes = BODY, *, lifetime: int = 60) -> Archive:
    key = f"{config.archive_prefix}ä b+c%25.zip"
    async with open_storage(through(config, nginx)) as storage:
        await storage.prepare_buckets()
        await storage.put_archive(key, memoryview(body), NAME)
        url = await storage.presign(key, NAME, lifetime)
    assert url.startswith(f"{nginx.base}/downloads/")
    return Archive(key, url.removeprefix(nginx.base))


def check_logs(*doors: Door) -> None:
    for nginx in doors:
        text = nginx.server.log.read_text("utf-8", "replace")
        assert "X-Amz" not in text
        assert "Signature" not in text


@pytest.fixture(params=["rclone", "moto"])
def either(
    request: pytest.FixtureRequest, shared_config: Config, api: Api, tmp_path: Path
) -> Iterator[tuple[Door, StorageConfig]]:
    """nginx in front of either store: rclone answers a Range with 200 and Content-Range, moto with 206."""
    storage = shared_config.storage
    if request.param == "moto":
        storage = replace(storage, endpoint_url=f"http://127.0.0.1:{request.getfixturevalue('moto_server').port}")
    store = Store(url=f"{storage.endpoint_url}/{storage.archive_bucket}", ca_file=CA_FILE)
    with door(shared_config, tmp_path / "n", api=api.port, store=store) as nginx:
        yield nginx, storage
    check_logs(nginx)


async def test_link_gives_the_archive(either: tuple[Door, StorageConfig]) -> None:
    nginx, storage = either
    archive = await archived(storage, nginx)
    whole = await nginx.raw(get(archive.link, "X-Request-ID: fetch"))
    assert (whole.status, whole.body) == (200, BODY)
    assert whole.all("content-type") == ["application/zip"]
    assert whole.all("content-length") == [str(len(BODY))]
    assert "F%C3%BC%C3%9Fe" in whole.all("content-disposition")[0]
    assert (whole.all("x-request-id"), whole.all("cache-control")) == (["fetch"], ["private"])
    for name in ("x-content-type-options", "x-frame-options", "content-security-policy", "server", "etag"):
        assert len(whole.all(name)) == 1, name
    assert not [name for name, _ in whole.headers if name.startswith("x-amz-") or name == "set-cookie"]
    head = await nginx.raw(get(archive.link, method="HEAD"))
    assert (head.status, head.body, head.all("content-length")) == (200, b"", [str(len(BODY))])


async def test_download_that_broke_off_goes_on(either: tuple[Door, StorageConfig]) -> None:
    nginx, storage = either
    archive = await archived(storage, nginx)
    (etag,) = (await nginx.raw(get(archive.link))).all("etag")
    for headers in (["Range: bytes=1000-"], ["Range: bytes=1000-", f"If-Range: {etag}"]):
        part = await nginx.raw(get(archive.link, *headers))
        assert part.status in (200, 206)
        assert part.body == BODY[1000:]
        assert part.all("content-range") == [f"bytes 1000-{len(BODY) - 1}/{len(BODY)}"]
    same = await nginx.raw(get(archive.link, f"If-None-Match: {etag}"))
    assert (same.status, same.body) == (304, b"")
    beyond = await nginx.raw(get(archive.link, "Range: bytes=99999999-"))
    assert beyond.status == 416


async def test_archive_that_is_gone_is_410(front: Door, shared_config: Config) -> None:
    archive = await archived(shared_config.storage, front)
    async with open_storage(shared_config.storage) as opened:
        await opened.delete_archive(archive.key)
    check_error(await front.raw(get(archive.link)), 410, "archive_expired")
    head = await front.raw(get(archive.link, method="HEAD"))
    assert (head.status, head.body) == (410, b"")


async def test_link_that_was_changed_or_is_old_is_403(front: Door, shared_config: Config) -> None:
    archive = await archived(shared_config.storage, front)
    changed = re.sub(r"Signature=(.)", lambda m: f"Signature={'1' if m[1] == '0' else '0'}", archive.link)
    other = archive.link.replace("%2525.zip", "%2526.zip")
    longer = re.sub("X-Amz-Expires=60", "X-Amz-Expires=6000", archive.link)
    inline = archive.link.replace("attachment", "inline")
    for link in (changed, other, longer, inline):
        assert link != archive.link
        reply = await front.raw(get(link))
        check_error(reply, 403, "link_refused")
        assert b"<" not in reply.body
    old = await archived(shared_config.storage, front, lifetime=1)
    await asyncio.sleep(2)
    check_error(await front.raw(get(old.link)), 403, "link_refused")
    check_logs(front)


async def test_only_signed_gets_of_archives_are_passed_on(shared_config: Config, tmp_path: Path) -> None:
    """Nothing else reaches the store, however its path is written."""
    async with Upstream() as store:
        address = Store(url=f"http://127.0.0.1:{store.port}/archives", ca_file=CA_FILE)
        with door(shared_config, tmp_path / "n", api=steady_port(), store=address) as nginx:
            for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS", "PROPFIND"):
                reply = await nginx.raw(get(f"/downloads/x?{NO_SIGNATURE}", method=method))
                check_error(reply, 405, "method_not_allowed")
                assert reply.all("allow") == ["GET, HEAD"]
            unsigned = [
                "",
                "?",
                "?X-Amz-Signature=",
                "?x=1",
                "?X-Amz-Signature=zz",
                f"?a{NO_SIGNATURE}",
                "?list-type=2",
            ]
            for query in unsigned:
                check_error(await nginx.raw(get(f"/downloads/x{query}")), 403, "link_refused")
            tricks = [
                "/downloads/../files/70000",
                "/downloads/%2e%2e/files/70000",
                "/downloads/x/../../files/70000",
                "/downloads//../files/70000",
                "/downloads/x/..%2f..%2ffiles/70000",
                "/downloads/a/../x",
                "/downloads/../files/../downloads/x",
                "/downloads/%2e%2e/files/%2E%2e/downloads/x",
                "/downloads/./x",
                "/downloads/%2e/x",
                "/downloads/..%5cfiles/70000",
                "/downloads/..\\files\\70000",
                "//downloads/../files/x",
                "/%64ownloads/x",
                "/x/../downloads/x",
                "/downloads/",
                "http://127.0.0.1/downloads/../files/70000",
                "http://127.0.0.1/files/70000",
            ]
            for path in tricks:
                reply = await nginx.raw(get(f"{path}?{NO_SIGNATURE}"))
                assert reply.status in (400, 403, 502), path
                assert list(reply.json) == ERROR_KEYS
            assert [seen.line for seen in store.seen] == []
            for path in ("/downloads/x", "http://other/downloads/x"):
                assert (await nginx.raw(get(f"{path}?{NO_SIGNATURE}"))).status == 200
            # A key may have what only looks like a way up.
            assert (await nginx.raw(get(f"/downloads/a..b/%252e%252e/..c?{NO_SIGNATURE}"))).status == 200
            assert [seen.line.split()[1].partition("?")[0] for seen in store.seen] == [
                "/archives/x",
                "/archives/x",
                "/archives/a..b/%252e%252e/..c",
            ]
        check_logs(nginx)


async def test_store_sees_the_host_that_was_signed_and_nothing_private(shared_config: Config, tmp_path: Path) -> None:
    async def cookies(_: Seen) -> bytes:
        headers = ("Set-Cookie: a=b", "X-Amz-Request-Id: 1", "Content-Security-Policy: block-all-mixed-content")
        return answer(b"zip", 200, *headers, "Access-Control-Allow-Origin: *", "Cache-Control: public")

    async with Upstream(cookies) as store:
        address = Store(url=f"http://127.0.0.1:{store.port}/archives", ca_file=CA_FILE)
        with door(shared_config, tmp_path / "n", api=steady_port(), store=address) as nginx:
            private = [
                "Cookie: delineate_session=secret",
                "Authorization: Bearer secret",
                "Origin: https://x",
                "Content-Length: 6",
            ]
            reply = await nginx.raw(
                get(f"/downloads/x?{NO_SIGNATURE}", *private, "X-Forwarded-For: 10.0.0.1") + b"secret"
            )
            assert reply.status == 200
            for name in ("set-cookie", "x-amz-request-id", "access-control-allow-origin"):
                assert reply.all(name) == []
            assert reply.all("cache-control") == ["private"]
            assert reply.all("content-security-policy") == [
                "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
            ]
        (seen,) = store.seen
        assert seen.all("host") == [f"127.0.0.1:{store.port}"]
        assert seen.line == f"GET /archives/x?{NO_SIGNATURE} HTTP/1.1"
        assert "secret" not in str(seen)
        for name in ("x-real-ip", "x-request-id", "x-forwarded-proto", "content-length"):
            assert seen.all(name) == [], name


async def test_store_that_is_away_or_slow_is_an_error_in_json(
    shared_config: Config, tmp_path: Path, s3_server: ServerProcess
) -> None:
    async with FaultyProxy(s3_server.port) as store:
        address = Store(url=f"http://127.0.0.1:{store.port}/archives", ca_file=CA_FILE)
        changes = {"proxy_read_timeout 60s": "proxy_read_timeout 500ms"}
        with door(shared_config, tmp_path / "n", api=steady_port(), store=address, changes=changes) as nginx:
            store.fail("GET", stalls)
            slow = await nginx.raw(get(f"/downloads/x?{NO_SIGNATURE}"))
            check_error(slow, 504, "gateway_timeout")
            assert slow.all("retry-after") == ["2"]

            async def hangs_up(_: object) -> None: ...

            store.fail("GET", hangs_up)
            check_error(await nginx.raw(get(f"/downloads/x?{NO_SIGNATURE}")), 502, "bad_gateway")
    for number in (500, 503):

        async def fails(_: Seen, number: int = number) -> bytes:
            return answer(b"<Error/>", number, "Retry-After: 77", "Cache-Control: public")

        async with Upstream(fails) as failing:
            address = Store(url=f"http://127.0.0.1:{failing.port}/archives", ca_file=CA_FILE)
            with door(shared_config, tmp_path / "m", api=steady_port(), store=address) as other:
                reply = await other.raw(get(f"/downloads/x?{NO_SIGNATURE}"))
                check_error(reply, *((503, "unavailable") if number == 503 else (502, "bad_gateway")))
                assert reply.all("retry-after") == ["2"]
    with door(shared_config, tmp_path / "o", api=steady_port(), store=address) as away:
        reply = await away.raw(get(f"/downloads/x?{NO_SIGNATURE}", "X-Request-ID: away"))
        check_error(reply, 502, "bad_gateway")
        assert away.logged("away")["context"]["upstream"] == f"127.0.0.1:{failing.port}"
    check_logs(nginx, other, away)


@asynccontextmanager
async def large_store(size: int) -> AsyncIterator[int]:
    """The port of a store whose archive has `size` bytes."""
    piece = bytes(1 << 20)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/zip\r\nContent-Length: %d\r\n\r\n" % size)
            for _ in range(size // len(piece)):
                writer.write(piece)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


def memory_of(nginx: Door) -> int:
    """Peak bytes of the workers."""
    assert nginx.server.process is not None
    master = nginx.server.process.pid
    children = Path(f"/proc/{master}/task/{master}/children").read_text().split()
    peaks = [re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text()) for pid in children]
    return sum(int(peak[1]) * 1024 for peak in peaks if peak)


async def test_large_archive_passes_without_memory_or_files(shared_config: Config, tmp_path: Path) -> None:
    """300 MB, to a reader that is slower than the store."""
    size = 300 << 20
    async with large_store(size) as port:
        address = Store(url=f"http://127.0.0.1:{port}/archives", ca_file=CA_FILE)
        with door(shared_config, tmp_path / "n", api=steady_port(), store=address) as nginx:
            await nginx.raw(get("/metrics"))
            before, got, files = memory_of(nginx), 0, set[str]()
            async with nginx.client() as client, client.get(f"/downloads/x?{NO_SIGNATURE}") as reply:
                await asyncio.sleep(0.5)  # the store could have sent all of it by now
                while piece := await reply.content.read(4 << 20):
                    got += len(piece)
                    files |= {file.name for file in (tmp_path / "n" / "proxy").rglob("*")}
            assert got == size
            assert files == set()
            assert memory_of(nginx) - before < 4 << 20


async def test_download_outlives_a_reload_and_the_end(shared_config: Config, tmp_path: Path) -> None:
    size = 64 << 20
    async with large_store(size) as port:
        address = Store(url=f"http://127.0.0.1:{port}/archives", ca_file=CA_FILE)
        with door(shared_config, tmp_path / "n", api=steady_port(), store=address) as nginx:
            async with nginx.client() as client, client.get(f"/downloads/x?{NO_SIGNATURE}") as reply:
                assert nginx.server.process is not None
                os.kill(nginx.server.process.pid, signal.SIGHUP)
                await asyncio.sleep(0.1)
                os.kill(nginx.server.process.pid, signal.SIGQUIT)
                await asyncio.sleep(0.1)
                got = 0
                while piece := await reply.content.read(1 << 20):
                    got += len(piece)
                assert got == size
            assert nginx.server.process.wait(5) == 0


async def test_store_over_tls_is_verified(shared_config: Config, tmp_path: Path) -> None:
    files, other = make_certificate(tmp_path), make_certificate(tmp_path, "other")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files.certificate, files.key)
    async with Upstream(tls=context) as store, Dns("127.0.0.1") as dns:
        machine = machine_with(dns)

        async def status(host: str, authority: Path) -> int:
            address = Store(url=f"https://{host}:{store.port}/archives", ca_file=str(authority))
            with door(shared_config, tmp_path / "n", api=steady_port(), store=address, machine=machine) as nginx:
                reply = await nginx.raw(get(f"/downloads/x?{NO_SIGNATURE}"))
                if reply.status != 200:
                    check_error(reply, 502, "bad_gateway")
            check_logs(nginx)
            return reply.status

        assert await status("localhost", files.certificate) == 200
        assert await status("localhost", other.certificate) == 502
        assert await status("another.example", files.certificate) == 502
        assert len(store.seen) == 1


def machine_with(dns: Dns) -> Machine:
    return dataclasses.replace(Machine.look(), resolvers=(f"127.0.0.1:{dns.port}",), hosts={}, ipv6=False)


async def test_address_of_the_store_that_vanished_costs_no_download(shared_config: Config, tmp_path: Path) -> None:
    """With half a second instead of five to connect."""
    async with Upstream(address="127.0.0.2") as here, Dns("127.0.0.2", "127.0.0.3") as dns:
        store = Store(url=f"http://store.example:{here.port}/archives", ca_file=CA_FILE)
        machine, changes = machine_with(dns), {"proxy_connect_timeout 5s": "proxy_connect_timeout 500ms"}
        with (
            black_hole("127.0.0.3", here.port),
            door(shared_config, tmp_path / "n", store=store, machine=machine, changes=changes) as nginx,
        ):
            link = get(f"/downloads/x?{NO_SIGNATURE}")
            assert (await nginx.raw(link)).status == 200
            replies = await asyncio.gather(*(nginx.raw(link) for _ in range(12)))
            assert [reply.status for reply in replies] == [200] * 12


async def test_store_is_looked_up_again_when_it_moves(shared_config: Config, tmp_path: Path) -> None:
    """With a second instead of two between two questions."""
    async with (
        Upstream(address="127.0.0.2") as old,
        Upstream(address="127.0.0.3", port=old.port) as new,
        Dns("127.0.0.2") as dns,
    ):
        store = Store(url=f"http://store.example:{old.port}/archives", ca_file=CA_FILE)
        machine, changes = machine_with(dns), {"valid=2s": "valid=1s"}
        with door(
            shared_config, tmp_path / "n", api=steady_port(), store=store, machine=machine, changes=changes
        ) as nginx:
            link = get(f"/downloads/x?{NO_SIGNATURE}")
            assert (await nginx.raw(link)).status == 200
            dns.addresses = ["127.0.0.3"]
            await asyncio.sleep(2)
            for _ in range(3):
                assert (await nginx.raw(link)).status == 200
            assert (len(old.seen), len(new.seen)) == (1, 3)
            assert new.seen[0].all("host") == [f"store.example:{old.port}"]
