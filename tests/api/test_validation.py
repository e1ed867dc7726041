"""Requests that are wrong, and requests that mean harm: each gets JSON that says what to change, and never a 500."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from delineate.api.schemas import parse_export, parse_file
from delineate.config import Config
from delineate.errors import InvalidRequest
from tests.api.running import running_api

ERROR_FIELDS = {"error", "code", "message", "requestId", "details"}
RULE = "must be an integer from 10,000 to 100,000,000"


@pytest.mark.parametrize("value", [10_000, 100_000_000, 70000])
def test_file_ids_in_range_are_accepted(value: int) -> None:
    assert parse_export(json.dumps({"file_ids": [value]}).encode()).file_ids == (value,)


@pytest.mark.parametrize(
    "text",
    ["9999", "100000001", "0", "-70000", "true", "false", "null", '"70000"', "70000.0", "7e4", "1.0", "[]", "{}",
     "9" * 30, "[70000]", "-0", "1e999"],
)  # fmt: skip
def test_anything_else_is_named_with_its_path(text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_export(f'{{"file_ids":[70000,{text},70001]}}'.encode())
    assert caught.value.code == "invalid_file_id"
    assert caught.value.details == (("$.file_ids[1]", RULE),)
    with pytest.raises(InvalidRequest) as caught:
        parse_file(f'{{"file_id":{text}}}'.encode())
    assert caught.value.code == "invalid_file_id"
    assert caught.value.details == (("$.file_id", RULE),)


def test_a_thousand_ids_are_the_most_before_duplicates_collapse() -> None:
    assert len(parse_export(json.dumps({"file_ids": list(range(10_000, 11_000))}).encode()).file_ids) == 1000
    assert parse_export(json.dumps({"file_ids": [70000] * 1000}).encode()).file_ids == (70000,)
    for ids in ([70000] * 1001, []):
        with pytest.raises(InvalidRequest) as caught:
            parse_export(json.dumps({"file_ids": ids}).encode())
        assert caught.value.details[0].path == "$.file_ids"


def test_order_is_kept_and_duplicates_collapse() -> None:
    assert parse_export(b'{"file_ids":[70002,70000,70002,70001,70000]}').file_ids == (70002, 70000, 70001)


def test_same_wish_has_the_same_fingerprint() -> None:
    first = parse_export(b'{"file_ids":[70000,70001]}').fingerprint()
    assert parse_export(b' {"on_missing":"fail", "file_ids":[70000,70001,70000]} ').fingerprint() == first
    assert parse_export(b'{"file_ids":[70001,70000]}').fingerprint() != first
    assert parse_export(b'{"file_ids":[70000,70001],"on_missing":"skip"}').fingerprint() != first


def test_at_most_twenty_details() -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_export(json.dumps({"file_ids": [1] * 1000}).encode())
    assert len(caught.value.details) == 20
    assert "999 more" not in caught.value.details[0].message


@pytest.mark.parametrize(
    ("body", "path"),
    [
        (b"{}", "$.file_ids"),
        (b'{"file_ids":null}', "$.file_ids"),
        (b'{"file_ids":"70000"}', "$.file_ids"),
        (b'{"file_ids":70000}', "$.file_ids"),
        (b'{"file_ids":{"0":70000}}', "$.file_ids"),
        (b'{"file_ids":[70000],"on_missing":"ignore"}', "$.on_missing"),
        (b'{"file_ids":[70000],"on_missing":null}', "$.on_missing"),
        (b'{"file_ids":[70000],"on_missing":["fail"]}', "$.on_missing"),
        (b'{"file_ids":[70000],"on_mising":"skip"}', "$.on_mising"),
        (b'{"file_ids":[70000],"\\ud800":1}', "$.\ud800"),
        (b"[]", "$"),
        (b"null", "$"),
        (b'"x"', "$"),
        (b"1", "$"),
    ],
)
def test_wrong_shape_is_named_with_its_path(body: bytes, path: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_export(body)
    assert caught.value.code == "invalid_request"
    assert path in [detail.path for detail in caught.value.details]


NOT_JSON = [
    b"",
    b" ",
    b"{",
    b'{"file_ids":[70000]',
    b'{"file_ids":[70000],}',
    b'{"file_ids":[NaN]}',
    b'{"file_ids":[Infinity]}',
    b'{"file_ids":[-Infinity]}',
    b'{"file_ids":[70000],"file_ids":[70001]}',
    b'{"file_ids":[070000]}',
    b'{"file_ids":[0x11170]}',
    b'{"file_ids":[70000]} x',
    b'\xef\xbb\xbf{"file_ids":[70000]}',
    b'{"file_ids":[70000],"a":"\xff"}',
    '{"file_ids":[70000]}'.encode("utf-16"),
    b'{"file_ids":' + b"[" * 30000 + b"]" * 30000 + b"}",
    b"[" * 60000,
    b'{"a":' * 12000,
    b'{"file_ids":[' + b"9" * 5000 + b"]}",
    b'{"a":"\x00"}',
    b"\x00",
    b"file_ids=70000",
]


@pytest.mark.parametrize("body", NOT_JSON, ids=[repr(body[:30]) for body in NOT_JSON])
def test_what_is_not_json_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_export(body)
    assert caught.value.code in ("invalid_json", "invalid_request")


async def test_hostile_bodies_get_the_contracts_error_and_nothing_else(config: Config) -> None:
    bodies = [*NOT_JSON, b'{"file_ids":[true]}', b'{"file_ids":[70000],"\\ud800":1}', b'{"file_ids":["\\ud800"]}']
    async with running_api(config) as running:
        for path in ("/v1/export", "/v1/download/initiate", "/v1/download/check", "/v1/download/start"):
            for body in bodies:
                reply = await running.fetch("POST", path, body, X_Request_ID="mine-1")
                assert reply.status == 400, (path, body[:50], reply)
                check_error(reply.json, "Bad Request")
                assert reply.json["requestId"] == "mine-1"
        assert (await running.queue.stats()).waiting == 0


def check_error(document: Any, reason: str) -> None:
    assert set(document) == ERROR_FIELDS
    assert document["error"] == reason
    assert re.fullmatch(r"[a-z_]+", document["code"])
    assert document["message"]
    assert "Traceback" not in document["message"]
    for detail in document["details"]:
        assert set(detail) == {"path", "message"}


@pytest.mark.parametrize(
    "content_type",
    ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "application/jsonp", "json",
     "application/json; charset=latin-1", "text/json", ""],
)  # fmt: skip
async def test_other_content_types_are_415(config: Config, content_type: str) -> None:
    async with running_api(config) as running:
        for path in ("/v1/export", "/v1/download/check", "/v1/download/start"):
            reply = await running.fetch("POST", path, b'{"file_ids":[70000]}', Content_Type=content_type)
            assert (reply.status, reply.json["code"]) == (415, "unsupported_media_type")
            check_error(reply.json, "Unsupported Media Type")


async def test_spellings_of_json_are_accepted(config: Config) -> None:
    async with running_api(config) as running:
        for content_type in ("application/json", "Application/JSON; charset=UTF-8", 'application/json;charset="utf-8"'):
            reply = await running.fetch("POST", "/v1/export", b'{"file_ids":[70000]}', Content_Type=content_type)
            assert reply.status == 200
        reply = await running.fetch("POST", "/v1/export", b"x", Content_Encoding="gzip")
        assert reply.status == 415


async def test_large_body_is_413_however_it_is_sent(config: Config) -> None:
    limit = config.api.max_body_bytes
    fits = b'{"file_ids":[70000]}' + b" " * (limit - 20)
    async with running_api(config) as running:
        assert (await running.fetch("POST", "/v1/export", fits)).status == 200
        for size in (limit + 1, 1_000_000):
            reply = await running.fetch("POST", "/v1/export", b" " * size)
            assert (reply.status, reply.json["code"]) == (413, "body_too_large")
            check_error(reply.json, "Content Too Large")
            assert "X-Request-ID" in reply.headers
        head = b"POST /v1/export HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        chunk = b"%x\r\n%b\r\n" % (40_000, b" " * 40_000)
        answer = await running.raw(head + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 3 + b"0\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 413 Content Too Large\r\n")
        assert b'"code":"body_too_large"' in answer
        answer = await running.raw(head + b"Content-Length: 5000000\r\n\r\n" + b" " * 5_000_000)
        assert answer.startswith(b"HTTP/1.1 413 ")
        # A client that asks first is told before it sends anything.
        answer = await running.raw(head + b"Content-Length: 99999999999999999999999\r\nExpect: 100-continue\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 413 ")
        assert answer.count(b"HTTP/1.1") == 1


async def test_expected_continue_and_chunks_work(config: Config) -> None:
    body = b'{"file_ids":[70000]}'
    head = b"POST /v1/export HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
    async with running_api(config) as running:
        answer = await running.raw(head + b"Expect: 100-continue\r\nContent-Length: 20\r\n\r\n" + body)
        assert answer.startswith(b"HTTP/1.1 100 ")
        assert b"HTTP/1.1 200 OK" in answer
        chunked = b"Transfer-Encoding: chunked\r\n\r\n5\r\n" + body[:5] + b"\r\nf\r\n" + body[5:] + b"\r\n0\r\n\r\n"
        assert b"HTTP/1.1 200 OK" in await running.raw(head + chunked)


@pytest.mark.parametrize(
    ("target", "status", "code"),
    [
        ("/%zz", 400, "invalid_path"),
        ("/v1/export/%", 400, "invalid_path"),
        ("/v1/export/%ff", 400, "invalid_path"),
        ("/%00", 404, "not_found"),
        ("/v1/%65xports", 200, ""),
        ("/../../etc/passwd", 404, "not_found"),
        ("/..%2f..%2fetc%2fpasswd", 404, "not_found"),
        ("/app.js/", 404, "not_found"),
        ("//evil.example/", 404, "not_found"),
        ("/v1/export/", 404, "not_found"),
        ("/v1/export/{jobId}", 404, "job_not_found"),
        ("/" + "a" * 8000, 404, "not_found"),
        ("/health?" + "a=1&" * 3000, 503, ""),
        ("http://somewhere/v1/exports", 200, ""),
        ("http://somewhere", 200, ""),
    ],
)
async def test_odd_targets_are_answered(config: Config, target: str, status: int, code: str) -> None:
    async with running_api(config) as running:
        answer = await running.raw(f"GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        assert answer.startswith(b"HTTP/1.1 %d " % status), answer
        if code:
            document = json.loads(answer.partition(b"\r\n\r\n")[2])
            assert document["code"] == code
            assert set(document) == ERROR_FIELDS


async def test_missing_host_is_400(config: Config) -> None:
    async with running_api(config) as running:
        answer = await running.raw(b"GET /health/live HTTP/1.1\r\nConnection: close\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 400 ")
        check_error(json.loads(answer.partition(b"\r\n\r\n")[2]), "Bad Request")
        assert (await running.raw(b"GET /health/live HTTP/1.0\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
