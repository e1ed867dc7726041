"""What comes through nginx: ids, errors in one shape, headers once, compression, and who is asking."""

from __future__ import annotations

import asyncio
import datetime
import json
import re
from itertools import count
from pathlib import Path

import pytest
from msgspec.structs import replace

from delineate.config import Config
from tests.api.running import changed, next_event, parse_events, progress, result
from tests.nginx.door import Door, RawReply, Seen, Upstream, door, rendered, steady_port
from tests.proxies.fronts import Api, worker_side

ERROR_KEYS = ["error", "code", "message", "requestId", "details"]
SECURITY = {
    "x-frame-options": "DENY",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
}
_addresses = (f"127.2.{number // 250}.{number % 250 + 1}" for number in count())


def check_error(reply: RawReply, status: int, code: str) -> None:
    """JSON with the API's keys, its id the header's, and each security header once."""
    assert reply.status == status, reply
    assert reply.all("content-type") == ["application/json"]
    document = reply.json
    assert list(document) == ERROR_KEYS
    assert (document["code"], document["details"]) == (code, [])
    assert reply.all("x-request-id") == [document["requestId"]]
    for name, value in SECURITY.items():
        assert reply.all(name) == [value], name
    assert len(reply.all("server")) == 1
    assert reply.all("strict-transport-security") == []


def get(path: str, *headers: str, method: str = "GET") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: x", "Connection: close", *headers, "", ""]).encode(
        "latin-1"
    )


WAITS = {"header": "10s", "body": "15s"}
HOSTILE_IDS = ["", "a b", 'a"b', "x" * 129, "ä", "a\tb", "a;b", "${jndi}"]


async def test_request_id_is_the_callers_everywhere(front: Door, api: Api) -> None:
    reply = await front.raw(get("/v1/export/none", "X-Request-ID: from.the:client-1"))
    assert (reply.status, reply.json["requestId"]) == (404, "from.the:client-1")
    assert reply.all("x-request-id") == ["from.the:client-1"]
    assert front.logged("from.the:client-1")["context"]["path"] == "/v1/export/none"


@pytest.mark.parametrize("sent", [None, *HOSTILE_IDS])
async def test_request_id_is_made_where_there_is_no_sane_one(front: Door, sent: str | None) -> None:
    reply = await front.raw(get("/v1/export/none", *([] if sent is None else [f"X-Request-ID: {sent}"])))
    (made,) = reply.all("x-request-id")
    assert re.fullmatch("[0-9a-f]{32}", made)
    assert reply.json["requestId"] == made


async def test_two_request_ids_become_one(front: Door) -> None:
    reply = await front.raw(get("/v1/export/none", "X-Request-ID: one", "X-Request-ID: two"))
    (used,) = reply.all("x-request-id")
    assert reply.json["requestId"] == used
    assert "," not in used


async def test_errors_of_nginx_are_the_apis_errors(front: Door) -> None:
    check_error(await front.raw(get("/metrics")), 404, "not_found")
    check_error(await front.raw(get("/v1/export", f"X-Long: {'x' * 9000}")), 400, "bad_request")
    check_error(await front.raw(get("/v1/export", *(f"X-Long{n}: {'x' * 7000}" for n in range(6)))), 400, "bad_request")
    check_error(await front.raw(get(f"/{'x' * 9000}")), 414, "uri_too_long")
    check_error(await front.raw(b"nonsense\r\n\r\n"), 400, "bad_request")
    check_error(await front.raw(b"GET no-path HTTP/1.1\r\nHost: x\r\n\r\n"), 400, "bad_request")
    check_error(await front.raw(b"GET / HTTP/9.1\r\nHost: x\r\n\r\n"), 400, "bad_request")
    check_error(await front.raw(b"GET /%zz HTTP/1.1\r\nHost: x\r\n\r\n"), 400, "bad_request")
    check_error(await front.raw(b"GET / HTTP/1.1\r\n\r\n"), 400, "bad_request")
    check_error(await front.raw(b"GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n"), 400, "bad_request")
    check_error(await front.raw(get("/v1/export", "Transfer-Encoding: gzip", method="POST")), 400, "bad_request")
    check_error(await front.raw(get("/v1/export", method="TRACE")), 405, "method_not_allowed")


async def test_errors_of_the_api_keep_their_headers(front: Door) -> None:
    for request in (get("/v1/export/none"), get("/v1/export", method="PUT")):
        reply = await front.raw(request)
        check_error(reply, reply.status, reply.json["code"])
    assert reply.all("allow") == ["POST, OPTIONS"]


