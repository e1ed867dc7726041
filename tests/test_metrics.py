"""Metrics that several processes share: what the dead leave behind, and that documents and code agree."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from delineate.api.app import ROUTES
from delineate.config import load_config
from delineate.telemetry import processes
from delineate.telemetry.exposition import Look, QueueLook, render_metrics
from delineate.telemetry.metrics import REDIS_TIMINGS, expect_requests
from delineate.telemetry.processes import living, this_process

DOCUMENT = (Path(__file__).resolve().parent.parent / "docs" / "observability.md").read_text()
LOOK = Look(
    {"storage": True, "redis": True, "workers": False},
    QueueLook({"waiting": 3, "active": 0, "delayed": 0, "failed": 0}, 12.5, 0, paused=True),
)

PROGRAM = """
import os, signal, sys
from delineate.config import load_config
from delineate.telemetry.processes import registered

config = load_config({"DELINEATE__TELEMETRY__METRICS_DIR": os.environ["PROMETHEUS_MULTIPROC_DIR"]}).telemetry
with registered(config, "worker"):
    from delineate.telemetry.metrics import ACTIVE_SSE_CONNECTIONS, EXPORT_JOB_WAIT, EXPORT_JOBS
    from delineate.telemetry.exposition import render_metrics
    EXPORT_JOBS.labels("completed").inc()
    EXPORT_JOB_WAIT.observe(0.7)
    ACTIVE_SSE_CONNECTIONS.inc(7 if sys.argv[1] == "killed" else 2)
    if sys.argv[1] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if sys.argv[1] == "asked":
        print(os.getpid())
        print(render_metrics(config).decode())
