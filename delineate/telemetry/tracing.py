"""Traces: which requests begin one, how its context travels, and where log lines find it.

    tracing()          around a process' life: spans go to `telemetry.traces.endpoint` (otlp.py)
    Sampler            decides for each request whether it is recorded
    start()            begins a span; spans.py says which there are
    attach, current    make a span the present one, for what is called and logged from there on
    traceparent()      the present context as text, for the job's record

Without a collector nothing is recorded, but a client's context still goes
through: the log lines of its request and of its job have its trace id.

The context is W3C Trace Context, version 00: https://www.w3.org/TR/trace-context/#traceparent-header.
`tracestate` is not carried on.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from opentelemetry import context, trace
from opentelemetry.trace import INVALID_SPAN, NonRecordingSpan, Span, SpanContext, SpanKind, TraceFlags

from delineate.config import TracesConfig

if TYPE_CHECKING:
    from delineate.telemetry.otlp import Recorder

Value = str | int | float | bool

_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_SAMPLED, _UNSAMPLED = TraceFlags(TraceFlags.SAMPLED), TraceFlags(TraceFlags.DEFAULT)

_recorder: Recorder | None = None


@contextmanager
def tracing(config: TracesConfig, service: str, environment: str) -> Iterator[None]:
    """Record spans in the block, for the collector at `config.endpoint`; without one nothing is recorded, or loaded."""
    global _recorder
    if not config.endpoint:
        yield
        return
    from delineate.telemetry.otlp import Recorder

    recorder = _recorder = Recorder(config.endpoint, service, environment)
    try:
        yield
    finally:
        _recorder = None
        recorder.close()


def enabled() -> bool:
    """Whether this process has a collector to send spans to."""
    return _recorder is not None


def recording() -> bool:
    """Whether the present span is recorded, so that there is a place for one below it."""
    return trace.get_current_span().is_recording()


def start(
    name: str,
    kind: SpanKind = SpanKind.INTERNAL,
    attributes: Mapping[str, Value] | None = None,
    *,
    parent: SpanContext | None = None,
    links: Sequence[SpanContext] = (),
    started: float | None = None,
    span_id: int | None = None,
) -> Span:
    """Begin a recorded span below `parent`, or below the present one; whoever calls has made sure that it is wanted.

    `started` is in Unix seconds, now if None; `span_id` is for a span that others know already.
    """
    if _recorder is None:
        return INVALID_SPAN
    # Often by another machine's clock: no span may begin after its end.
    began = None if started is None else min(started, time.time())
    return _recorder.start(name, kind, attributes, parent, links, began, span_id)


def attach(span: Span) -> None:
    """Make `span` the present one until the end of this task."""
    context.attach(trace.set_span_in_context(span))


@contextmanager
def current(span: Span) -> Iterator[None]:
    """Make `span` the present one in the block."""
    token = context.attach(trace.set_span_in_context(span))
    try:
        yield
    finally:
        context.detach(token)


def unrecorded(remote: SpanContext, *, sampled: bool) -> Span:
    """A span that is nothing but `remote`, carried on; `sampled` is what those who get it from us are told."""
    flags = _SAMPLED if sampled else _UNSAMPLED
    return NonRecordingSpan(SpanContext(remote.trace_id, remote.span_id, is_remote=True, trace_flags=flags))


def parse_traceparent(text: str) -> SpanContext | None:
    """The context in a `traceparent` header; None where there is none, or not a valid one."""
    found = _TRACEPARENT.fullmatch(text) if text else None
    # Versions to come may have more fields. 00 has not, and there will be no ff.
    if found is None or found[1] == "ff" or (found[1] == "00" and found[5]):
        return None
    return remote_context(int(found[2], 16), int(found[3], 16), sampled=bool(int(found[4], 16) & TraceFlags.SAMPLED))


def remote_context(trace_id: int, span_id: int, *, sampled: bool) -> SpanContext | None:
    """The context of a span elsewhere; None if there can be no such ids."""
    found = SpanContext(trace_id, span_id, is_remote=True, trace_flags=_SAMPLED if sampled else _UNSAMPLED)
    return found if found.is_valid else None


def traceparent(span: Span | None = None) -> str:
    """`span`, or the present one, as a `traceparent` header; "" outside of any trace."""
    found = (span or trace.get_current_span()).get_span_context()
    if not found.is_valid:
        return ""
    return f"00-{found.trace_id:032x}-{found.span_id:016x}-{found.trace_flags & TraceFlags.SAMPLED:02x}"


def present_ids() -> tuple[str, str]:
    """Trace and span id (hex) of the present span, "" outside of any trace; for log lines."""
    found = trace.get_current_span().get_span_context()
    return (f"{found.trace_id:032x}", f"{found.span_id:016x}") if found.is_valid else ("", "")


class Sampler:
    """Decides for the requests of one process. A client decides for its own, by the flag in its `traceparent`.

    Requests that make a job, and all others, may each record `per_minute` traces on average, and as many at
    once: neither a rush, nor a client that wants all of its requests traced, makes tracing cost more than that.
    """

    def __init__(self, config: TracesConfig) -> None:
        self._jobs = _Allowance(config.ratio, config.per_minute)
        self._others = _Allowance(config.request_ratio, config.per_minute)

    def wants(self, remote: SpanContext | None, *, makes_job: bool) -> bool:
        """Whether a request that came with the context `remote` is to be recorded."""
        allowance = self._jobs if makes_job else self._others
        chosen = random.random() < allowance.ratio if remote is None else remote.trace_flags.sampled
        return chosen and allowance.take()


class _Allowance:
    __slots__ = ("_at", "_left", "_most", "ratio")

    def __init__(self, ratio: float, per_minute: int) -> None:
        self.ratio = ratio
        self._most = self._left = float(per_minute)
        self._at = time.monotonic()

    def take(self) -> bool:
        now = time.monotonic()
        self._left = min(self._most, self._left + (now - self._at) * self._most / 60)
        self._at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True
