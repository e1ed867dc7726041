"""One typed method for each Lua transition in `lua/`; the headers there say what they do.

A script that the server does not know (a restart, SCRIPT FLUSH) is loaded and
sent once more; it has not run before, so that is safe.
"""

from __future__ import annotations

from importlib import resources
from typing import Any, Literal, NamedTuple

import msgspec
from redis.asyncio import Redis
from redis.commands.core import AsyncScript

from delineate.queue.keys import Keys

Settled = Literal[0, 1, 2]  # refused, done, done before
Hash = dict[str, str]

# Lua's unpack and ARGV have limits; no call needs more than this many.
MAX_BATCH = 500


def _source(name: str) -> str:
    folder = resources.files("delineate.queue") / "lua"
    return f"{(folder / 'common.lua').read_text()}\n{(folder / f'{name}.lua').read_text()}"


def _hash(flat: list[str]) -> Hash:
    return dict(zip(flat[::2], flat[1::2], strict=True))


class Fenced(Exception):
    """The worker was declared dead; it needs a new id. Never leaves delineate.queue."""


class Paused(Exception):
    """Nothing was claimed because the queue is paused. Never leaves delineate.queue."""


class Hold(NamedTuple):
    """What a script needs to know of a hold."""

    job_id: str
    worker: str
    token: int