"""


def run(folder: Path, how: str) -> str:
    env = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(folder)}
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == (-signal.SIGKILL if how == "killed" else 0), done.stderr
    return done.stdout


def values(text: str, name: str) -> dict[str, float]:
    """Labels as they are written, and the value, of every sample of that very name."""
    found = re.findall(rf"^{name}(?:{{(.*)}})? (\S+)$", text, re.MULTILINE)
    return {labels: float(value) for labels, value in found}


def test_a_killed_process_leaves_its_counts_and_no_gauges(tmp_path: Path) -> None:
    run(tmp_path, "killed")
    assert list(tmp_path.glob("gauge_live*.db"))
    assert list(tmp_path.glob("process_*"))
    pid, _, text = run(tmp_path, "asked").partition("\n")
    assert values(text, "active_sse_connections") == {"": 2}
    assert values(text, "export_jobs_total")['status="completed"'] == 2
    assert values(text, "export_job_wait_seconds_count") == {"": 2}
    for name in ("process_resident_memory_bytes", "process_disk_read_bytes_total", "process_disk_written_bytes_total"):
        assert values(text, name).keys() == {f'pid="{pid}",role="worker"'}
    assert len(values(text, "delineate_build_info")) == 1


def test_many_restarts_leave_a_few_files_and_every_count(tmp_path: Path) -> None:
    for _ in range(4):
        run(tmp_path, "killed")
        run(tmp_path, "ended")
    # The sums, and what the last two have left, one of them merged already.
    assert len(list(tmp_path.glob("*.db"))) <= 2 + 3
    text = run(tmp_path, "asked")
    assert values(text, "export_jobs_total")['status="completed"'] == 9
    assert values(text, "export_job_wait_seconds_bucket")['le="1.0"'] == 9
    assert not list(tmp_path.glob("process_*"))


@pytest.mark.parametrize("step", ["replace", "unlink"])
def test_a_merge_that_is_cut_off_is_finished_by_the_next_and_counts_once(
    tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path, "killed")
    run(tmp_path, "killed")  # merges the first
    real = getattr(Path, step)
    for number in range(8):
        left = iter(range(number))

        def until_then(*arguments: object, left: Iterator[int] = left, **options: object) -> object:
            if next(left, None) is None:
                raise KeyboardInterrupt
            return real(*arguments, **options)

        monkeypatch.setattr(Path, step, until_then)
        with pytest.raises(KeyboardInterrupt), living(tmp_path):
            raise KeyboardInterrupt  # for the numbers that are beyond the last step
        monkeypatch.undo()
        if number % 3 == 0:
            run(tmp_path, "killed")
    text = run(tmp_path, "asked")
    assert values(text, "export_jobs_total")['status="completed"'] == 6
    assert values(text, "active_sse_connections") == {"": 2}


def test_a_full_disk_costs_no_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, "killed")

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with living(tmp_path) as live:
        assert live == []
        assert list(tmp_path.glob("counter_*.db"))
    monkeypatch.undo()
    assert values(run(tmp_path, "asked"), "export_jobs_total")['status="completed"'] == 2


def test_files_of_a_process_that_was_killed_while_it_started_harm_nobody(tmp_path: Path) -> None:
    run(tmp_path, "killed")
    dead = next(tmp_path.glob("counter_*.db")).stem.rpartition("_")[2]
    (tmp_path / f"histogram_{dead}.db").write_bytes(b"")
    (tmp_path / f"new.process_{dead}").write_bytes(b"{")
    assert values(run(tmp_path, "asked"), "export_jobs_total")['status="completed"'] == 2


def test_a_pid_that_was_given_away_again_is_another_process(tmp_path: Path) -> None:
    own = this_process("worker")
    before = msgspec.structs.replace(own, started=own.started - 1)
    (tmp_path / f"process_{own.pid}").write_bytes(msgspec.json.encode(before))
    (tmp_path / f"gauge_livesum_{own.pid}.db").touch()
    processes._bury(tmp_path, [])
    assert not list(tmp_path.glob("*_*"))


def whole_text() -> str:
    for route in ROUTES:
        expect_requests(route.method, route.path, (200,))
    return render_metrics(load_config({}).telemetry, LOOK).decode()


def test_the_document_lists_every_metric_with_its_type_and_labels() -> None:
    text = whole_text()
    exposed = {}
    for name, kind in re.findall(r"^# TYPE (\w+) (\w+)$", text, re.MULTILINE):
        sample = f"{name}_count" if kind == "histogram" else name
        labels = {label for found in values(text, sample) for label in re.findall(r'(\w+)="', found)}
        exposed[name] = (kind, labels)
    documented = {
        name: (kind, set(re.findall(r"`(\w+)`", labels)))
        for name, kind, labels in re.findall(r"^\| `(\w+)` \| (\w+) \| ([^|]*)\|", DOCUMENT, re.MULTILINE)
    }
    assert documented == exposed


def test_every_label_value_is_there_before_it_happens() -> None:
    text = whole_text()
    for name, values_of in re.findall(r"^\| `(\w+)` \| \w+ \|[^|]+\| ([^|]*) \|", DOCUMENT, re.MULTILINE):
        if name in ("sse_events_total", "sse_streams_ended_total", "download_links_total", "downloads_total"):
            label = next(iter(values(text, name))).partition("=")[0]
            for value in re.findall(r"`(\w+)`", values_of):
                assert f'{label}="{value}"' in values(text, name), (name, value)
    assert len(values(text, "export_attempt_failures_total")) == 12
    assert len(values(text, "download_processing_seconds_count")) == 12
    assert len(values(text, "redis_operation_duration_seconds_count")) == len(REDIS_TIMINGS)
    assert 'method="GET",path="/v1/export/{jobId}"' in values(text, "http_request_duration_seconds_count")


def test_what_is_not_known_is_missing_and_not_old() -> None:
    assert values(whole_text(), "export_queue_oldest_seconds") == {"": 12.5}
    text = render_metrics(load_config({}).telemetry, Look({"redis": False}, None)).decode()
    assert values(text, "dependency_up") == {'dependency="redis"': 0}
    assert "export_queue" not in text


def test_disk_bytes_that_the_kernel_keeps_to_itself_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    read_text = Path.read_text

    def refused(file: Path, *_: object) -> str:
        if file.name == "io":
            raise PermissionError(13, "Permission denied")
        return read_text(file)

    # Root is refused nothing.
    telemetry = load_config({}).telemetry
    monkeypatch.setattr(Path, "read_text", refused)
    text = render_metrics(telemetry, None).decode()
    assert values(text, "process_open_fds")
    assert not values(text, "process_disk_read_bytes_total")
    assert not values(text, "process_disk_written_bytes_total")
