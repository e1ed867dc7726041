"""nginx in front of several containers: all of them are used, one that is away costs nothing, nothing is sent twice."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from delineate.config import Config
from delineate.nginx import Machine
from tests.api.running import next_event, parse_events, progress
from tests.nginx.door import Dns, Door, Seen, Upstream, answer, black_hole, door
from tests.nginx.test_answers import check_error, get, requests_left
from tests.nginx.test_downloads import BODY, archived
from tests.proxies.fronts import Api, worker_side

ONE, OTHER = "127.0.0.2", "127.0.0.3"


@contextlib.contextmanager
def edge_of(config: Config, folder: Path, dns: Dns, port: int) -> Iterator[Door]:
    machine = dataclasses.replace(Machine.look(), resolvers=(f"127.0.0.1:{dns.port}",), ipv6=False)
    with door(config, folder, edge=True, machine=machine, upstream=f"app.example:{port}") as started:
        yield started


async def looked_up(edge: Door) -> None:
    """Requests that wait for the same answer of the DNS all go to its first address."""
    assert (await edge.raw(get("/v1/exports"))).status == 200


async def test_containers_share_the_work(shared_config: Config, tmp_path: Path) -> None:
    async with Upstream(address=ONE) as one, Upstream(address=OTHER, port=one.port) as other, Dns(ONE, OTHER) as dns:
        with edge_of(shared_config, tmp_path / "n", dns, one.port) as edge:
            await looked_up(edge)
            replies = await asyncio.gather(*(edge.raw(get("/v1/exports")) for _ in range(60)))
    assert {reply.status for reply in replies} == {200}
    assert len(one.seen) + len(other.seen) == 61
    assert min(len(one.seen), len(other.seen)) >= 12


async def test_container_that_refuses_costs_no_request(shared_config: Config, tmp_path: Path) -> None:
    async with Upstream(address=ONE) as one, Dns(ONE, OTHER) as dns:
        with edge_of(shared_config, tmp_path / "n", dns, one.port) as edge:
            await looked_up(edge)
            for method in ("GET", "POST", "DELETE"):
                replies = await asyncio.gather(*(edge.raw(get("/v1/exports", method=method)) for _ in range(10)))
                assert [reply.status for reply in replies] == [200] * 10
    assert len(one.seen) == 31


async def test_container_that_vanished_costs_no_request(shared_config: Config, tmp_path: Path) -> None:
    """Its address answers nothing at all, not even with a refusal."""
    async with Upstream(address=ONE) as one, Dns(ONE, OTHER) as dns:
        with (
            black_hole(OTHER, one.port),
            edge_of(shared_config, tmp_path / "n", dns, one.port) as edge,
        ):
            await looked_up(edge)
            replies = await asyncio.gather(*(edge.raw(get("/v1/exports", method=m)) for m in ("GET", "POST") * 8))
            assert [reply.status for reply in replies] == [200] * 16
    assert len(one.seen) == 17


async def test_container_without_an_api_is_passed_over(shared_config: Config, tmp_path: Path) -> None:
    """Its own nginx says 502."""

    async def away(_: Seen) -> bytes:
        return answer(b"{}", 502)

    async with (
        Upstream(address=ONE) as one,
        Upstream(away, address=OTHER, port=one.port) as other,
        Dns(ONE, OTHER) as dns,
    ):
        with edge_of(shared_config, tmp_path / "n", dns, one.port) as edge:
            await looked_up(edge)
            replies = await asyncio.gather(*(edge.raw(get("/v1/exports")) for _ in range(20)))
    assert [reply.status for reply in replies] == [200] * 20
    assert len(other.seen) > 0


async def test_post_that_was_sent_is_never_sent_twice(shared_config: Config, tmp_path: Path) -> None:
    async def hangs_up(_: Seen) -> None:
        return None

    async with (
        Upstream(hangs_up, address=ONE) as one,
        Upstream(hangs_up, address=OTHER, port=one.port) as other,
        Dns(ONE, OTHER) as dns,
    ):
        with edge_of(shared_config, tmp_path / "n", dns, one.port) as edge:
            for sent in range(1, 6):
                reply = await edge.raw(get("/v1/export", "Content-Length: 2", method="POST") + b"{}")
                check_error(reply, 502, "bad_gateway")
                assert len(one.seen) + len(other.seen) == sent


async def test_containers_that_come_and_go_are_noticed(shared_config: Config, tmp_path: Path) -> None:
    async with Upstream(address=ONE) as one, Upstream(address=OTHER, port=one.port) as other, Dns() as dns:
        with edge_of(shared_config, tmp_path / "n", dns, one.port) as edge:
            reply = await edge.raw(get("/v1/exports", "X-Request-ID: nobody"))
            check_error(reply, 502, "bad_gateway")
            assert edge.logged("nobody")["context"]["upstream"] == ""
            dns.addresses = [OTHER]
            assert (await edge.raw(get("/v1/exports"))).status == 200
    assert (len(one.seen), len(other.seen)) == (0, 1)


@pytest.fixture
def chain(shared_config: Config, api: Api, tmp_path: Path) -> Iterator[tuple[Door, Door]]:
    """An edge, and the container behind it, which believes it."""
    with (
        door(shared_config, tmp_path / "app", api=api.port, trusted_proxies=("127.0.0.1/32",)) as app,
        door(
            shared_config,
            tmp_path / "edge",
            edge=True,
            upstream=f"127.0.0.1:{app.port}",
            trusted_proxies=("127.0.0.9/32",),
        ) as edge,
    ):
        yield edge, app


async def test_caller_is_the_edges_caller(chain: tuple[Door, Door]) -> None:
    edge, _ = chain
    address, other = "127.0.7.1", "127.0.7.2"
    assert [await requests_left(edge, address) for _ in range(2)] == [4999, 4998]
    assert await requests_left(edge, address, f"X-Forwarded-For: {other}") == 4997
    assert await requests_left(edge, other) == 4999
    assert await requests_left(edge, "127.0.0.9", f"X-Forwarded-For: 10.9.8.7, {address}") == 4996


async def test_scheme_goes_through_the_edge(chain: tuple[Door, Door]) -> None:
    edge, _ = chain
    for address, secure in (("127.0.0.9", True), ("127.0.0.10", False)):
        reply = await edge.ask("GET", "/v1/exports", address=address, X_Forwarded_Proto="https")
        assert ("; Secure" in reply.headers["Set-Cookie"]) is secure
        assert len(reply.headers.getall("Strict-Transport-Security", [])) == int(secure)  # type: ignore[attr-defined]


async def test_answers_come_through_the_edge_as_they_are(chain: tuple[Door, Door]) -> None:
    edge, app = chain
    reply = await edge.raw(get("/v1/export/none", "X-Request-ID: chained"))
    check_error(reply, 404, reply.json["code"])
    assert reply.json["requestId"] == "chained"
    assert edge.logged("chained")["context"]["path"] == app.logged("chained")["context"]["path"]
    wrong = await edge.raw(get("/v1/export", method="PUT"))
    assert wrong.all("allow") == ["POST, OPTIONS"]
    page = await edge.raw(get("/", "Accept: text/html"))
    assert "script-src 'self'" in page.all("content-security-policy")[0]
    check_error(await edge.raw(get("/metrics")), 404, "not_found")
    packed = await edge.raw(get("/openapi.json", "Accept-Encoding: gzip"))
    assert packed.all("content-encoding") == ["gzip"]


async def test_edge_has_its_own_port_for_operators(chain: tuple[Door, Door]) -> None:
    edge, _ = chain
    assert (await edge.ask("GET", "/nginx_status", port=edge.internal_port)).status == 200
    assert (await edge.ask("GET", "/health/live", port=edge.internal_port)).status == 200
    assert (await edge.ask("GET", "/metrics", port=edge.internal_port)).status == 404


async def test_events_come_at_once_through_the_edge(chain: tuple[Door, Door], shared_config: Config) -> None:
    edge, _ = chain
    loop = asyncio.get_running_loop()
    async with worker_side(shared_config) as jobs:
        lease = await jobs.claimed()
        path = f"/v1/export/{lease.job.id}/progress"
        async with edge.client() as client, client.get(path) as reply:
            events = parse_events(reply)
            await next_event(events)
            began = loop.time()
            await jobs.queue.progress(lease, progress(20))
            assert (await next_event(events)).data["progress"] == 20
            assert loop.time() - began < 0.5


async def test_archives_come_through_the_edge(chain: tuple[Door, Door], shared_config: Config) -> None:
    edge, _ = chain
    archive = await archived(shared_config.storage, edge)
    reply = await edge.raw(get(archive.link))
    assert (reply.status, reply.body) == (200, BODY)
