"""What every answer has, whatever was asked: headers, limits, JSON errors, the right methods."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import pytest

from delineate.api.app import ROUTES
from delineate.api.auth import make_caller
from delineate.api.handler import Answer, Request, Route
from delineate.api.routing import Table
from delineate.config import Config
from delineate.errors import ConfigError
from delineate.telemetry.logs import JsonFormatter
from tests.api.running import RunningApi, changed, running_api
from tests.api.test_validation import check_error

TIMES_OUT = "/test/slow"
BREAKS = "/test/broken"


def add_route(running: RunningApi, route: Route) -> None:
    running.api.table = Table([*ROUTES, route])


async def test_every_answer_has_the_headers(config: Config) -> None:
    async with running_api(config) as running:
        job = await running.completed()
        asked = [
            ("GET", "/", None),
            ("GET", "/docs", None),
            ("GET", "/app.js", None),
            ("GET", "/health", None),
            ("GET", "/health/live", None),
            ("GET", "/metrics", None),
            ("GET", "/nowhere", None),
            ("GET", "/%zz", None),
            ("PUT", "/v1/export", None),
            ("OPTIONS", "/v1/export", None),
            ("POST", "/v1/export", {"file_ids": [70000]}),
            ("POST", "/v1/export", {"file_ids": [1]}),
            ("POST", "/v1/export", b"x" * 100_000),
            ("GET", f"/v1/export/{job.id}", None),
            ("HEAD", f"/v1/export/{job.id}", None),
            ("GET", f"/v1/export/{job.id}/progress", None),
            ("GET", f"/v1/export/{uuid.uuid4()}/progress", None),
        ]
        for method, path, body in asked:
            reply = await running.fetch(method, path, body)
            headers = reply.headers
            assert uuid.UUID(headers["X-Request-ID"]).version == 4, path
            for name in ("RateLimit-Limit", "RateLimit-Remaining", "RateLimit-Reset"):
                assert headers[name].isdigit(), (path, name)
            assert headers["Strict-Transport-Security"].startswith("max-age=31536000")
            assert headers["X-Frame-Options"] == "DENY"
            assert headers["X-Content-Type-Options"] == "nosniff"
            assert "default-src 'none'" in headers["Content-Security-Policy"]
            assert "unsafe" not in headers["Content-Security-Policy"]
            assert "Access-Control-Allow-Origin" not in headers
            assert re.fullmatch(r"\w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT", headers["Date"])
            if reply.status >= 400 and path not in ("/health",):
                assert headers["Content-Type"] == "application/json"
                assert reply.json["requestId"] == headers["X-Request-ID"]


async def test_sane_request_id_is_kept_and_others_are_replaced(config: Config) -> None:
    async with running_api(config) as running:
        for sane in ("abc-123", "a" * 128, "1.2:3_4"):
            assert (await running.fetch("GET", "/health/live", X_Request_ID=sane)).headers["X-Request-ID"] == sane
        for odd in ("", "a" * 129, "a b", "<script>", 'a"b', "é"):
            found = (await running.fetch("GET", "/health/live", X_Request_ID=odd)).headers["X-Request-ID"]
            assert uuid.UUID(found).version == 4


async def test_wrong_method_is_405_and_says_what_is_allowed(config: Config) -> None:
    async with running_api(config) as running:
        for method, path, allowed in (
            ("GET", "/v1/export", "POST, OPTIONS"),
            ("PUT", "/v1/export", "POST, OPTIONS"),
            ("PATCH", f"/v1/export/{uuid.uuid4()}", "DELETE, GET, HEAD, OPTIONS"),
            ("POST", "/health", "GET, HEAD, OPTIONS"),
            ("BREW", "/v1/exports", "GET, HEAD, OPTIONS"),
            ("GET", "/v1/download/check", "POST, OPTIONS"),
            ("GET", f"/v1/download/{uuid.uuid4()}", "DELETE, OPTIONS"),
            ("TRACE", "/", "GET, HEAD, OPTIONS"),
        ):
            reply = await running.fetch(method, path)
            assert (reply.status, reply.json["code"]) == (405, "method_not_allowed")
            assert reply.headers["Allow"] == allowed
            check_error(reply.json, "Method Not Allowed")
            preflight = await running.fetch("OPTIONS", path)
            assert (preflight.status, preflight.headers["Allow"], preflight.text) == (204, allowed, "")


async def test_head_is_get_without_its_body(config: Config) -> None:
    async with running_api(config) as running:
        job = await running.queued()
        for path in (f"/v1/export/{job.id}", "/health/live", "/docs", "/v1/exports", "/nowhere"):
            head, get = await running.fetch("HEAD", path), await running.fetch("GET", path)
            assert (head.status, head.text) == (get.status, "")
            assert head.headers["Content-Length"] == get.headers["Content-Length"]


async def test_connection_is_kept_and_pipelined_requests_are_answered_in_order(config: Config) -> None:
    async with running_api(config) as running:
        one = b"GET /health/live HTTP/1.1\r\nHost: x\r\nX-Request-ID: %d\r\n\r\n"
        last = b"GET /nowhere HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        answer = await running.raw(b"".join(one % number for number in range(5)) + last)
        assert re.findall(rb"X-Request-ID: (\d)\r", answer) == [b"0", b"1", b"2", b"3", b"4"]
        assert answer.count(b"HTTP/1.1 200 OK") == 5
        assert b"HTTP/1.1 404 Not Found" in answer


async def test_bug_is_500_without_a_trace_and_is_logged(config: Config) -> None:
    async def broken(_: Request) -> NoReturn:
        raise ZeroDivisionError("the secret reason")

    async with running_api(config) as running:
        add_route(running, Route("GET", BREAKS, broken))
        with logged() as lines:
            reply = await running.fetch("GET", f"{BREAKS}?signature=secret")
        assert (reply.status, reply.json["code"]) == (500, "internal_error")
        check_error(reply.json, "Internal Server Error")
        assert "secret" not in reply.text
    (line,) = [json.loads(line) for line in lines.getvalue().splitlines()]
    assert (line["level"], line["error"]["type"]) == ("error", "ZeroDivisionError")
    assert "in broken" in line["error"]["stack"]
    assert line["requestId"] == reply.headers["X-Request-ID"]
    assert line["context"] == {"method": "GET", "path": BREAKS}


@contextmanager
def logged() -> Iterator[io.StringIO]:
    """What the API writes into its log meanwhile."""
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(JsonFormatter("delineate-api"))
    log = logging.getLogger("delineate")
    log.addHandler(handler)
    try:
        yield written
    finally:
        log.removeHandler(handler)


async def test_request_that_takes_too_long_is_504(config: Config) -> None:
    async def slow(_: Request) -> Answer:
        await asyncio.sleep(60)
        return Answer()

    async with running_api(changed(config, "api", request_timeout=0.1)) as running:
        add_route(running, Route("GET", TIMES_OUT, slow))
        reply = await running.fetch("GET", TIMES_OUT)
        assert (reply.status, reply.json["code"]) == (504, "request_timeout")


async def test_header_that_would_break_the_answer_is_never_sent(
    config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    async def split(_: Request) -> Answer:
        return Answer(headers=(("Location", "/x\r\nSet-Cookie: stolen=1"),))

    async with running_api(config) as running:
        add_route(running, Route("GET", BREAKS, split))
        answer = await running.raw(f"GET {BREAKS} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        assert answer.startswith(b"HTTP/1.1 500 ")
        assert b"stolen" not in answer
    assert "would break the answer" in caplog.text


async def test_limit_counts_per_caller_and_answers_429(config: Config) -> None:
    limited = changed(config, "rate_limit", enabled=True, requests=3, window=60)
    async with running_api(limited) as running:
        for left in (2, 1, 0):
            reply = await running.fetch("GET", "/v1/exports", X_Forwarded_For="203.0.113.7")
            assert (reply.status, reply.headers["RateLimit-Remaining"]) == (200, str(left))
            assert reply.headers["RateLimit-Limit"] == "3"
            assert 0 < int(reply.headers["RateLimit-Reset"]) <= 60
        for path in ("/v1/exports", f"/v1/export/{uuid.uuid4()}/progress"):
            reply = await running.fetch("GET", path, X_Forwarded_For="203.0.113.7")
            assert (reply.status, reply.json["code"]) == (429, "rate_limited")
            assert 1 <= int(reply.headers["Retry-After"]) <= 60
            assert reply.headers["RateLimit-Remaining"] == "0"
            check_error(reply.json, "Too Many Requests")
        # What a client writes in front of what our proxy wrote is not believed; another caller is free; health is too.
        forged = await running.fetch("GET", "/v1/exports", X_Forwarded_For="198.51.100.9, 203.0.113.7")
        assert forged.status == 429
        assert (await running.fetch("GET", "/v1/exports", X_Forwarded_For="203.0.113.8")).status == 200
        assert (await running.fetch("GET", "/health/live", X_Forwarded_For="203.0.113.7")).status == 200


def test_only_trusted_proxies_are_believed() -> None:
    caller = make_caller(["127.0.0.0/8", "10.0.0.0/8", "::1/128"])
    assert caller("127.0.0.1", "") == "127.0.0.1"
    assert caller("127.0.0.1", "203.0.113.7") == "203.0.113.7"
    assert caller("127.0.0.1", "1.2.3.4, 203.0.113.7, 10.1.1.1") == "203.0.113.7"
    assert caller("203.0.113.9", "1.2.3.4") == "203.0.113.9"
    assert caller("127.0.0.1", "1.2.3.4, nonsense") == "127.0.0.1"
    assert caller("127.0.0.1", "10.0.0.1, 10.0.0.2") == "10.0.0.1"
    assert caller("::ffff:127.0.0.1", "203.0.113.7") == "203.0.113.7"
    assert caller("::1", "2001:db8:1:2:3::4") == caller("::1", "2001:db8:1:2:ffff::9") == "2001:db8:1:2::/64"
    with pytest.raises(ConfigError, match=r"trusted_proxies: 'here'"):
        make_caller(["here"])


async def test_cors_is_for_configured_origins_only(config: Config) -> None:
    origin = "https://app.example.org"
    async with running_api(changed(config, "api", cors_origins=(origin,))) as running:
        reply = await running.fetch("GET", "/health/live", Origin=origin)
        assert reply.headers["Access-Control-Allow-Origin"] == origin
        assert reply.headers["Access-Control-Allow-Credentials"] == "true"
        assert "RateLimit-Remaining" in reply.headers["Access-Control-Expose-Headers"]
        assert reply.headers["Vary"] == "Origin"
        asked = {"Access_Control_Request_Method": "POST", "Access_Control_Request_Headers": "content-type"}
        preflight = await running.fetch("OPTIONS", "/v1/export", Origin=origin, **asked)
        assert preflight.status == 204
        assert "POST" in preflight.headers["Access-Control-Allow-Methods"]
        assert "Idempotency-Key" in preflight.headers["Access-Control-Allow-Headers"]
        refused = await running.fetch("GET", "/nowhere", Origin=origin)
        assert refused.headers["Access-Control-Allow-Origin"] == origin
        for other in ("https://evil.example", "null", "https://app.example.org.evil.example"):
            reply = await running.fetch("OPTIONS", "/v1/export", Origin=other, **asked)
            assert not [name for name in reply.headers if name.startswith("Access-Control")]
    async with running_api(changed(config, "api", cors_origins=("*",))) as running:
        reply = await running.fetch("GET", "/health/live", Origin=origin)
        assert reply.headers["Access-Control-Allow-Origin"] == "*"
        assert "Access-Control-Allow-Credentials" not in reply.headers


async def test_index_is_a_page_to_browsers_and_json_to_programs(config: Config) -> None:
    async with running_api(config) as running:
        page = await running.fetch("GET", "/", Accept="text/html,application/xhtml+xml")
        assert page.headers["Content-Type"] == "text/html; charset=utf-8"
        assert "Set-Cookie" not in page.headers  # a cache may keep it
        again = await running.fetch("GET", "/", **{"Accept": "text/html", "If-None-Match": page.headers["ETag"]})
        assert (again.status, again.text) == (304, "")
        assert "script-src 'self'" in page.headers["Content-Security-Policy"]
        assert not re.search(r"<script(?![^>]*src=)|\son\w+=|style=|https?://", page.text)
        for path in re.findall(r'(?:src|href)="(/[^"]+)"', page.text):
            assert (await running.fetch("GET", path)).status in (200, 503)
        index = await running.fetch("GET", "/")
        assert index.json["name"] == "delineate"
        assert index.json["links"]["docs"] == "/docs"
        script = await running.fetch("GET", "/app.js")
        assert script.headers["Content-Type"].startswith("text/javascript")
        again = await running.fetch("GET", "/app.js", If_None_Match=script.headers["ETag"])
        assert (again.status, again.text) == (304, "")


async def test_description_covers_every_route(config: Config) -> None:
    async with running_api(config) as running:
        document = (await running.fetch("GET", "/openapi.json")).json
        described = {(method.upper(), path) for path, item in document["paths"].items() for method in item}
        files = {("GET", "/app.js"), ("GET", "/style.css")}
        assert described == {(route.method, route.path) for route in ROUTES} - files
        assert document["openapi"].startswith("3.1")
        ids = document["components"]["schemas"]["ExportRequest"]["properties"]["file_ids"]
        assert (ids["minItems"], ids["maxItems"]) == (1, 1000)
        assert (ids["items"]["minimum"], ids["items"]["maximum"]) == (10_000, 100_000_000)
        for name in re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document)):
            assert name in document["components"]["schemas"]
        page = await running.fetch("GET", "/docs")
        assert page.headers["Content-Type"] == "text/html; charset=utf-8"
        assert not re.search(r"<script|\sstyle=|https?://", page.text)
        for _, path in described:
            assert path in page.text


async def test_session_cookie_is_for_tls_alone_where_tls_is_used(config: Config) -> None:
    async def cookie(running: RunningApi, **headers: str) -> str:
        return (await running.fetch("GET", "/v1/exports", **headers)).headers["Set-Cookie"]

    async with running_api(config) as running:
        assert (await cookie(running)).endswith("; HttpOnly; SameSite=Lax")
        assert (await cookie(running, **{"X-Forwarded-Proto": "https"})).endswith("; HttpOnly; SameSite=Lax; Secure")
    async with running_api(changed(config, "api", secure_cookies=True)) as running:
        assert (await cookie(running)).endswith("; HttpOnly; SameSite=Lax; Secure")
