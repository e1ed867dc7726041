"""Real servers for the tests: each is a child process on a free loopback port with a folder of its own."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from delineate.embedded import s3_command, s3_environment

ACCESS_KEY, SECRET_KEY = "delineate-test", "delineate-test-secret"


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def answers(port: int) -> bool:
    with socket.socket() as sock:
        sock.settimeout(0.5)
        return sock.connect_ex(("127.0.0.1", port)) == 0


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 15, *, pause: float = 0.02) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"{what} did not happen within {seconds} s")
        time.sleep(pause)


def store_of_its_own(folder: Path, access_key: str, secret_key: str) -> ServerProcess:
    """A store with its two buckets in `folder`/s3, for a test to start, kill and stop."""
    for bucket in ("files", "archives"):
        (folder / "s3" / bucket).mkdir(parents=True)
    port = free_port()
    command = s3_command(folder / "s3", port)
    return ServerProcess(command, port, folder / "s3.log", s3_environment(access_key, secret_key))


class ServerProcess:
    """A server that tests may start, kill and start again on the same port; output goes to a log file."""

    def __init__(self, command: Sequence[str], port: int, log: Path, env: Mapping[str, str] | None = None) -> None:
        self.command, self.port, self.log = list(command), port, log
        self.env = {**os.environ, **(env or {})}
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(self.command, stdout=out, stderr=out, env=self.env)
        process = self.process

        def up() -> bool:
            if process.poll() is not None:
                raise RuntimeError(f"{self.command[0]} ended with {process.returncode}: {self.log.read_text()[-2000:]}")
            return answers(self.port)

        wait_until(up, f"start of {self.command[0]}")

    def stop(self) -> None:
        self._end("terminate")

    def kill(self) -> None:
        self._end("kill")

    def _end(self, how: str) -> None:
        if self.process is None:
            return
        getattr(self.process, how)()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(10)
        self.process = None