class Scripts:
    """All transitions on one client and one set of keys."""

    def __init__(self, client: Redis, keys: Keys) -> None:
        self._client = client
        self._keys = keys
        self._scripts: dict[str, AsyncScript] = {}

    async def _run(self, name: str, keys: list[str], *arguments: str | int | float) -> Any:
        script = self._scripts.get(name)
        if script is None:
            script = self._scripts[name] = self._client.register_script(_source(name))
        return await script(keys=keys, args=list(arguments))

    async def enqueue(
        self,
        *,
        job_id: str,
        user: str,
        file_ids: tuple[int, ...],
        on_missing: str,
        idempotency_key: str | None,
        fingerprint: str,
        traceparent: str,
        request_id: str,
        max_waiting: int,
        max_waiting_of_user: int,
        user_jobs_seconds: int,
        user_jobs_kept: int,
        idempotency_seconds: int,
    ) -> tuple[str, Hash]:
        """The outcome, and the record of the job that stands for the request."""
        k = self._keys
        outcome, flat = await self._run(
            "enqueue",
            [k.job(job_id), k.user_jobs(user), k.user_waiting(user), k.idempotency(user, idempotency_key or "")],
            job_id,
            user,
            msgspec.json.encode(file_ids).decode(),
            len(file_ids),
            on_missing,
            fingerprint,
            traceparent,
            request_id,
            max_waiting,
            max_waiting_of_user,
            user_jobs_seconds,
            user_jobs_kept,
            idempotency_seconds if idempotency_key is not None else 0,
            k.base,
        )
        return outcome, _hash(flat)

    async def withdraw(self, job_id: str, user: str, idempotency_key: str | None, tombstone_seconds: int) -> bool:
        k = self._keys
        keys = [k.job(job_id), k.user_jobs(user), k.idempotency(user, idempotency_key or "")]
        return bool(await self._run("withdraw", keys, job_id, user, k.base, tombstone_seconds))

    async def claim(
        self, worker: str, count: int, job_ids: list[str], keep_seconds: int, span_nonce: str
    ) -> list[tuple[str, Hash]]:
        """Ids and records; a record that Lua could not use, and buried, is empty. Raises Fenced, Paused."""
        k = self._keys
        keys = [k.wait, k.active(worker), k.workers, k.failed, k.paused]
        reply = await self._run("claim", keys, k.base, worker, count, keep_seconds, span_nonce, *job_ids)
        if reply == "fenced":
            raise Fenced
        if reply == "paused":
            raise Paused
        return [(job_id, _hash(flat)) for job_id, flat in reply]

    async def progress(
        self,
        hold: Hold,
        *,
        percent: int,
        current_file: int,
        stage: str,
        message: str,
        bytes_done: int,
        bytes_total: int,
    ) -> bool:
        reply = await self._run(
            "progress",
            [self._keys.job(hold.job_id)],
            hold.token,
            percent,
            current_file,
            stage,
            message,
            bytes_done,
            bytes_total,
        )
        return bool(reply)

    async def begin_upload(self, hold: Hold, upload: str) -> bool:
        keys = [self._keys.job(hold.job_id), self._keys.abandoned]
        return bool(await self._run("begin_upload", keys, hold.token, upload))

    async def save_part(self, hold: Hold, number: int, part: str) -> bool:
        keys = [self._keys.job(hold.job_id), self._keys.parts(hold.job_id)]
        return bool(await self._run("save_part", keys, hold.token, number, part))

    async def finish(self, hold: Hold, result: str, message: str, keep_seconds: int) -> Settled:
        return await self._settle("finish", hold, [], hold.token, result, message, keep_seconds)

    async def retry(self, hold: Hold, delay_ms: int, failure: str, message: str) -> Settled:
        return await self._settle("retry", hold, [self._keys.delayed], hold.token, delay_ms, failure, message)

    async def release(self, hold: Hold) -> Settled:
        return await self._settle("release", hold, [self._keys.wait], hold.token)

    async def bury(self, hold: Hold, failure: str, message: str, keep_seconds: int) -> Settled:
        more_keys = [self._keys.failed, self._keys.abandoned]
        return await self._settle("bury", hold, more_keys, hold.token, failure, message, keep_seconds)

    async def _settle(self, name: str, hold: Hold, more_keys: list[str], *arguments: str | int) -> Settled:
        keys = [self._keys.job(hold.job_id), self._keys.active(hold.worker), *more_keys]
        reply: Settled = await self._run(name, keys, hold.job_id, *arguments)
        return reply

    async def cancel(self, job_id: str, keep_seconds: int) -> str:
        k = self._keys
        reply: str = await self._run("cancel", [k.job(job_id)], job_id, k.base, keep_seconds)
        return reply

    async def requeue(self, job_id: str, max_waiting: int, nonce: str) -> str:
        k = self._keys
        reply: str = await self._run("requeue", [k.job(job_id), k.failed], job_id, k.base, max_waiting, nonce)
        return reply

    async def position(self, job_id: str) -> int | None:
        k = self._keys
        reply: int | None = await self._run("position", [k.job(job_id), k.wait, k.backlog, k.turns], job_id, k.base)
        return reply

    async def promote(self) -> int:
        k = self._keys
        reply: int = await self._run("promote", [k.delayed], k.base, MAX_BATCH)
        return reply

    async def reap(
        self, *, max_crashes: int, failed_seconds: int, forget_seconds: int, failure: str, message: str
    ) -> list[tuple[str, str, str, str, str, str]]:
        """Worker, job id, outcome, and of the lost attempt: traceparent, span id, milliseconds of its start."""
        k = self._keys
        flat = await self._run(
            "reap",
            [k.workers, k.wait, k.failed],
            k.base,
            max_crashes,
            failed_seconds,
            MAX_BATCH,
            forget_seconds * 1000,
            failure,
            message,
        )
        return list(zip(*(flat[field::6] for field in range(6)), strict=True))

    async def heartbeat(self, worker: str, life_ms: int, *, register: bool, holds: list[Hold]) -> set[tuple[str, int]]:
        """Raises Fenced."""
        held: list[str | int] = [item for hold in holds for item in (hold.job_id, hold.token)]
        k = self._keys
        reply = await self._run("heartbeat", [k.workers], k.base, worker, life_ms, "1" if register else "0", *held)
        if reply == "fenced":
            raise Fenced
        return {(job_id, int(token)) for job_id, token in zip(reply[::2], reply[1::2], strict=True)}

    async def retire(self, worker: str) -> list[str]:
        k = self._keys
        handed_back: list[str] = await self._run("retire", [k.workers, k.active(worker), k.wait], k.base, worker)
        return handed_back

    async def sweep(self) -> int:
        reply: int = await self._run("sweep", [self._keys.failed], self._keys.base, MAX_BATCH)
        return reply

    async def purge(self, job_id: str) -> str:
        k = self._keys
        reply: str = await self._run("purge", [k.job(job_id), k.failed], job_id, k.base)
        return reply

    async def stats(self) -> list[int]:
        k = self._keys
        reply: list[int] = await self._run(
            "stats", [k.wait, k.backlog, k.delayed, k.failed, k.workers, k.paused], k.base
        )
        return reply

    async def limit(self, caller: str, requests: int, window_ms: int) -> list[int]:
        reply: list[int] = await self._run("limit", [self._keys.limit(caller)], requests, window_ms)
        return reply
