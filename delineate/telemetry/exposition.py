"""What GET /metrics answers: the numbers of all processes of the container, and what is looked up at that moment.

A gauge that is looked up belongs to the moment it is asked for. If Redis does not answer, the
queue's gauges are missing rather than old, and `dependency_up` says why.
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import msgspec
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from delineate.config import TelemetryConfig
from delineate.telemetry.metrics import flush_timings
from delineate.telemetry.processes import Process, Usage, living, this_process, usage


class QueueLook(msgspec.Struct, frozen=True):
    """The queue at one moment: jobs by state, age of the oldest that waits, workers with a lease, paused or not."""

    sizes: dict[str, int]
    oldest_waiting_seconds: float
    workers: int
    paused: bool


class Look(msgspec.Struct, frozen=True):
    """`dependencies` are storage, redis and workers, each up or not; `queue` is None if Redis did not answer."""

    dependencies: dict[str, bool]
    queue: QueueLook | None


def render_metrics(config: TelemetryConfig, look: Look | None = None) -> bytes:
    """The Prometheus text of every process that shares this one's metrics."""
    flush_timings()
    registry = CollectorRegistry()
    if not config.metrics_dir:
        registry.register(_Registered())
        registry.register(_Found([this_process("api")], look))
        return generate_latest(registry)
    folder = Path(config.metrics_dir)
    with living(folder) as processes:
        MultiProcessCollector(registry, str(folder))  # type: ignore[no-untyped-call]
        registry.register(_Found(processes, look))
        return generate_latest(registry)


class _Registered(Collector):
    """This process' own."""

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterable[Metric]:
        return REGISTRY.collect()


class _Found(Collector):
    def __init__(self, processes: list[Process], look: Look | None) -> None:
        self._processes = processes
        self._look = look

    def describe(self) -> Iterable[Metric]:
        return []  # or registering would look everything up once more

    def collect(self) -> Iterator[Metric]:
        yield from _of_processes(self._processes)
        if self._look is not None:
            yield from _of_dependencies(self._look.dependencies)
            if self._look.queue is not None:
                yield from _of_queue(self._look.queue)


def _of_queue(queue: QueueLook) -> Iterator[Metric]:
    sizes = GaugeMetricFamily("export_queue_size", "Jobs by state.", labels=["state"])
    for state, count in queue.sizes.items():
        sizes.add_metric([state], count)
    yield sizes
    yield GaugeMetricFamily(
        "export_queue_oldest_seconds",
        "Age of the oldest waiting job, 0 if none waits.",
        value=queue.oldest_waiting_seconds,
    )
    yield GaugeMetricFamily("export_queue_paused", "1 while an operator holds the queue.", value=int(queue.paused))
    yield GaugeMetricFamily("workers_live", "Workers with a heartbeat, on all machines.", value=queue.workers)


def _of_dependencies(dependencies: dict[str, bool]) -> Iterator[Metric]:
    up = GaugeMetricFamily(
        "dependency_up", "1 if it answered now, by the same checks as /health.", labels=["dependency"]
    )
    for name, is_up in dependencies.items():
        up.add_metric([name], int(is_up))
    yield up


_COUNTERS: list[tuple[str, str, Callable[[Usage], float | None]]] = [
    ("process_cpu_seconds", "CPU time of a process.", lambda used: used.cpu_seconds),
    ("process_disk_read_bytes", "Bytes that a disk read for a process.", lambda used: used.disk_read_bytes),
    ("process_disk_written_bytes", "Bytes that a disk wrote for a process.", lambda used: used.disk_written_bytes),
]
_GAUGES: list[tuple[str, str, Callable[[Usage], float]]] = [
    ("process_resident_memory_bytes", "Resident memory of a process.", lambda used: used.resident_bytes),
    ("process_open_fds", "Open file descriptors of a process.", lambda used: used.open_files),
]


def _of_processes(processes: list[Process]) -> Iterator[Metric]:
    """Nothing of a process that ended meanwhile. Its series end with it, and no pid stays on."""
    build = GaugeMetricFamily("delineate_build_info", "What runs; always 1.", labels=["version", "python"])
    for labels in sorted({(process.version, process.python) for process in processes}):
        build.add_metric(list(labels), 1)
    yield build
    labels_of = {process.pid: [process.role, str(process.pid)] for process in processes}
    used = {pid: found for pid in labels_of if (found := usage(pid)) is not None}
    for name, documentation, counted in _COUNTERS:
        counter = CounterMetricFamily(name, documentation, labels=["role", "pid"])
        for pid, found in used.items():
            if (amount := counted(found)) is not None:
                counter.add_metric(labels_of[pid], amount)
        yield counter
    for name, documentation, value in _GAUGES:
        gauge = GaugeMetricFamily(name, documentation, labels=["role", "pid"])
        for pid, found in used.items():
            gauge.add_metric(labels_of[pid], value(found))
        yield gauge
    began = GaugeMetricFamily(
        "process_start_time_seconds", "When a process was started, Unix time.", labels=["role", "pid"]
    )
    for process in processes:
        if process.pid in used:
            began.add_metric(labels_of[process.pid], process.began)
    yield began
    most = GaugeMetricFamily("process_max_fds", "Most file descriptors a process may open.", labels=["role", "pid"])
    for pid in used:
        with suppress(OSError):
            most.add_metric(labels_of[pid], resource.prlimit(pid, resource.RLIMIT_NOFILE)[0])
    yield most
