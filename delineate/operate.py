"""`delineate jobs` and `delineate queue`: what an operator sees of the queue in Redis, and does to it.

Text for a terminal, or one JSON object with --json. Exit codes: 0 done, 1 not
(all of) it - one line on stderr for each job says why -, 2 Redis or S3 did not answer.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from delineate.api.documents import timestamp
from delineate.config import Config
from delineate.errors import JobError, JobNotFound, OperatorError, QueueUnavailable, RequestError
from delineate.job import JOB_ID, Job, JobStatus
from delineate.queue import Queue, open_queue
from delineate.storage import open_storage

DRAIN_POLL_SECONDS = 0.5


async def operate(config: Config, options: argparse.Namespace) -> int:
    """Carry out one command; the exit code. Raises OperatorError if Redis or S3 does not answer."""
    commands: dict[tuple[str, str], Callable[[Config, Queue, argparse.Namespace], Awaitable[int]]] = {
        ("jobs", "list"): _list,
        ("jobs", "show"): _show,
        ("jobs", "retry"): _retry,
        ("jobs", "cancel"): _cancel,
        ("jobs", "purge"): _purge,
        ("queue", "stats"): _stats,
        ("queue", "pause"): _pause,
        ("queue", "resume"): _resume,
        ("queue", "drain"): _drain,
    }
    async with open_queue(config) as queue:
        try:
            return await commands[options.command, options.action](config, queue, options)
        except RequestError as error:
            print(f"delineate {options.command} {options.action}: {error.message}", file=sys.stderr)
            return 1
        except (QueueUnavailable, JobError) as error:
            raise OperatorError(str(error)) from error


async def _list(_: Config, queue: Queue, options: argparse.Namespace) -> int:
    found = await _jobs_of(queue, options.status or ("processing", "queued", "failed"), options.user)
    shown = found[: options.limit]
    if options.json:
        _print_json({"jobs": [_document(job) for job in shown], "total": len(found)})
        return 0
    rows = [("JOB", "STATUS", "DONE", "FILES", "TRIES", "AGE", "USER", "MESSAGE"), *map(_row, shown)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    for row in rows:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]))
    if len(found) > len(shown):
        print(f"{len(found) - len(shown)} more; --limit {len(found)} shows all", file=sys.stderr)
    return 0


async def _show(_: Config, queue: Queue, options: argparse.Namespace) -> int:
    job = await _existing(queue, options.job)
    document = _document(job) | {"fileIds": job.file_ids}
    if options.json:
        _print_json(document)
        return 0
    for name, value in document.items():
        text = value if isinstance(value, str) else json.dumps(value)
        print(f"{name:<12} {text if len(text) < 2000 else f'{text[:2000]} ...'}")
    return 0


async def _retry(_: Config, queue: Queue, options: argparse.Namespace) -> int:
    ids = await _chosen(queue, options, (JobStatus.FAILED,))
    return await _each(ids, queue.requeue, "queued again", options)


async def _cancel(_: Config, queue: Queue, options: argparse.Namespace) -> int:
    ids = await _chosen(queue, options, (JobStatus.QUEUED, JobStatus.PROCESSING))
    return await _each(ids, queue.cancel, "cancelled", options)


async def _purge(config: Config, queue: Queue, options: argparse.Namespace) -> int:
    async with open_storage(config.storage) as storage:

        async def forget(job_id: str) -> None:
            job = await _existing(queue, job_id)
            # First, so that a failure leaves a record that can be purged again.
            if job.status is JobStatus.COMPLETED and job.result is not None:
                await storage.delete_archive(job.result.key)
            await queue.purge(job_id)

        ids = list(options.jobs)
        if options.status:
            before = time.time() - options.older_than
            ids += [job.id for job in await _jobs_of(queue, options.status, options.user) if job.updated_at <= before]
        return await _each(ids, forget, "purged", options)


async def _stats(_: Config, queue: Queue, options: argparse.Namespace) -> int:
    stats = await queue.stats()
    if options.json:
        _print_json(
            {
                "waiting": stats.waiting,
                "active": stats.active,
                "delayed": stats.delayed,
                "failed": stats.failed,
                "workers": stats.workers,
                "paused": stats.paused,
                "oldestWaitingSeconds": round(stats.oldest_waiting_seconds, 3),
            }
        )
        return 0
    oldest = f" (the oldest for {_age(stats.oldest_waiting_seconds)})" if stats.waiting else ""
    print(f"waiting  {stats.waiting}{oldest}")
    for name in ("active", "delayed", "failed", "workers"):
        print(f"{name:<8} {getattr(stats, name)}")
    print(f"paused   {'yes' if stats.paused else 'no'}")
    return 0


async def _pause(_: Config, queue: Queue, options: argparse.Namespace) -> int:
    await queue.pause()
    _say(options, {"paused": True}, "paused: running jobs go on, waiting ones stay; `delineate queue resume` undoes it")
    return 0


async def _resume(_: Config, queue: Queue, options: argparse.Namespace) -> int:
    await queue.resume()
    _say(options, {"paused": False}, "resumed")
    return 0


async def _drain(_: Config, queue: Queue, options: argparse.Namespace) -> int:
    await queue.pause()
    end, told = time.monotonic() + options.timeout, -1
    while (active := (await queue.stats()).active) and time.monotonic() < end:
        if active != told and not options.json:
            print(f"paused, {active} running", flush=True)
            told = active
        await asyncio.sleep(DRAIN_POLL_SECONDS)
    drained = "drained: nothing runs; `delineate queue resume` goes on"
    late = f"still {active} running after {options.timeout:.0f} s; the queue stays paused"
    _say(options, {"paused": True, "active": active}, late if active else drained)
    return 1 if active else 0


async def _jobs_of(queue: Queue, statuses: Iterable[str], user: str | None) -> list[Job]:
    jobs = [job for status in statuses for job in await queue.jobs_by_status(JobStatus(status))]
    return [job for job in jobs if user is None or job.user == user]


async def _chosen(queue: Queue, options: argparse.Namespace, statuses: Iterable[JobStatus]) -> list[str]:
    """The ids that were named, and with --all those of every job that the command can be meant for."""
    everyone = await _jobs_of(queue, statuses, options.user) if options.all else []
    return [*options.jobs, *(job.id for job in everyone)]


async def _each(
    ids: list[str], call: Callable[[str], Awaitable[object]], done: str, options: argparse.Namespace
) -> int:
    """Do it to one job after the other; a job that refuses does not keep the others from it."""
    changed, refused = [], []
    for job_id in ids:
        try:
            _check_id(job_id)
            await call(job_id)
            changed.append(job_id)
        except RequestError as error:
            refused.append({"jobId": job_id, "code": error.code, "message": error.message})
            print(f"{job_id}: {error.message}", file=sys.stderr)
        else:
            if not options.json:
                print(f"{job_id}: {done}")
    _say(options, {"jobs": changed, "refused": refused}, "" if ids else "no such jobs")
    return 1 if refused else 0


async def _existing(queue: Queue, job_id: str) -> Job:
    _check_id(job_id)
    job = await queue.get(job_id)
    if job is None:
        raise JobNotFound(f"there is no job {job_id}")
    return job


def _check_id(job_id: str) -> None:
    if not JOB_ID.fullmatch(job_id):
        raise JobNotFound(f"{job_id!r} is no job id; a job id is a UUID")


def _say(options: argparse.Namespace, document: dict[str, Any], text: str) -> None:
    if options.json:
        _print_json(document)
    elif text:
        print(text)


def _print_json(document: object) -> None:
    print(json.dumps(document))


def _document(job: Job) -> dict[str, Any]:
    """What an operator may know of a job, without its file ids, which can be a thousand."""
    failure, result = job.failure, job.result
    document: dict[str, Any] = {
        "jobId": job.id,
        "status": job.status,
        "user": job.user,
        "progress": job.progress.percent,
        "currentFile": job.progress.current_file,
        "totalFiles": job.total_files,
        "stage": job.progress.stage,
        "message": job.progress.message,
        "attempts": job.attempts,
        "crashes": job.crashes,
        "worker": job.worker,
        "requestId": job.request_id,
    }
    times = {
        "createdAt": job.created_at,
        "updatedAt": job.updated_at,
        "startedAt": job.started_at,
        "dueAt": job.due_at,
        "completedAt": job.completed_at,
    }
    document |= {name: timestamp(seconds) for name, seconds in times.items() if seconds is not None}
    if failure is not None:
        document["error"] = {"code": failure.code, "class": failure.error_class, "message": failure.message}
    if result is not None:
        document["archive"] = {"key": result.key, "size": result.size, "skippedFiles": result.skipped_file_ids}
    return document


def _row(job: Job) -> tuple[str, ...]:
    return (
        job.id,
        job.status,
        f"{job.progress.percent}%",
        f"{job.progress.current_file}/{job.total_files}",
        str(job.attempts),
        _age(time.time() - job.created_at),
        job.user[:12],
        job.failure.message if job.failure is not None else job.progress.message,
    )


def _age(seconds: float) -> str:
    for unit, length in (("d", 86_400), ("h", 3_600), ("m", 60)):
        if seconds >= length:
            return f"{seconds // length:.0f}{unit}"
    return f"{max(0.0, seconds):.0f}s"
