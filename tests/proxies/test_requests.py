"""Plain requests through real proxies: polling where streams do not get through, and who is calling."""

from __future__ import annotations

from itertools import count
from pathlib import Path

import aiohttp
import pytest

from delineate.config import Config
from tests.api.running import result
from tests.proxies.fronts import ARGUMENTS, CDN, Api, Front, ask, ended, front, worker_side
from tests.servers import free_port

# A firewall that knows no streams, as one more frontend of the same HAProxy.
REFUSING = """
frontend refusing
    bind 127.0.0.1:{port}
    http-request deny deny_status 403 if {{ path_end /progress }}
    default_backend api
"""
_addresses = (f"127.1.{number // 250}.{number % 250 + 1}" for number in count())


async def poll_to_the_end(client: aiohttp.ClientSession, config: Config) -> None:
    """Everything a stream would have shown, by asking."""
    async with worker_side(config) as jobs:
        lease = await jobs.claimed()
        path = f"/v1/export/{lease.job.id}"
        known = ""
        for percent in (0, 20, 99):
            if percent:
                await jobs.report(lease, percent)
            reply = await ask(client, "GET", path, If_None_Match=known)
            assert (reply.status, reply.json["progress"], reply.headers["Retry-After"]) == (200, percent, "2")
            known = reply.headers["ETag"]
            unchanged = await ask(client, "GET", path, If_None_Match=known)
            assert (unchanged.status, unchanged.text) == (304, "")
            assert (unchanged.headers["ETag"], unchanged.headers["Retry-After"]) == (known, "2")
        await jobs.queue.finish(lease, result())
        last = await ask(client, "GET", path, If_None_Match=known)
        assert (last.status, last.json["status"], last.json["progress"]) == (200, "completed", 100)
        assert "X-Amz-Signature" in last.json["downloadUrl"]
        assert "Retry-After" not in last.headers


@pytest.mark.parametrize("name", list(ARGUMENTS))
async def test_polling_shows_everything_where_streams_are_cut_at_once(
    name: str, quiet_api: Api, shared_config: Config, tmp_path: Path
) -> None:
    with front(name, quiet_api.port, tmp_path, idle="200ms") as proxy:
        async with worker_side(shared_config) as jobs:
            job = await jobs.queued()
            async with proxy.stream(job.id) as events:
                assert [event.name for event in await ended(events, 1)] == ["retry", "progress"]
            await jobs.queue.cancel(job.id)
        async with proxy.client() as client:
            await poll_to_the_end(client, shared_config)


async def test_polling_shows_everything_where_streams_are_refused(
    quiet_api: Api, shared_config: Config, tmp_path: Path
) -> None:
    port = free_port()
    with front("haproxy", quiet_api.port, tmp_path, further=REFUSING.format(port=port)):
        async with Front("haproxy", port).client() as client, worker_side(shared_config) as jobs:
            job = await jobs.queued()
            assert (await ask(client, "GET", f"/v1/export/{job.id}/progress")).status == 403
            await jobs.queue.cancel(job.id)
            await poll_to_the_end(client, shared_config)


async def requests_left(proxy: Front, address: str, *forwarded: str) -> int:
    """What the rate limit leaves to whom the API takes for the caller."""
    headers = [("X-Forwarded-For", value) for value in forwarded]
    async with proxy.client(address) as client, client.get("/v1/exports", headers=headers) as answer:
        assert answer.status == 200, await answer.text()
        return int(answer.headers["RateLimit-Remaining"])


async def test_callers_behind_the_proxy_have_a_limit_each(proxy: Front) -> None:
    one, other = next(_addresses), next(_addresses)
    assert [await requests_left(proxy, one) for _ in range(3)] == [4999, 4998, 4997]
    assert await requests_left(proxy, other) == 4999


async def test_forged_address_does_not_change_the_caller(proxy: Front) -> None:
    address, victim = next(_addresses), next(_addresses)
    assert await requests_left(proxy, address) == 4999
    forgeries: list[tuple[str, ...]] = [
        (victim,),
        (f"{victim}, 127.0.0.1",),
        (f"{victim}, {CDN}",),
        (victim, "127.0.0.1"),
        ("nonsense",),
        (", ," * 100,),
    ]
    left = [await requests_left(proxy, address, *forged) for forged in forgeries]
    assert left == list(range(4998, 4998 - len(forgeries), -1))
    assert await requests_left(proxy, victim) == 4999


async def test_caller_of_a_trusted_cdn_before_the_proxy_is_the_one_it_names(proxy: Front) -> None:
    """The CDN has an address of its own, which the proxy hands on as well."""
    one, other = f"203.0.113.{len(proxy.name)}", f"198.51.100.{len(proxy.name)}"
    assert [await requests_left(proxy, CDN, one) for _ in range(2)] == [4999, 4998]
    assert await requests_left(proxy, CDN, other) == 4999
    # What the CDN's client had written before the CDN came.
    assert await requests_left(proxy, CDN, f"{other}, {one}") == 4997


async def test_request_id_passes_through_both_ways(proxy: Front) -> None:
    async with proxy.client() as client:
        reply = await ask(client, "GET", "/v1/export/none", X_Request_ID="from-the-client")
        assert (reply.headers["X-Request-ID"], reply.json["requestId"]) == ("from-the-client", "from-the-client")
        made = await ask(client, "GET", "/v1/export/none")
        assert made.headers["X-Request-ID"] == made.json["requestId"] != "from-the-client"
