"""Every kind of span, from a client's request to the last event of its job. One trace has them all:

    POST /v1/export             SERVER     in an API process, below the client's own span if it sent one
      send exports              PRODUCER   the job is put into the queue; its record carries this context
        process exports         CONSUMER   one attempt, in a worker; a further one is linked to the one before
          look up files ...     INTERNAL   its steps
            S3.GetObject        CLIENT     each request to the store, each retry too
          deliver completed     INTERNAL   in an API process: from the job's end to the event on its streams

An attempt whose worker was lost is recorded by the one that finds out, under the
span id that the job's record has, so that the steps which arrived have a parent. A worker that
was only cut off for too long ends its span as well: then there are two with one id.

Names and attributes follow the semantic conventions: https://opentelemetry.io/docs/specs/semconv/
(HTTP, messaging, AWS S3); ours begin with `delineate.`. No span has an address or an
agent of a client, a file's name, a query string or a signature.
"""

from __future__ import annotations

import asyncio
import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from opentelemetry import trace
from opentelemetry.trace import INVALID_SPAN, Span, SpanContext, SpanKind, StatusCode

from delineate.job import Job, Lease
from delineate.telemetry import tracing
from delineate.telemetry.logs import without_secrets
from delineate.telemetry.tracing import Value

QUEUE_NAME = "exports"
OUTCOME = "delineate.attempt.outcome"
_SPAN_ID = re.compile(r"[0-9a-f]{16}")


def _message(operation: str, kind: str, job_id: str) -> dict[str, Value]:
    return {
        "messaging.system": "delineate",
        "messaging.destination.name": QUEUE_NAME,
        "messaging.operation.name": operation,
        "messaging.operation.type": kind,
        "messaging.message.id": job_id,
        "delineate.job.id": job_id,
    }


def fail(span: Span, error: BaseException, error_type: str = "") -> None:
    """Mark `span` as failed by `error`; `error_type` is its stable name, if that is not its class."""
    if not span.is_recording():
        return
    name, message = type(error).__name__, without_secrets(str(error))
    span.set_attribute("error.type", error_type or name)
    span.set_status(StatusCode.ERROR, message)
    stack = without_secrets("".join(traceback.format_exception(error)))
    # What Span.record_exception does, but for the words of other libraries' errors, which may quote a URL.
    span.add_event("exception", {"exception.type": name, "exception.message": message, "exception.stacktrace": stack})


# Requests


def begin_request(sampler: tracing.Sampler, method: str, route: str, path: str, header: str, makes_job: bool) -> Span:
    """The present span from here on to the end of this task; recorded if `sampler` wants it."""
    remote = tracing.parse_traceparent(header)
    if tracing.enabled() and sampler.wants(remote, makes_job=makes_job):
        span = tracing.start(
            f"{method} {route}",
            SpanKind.SERVER,
            {"http.request.method": method, "http.route": route, "url.path": path},
            parent=remote,
        )
    elif remote is None:
        return INVALID_SPAN
    else:
        # Without a collector the client's word goes on as it came; with one, it was this process that said no.
        span = tracing.unrecorded(remote, sampled=remote.trace_flags.sampled and not tracing.enabled())
    tracing.attach(span)
    return span


def end_request(span: Span, status: int | None) -> None:
    """`status` is None if the client left before there was an answer."""
    if span.is_recording():
        if status is None:
            span.set_attribute("error.type", "client_gone")
        else:
            span.set_attribute("http.response.status_code", status)
        span.end()


def about(job: Job) -> None:
    """Say that the present request is about `job`, whose own trace is another one if another request made it."""
    span = trace.get_current_span()
    if span.is_recording():
        span.set_attribute("delineate.job.id", job.id)
        origin = tracing.parse_traceparent(job.traceparent)
        if origin is not None and origin.trace_id != span.get_span_context().trace_id:
            span.add_link(origin)


# The queue


@contextmanager
def sending() -> Iterator[Span]:
    """Around the enqueueing of a job. `tracing.traceparent()` in the block is for its record."""
    if not tracing.recording():
        yield INVALID_SPAN
        return
    span = tracing.start(f"send {QUEUE_NAME}", SpanKind.PRODUCER)
    with _ended(span):
        yield span


def sent(span: Span, job: Job) -> None:
    """Say which job it was: an idempotency key may have brought back an earlier one."""
    if span.is_recording():
        span.set_attributes(_message("send", "send", job.id))


