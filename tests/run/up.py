"""`delineate up` as a child process with a home and a port of its own, and how tests talk to it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

from tests.servers import free_port, wait_until

ROOT = Path(__file__).resolve().parent.parent.parent
START_SECONDS = 60


class Up:
    """One service. `log` has its stdout and stderr; `processes()` everything it started that still lives."""

    def __init__(self, folder: Path, **environ: str) -> None:
        self.folder, self.home, self.log = folder, folder / "home", folder / "log"
        self.port = free_port()
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("DELINEATE")}
        self.environ = inherited | {"DELINEATE_HOME": str(self.home), "DELINEATE_PORT": str(self.port)} | environ
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def supervisor_url(self) -> str:
        """What the summary says to give to supervisorctl; a deep home has its socket elsewhere."""
        found = re.search(r"unix://.+supervisor\.sock", self.log.read_text())
        assert found
        return found[0]

    def launch(self) -> subprocess.Popen[bytes]:
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "delineate", "up"],
                cwd=ROOT,
                env=self.environ,
                stdout=out,
                stderr=out,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        return self.process

    def start(self) -> float:
        """Start it and wait for the summary; the seconds it took."""
        started = time.monotonic()
        process = self.launch()

        def ready() -> bool:
            if process.poll() is not None:
                raise RuntimeError(f"`up` ended with {process.returncode}:\n{self.log.read_text()[-4000:]}")
            return "delineate is ready" in self.log.read_text()

        try:
            wait_until(ready, "the summary", START_SECONDS)
        except TimeoutError as error:
            raise TimeoutError(f"{error}; the log says:\n{self.log.read_text()[-4000:]}") from error
        return time.monotonic() - started

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal, wait for the end, and return the exit code."""
        assert self.process is not None
        self.process.send_signal(number)
        code = self.process.wait(20)
        self.process = None
        return code

    def end(self) -> None:
        """Whatever the test did, leave nothing behind."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(10)
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)

    def processes(self) -> dict[int, list[str]]:
        """pid -> command line of every process that lives in this home."""
        mark, lock = f"DELINEATE_HOME={self.home}".encode(), str(self.home / "run" / "lock")
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                # Valkey writes its title over its environment, but holds the home's lock open as all do.
                ours = mark in (folder / "environ").read_bytes().split(b"\0")
                if ours or any(str(file.readlink()) == lock for file in (folder / "fd").iterdir()):
                    found[int(folder.name)] = (folder / "cmdline").read_bytes().decode().split("\0")
            except OSError:  # it ended while we looked
                continue
        return found

    def supervisorctl(self, *words: str) -> str:
        command = [str(Path(sys.executable).with_name("supervisorctl")), "-c", str(ROOT / "supervisord.conf")]
        done = subprocess.run([*command, "-s", self.supervisor_url, *words], capture_output=True, text=True, timeout=60)
        return done.stdout + done.stderr

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"{self.base}{path}", timeout=30) as response:  # noqa: S310
            return json.loads(response.read())

    def post(self, file_ids: list[int]) -> str:
        """Ask for an export and return its job's id."""
        request = urllib.request.Request(  # noqa: S310
            f"{self.base}/v1/export",
            data=json.dumps({"file_ids": file_ids}).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as response:  # noqa: S310
            return str(json.loads(response.read())["jobId"])

    def completed(self, job_id: str, seconds: float = 40) -> dict[str, Any]:
        """Wait until the job has completed, and return it."""
        job: dict[str, Any] = {}

        def done() -> bool:
            job.update(self.get(f"/v1/export/{job_id}"))
            assert job["status"] in ("queued", "processing", "completed"), job
            return bool(job["status"] == "completed")

        # Slowly: the callers of one address are limited to 100 requests a minute.
        end = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < end, f"not completed within {seconds} s: {job}"
            time.sleep(0.5)
        return job

    def fetch(self, job_id: str) -> Path:
        """Download a completed job's archive."""
        url = self.get(f"/v1/export/{job_id}/download")["downloadUrl"]
        file = self.folder / f"{job_id}.zip"
        with urllib.request.urlopen(url, timeout=30) as response:  # noqa: S310
            file.write_bytes(response.read())
        return file


def unzip(archive: Path, into: Path) -> dict[str, bytes]:
    """What Info-ZIP makes of an archive: name -> content."""
    subprocess.run(["unzip", "-q", str(archive), "-d", str(into)], check=True, env=os.environ | {"LC_ALL": "C.UTF-8"})
    return {str(file.relative_to(into)): file.read_bytes() for file in into.rglob("*") if file.is_file()}
