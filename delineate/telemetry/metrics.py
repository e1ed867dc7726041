"""Every metric of delineate: what is counted, by whom, and what the labels may be.

Names are snake_case, end in their unit, counters in `_total`. Labels have few
values by construction: `path` is a route's template, never a path that a
client sent.

Several processes of a container share `telemetry.metrics_dir`, and each of
them can then answer /metrics for all. prometheus_client decides about this
when it is imported, by the variable PROMETHEUS_MULTIPROC_DIR; a supervisor
sets both, to the same directory, which exists, and is emptied when the container starts:

    environment=DELINEATE__TELEMETRY__METRICS_DIR="...",PROMETHEUS_MULTIPROC_DIR="..."

`check_metrics` stops a process in which only one of them is set.
"""

from __future__ import annotations

import os
from pathlib import Path

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, generate_latest, values
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from delineate.config import TelemetryConfig
from delineate.errors import StartupError

REQUEST_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
JOB_BUCKETS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 90, 120, 180, 300)
S3_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)

# Of the API
HTTP_REQUESTS = Counter("http_requests_total", "Requests answered.", ["method", "path", "status"])
HTTP_REQUEST_DURATION = Histogram(
    "http_request_duration_seconds",
    "From the last byte of a request to its answer; to the first event for a stream.",
    ["method", "path"],
    buckets=REQUEST_BUCKETS,
)
ACTIVE_SSE_CONNECTIONS = Gauge("active_sse_connections", "Open event streams.", multiprocess_mode="livesum")
DOWNLOADS = Counter("downloads_total", "Download links asked for, by outcome.", ["status"])
EXPORT_QUEUE_SIZE = Gauge("export_queue_size", "Jobs by state.", ["state"], multiprocess_mode="mostrecent")

# Of the workers
EXPORT_JOBS = Counter("export_jobs_total", "Jobs that ended, by final status.", ["status"])
EXPORT_JOB_DURATION = Histogram(
    "export_job_duration_seconds", "From a job's claim to its end.", ["status"], buckets=JOB_BUCKETS
)
DOWNLOADS_ACTIVE = Gauge("downloads_active", "Jobs being packed now.", multiprocess_mode="livesum")
S3_OPERATIONS = Counter("s3_operations_total", "Requests to the S3 store.", ["operation", "status"])
S3_OPERATION_DURATION = Histogram(
    "s3_operation_duration_seconds", "Time of one request to the S3 store.", ["operation"], buckets=S3_BUCKETS
)

# Values that exist before they first happen, so that rate() sees the first one.
for _status in ("completed", "failed", "cancelled"):
    EXPORT_JOBS.labels(_status)
for _status in ("ready", "not_ready", "expired"):
    DOWNLOADS.labels(_status)


_requests: dict[tuple[str, str, int], tuple[Counter, Histogram]] = {}


def count_request(method: str, path: str, status: int, seconds: float) -> None:
    """Count one answer; `method` and `path` (a route's template) must come from a short list."""
    children = _requests.get((method, path, status))
    if children is None:
        # Kept, because finding a child by its labels costs more than counting.
        children = HTTP_REQUESTS.labels(method, path, str(status)), HTTP_REQUEST_DURATION.labels(method, path)
        _requests[method, path, status] = children
    children[0].inc()
    children[1].observe(seconds)


def check_metrics(config: TelemetryConfig) -> None:
    """Raises StartupError when the processes of a container would not share their metrics as configured."""
    shared = bool(getattr(values.ValueClass, "_multiprocess", False))
    if shared != bool(config.metrics_dir):
        raise StartupError(
            "telemetry.metrics_dir and the environment variable PROMETHEUS_MULTIPROC_DIR: set both or neither"
        )


def _bury_the_dead(folder: Path) -> None:
    """Take the gauges of killed processes out: nobody else could, and a container's pids are its own."""
    for file in folder.glob("gauge_live*_*.db"):
        pid = file.stem.rpartition("_")[2]
        if pid.isdecimal() and not _alive(int(pid)):
            mark_process_dead(int(pid), str(folder))  # type: ignore[no-untyped-call]


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # somebody else's, so the number was used again: nothing is known of ours
    return True


def render_metrics(config: TelemetryConfig) -> bytes:
    """The Prometheus text of every process that shares this one's metrics."""
    if not config.metrics_dir:
        return generate_latest(REGISTRY)
    _bury_the_dead(Path(config.metrics_dir))
    registry = CollectorRegistry()
    MultiProcessCollector(registry, config.metrics_dir)  # type: ignore[no-untyped-call]
    return generate_latest(registry)
