"""Exports over HTTP: every endpoint of exports.py, its older name, and every status it may answer with."""

from __future__ import annotations

import re

import pytest

from delineate.config import Config
from tests.api.running import FAILURE, changed, progress, result, running_api

UUID4 = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")


@pytest.mark.parametrize("path", ["/v1/export", "/v1/download/initiate"])
async def test_export_is_accepted_at_once(config: Config, path: str) -> None:
    async with running_api(config) as running:
        reply = await running.fetch("POST", path, {"file_ids": [70000, 70001, 70000]})
        assert reply.status == 200
        body = reply.json
        job_id = body.pop("jobId")
        assert UUID4.fullmatch(job_id)
        assert TIME.fullmatch(body.pop("createdAt"))
        assert body == {
            "status": "queued",
            "totalFiles": 2,
            "totalFileIds": 2,
            "links": {
                "self": f"/v1/export/{job_id}",
                "progress": f"/v1/export/{job_id}/progress",
                "download": f"/v1/export/{job_id}/download",
            },
        }
        assert reply.headers["Location"] == f"/v1/export/{job_id}"
        assert (await running.job(job_id)).file_ids == (70000, 70001)


@pytest.mark.parametrize("template", ["/v1/export/{}", "/v1/download/status/{}"])
async def test_status_shows_each_state(config: Config, template: str) -> None:
    async with running_api(config) as running:
        first, second = await running.queued(), await running.queued()
        reply = await running.fetch("GET", template.format(second.id))
        assert (reply.status, reply.json["status"], reply.json["queuePosition"]) == (200, "queued", 2)
        assert int(reply.headers["Retry-After"]) >= 1
        assert (await running.fetch("GET", template.format(first.id.upper()))).json["queuePosition"] == 1

        lease = await running.claimed()
        await running.queue.progress(lease, progress(45, 450))
        body = (await running.fetch("GET", template.format(lease.job.id))).json
        assert (body["status"], body["progress"], body["currentFile"], body["totalFiles"]) == ("processing", 45, 1, 3)
        assert body["stage"] == "packing"
        assert body["attempts"] == 1
        assert body["etaSeconds"] >= 0
        assert TIME.fullmatch(body["startedAt"])
        assert "completedAt" not in body

        await running.queue.finish(lease, result())
        reply = await running.fetch("GET", template.format(lease.job.id))
        body = reply.json
        assert (body["status"], body["progress"], body["size"]) == ("completed", 100, 1234)
        assert body["skippedFiles"] == [70002]
        assert "X-Amz-Signature" in body["downloadUrl"]
        assert TIME.fullmatch(body["expiresAt"])
        assert TIME.fullmatch(body["completedAt"])
        assert "Retry-After" not in reply.headers

        body = (await running.fetch("GET", template.format((await running.failed()).id))).json
        assert body["status"] == "failed"
        assert body["error"] == {"code": FAILURE.code, "message": FAILURE.message}
        assert body["progress"] < 100
        body = (await running.fetch("GET", template.format((await running.cancelled()).id))).json
        assert body["status"] == "cancelled"


async def test_status_that_did_not_change_is_304(config: Config) -> None:
    async with running_api(config) as running:
        lease = await running.claimed()
        path = f"/v1/export/{lease.job.id}"
        etag = (await running.fetch("GET", path)).headers["ETag"]
        for wanted in (etag, f'"other", {etag}', "*", etag.removeprefix("W/")):
            reply = await running.fetch("GET", path, If_None_Match=wanted)
            assert (reply.status, reply.text) == (304, "")
            assert reply.headers["ETag"] == etag
        await running.report(lease, 10)
        reply = await running.fetch("GET", path, If_None_Match=etag)
        assert reply.status == 200
        assert reply.headers["ETag"] != etag


