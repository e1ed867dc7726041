"""The page and its files: asked for once, kept for when the API is away, and nobody gets another one's answer."""

from __future__ import annotations

import asyncio
from pathlib import Path

from delineate.config import Config
from tests.chaos.tcp_proxy import TcpProxy
from tests.nginx.door import Door, Seen, Upstream, answer, door, steady_port
from tests.nginx.test_answers import get
from tests.proxies.fronts import Api

PATHS = ["/", "/app.js", "/style.css", "/docs", "/openapi.json"]


async def test_page_is_asked_for_once(shared_config: Config, tmp_path: Path) -> None:
    async def hello(seen: Seen) -> bytes:
        return answer(seen.line.encode(), 200, "Cache-Control: no-cache", 'ETag: "x"')

    async with Upstream(hello) as upstream:
        with door(shared_config, tmp_path / "n", api=upstream.port) as nginx:
            for _ in range(5):
                for path in PATHS:
                    reply = await nginx.raw(get(f"{path}?query={_}"))
                    assert reply.status == 200
                    assert reply.all("cache-control") == ["no-cache"]
            assert len(upstream.seen) == len(PATHS)


async def test_page_is_still_there_while_the_api_is_not(shared_config: Config, tmp_path: Path, api: Api) -> None:
    port = steady_port()
    between = TcpProxy(port, api.port)
    between.start()
    changes = {"proxy_cache_valid 200 10s": "proxy_cache_valid 200 1s"}
    try:
        with door(shared_config, tmp_path / "n", api=port, changes=changes) as nginx:
            before = [await nginx.raw(get(path, "Accept: text/html")) for path in PATHS]
            assert [reply.status for reply in before] == [200] * len(PATHS)
            between.refuses = True
            between.hang_up()
            assert (await nginx.raw(get("/v1/exports"))).status == 502
            await asyncio.sleep(1.1)  # what is kept has grown old
            for _ in range(2):
                after = [await nginx.raw(get(path, "Accept: text/html")) for path in PATHS]
                assert [reply.body for reply in after] == [reply.body for reply in before]
                assert [reply.all("content-security-policy") for reply in after] == [
                    reply.all("content-security-policy") for reply in before
                ]
    finally:
        between.stop()


async def test_programs_and_people_get_their_own_page(front: Door) -> None:
    for _ in range(2):
        page = await front.raw(get("/", "Accept: text/html,*/*"))
        index = await front.raw(get("/", "Accept: application/json"))
        assert page.all("content-type") == ["text/html; charset=utf-8"]
        assert "script-src 'self'" in page.all("content-security-policy")[0]
        assert index.all("content-type") == ["application/json"]
        assert index.json["name"] == "delineate"
        assert "Accept" in ", ".join(page.all("vary"))
        assert page.all("set-cookie") == index.all("set-cookie") == []


async def test_kept_answer_has_the_id_of_each_request(front: Door) -> None:
    for name in ("one", "two"):
        reply = await front.raw(get("/docs", f"X-Request-ID: page-{name}"))
        assert reply.all("x-request-id") == [f"page-{name}"]


async def test_kept_answer_is_compared_and_packed(front: Door) -> None:
    plain = await front.raw(get("/app.js"))
    packed = await front.raw(get("/app.js", "Accept-Encoding: gzip"))
    assert packed.all("content-encoding") == ["gzip"]
    assert len(packed.body) < len(plain.body)
    for tag in (*plain.all("etag"), *packed.all("etag")):
        same = await front.raw(get("/app.js", f"If-None-Match: {tag}"))
        assert (same.status, same.body) == (304, b"")
        assert same.all("x-frame-options") == ["DENY"]


async def test_head_of_the_page_is_its_head(front: Door) -> None:
    full, head = await front.raw(get("/docs")), await front.raw(get("/docs", method="HEAD"))
    assert head.body == b""
    assert head.all("content-length") == full.all("content-length") == [str(len(full.body))]


async def test_origins_do_not_share_answers(shared_config: Config, tmp_path: Path) -> None:
    async def allows(seen: Seen) -> bytes:
        return answer(b"{}", 200, "Vary: Origin", *(f"Access-Control-Allow-Origin: {o}" for o in seen.all("origin")))

    async with Upstream(allows) as upstream:
        with door(shared_config, tmp_path / "n", api=upstream.port) as nginx:
            for origin in ("https://a.example", "https://b.example"):
                reply = await nginx.raw(get("/openapi.json", f"Origin: {origin}"))
                assert reply.all("access-control-allow-origin") == [origin]
            assert (await nginx.raw(get("/openapi.json"))).all("access-control-allow-origin") == []