async def test_old_health_checks_need_no_host(front: Door) -> None:
    for path in ("/health/live", "/"):
        assert (await front.raw(f"GET {path} HTTP/1.0\r\n\r\n".encode())).status == 200


async def test_head_of_an_error_has_no_body(front: Door) -> None:
    reply = await front.raw(get("/metrics", method="HEAD"))
    assert (reply.status, reply.body) == (404, b"")


async def test_body_that_is_too_large_is_413(front: Door) -> None:
    declared = await front.raw(get("/v1/export", "Content-Length: 65537", method="POST") + b"x" * 65537)
    check_error(declared, 413, "body_too_large")
    assert "65,536" in declared.json["message"]
    chunked = get("/v1/export", "Transfer-Encoding: chunked", method="POST") + b"4000\r\n" + b"x" * 0x4000 + b"\r\n"
    check_error(await front.raw(chunked + (b"4000\r\n" + b"x" * 0x4000 + b"\r\n") * 5), 413, "body_too_large")
    download = await front.raw(get("/downloads/x", "Content-Length: 65537", method="GET") + b"x" * 65537)
    check_error(download, 413, "body_too_large")


async def test_body_as_large_as_allowed_reaches_the_api_without_touching_the_disk(front: Door) -> None:
    body = json.dumps({"file_ids": [70000], "x": "y"}).encode().ljust(65536)
    head = get("/v1/export", "Content-Type: application/json", "Content-Length: 65536", method="POST")
    reply = await front.raw(head + body)
    assert (reply.status, reply.json["code"]) == (400, "invalid_request"), reply
    # nginx would have warned about a temporary file, and the fixture complained.


async def test_hanging_api_is_504_by_the_waits_of_each_place(shared_config: Config, tmp_path: Path) -> None:
    loop = asyncio.get_running_loop()

    async def hangs(_: Seen) -> bytes:
        await asyncio.sleep(60)
        return b""

    changes = {"proxy_read_timeout 35s": "proxy_read_timeout 300ms", "proxy_read_timeout 300s": "proxy_read_timeout 1s"}
    async with Upstream(hangs) as hanging:
        with door(shared_config, tmp_path / "n", api=hanging.port, changes=changes) as nginx:

            async def seconds(method: str, path: str) -> float:
                began = loop.time()
                reply = await nginx.raw(get(path, method=method))
                check_error(reply, 504, "gateway_timeout")
                assert reply.all("retry-after") == ["2"]
                return loop.time() - began

            short, post, long = await asyncio.gather(
                seconds("GET", "/v1/exports"), seconds("POST", "/v1/export"), seconds("POST", "/v1/download/start")
            )
            assert max(short, post) < 1 <= long
            # None of them was sent a second time.
            assert len(hanging.seen) == 3


def test_waits_are_longer_than_the_apis(shared_config: Config, tmp_path: Path) -> None:
    text = rendered(shared_config, tmp_path)
    assert float(re.findall(r"proxy_read_timeout (\d+)s;\s+# the API", text)[0]) > shared_config.api.request_timeout
    assert "proxy_read_timeout 300s;" in text
    slow = rendered(changed(shared_config, "api", request_timeout=600), tmp_path)
    assert "proxy_read_timeout 630s;" in slow
    assert f"proxy_read_timeout {int(shared_config.sse.max_duration) + 10}s;" in text


async def test_api_that_is_away_is_502(shared_config: Config, tmp_path: Path) -> None:
    with door(shared_config, tmp_path / "n", api=steady_port()) as nginx:
        reply = await nginx.raw(get("/v1/exports", "X-Request-ID: mine"))
        check_error(reply, 502, "bad_gateway")
        assert reply.all("retry-after") == ["2"]
        assert reply.all("x-request-id") == ["mine"]
        line = nginx.logged("mine")
        assert (line["level"], line["context"]["status"]) == ("error", 502)
        check_error(await nginx.raw(get("/health")), 502, "bad_gateway")


async def test_slow_clients_are_let_go(shared_config: Config, tmp_path: Path, api: Api) -> None:
    """With waits of a second instead of 10 and 15."""
    loop = asyncio.get_running_loop()
    changes = {
        "client_header_timeout 10s": "client_header_timeout 1s",
        "client_body_timeout 15s": "client_body_timeout 1s",
    }
    with door(shared_config, tmp_path / "n", api=api.port, changes=changes) as nginx:

        async def drip(start: bytes, drop: bytes) -> float:
            """Seconds until nginx has enough."""
            reader, writer = await asyncio.open_connection("127.0.0.1", nginx.port)
            began = loop.time()
            writer.write(start)
            try:
                async with asyncio.timeout(8):
                    while True:
                        try:
                            async with asyncio.timeout(0.2):
                                said = await reader.read(100)
                        except TimeoutError:
                            if drop:
                                writer.write(drop)
                            continue
                        assert said == b"" or b" 408 " in said
                        break
            except ConnectionError:
                pass
            finally:
                writer.close()
            return loop.time() - began

        begun = b"POST /v1/export HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n"
        # The header as a whole has to come in time, a body's next bytes.
        waits = await asyncio.gather(drip(b"GET / HT", b""), drip(begun, b"X-A: b\r\n"), drip(begun + b"\r\n{", b""))
        assert max(waits) < 4, waits
        assert [line["context"]["status"] for line in nginx.log()] == [408] * 3


