"""What a user waits for: the whole service as `make run` starts it, from the outside.

    python -m benchmarks.service [--rounds 20]

Prints the seconds from start to the first healthy answer (first start of a
home, and a later one), from POST to the completed event for 3 files of 1 MB,
the peak memory of a worker, and one JSON line with all of it.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.run.up import Up

FILE_IDS = [80_000, 80_001, 80_002]


def post_to_completed(service: Up) -> float:
    """Seconds from sending the request to having read the `completed` event."""
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=60)
    start = time.perf_counter()
    body = json.dumps({"file_ids": FILE_IDS})
    connection.request("POST", "/v1/export", body, {"Content-Type": "application/json"})
    job = json.loads(connection.getresponse().read())
    connection.request("GET", f"/v1/export/{job['jobId']}/progress")
    for line in connection.getresponse():
        if line.startswith(b"event: failed"):
            raise SystemExit("the export failed")
        if line.startswith(b"event: completed"):
            break
    seconds = time.perf_counter() - start
    connection.close()
    return seconds


def workers_peak_mb(service: Up) -> float:
    peaks = [0]
    for pid, command in service.processes().items():
        # The tether that a worker runs through has the same words in its command line, and more.
        if command[-2:] == ["worker", ""] and "delineate.tether" not in command:
            status = Path(f"/proc/{pid}/status").read_text()
            peaks += [int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")]
    return max(peaks) / 1024


def measure(rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        service = Up(Path(folder), DELINEATE__RATE_LIMIT__ENABLED="false", DELINEATE__LOG__LEVEL="warning")
        try:
            first = service.start()
            service.stop()
            later = service.start()
            for file_id in FILE_IDS:
                (service.home / "s3" / "files" / str(file_id)).write_bytes(os.urandom(1_000_000))
            waits = [post_to_completed(service) for _ in range(rounds)]
            return {
                "first_start_seconds": round(first, 2),
                "later_start_seconds": round(later, 2),
                "post_to_completed_ms": round(statistics.median(waits) * 1000),
                "post_to_completed_worst_ms": round(max(waits) * 1000),
                "worker_peak_rss_mb": round(workers_peak_mb(service)),
            }
        finally:
            if service.process is not None:
                service.stop()
            service.end()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    results = measure(parser.parse_args().rounds)
    for name, value in results.items():
        print(f"{name:<28}{value:>8}")
    print(json.dumps({"benchmark": "service", "results": results}))


if __name__ == "__main__":
    main()
