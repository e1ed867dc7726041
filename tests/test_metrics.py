"""Metrics that several processes share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import os, signal, sys
from delineate.telemetry.metrics import ACTIVE_SSE_CONNECTIONS, render_metrics
from delineate.config import TelemetryConfig
if sys.argv[1] == "killed":
    ACTIVE_SSE_CONNECTIONS.inc(7)
    os.kill(os.getpid(), signal.SIGKILL)
ACTIVE_SSE_CONNECTIONS.inc(2)
print(render_metrics(TelemetryConfig(metrics_dir=os.environ["PROMETHEUS_MULTIPROC_DIR"])).decode())
"""


def test_a_killed_process_leaves_no_open_streams_behind(tmp_path: Path) -> None:
    env = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    program = [sys.executable, "-c", PROGRAM]
    subprocess.run([*program, "killed"], env=env, check=False)
    assert list(tmp_path.glob("gauge_live*.db"))
    shown = subprocess.run(
        [sys.executable, "-c", PROGRAM, "asked"], env=env, check=True, capture_output=True, text=True
    )
    assert "active_sse_connections 2.0" in shown.stdout
