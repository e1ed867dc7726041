"""Every metric of delineate: what is counted, by whom, and what the labels may be.

Names are snake_case, end in their unit, counters in `_total`. Labels have few
values by construction: `path` is a route's template, never a path that a
client sent. docs/observability.md has the same list for people; a test compares the two.
What is known only when somebody asks - the queue, the processes - is in exposition.py.

Several processes of a container share `telemetry.metrics_dir`, and each of
them can then answer /metrics for all. prometheus_client decides about this
when it is imported, by the variable PROMETHEUS_MULTIPROC_DIR; a supervisor
sets both, to the same directory, which exists, and is emptied when the container starts:

    environment=DELINEATE__TELEMETRY__METRICS_DIR="...",PROMETHEUS_MULTIPROC_DIR="..."

Importing this module opens this process' files there (processes.py).
"""

from __future__ import annotations

import atexit
import time
from bisect import bisect_left
from collections.abc import Iterable

from prometheus_client import (
    GC_COLLECTOR,
    PLATFORM_COLLECTOR,
    PROCESS_COLLECTOR,
    REGISTRY,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
)

from delineate.job import ErrorClass

# Processes that share their metrics could not have these, so that a single one has the same as many.
for _collector in (GC_COLLECTOR, PLATFORM_COLLECTOR, PROCESS_COLLECTOR):
    REGISTRY.unregister(_collector)
disable_created_metrics()  # type: ignore[no-untyped-call]

REQUEST_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
JOB_BUCKETS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 90, 120, 180, 300)
# Each tier sees only its own part of these.
PROCESSING_BUCKETS = (1, 5, 10, 15, 30, 45, 60, 90, 120, 180, 300)
WAIT_BUCKETS = (0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)
S3_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
REDIS_BUCKETS = (0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)

# Of the API
HTTP_REQUESTS = Counter("http_requests_total", "Requests answered.", ["method", "path", "status"])
HTTP_REQUEST_DURATION = Histogram(
    "http_request_duration_seconds",
    "From the last byte of a request to its answer; to the first event for a stream.",
    ["method", "path"],
    buckets=REQUEST_BUCKETS,
)
RATE_LIMITED = Counter("rate_limited_requests_total", "Requests refused because their caller had sent too many.")
ACTIVE_SSE_CONNECTIONS = Gauge("active_sse_connections", "Open event streams.", multiprocess_mode="livesum")
SSE_EVENTS = Counter("sse_events_total", "Events sent on streams, without heartbeats.", ["event"])
SSE_STREAMS_ENDED = Counter("sse_streams_ended_total", "Event streams that ended, by reason.", ["reason"])
DOWNLOAD_LINKS = Counter("download_links_total", "Download links asked for, by outcome.", ["status"])

# Of the workers: a download is one attempt to pack a job, a job may take several.
DOWNLOADS_ACTIVE = Gauge("downloads_active", "Attempts being packed now.", multiprocess_mode="livesum")
DOWNLOADS = Counter("downloads_total", "Attempts that ended, by how.", ["status"])
DOWNLOAD_PROCESSING = Histogram(
    "download_processing_seconds",
    "Time of one attempt; tier is fast up to 15 s, medium up to 60 s, else slow.",
    ["status", "tier"],
    buckets=PROCESSING_BUCKETS,
)
EXPORT_JOBS = Counter("export_jobs_total", "Jobs that ended, by final status.", ["status"])
EXPORT_JOB_DURATION = Histogram(
    "export_job_duration_seconds", "From a job's last claim to its end.", ["status"], buckets=JOB_BUCKETS
)
EXPORT_JOB_WAIT = Histogram(
    "export_job_wait_seconds", "From a job's place in the queue to its first claim.", buckets=WAIT_BUCKETS
)
ATTEMPT_FAILURES = Counter(
    "export_attempt_failures_total",
    "Attempts that failed, by class of error and by whether the job is tried again.",
    ["error_class", "outcome"],
)
CRASHES_RECOVERED = Counter(
    "export_crashes_recovered_total", "Jobs taken from workers that were lost, by what became of them.", ["outcome"]
)
SOURCE_BYTES = Counter("source_bytes_read_total", "Bytes of source files read from the S3 store.")
ARCHIVE_BYTES = Counter("archive_bytes_written_total", "Bytes of archives that the S3 store has taken.")
ARCHIVE_PARTS = Counter(
    "archive_parts_total", "Parts of multipart uploads: sent, or there already from an attempt before.", ["outcome"]
)

# Of both
S3_OPERATIONS = Counter("s3_operations_total", "Requests to the S3 store.", ["operation", "status"])
S3_OPERATION_DURATION = Histogram(
    "s3_operation_duration_seconds", "Time of one request to the S3 store.", ["operation"], buckets=S3_BUCKETS
)
REDIS_OPERATION_DURATION = Histogram(
    "redis_operation_duration_seconds",
    "From a command to its reply, or to giving up, on one connection to Redis.",
    ["kind"],
    buckets=REDIS_BUCKETS,
)

TRACE_SPANS = Counter(
    "trace_spans_total", "Spans by what became of them: taken by the collector, or lost.", ["outcome"]
)

JOB_STATUSES = ("completed", "failed", "cancelled")
DOWNLOAD_STATUSES = ("completed", "failed", "dropped", "handed_back")
TIERS = ("fast", "medium", "slow")
SSE_REASONS = ("job_ended", "job_gone", "client_gone", "slow_reader", "max_duration", "drain")
S3_OPERATION_NAMES = (
    *("GetObject", "HeadObject", "PutObject", "DeleteObject", "ListObjectsV2"),
    *("CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload", "AbortMultipartUpload"),
    *("ListParts", "ListMultipartUploads", "HeadBucket"),
)