async def test_too_many_connections_of_one_address_are_429(shared_config: Config, tmp_path: Path, api: Api) -> None:
    async with worker_side(shared_config) as jobs:
        job = await jobs.queued()
        with door(shared_config, tmp_path / "n", api=api.port, connections_of_address=2) as nginx:
            path = f"/v1/export/{job.id}/progress"
            async with nginx.client() as client, client.get(path) as one, client.get(path) as two:
                assert (one.status, two.status) == (200, 200)
                reply = await nginx.raw(get("/v1/exports"))
                check_error(reply, 429, "too_many_connections")
                assert reply.all("retry-after") == ["2"]
                link = "/downloads/x?X-Amz-Signature=" + "0" * 64
                check_error(await nginx.raw(get(link)), 429, "too_many_connections")
                assert (await nginx.ask("GET", "/v1/exports", address="127.0.0.77")).status == 200
        await jobs.queue.cancel(job.id)


async def requests_left(nginx: Door, address: str, *headers: str) -> int:
    """What the rate limit leaves to whom the API takes for the caller."""
    sent = [tuple(header.split(": ", 1)) for header in headers]
    async with nginx.client(address) as client, client.get("/v1/exports", headers=sent) as reply:  # type: ignore[arg-type]
        assert reply.status == 200, await reply.text()
        return int(reply.headers["RateLimit-Remaining"])


async def test_forged_addresses_do_not_change_the_caller(front: Door) -> None:
    address, victim = next(_addresses), next(_addresses)
    forged = [
        f"X-Forwarded-For: {victim}",
        f"X-Forwarded-For: {victim}, 127.0.0.1",
        f"X-Real-IP: {victim}",
        f"Forwarded: for={victim}",
        f"X_Forwarded_For: {victim}",
    ]
    left = [await requests_left(front, address), *[await requests_left(front, address, header) for header in forged]]
    assert left == list(range(4999, 4999 - len(left), -1))
    assert await requests_left(front, victim) == 4999


async def test_trusted_proxies_say_who_asks(shared_config: Config, tmp_path: Path, api: Api) -> None:
    trusted = ("127.0.0.8/32", "127.0.0.9/32")
    with door(shared_config, tmp_path / "n", api=api.port, trusted_proxies=trusted) as nginx:
        one, other = "203.0.113.201", "198.51.100.201"
        assert await requests_left(nginx, "127.0.0.9", f"X-Forwarded-For: {one}") == 4999
        # What stands before the first address that is not a trusted proxy's is a claim.
        assert await requests_left(nginx, "127.0.0.9", f"X-Forwarded-For: {other}, {one}, 127.0.0.8") == 4998
        assert await requests_left(nginx, "127.0.0.9", f"X-Forwarded-For: {other}", f"X-Forwarded-For: {one}") == 4997
        assert await requests_left(nginx, "127.0.0.9", "X-Forwarded-For: 2001:db8:77::1") == 4999
        assert await requests_left(nginx, "127.0.0.10", f"X-Forwarded-For: {one}") == 4999


async def test_scheme_is_believed_of_trusted_proxies_alone(shared_config: Config, tmp_path: Path, api: Api) -> None:
    with door(shared_config, tmp_path / "n", api=api.port, trusted_proxies=("127.0.0.9/32",)) as nginx:
        for address, proto, secure in (
            ("127.0.0.9", "https", True),
            ("127.0.0.9", "http", False),
            ("127.0.0.9", "https, http", False),
            ("127.0.0.10", "https", False),
        ):
            reply = await nginx.ask("GET", "/v1/exports", address=address, X_Forwarded_Proto=proto)
            assert ("; Secure" in reply.headers["Set-Cookie"]) is secure
            assert ("Strict-Transport-Security" in reply.headers) is secure