@contextmanager
def attempt(lease: Lease) -> Iterator[Span]:
    """Around one attempt; recorded if the request that made the job was."""
    job = lease.job
    origin = tracing.parse_traceparent(job.traceparent)
    if origin is None:
        yield INVALID_SPAN
        return
    if not _recorded(origin):
        with tracing.current(tracing.unrecorded(origin, sampled=origin.trace_flags.sampled)):
            yield INVALID_SPAN
        return
    before = _context_of(job.traceparent, job.previous_span)
    span = tracing.start(
        f"process {QUEUE_NAME}",
        SpanKind.CONSUMER,
        {
            **_message("process", "process", job.id),
            "messaging.client.id": lease.worker,
            "delineate.job.attempt": job.attempts,
            "delineate.job.crashes": job.crashes,
            "delineate.job.files": job.total_files,
        },
        parent=origin,
        links=[before] if before else [],
        span_id=_span_id(job.span),
    )
    with _ended(span):
        yield span


def fail_attempt(error: BaseException, code: str) -> None:
    """Mark the present attempt as failed; it may be tried again."""
    fail(trace.get_current_span(), error, code)


def lost_attempt(job_id: str, worker: str, traceparent: str, span_id: str, started_at: float | None) -> None:
    """Record, for a worker that cannot any more, the attempt it was lost in."""
    origin, number = tracing.parse_traceparent(traceparent), _span_id(span_id)
    if origin is None or number is None or not _recorded(origin):
        return
    span = tracing.start(
        f"process {QUEUE_NAME}",
        SpanKind.CONSUMER,
        {**_message("process", "process", job_id), "messaging.client.id": worker, OUTCOME: "lost"},
        parent=origin,
        started=started_at,
        span_id=number,
    )
    span.set_attribute("error.type", "worker_lost")
    span.set_status(StatusCode.ERROR, "the worker was lost")
    span.end()


def delivered(job: Job, streams: int) -> None:
    """Record that the end of `job` went out on `streams` event streams of this process."""
    parent = _context_of(job.traceparent, job.span) or tracing.parse_traceparent(job.traceparent)
    if parent is None or not _recorded(parent):
        return
    attributes: dict[str, Value] = {"delineate.job.id": job.id, "delineate.streams": streams}
    tracing.start(f"deliver {job.status}", attributes=attributes, parent=parent, started=job.completed_at).end()


def _recorded(context: SpanContext) -> bool:
    """Whether a span of this process belongs into the trace of `context`."""
    return tracing.enabled() and context.trace_flags.sampled


def _context_of(traceparent: str, span_id: str) -> SpanContext | None:
    """The span `span_id` of the trace that `traceparent` is in."""
    origin, number = tracing.parse_traceparent(traceparent), _span_id(span_id)
    if origin is None or number is None:
        return None
    return tracing.remote_context(origin.trace_id, number, sampled=origin.trace_flags.sampled)


def _span_id(text: str) -> int | None:
    return int(text, 16) if _SPAN_ID.fullmatch(text) else None


# Inside an attempt


@contextmanager
def step(name: str, **attributes: Value) -> Iterator[None]:
    """Around a part of an attempt; `attributes` without their `delineate.`."""
    if not tracing.recording():
        yield
        return
    with _ended(tracing.start(name, attributes={f"delineate.{key}": value for key, value in attributes.items()})):
        yield


class S3Target(NamedTuple):
    """What a request to the store is about, as far as it is known."""

    bucket: str
    key: str
    part_number: int | None = None


def start_s3(operation: str, target: Callable[[], S3Target]) -> Span:
    """One request to the store, which its caller ends."""
    if not tracing.recording():
        return INVALID_SPAN
    bucket, key, part_number = target()
    attributes: dict[str, Value] = {
        "rpc.system.name": "aws-api",
        "rpc.method": f"S3/{operation}",
        "aws.s3.bucket": bucket,
    }
    if key:
        attributes["aws.s3.key"] = key
    if part_number is not None:
        attributes["aws.s3.part_number"] = part_number
    return tracing.start(f"S3.{operation}", SpanKind.CLIENT, attributes)


def answered_s3(span: Span, status: int) -> None:
    if span.is_recording():
        span.set_attribute("http.response.status_code", status)


def end_s3(span: Span, error: BaseException | None = None, status: int = 0) -> None:
    """`error` is what came of it in place of a usable answer; `status` is the store's own, if it refused."""
    if not span.is_recording():
        return
    if status:
        answered_s3(span, status)
    if error is not None:
        _ended_by(span, error, str(status) if status else "")
    span.end()


@contextmanager
def _ended(span: Span) -> Iterator[None]:
    """Make `span` the present one in the block, and end it with the block, failed if that raises."""
    with tracing.current(span):
        try:
            yield
        except BaseException as error:
            _ended_by(span, error)
            raise
        finally:
            span.end()


def _ended_by(span: Span, error: BaseException, error_type: str = "") -> None:
    """Without words and stack, which the attempt or the request around it has."""
    if isinstance(error, asyncio.CancelledError):
        span.set_attribute("error.type", "cancelled")  # by whoever wanted it no longer: no error of its own
        return
    span.set_attribute("error.type", error_type or type(error).__name__)
    span.set_status(StatusCode.ERROR)
