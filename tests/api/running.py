"""The API on a free port with real clients behind it, and the short ways tests have of talking to it."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import aiohttp
import msgspec
from tornado.netutil import bind_sockets

from delineate.api.app import Api, Server, listening, make_app
from delineate.config import Config
from delineate.job import ArchiveResult, ErrorClass, Failure, Job, Lease, NewJob, Progress, Stage, new_job_id
from delineate.queue import Queue, open_queue
from delineate.queue.progress import JobEvents, open_job_events
from delineate.storage import Storage, open_storage

FAILURE = Failure(code="files_missing", error_class=ErrorClass.NOT_FOUND, message="1 of the files does not exist.")


class Reply(NamedTuple):
    status: int
    headers: Mapping[str, str]
    text: str

    @property
    def json(self) -> Any:
        return json.loads(self.text)


class Event(NamedTuple):
    """One server-sent event; comments and retry lines come as names of their own."""

    name: str
    id: str
    data: Any


@dataclass
class WorkerSide:
    """Jobs in every state, made by the worker's side of the queue."""

    queue: Queue
    worker: str

    async def queued(self, file_ids: tuple[int, ...] = (70000, 70001, 70002)) -> Job:
        return (await self.queue.enqueue(NewJob(id=new_job_id(), user="test", file_ids=file_ids))).job

    async def claimed(self) -> Lease:
        job = await self.queued()
        await self.queue.register(self.worker)
        leases = await self.queue.claim(self.worker, 100)
        return next(lease for lease in leases if lease.job.id == job.id)

    async def report(self, lease: Lease, percent: int, bytes_done: int = 0) -> None:
        await self.queue.progress(lease, progress(percent, bytes_done))

    async def completed(self, key: str = "none") -> Job:
        lease = await self.claimed()
        await self.queue.finish(lease, result(key))
        return await self.job(lease.job.id)

    async def failed(self) -> Job:
        lease = await self.claimed()
        await self.queue.bury(lease, FAILURE)
        return await self.job(lease.job.id)

    async def cancelled(self) -> Job:
        return await self.queue.cancel((await self.queued()).id)

    async def job(self, job_id: str) -> Job:
        job = await self.queue.get(job_id)
        assert job is not None
        return job


@dataclass
class RunningApi(WorkerSide):
    api: Api
    server: Server
    config: Config
    storage: Storage
    job_events: JobEvents
    http: aiohttp.ClientSession
    port: int

    async def fetch(self, method: str, path: str, body: object = None, **headers: str) -> Reply:
        """`headers` with _ for -; a body that is not bytes goes as JSON."""
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        if data is not None:
            sent.setdefault("Content-Type", "application/json")
        async with self.http.request(method, path, data=data, headers=sent, allow_redirects=False) as answer:
            return Reply(answer.status, answer.headers, await answer.text())

    async def raw(self, request: bytes) -> bytes:
        """Everything the server says until it closes."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(request)
        try:
            return await asyncio.wait_for(reader.read(), 10)
        finally:
            writer.close()

    @asynccontextmanager
    async def stream(self, job_id: str, **headers: str) -> AsyncIterator[AsyncIterator[Event]]:
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        async with self.http.get(f"/v1/export/{job_id}/progress", headers=sent) as answer:
            assert answer.status == 200, await answer.text()
            assert answer.headers["Content-Type"] == "text/event-stream"
            yield parse_events(answer)


def progress(percent: int, bytes_done: int = 0) -> Progress:
    return Progress(
        percent=percent,
        current_file=percent * 3 // 100,
        stage=Stage.PACKING,
        message=f"Packing, {percent} %",
        bytes_done=bytes_done,
        bytes_total=1000,
    )


def result(key: str = "none") -> ArchiveResult:
    return ArchiveResult(key=key, size=1234, filename="export.zip", skipped_file_ids=(70002,))


async def parse_events(answer: aiohttp.ClientResponse) -> AsyncIterator[Event]:
    fields: dict[str, str] = {}
    async for raw in answer.content:
        line = raw.decode().rstrip("\n")
        if line.startswith(":"):
            yield Event("heartbeat", "", line)
        elif line:
            name, _, value = line.partition(": ")
            fields[name] = value
        elif fields:
            if "data" in fields:
                yield Event(fields.get("event", "message"), fields.get("id", ""), json.loads(fields["data"]))
            else:
                yield Event("retry", "", int(fields["retry"]))
            fields = {}


async def next_event(events: AsyncIterator[Event], *, skip: tuple[str, ...] = ("retry", "heartbeat")) -> Event:
    async with asyncio.timeout(10):
        async for event in events:
            if event.name not in skip:
                return event
    raise AssertionError("the stream ended")


@asynccontextmanager
async def running_api(config: Config) -> AsyncIterator[RunningApi]:
    async with (
        open_queue(config) as queue,
        open_storage(config.storage) as storage,
        open_job_events(config) as job_events,
        make_app(config, queue, storage, job_events) as api,
    ):
        sockets = bind_sockets(0, "127.0.0.1")
        port: int = sockets[0].getsockname()[1]
        async with (
            listening(api, sockets) as server,
            aiohttp.ClientSession(f"http://127.0.0.1:{port}", cookie_jar=aiohttp.DummyCookieJar()) as http,
        ):
            worker = f"w-{uuid.uuid4().hex[:8]}"
            yield RunningApi(queue, worker, api, server, config, storage, job_events, http, port)


def changed(config: Config, section: str, **values: object) -> Config:
    """`config` with some keys of one section replaced."""
    part = msgspec.structs.replace(getattr(config, section), **values)
    return msgspec.structs.replace(config, **{section: part})


async def until(condition: Any, what: str, seconds: float = 10) -> None:
    """Wait for what has no event of its own."""
    try:
        async with asyncio.timeout(seconds):
            while not condition():
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(f"{what} did not happen") from None