@pytest.mark.parametrize(
    "target", ["/metrics", "/metrics/", "//metrics", "/%6detrics", "/metrics?x", "/./metrics", "/v1/../metrics"]
)
async def test_what_is_for_operators_is_not_outside(front: Door, target: str) -> None:
    for path in (target, target.replace("metrics", "nginx_status")):
        check_error(await front.raw(get(path)), 404, "not_found")
    absolute = await front.raw(get(f"http://x{target}"))
    check_error(absolute, 404, "not_found")


async def test_operators_have_a_port(front: Door, shared_config: Config, tmp_path: Path, api: Api) -> None:
    port = front.internal_port
    metrics = await front.ask("GET", "/metrics", port=port)
    assert "http_requests_total" in metrics.text
    assert "Active connections" in (await front.ask("GET", "/nginx_status", port=port)).text
    assert (await front.ask("GET", "/v1/exports", port=port)).status == 404
    for inside in (None, port):
        health = await front.ask("GET", "/health", port=inside)
        assert health.json["checks"]["redis"] == "ok"
        assert (await front.ask("GET", "/health/live", port=inside)).status == 200
    with door(shared_config, tmp_path / "n", api=api.port, internal_networks=("127.0.0.5/32",)) as nginx:
        for path in ("/metrics", "/nginx_status", "/health"):
            assert (await nginx.ask("GET", path, port=nginx.internal_port, address="127.0.0.5")).status in (200, 503)
            refused = await nginx.ask("GET", path, port=nginx.internal_port, address="127.0.0.6")
            assert (refused.status, refused.json["code"]) == (403, "forbidden")


async def test_events_come_at_once_and_are_never_compressed(front: Door, shared_config: Config) -> None:
    loop = asyncio.get_running_loop()
    async with worker_side(shared_config) as jobs:
        lease = await jobs.claimed()
        paths = {f"/v1/export/{lease.job.id}/progress": (20, 40), f"/v1/download/subscribe/{lease.job.id}": (60, 80)}
        for path, percents in paths.items():
            async with front.client() as client, client.get(path, headers={"Accept-Encoding": "gzip"}) as reply:
                assert reply.headers["Content-Type"] == "text/event-stream"
                assert "Content-Encoding" not in reply.headers
                assert len(reply.headers.getall("X-Request-ID")) == 1
                events = parse_events(reply)
                await next_event(events)
                for percent in percents:
                    began = loop.time()
                    await jobs.queue.progress(lease, progress(percent))
                    assert (await next_event(events)).data["progress"] == percent
                    assert loop.time() - began < 0.5
        await jobs.queue.finish(lease, result())


async def test_json_is_compressed_and_still_compared(front: Door, shared_config: Config) -> None:
    reply = await front.raw(get("/openapi.json", "Accept-Encoding: gzip"))
    assert reply.all("content-encoding") == ["gzip"]
    assert "Accept-Encoding" in ", ".join(reply.all("vary"))
    small = await front.ask("GET", "/v1/export/none", Accept_Encoding="gzip")
    assert "Content-Encoding" not in small.headers
    async with worker_side(shared_config) as jobs:
        lease = await jobs.claimed()
        await jobs.queue.finish(lease, replace(result(), skipped_file_ids=tuple(range(80_000, 80_100))))
        path = f"/v1/export/{lease.job.id}"
        plain = await front.raw(get(path))
        packed = await front.raw(get(path, "Accept-Encoding: gzip"))
        assert packed.all("content-encoding") == ["gzip"], len(plain.body)
        (known,) = packed.all("etag")
        assert known == f"W/{plain.all('etag')[0].removeprefix('W/')}"
        for tag in (known, plain.all("etag")[0]):
            same = await front.raw(get(path, "Accept-Encoding: gzip", f"If-None-Match: {tag}"))
            assert (same.status, same.body) == (304, b"")


async def test_log_has_one_object_for_each_request(front: Door, api: Api) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    await front.raw(get("/v1/exports?secret=1", "X-Request-ID: logged", f"traceparent: {trace}"))
    line = front.logged("logged")
    seconds = line["context"].pop("seconds"), line["context"].pop("upstreamSeconds")
    assert all(isinstance(number, float | int) and 0 <= number < 5 for number in seconds)
    assert line["context"].pop("bytes") > 0
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", line.pop("timestamp"))
    assert line == {
        "level": "info",
        "service": "delineate-nginx",
        "traceId": "0af7651916cd43dd8448eb211c80319c",
        "spanId": "b7ad6b7169203331",
        "requestId": "logged",
        "message": "GET /v1/exports 200",
        "context": {
            "method": "GET",
            "path": "/v1/exports",
            "status": 200,
            "protocol": "HTTP/1.1",
            "upstreamStatus": 200,
            "upstream": f"127.0.0.1:{api.port}",
        },
    }
    await front.raw(get("/metrics", "X-Request-ID: not-passed-on"))
    alone = front.logged("not-passed-on")
    assert alone["level"] == "warning"
    assert (alone["context"]["upstreamStatus"], alone["context"]["upstreamSeconds"]) == (None, None)