async def test_moving_up_in_line_is_a_change(config: Config) -> None:
    async with running_api(config) as running:
        first, second = await running.queued(), await running.queued()
        etag = (await running.fetch("GET", f"/v1/export/{second.id}")).headers["ETag"]
        await running.queue.cancel(first.id)
        reply = await running.fetch("GET", f"/v1/export/{second.id}", If_None_Match=etag)
        assert (reply.status, reply.json["queuePosition"]) == (200, 1)


@pytest.mark.parametrize(
    "job_id", ["6f8a1d9e-2c1b-4f7e-9a53-0d4be1c7a001", "nonsense", "1", "%00", "..%2f..", "x" * 3000]
)
async def test_unknown_job_is_404_everywhere(config: Config, job_id: str) -> None:
    async with running_api(config) as running:
        for method, path in (
            ("GET", f"/v1/export/{job_id}"),
            ("GET", f"/v1/download/status/{job_id}"),
            ("GET", f"/v1/export/{job_id}/progress"),
            ("GET", f"/v1/download/subscribe/{job_id}"),
            ("GET", f"/v1/export/{job_id}/download"),
            ("DELETE", f"/v1/export/{job_id}"),
            ("DELETE", f"/v1/download/{job_id}"),
            ("POST", f"/v1/export/{job_id}/retry"),
        ):
            head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()
            answer = await running.raw(head)
            assert answer.startswith(b"HTTP/1.1 404 Not Found\r\n"), (path, answer)
            assert b'"code":"job_not_found"' in answer or b"%2f" in head


async def test_download_gives_a_link_that_works(config: Config) -> None:
    async with running_api(config) as running:
        key = f"{config.storage.archive_prefix}a.zip"
        await running.storage.put_archive(key, memoryview(b"zip"), "export.zip")
        job = await running.completed(key)
        reply = await running.fetch("GET", f"/v1/export/{job.id}/download")
        assert reply.status == 200
        body = reply.json
        assert set(body) == {"jobId", "downloadUrl", "expiresAt", "filename", "size"}
        assert (body["jobId"], body["filename"], body["size"]) == (job.id, "export.zip", 1234)
        async with running.http.get(body["downloadUrl"]) as archive:
            assert (archive.status, await archive.read()) == (200, b"zip")
        redirect = await running.fetch("GET", f"/v1/export/{job.id}/download?redirect=1")
        assert redirect.status == 302
        async with running.http.get(redirect.headers["Location"]) as archive:
            assert await archive.read() == b"zip"


async def test_download_before_the_end_is_409(config: Config) -> None:
    async with running_api(config) as running:
        for job, code in (
            (await running.queued(), "job_not_ready"),
            ((await running.claimed()).job, "job_not_ready"),
            (await running.failed(), "job_failed"),
            (await running.cancelled(), "job_cancelled"),
        ):
            reply = await running.fetch("GET", f"/v1/export/{job.id}/download")
            assert (reply.status, reply.json["code"]) == (409, code)


async def test_deleted_archive_is_410(config: Config) -> None:
    async with running_api(config) as running:
        job = await running.completed(f"{config.storage.archive_prefix}gone.zip")
        reply = await running.fetch("GET", f"/v1/export/{job.id}/download")
        assert (reply.status, reply.json["code"]) == (410, "archive_expired")


@pytest.mark.parametrize("template", ["/v1/export/{}", "/v1/download/{}"])
async def test_cancel_is_idempotent_and_too_late_for_the_finished(config: Config, template: str) -> None:
    async with running_api(config) as running:
        for job in (await running.queued(), (await running.claimed()).job):
            for _ in range(2):
                reply = await running.fetch("DELETE", template.format(job.id))
                assert (reply.status, reply.json["status"]) == (200, "cancelled")
        for job in (await running.completed(), await running.failed()):
            reply = await running.fetch("DELETE", template.format(job.id))
            assert (reply.status, reply.json["code"]) == (409, "job_finished")


