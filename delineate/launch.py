"""What `delineate up` and `delineate serve` start supervisord with: the environment that supervisord.conf reads."""

from __future__ import annotations

import contextlib
import math
import os
import resource
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

from delineate.config import ApiConfig, Config, find_conf_dir
from delineate.errors import ConfigError, StartupError

CHECKOUT = Path(__file__).resolve().parent.parent
# After its drain_timeout a process hands back jobs (2 s at most), closes connections, and may have to wait for a core.
CLOSE_SECONDS = 3
OPEN_FILES = 65_536
DEFAULTS = {
    "DELINEATE_API_PROCESSES": "2",
    "DELINEATE_WORKER_PROCESSES": "2",
    # Names are looked up in libuv's threads, four by default. A Redis that is away, where DNS takes its time to say so,
    # would keep all four, and the S3 store's name would wait behind them.
    "UV_THREADPOOL_SIZE": "32",
}


def find_file(name: str) -> Path:
    """`name` in the working directory (the image's /app), else in the checkout. Raises StartupError."""
    for folder in (Path.cwd(), CHECKOUT):
        if (folder / name).is_file():
            return folder / name
    raise StartupError(f"{CHECKOUT / name} is missing; run it from a checkout of delineate")


def launch_environment(given: Mapping[str, str], home: Path, sock: Path, profile: str) -> dict[str, str]:
    """`given`, and where everything is; `profile` names the conf/supervisord.*.conf that is included.

    `sock` is where supervisord will listen. Raises ConfigError.
    """
    environ = dict(given)
    environ |= {name: value for name, value in DEFAULTS.items() if not environ.get(name)}
    for name in ("DELINEATE_API_PROCESSES", "DELINEATE_WORKER_PROCESSES"):
        whole_number(environ, name, 1, 256)
    return environ | {
        "DELINEATE_HOME": str(home),
        "DELINEATE_CONF_DIR": str(find_conf_dir(given).absolute()),
        "DELINEATE_PYTHON": sys.executable,
        # The client library reads its variable when it is imported, so both have to say the same.
        "DELINEATE__TELEMETRY__METRICS_DIR": str(home / "metrics"),
        "PROMETHEUS_MULTIPROC_DIR": str(home / "metrics"),
        "DELINEATE_PROFILE": profile,
        "DELINEATE_SUPERVISOR_SOCKET": str(sock),
    }


def process_settings(config: Config, sock: Path) -> dict[str, str]:
    """The rest of that environment, which follows from the configuration of the processes themselves."""
    return {
        "DELINEATE_API_SOCKET": _api_socket(config.api, sock),
        "DELINEATE_API_STOP_SECONDS": str(math.ceil(config.api.drain_timeout) + CLOSE_SECONDS),
        "DELINEATE_WORKER_STOP_SECONDS": str(math.ceil(config.worker.drain_timeout) + CLOSE_SECONDS),
    }


def supervisord_command(conf: Path) -> list[str]:
    root = ("--user", str(os.getuid())) if os.getuid() == 0 else ()
    return [sys.executable, "-m", "delineate.supervisord", "--configuration", str(conf), *root]


def allow_many_open_files() -> None:
    """Every open stream is a file descriptor; the usual soft limit of 1024 would be the first to give way."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def whole_number(environ: Mapping[str, str], name: str, least: int, most: int) -> int:
    """The value of a variable that is a whole number. Raises ConfigError."""
    text = environ[name]
    if not (text.isascii() and text.isdigit() and least <= int(text) <= most):
        raise ConfigError(
            f"environment variable {name}: {text!r} is not allowed, expected a whole number from {least} to {most}"
        )
    return int(text)


def _api_socket(config: ApiConfig, sock: Path) -> str:
    """What supervisord opens for the API processes (supervision.py).

    It can open one IPv4 socket. For another address, or a name with several, it gets
    one that nobody connects to, and the API processes listen for themselves.
    """
    with contextlib.suppress(OSError, UnicodeError):
        found = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)
        if len(found) == 1 and found[0][0] == socket.AF_INET:
            return f"tcp://{found[0][4][0]}:{config.port}"
    return f"unix://{sock.with_name('api.sock')}"