@pytest.mark.parametrize("zone", ["America/New_York", "Asia/Kolkata"])
async def test_log_has_the_right_time_in_every_zone(shared_config: Config, tmp_path: Path, zone: str) -> None:
    with door(shared_config, tmp_path / "n", api=steady_port(), environ={"TZ": zone}) as nginx:
        await nginx.raw(get("/metrics", "X-Request-ID: when"))
        logged = datetime.datetime.fromisoformat(nginx.logged("when")["timestamp"])
        assert abs(datetime.datetime.now(datetime.UTC) - logged) < datetime.timedelta(seconds=10)


async def test_hostile_requests_keep_the_log_json(front: Door) -> None:
    """Quotes, escapes, control characters, bytes that are not UTF-8; no query and no address."""
    before = len(front.server.log.read_bytes())
    paths = ['/"', "/\\", "/%22%5c%0a%00", "/%0d%0a{", "/%ff%fe", "/\xff\xfe", "/ü%c3%bc?a=secret", "/a%3Fb=secret"]
    headers = ('User-Agent: "}', "X-Request-ID: a\\b", 'traceparent: 00-"-"-01')
    for path in paths:
        await front.raw(get(path, *headers), address="127.0.0.77")
    for line in (b"\x16\x03\x01\r\n\r\n", b"GET /\x01 HTTP/1.1\r\n\r\n", b"GET /?secret\r\n\r\n", b'"}\r\n\r\n'):
        await front.raw(line, address="127.0.0.77")
    added = front.server.log.read_bytes()[before:].decode()  # UTF-8, or this fails
    lines = added.splitlines()
    assert len(lines) >= len(paths)
    keys = {" ".join(json.loads(line)["context"]) for line in lines}
    assert keys == {"method path status protocol bytes seconds upstreamSeconds upstreamStatus upstream"}
    assert "secret" not in added
    assert "127.0.0.77" not in added
    assert all(isinstance(json.loads(line)["context"]["status"], int) for line in lines)


SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"
CHUNKED_END = b"0\r\n\r\n" + SMUGGLED


SMUGGLERS = [
    (b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n", CHUNKED_END),
    (b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n", CHUNKED_END),
    (b"Content-Length: 0\r\nContent-Length: %d\r\n" % len(SMUGGLED), SMUGGLED),
    (b"Content-Length: 0, %d\r\n" % len(SMUGGLED), SMUGGLED),
    (b"Content-Length: +5\r\n", CHUNKED_END),
    (b"Transfer-Encoding: xchunked\r\n", CHUNKED_END),
    (b"Transfer-Encoding : chunked\r\n", CHUNKED_END),
    (b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n", CHUNKED_END),
    (b"Transfer-Encoding: chunked, identity\r\n", CHUNKED_END),
    (b"Transfer-Encoding: \x0bchunked\r\n", CHUNKED_END),
    (b"Transfer-Encoding:\n chunked\r\n", CHUNKED_END),
    (b"X: y\rTransfer-Encoding: chunked\r\n", CHUNKED_END),
    (b"Transfer-Encoding: chunked\r\n", b"-1\r\n" + CHUNKED_END),
    (b"Transfer-Encoding: chunked\r\n", b"0x5\r\n" + CHUNKED_END),
    (b"Transfer-Encoding: chunked\r\n", b"ffffffffffffffff1\r\n" + CHUNKED_END),
    (b"Transfer-Encoding: chunked\r\n", b"5\r\nabcde" + CHUNKED_END),
]


async def test_no_request_is_smuggled_in_the_body_of_another(shared_config: Config, tmp_path: Path) -> None:
    async with Upstream() as upstream:
        with door(shared_config, tmp_path / "n", api=upstream.port) as nginx:
            for headers, body in SMUGGLERS:
                start = b"POST /v1/first HTTP/1.1\r\nHost: x\r\n"
                reply = await nginx.raw(start + headers + b"\r\n" + body, seconds=3)
                check_error(reply, 400, "bad_request")
            assert upstream.seen == []
            # Two honest ones on a connection are two, and a chunked body arrives with its length.
            chunked = b"POST /v1/one HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
            await nginx.raw(chunked + get("/v1/two"))
            assert [(seen.line, seen.body) for seen in upstream.seen] == [
                ("POST /v1/one HTTP/1.1", b"abc"),
                ("GET /v1/two HTTP/1.1", b""),
            ]
