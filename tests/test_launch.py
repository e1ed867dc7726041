"""What supervisord and its programs are started with."""

from __future__ import annotations

from pathlib import Path

import pytest

from delineate.errors import ConfigError
from delineate.launch import launch_environment

HOME, SOCKET = Path("/home"), Path("/home/run/supervisor.sock")


def test_what_nobody_has_set_has_a_value_and_what_somebody_has_stays() -> None:
    environ = launch_environment({"DELINEATE_API_PROCESSES": "7", "PATH": "/bin"}, HOME, SOCKET, "container")
    assert environ["DELINEATE_API_PROCESSES"] == "7"
    assert environ["DELINEATE_WORKER_PROCESSES"] == "2"
    assert environ["PATH"] == "/bin"
    assert environ["DELINEATE__TELEMETRY__METRICS_DIR"] == environ["PROMETHEUS_MULTIPROC_DIR"] == "/home/metrics"


def test_look_ups_of_a_server_that_is_away_leave_threads_to_others() -> None:
    """Libuv has four unless told otherwise: with DNS that does not answer, the fifth name waited for 40 s."""
    assert int(launch_environment({}, HOME, SOCKET, "container")["UV_THREADPOOL_SIZE"]) >= 32
    assert launch_environment({"UV_THREADPOOL_SIZE": "8"}, HOME, SOCKET, "container")["UV_THREADPOOL_SIZE"] == "8"


@pytest.mark.parametrize("number", ["0", "257", "two", "1.5", "-1"])
def test_a_number_of_processes_that_makes_no_sense_is_one_line(number: str) -> None:
    with pytest.raises(ConfigError, match=r"DELINEATE_WORKER_PROCESSES: .* expected a whole number from 1 to 256"):
        launch_environment({"DELINEATE_WORKER_PROCESSES": number}, HOME, SOCKET, "container")