async def test_retry_brings_failed_and_cancelled_jobs_back(config: Config) -> None:
    async with running_api(config) as running:
        for job in (await running.failed(), await running.cancelled()):
            reply = await running.fetch("POST", f"/v1/export/{job.id}/retry")
            assert (reply.status, reply.json["status"], reply.json["jobId"]) == (200, "queued", job.id)
            assert reply.headers["Location"] == f"/v1/export/{job.id}"
        for job in (await running.completed(), await running.queued()):
            reply = await running.fetch("POST", f"/v1/export/{job.id}/retry")
            assert (reply.status, reply.json["code"]) == (409, "job_not_retryable")


async def test_session_lists_its_own_jobs_newest_first(config: Config) -> None:
    async with running_api(config) as running:
        first = await running.fetch("POST", "/v1/export", {"file_ids": [70000]})
        cookie = first.headers["Set-Cookie"]
        assert re.fullmatch(
            r"delineate_session=[A-Za-z0-9_-]{43}; Path=/; Max-Age=604800; HttpOnly; SameSite=Lax", cookie
        )
        mine = cookie.split(";")[0]
        ids = [first.json["jobId"]]
        for _ in range(4):
            reply = await running.fetch("POST", "/v1/export", {"file_ids": [70001]}, Cookie=mine)
            ids.append(reply.json["jobId"])
        await running.fetch("POST", "/v1/export", {"file_ids": [70000]})
        seen: list[str] = []
        cursor = ""
        while True:
            page = (await running.fetch("GET", f"/v1/exports?limit=2{cursor}", Cookie=mine)).json
            assert len(page["jobs"]) <= 2
            seen += [job["jobId"] for job in page["jobs"]]
            if page["nextCursor"] is None:
                break
            cursor = f"&cursor={page['nextCursor']}"
        assert seen == ids[::-1]
        assert (await running.fetch("GET", "/v1/exports")).json == {"jobs": [], "nextCursor": None}


@pytest.mark.parametrize(
    "query",
    ["limit=0", "limit=101", "limit=x", "limit=-1", "limit=", "limit=1&limit=2", "cursor=x", "cursor=%ff", "limit=٣"],
)
async def test_bad_page_is_refused(config: Config, query: str) -> None:
    async with running_api(config) as running:
        reply = await running.fetch("GET", f"/v1/exports?{query}")
        assert (reply.status, reply.json["code"]) == (400, "invalid_query")


async def test_same_idempotency_key_is_the_same_job(config: Config) -> None:
    async with running_api(config) as running:
        key = {"Idempotency_Key": "a key with spaces ~!"}
        first = await running.fetch("POST", "/v1/export", {"file_ids": [70000, 70001]}, **key)
        again = await running.fetch(
            "POST", "/v1/export", {"on_missing": "fail", "file_ids": [70000, 70001, 70001]}, **key
        )
        assert (again.status, again.json["jobId"]) == (200, first.json["jobId"])
        assert again.headers["Idempotency-Replayed"] == "true"
        assert "Idempotency-Replayed" not in first.headers
        other = await running.fetch("POST", "/v1/export", {"file_ids": [70000]}, **key)
        assert (other.status, other.json["code"]) == (422, "idempotency_conflict")


@pytest.mark.parametrize("key", ["", "x" * 256, "tab\tinside", "Ã¼"])
async def test_bad_idempotency_key_is_refused(config: Config, key: str) -> None:
    async with running_api(config) as running:
        body = b'{"file_ids":[70000]}'
        head = (
            f"POST /v1/export HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
            f"Idempotency-Key: {key}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        answer = await running.raw(head.encode("latin-1") + body)
        assert answer.startswith(b"HTTP/1.1 400 "), answer
        assert b'"code":"invalid_idempotency_key"' in answer


async def test_full_queue_is_503_with_retry_after(config: Config) -> None:
    async with running_api(changed(config, "queue", max_waiting=1)) as running:
        await running.queued()
        reply = await running.fetch("POST", "/v1/export", {"file_ids": [70000]})
        assert (reply.status, reply.json["code"]) == (503, "queue_full")
        assert int(reply.headers["Retry-After"]) >= 1
