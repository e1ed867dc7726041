"""Traffic that notices everything: clients that never repeat a request, and count each one that fails.

    Connection   HTTP/1.1 by hand, because client libraries repeat lost requests without a word
    Traffic      posts jobs at a steady rate, follows them, asks for them, on kept and on fresh connections

A request fails when the connection is refused, reset or closed before the
answer is complete, and when its status is 400 or more. A stream fails when it
ends in any other way than with a final event or a `retry:`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from typing import Any, NamedTuple

FINAL = ("completed", "failed", "cancelled")
ANSWER_SECONDS = 30


class Failed(Exception):
    """What a user would have seen as an error."""


class Reply(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


class Connection:
    """One client's connection; opened when it is needed, and again after the server has closed it."""

    def __init__(self, port: int, *, keep: bool) -> None:
        self._port, self._keep = port, keep
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter | None = None
        self._chunked = False

    async def request(self, method: str, path: str, body: bytes = b"") -> Reply:
        """Raises Failed, whatever went wrong."""
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                await self.send(method, path, body)
                status, headers = await self.head()
                content = await self._reader.readexactly(int(headers.get("content-length", "0")))
        except (OSError, asyncio.IncompleteReadError, TimeoutError) as error:
            self.close()
            raise Failed(f"{method} {path}: {error!r}") from error
        if not self._keep or headers.get("connection") == "close":
            self.close()
        if status >= 400:
            raise Failed(f"{method} {path}: {status} {content[:200]!r}")
        return Reply(status, headers, content)

    async def send(self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None) -> None:
        # What every client does before it uses a connection again: has the server closed it meanwhile?
        if self._writer is not None and self._reader.at_eof():
            self.close()
        if self._writer is None:
            self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        lines = [f"{method} {path} HTTP/1.1", "Host: delineate", f"Content-Length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        lines += ["Content-Type: application/json"] if body else []
        lines += [] if self._keep else ["Connection: close"]
        self._writer.write("\r\n".join([*lines, "", ""]).encode() + body)
        await self._writer.drain()

    async def head(self) -> tuple[int, dict[str, str]]:
        block = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").splitlines()
        fields = (line.partition(":") for line in block[1:] if line)
        headers = {name.lower(): value.strip() for name, _, value in fields}
        self._chunked = headers.get("transfer-encoding") == "chunked"
        return int(block[0].split()[1]), headers

    async def events(self) -> AsyncIterator[dict[str, str]]:
        """The fields of each event, until the server ends the stream. Raises Failed if it breaks."""
        fields: dict[str, str] = {}
        ended = not self._chunked
        try:
            while line := await self._reader.readline():
                if self._chunked and line.endswith(b"\r\n"):
                    # What frames chunks (RFC 9112, 7.1): events have no carriage returns, and none is split here.
                    if line == b"0\r\n":
                        ended = True
                        break
                elif line == b"\n":
                    if fields:
                        yield fields
                    fields = {}
                elif not line.startswith(b":"):
                    name, _, value = line.decode().rstrip("\n").partition(": ")
                    fields[name] = value
        except OSError as error:
            raise Failed(f"a stream broke: {error!r}") from error
        if fields or not ended:
            raise Failed(f"a stream was cut off: {fields}")

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class Traffic:
    """Everything at once, from `start` to `stop`; then `finish` waits for the jobs. `failures` is to stay empty."""

    def __init__(self, port: int, file_ids: Sequence[int], *, posts_per_second: float, streams: int, pollers: int):
        self.port, self.file_ids = port, file_ids
        self.posts_per_second, self.streams, self.pollers = posts_per_second, streams, pollers
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []
        self.worst_seconds = 0.0
        self.accepted: list[str] = []
        self.ended: dict[str, str] = {}
        self._stop = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._new_job = asyncio.Condition()

    def start(self) -> None:
        self._own(self._post_forever())
        for number in range(self.pollers):
            self._own(self._poll_forever(keep=number % 2 == 0))
        for _ in range(self.streams):
            self._own(self._follow_forever())

    async def stop(self) -> None:
        """No new requests. Streams go on until their jobs have ended."""
        self._stop.set()
        async with self._new_job:
            self._new_job.notify_all()
        await asyncio.gather(*self._tasks)

    async def finish(self, seconds: float) -> None:
        """Ask for every accepted job until it has ended."""
        connection, end = Connection(self.port, keep=True), time.monotonic() + seconds
        for job_id in self.accepted:
            while self.ended.get(job_id) not in FINAL and time.monotonic() < end:
                reply = await connection.request("GET", f"/v1/export/{job_id}")
                self.ended[job_id] = json.loads(reply.body)["status"]
                if self.ended[job_id] not in FINAL:
                    await asyncio.sleep(0.1)
        connection.close()

    def _own(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _asked(self, connection: Connection, method: str, path: str, body: bytes = b"") -> Reply | None:
        began = time.monotonic()
        try:
            reply = await connection.request(method, path, body)
        except Failed as failure:
            self.failures.append(str(failure))
            return None
        finally:
            self.counts["requests"] += 1
            self.worst_seconds = max(self.worst_seconds, time.monotonic() - began)
        return reply

    async def _post_forever(self) -> None:
        """At a fixed rate, however long the answers take; every second one on a fresh connection."""
        kept = [Connection(self.port, keep=True) for _ in range(4)]
        began = time.monotonic()
        free = asyncio.Queue[Connection]()
        for connection in kept:
            free.put_nowait(connection)
        number = 0
        while not self._stop.is_set():
            self._own(self._post(free if number % 2 else None))
            number += 1
            await asyncio.sleep(max(0, began + number / self.posts_per_second - time.monotonic()))
        for _ in kept:
            (await free.get()).close()

    async def _post(self, free: asyncio.Queue[Connection] | None) -> None:
        connection = await free.get() if free else Connection(self.port, keep=False)
        ids = random.sample(self.file_ids, random.randint(1, 4))
        reply = await self._asked(connection, "POST", "/v1/export", json.dumps({"file_ids": ids}).encode())
        if free:
            free.put_nowait(connection)
        if reply is not None:
            self.accepted.append(json.loads(reply.body)["jobId"])
            async with self._new_job:
                self._new_job.notify_all()

    async def _poll_forever(self, *, keep: bool) -> None:
        connection = Connection(self.port, keep=keep)
        while not self._stop.is_set():
            if self.accepted:
                await self._asked(connection, "GET", f"/v1/export/{random.choice(self.accepted[-200:])}")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), random.uniform(0.05, 0.5))
        connection.close()

    async def _follow_forever(self) -> None:
        """One job after the other, each from its present state to its end."""
        while not self._stop.is_set():
            if not self.accepted:
                async with self._new_job:
                    await self._new_job.wait()
                continue
            try:
                await self._follow(random.choice(self.accepted[-50:]))
            except Failed as failure:
                self.failures.append(str(failure))

    async def _follow(self, job_id: str) -> None:
        """As an EventSource does: come back after `retry` with the last id, until the final event."""
        last: dict[str, str] = {}
        retry, progress = 1.0, -1
        while True:
            connection, began, ended_with_retry = Connection(self.port, keep=True), time.monotonic(), False
            self.counts["requests"] += 1
            try:
                async with asyncio.timeout(ANSWER_SECONDS):
                    await connection.send("GET", f"/v1/export/{job_id}/progress", headers=last)
                    status, _ = await connection.head()
                self.worst_seconds = max(self.worst_seconds, time.monotonic() - began)
                if status != 200:
                    raise Failed(f"a stream was answered with {status}")
                self.counts["streams opened"] += 1
                first = True
                async for event in connection.events():
                    ended_with_retry = "retry" in event and "data" not in event
                    retry = int(event.get("retry", retry * 1000)) / 1000
                    if "data" not in event:
                        continue
                    last = {"Last-Event-ID": event["id"]}
                    if event["event"] in FINAL:
                        self.counts["final events"] += 1
                        self.ended.setdefault(job_id, event["event"])
                        return
                    now = json.loads(event["data"])["progress"]
                    if first and now < progress:
                        self.counts["restarted from nought"] += 1  # a job that was handed back begins anew
                    first, progress = False, now
            except (OSError, asyncio.IncompleteReadError, TimeoutError) as error:
                raise Failed(f"a stream of {job_id}: {error!r}") from error
            finally:
                connection.close()
            if not ended_with_retry:
                raise Failed(f"a stream of {job_id} ended without a final event or a retry")
            self.counts["streams resumed"] += 1
            await asyncio.sleep(retry)