# Values that exist before they first happen, so that rate() sees the first one. Children are kept where they are
# used often: finding one by its labels costs as much as counting.
for _status in JOB_STATUSES:
    EXPORT_JOBS.labels(_status)
for _status in ("completed", "failed"):
    EXPORT_JOB_DURATION.labels(_status)
for _status in ("ready", "not_ready", "expired"):
    DOWNLOAD_LINKS.labels(_status)
for _status in DOWNLOAD_STATUSES:
    DOWNLOADS.labels(_status)
    for _tier in TIERS:
        DOWNLOAD_PROCESSING.labels(_status, _tier)
for _class in ErrorClass:
    # A crash is nobody's attempt any more; it is counted as recovered, and retried without limit of its class.
    if _class is not ErrorClass.CRASH:
        for _outcome in ("retried", "final"):
            ATTEMPT_FAILURES.labels(_class.value, _outcome)
for _outcome in ("requeued", "buried"):
    CRASHES_RECOVERED.labels(_outcome)
PARTS_UPLOADED, PARTS_RESUMED = ARCHIVE_PARTS.labels("uploaded"), ARCHIVE_PARTS.labels("resumed")
SPANS_SENT, SPANS_LOST = TRACE_SPANS.labels("sent"), TRACE_SPANS.labels("lost")
SSE_EVENT = {event: SSE_EVENTS.labels(event) for event in ("progress", *JOB_STATUSES)}
SSE_ENDED = {reason: SSE_STREAMS_ENDED.labels(reason) for reason in SSE_REASONS}


class _Requests:
    """The children of one method, path and status.

    Their values are written to directly: the checks of inc() and observe() (a negative amount, missing labels,
    exemplars) and the search for the bucket cost more than a write does: 3.6 us a request in place of 4.2.
    """

    __slots__ = ("_bounds", "_buckets", "_count", "_sum")

    def __init__(self, method: str, path: str, status: int) -> None:
        durations = HTTP_REQUEST_DURATION.labels(method, path)
        self._count = HTTP_REQUESTS.labels(method, path, str(status))._value
        self._bounds: list[float] = durations._upper_bounds
        self._buckets, self._sum = durations._buckets, durations._sum

    def add(self, seconds: float) -> None:
        self._count.inc(1)
        self._sum.inc(seconds)
        self._buckets[bisect_left(self._bounds, seconds)].inc(1)


_requests: dict[tuple[str, str, int], _Requests] = {}


def count_request(method: str, path: str, status: int, seconds: float) -> None:
    """Count one answer; `method` and `path` (a route's template) must come from a short list."""
    found = _requests.get((method, path, status))
    if found is None:
        found = _requests[method, path, status] = _Requests(method, path, status)
    found.add(seconds)


def expect_requests(method: str, path: str, statuses: Iterable[int]) -> None:
    """Have these at 0 before the first of them comes."""
    for status in statuses:
        if (method, path, status) not in _requests:
            _requests[method, path, status] = _Requests(method, path, status)


def count_download(status: str, seconds: float) -> None:
    """Count one attempt that ended; `status` is one of DOWNLOAD_STATUSES."""
    DOWNLOADS.labels(status).inc()
    tier = "fast" if seconds <= 15 else "medium" if seconds <= 60 else "slow"
    DOWNLOAD_PROCESSING.labels(status, tier).observe(seconds)


_s3: dict[tuple[str, str], tuple[Counter, Histogram]] = {}


def count_s3(operation: str, status: str, seconds: float) -> None:
    """Count one request to the store; `operation` is an S3 operation, `status` ok or error."""
    children = _s3.get((operation, status))
    if children is None:
        children = _s3[operation, status] = (
            S3_OPERATIONS.labels(operation, status),
            S3_OPERATION_DURATION.labels(operation),
        )
    children[0].inc()
    children[1].observe(seconds)


for _operation in S3_OPERATION_NAMES:
    for _status in ("ok", "error"):
        S3_OPERATIONS.labels(_operation, _status)
    S3_OPERATION_DURATION.labels(_operation)


class Timings:
    """One child of a histogram, for what happens many times a request: written down once a second.

    An `observe` writes to memory, not to the three places of a shared file. A killed process loses its last second,
    so this is for durations, not for what has to add up.
    """

    __slots__ = ("_bounds", "_buckets", "_due", "_pending", "_seconds", "_sum")

    def __init__(self, histogram: Histogram) -> None:
        self._bounds: list[float] = histogram._upper_bounds
        self._buckets, self._sum = histogram._buckets, histogram._sum
        self._pending = [0] * len(self._bounds)
        self._seconds = 0.0
        self._due = 0.0

    def observe(self, started: float) -> None:
        """Count what began at `started` (time.perf_counter) and ended now."""
        now = time.perf_counter()
        self._pending[bisect_left(self._bounds, now - started)] += 1
        self._seconds += now - started
        if now > self._due:
            self.flush()
            self._due = now + 1

    def flush(self) -> None:
        pending, self._pending = self._pending, [0] * len(self._bounds)
        seconds, self._seconds = self._seconds, 0.0
        if seconds:
            self._sum.inc(seconds)
        for bucket, count in zip(self._buckets, pending, strict=True):
            if count:
                bucket.inc(count)


REDIS_TIMINGS = {
    kind: Timings(REDIS_OPERATION_DURATION.labels(kind)) for kind in ("script", "command", "wait", "connect")
}


def flush_timings() -> None:
    for timings in REDIS_TIMINGS.values():
        timings.flush()


atexit.register(flush_timings)
