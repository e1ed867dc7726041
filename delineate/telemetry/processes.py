"""The processes that share telemetry.metrics_dir: which of them live, and what the dead ones had counted.

    process_<pid>                        who a process is, written by itself (`registered`)
    counter_<pid>.db, histogram_<pid>.db, gauge_..._<pid>.db
                                         its numbers, kept by prometheus_client in an mmap, which outlives SIGKILL
    counter_dead.db, histogram_dead.db   the sums of all who died
    lock                                 held while files are merged or read

prometheus_client keeps the files of the dead for ever: each restart would cost three files and some
milliseconds at every scrape, until the container ends. Here counters and histograms of the dead are added up in
one file each, so that no total ever falls, and their gauges go. Whoever starts or is scraped does it; nobody has
to be asked to, nor be alive when a process is killed.

This module must be imported without delineate.telemetry.metrics, which opens the files as it is imported:
`registered` comes first, and takes what an earlier process with the same pid has left.
"""

from __future__ import annotations

import fcntl
import logging
import os
import platform
import struct
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec
from prometheus_client import values
from prometheus_client.mmap_dict import MmapedDict

from delineate import __version__
from delineate.config import TelemetryConfig
from delineate.errors import StartupError

_log = logging.getLogger(__name__)

_MERGED = ("counter", "histogram")
_JOURNAL = "merged.json"


class Process(msgspec.Struct, frozen=True):
    """`started` is the clock ticks from boot to its start, which tells it from a later process with its pid.

    `began` is the same in Unix time, as it said itself: each who works it out from the ticks
    gets another time when the clock is set, which would look like a new process.
    """

    pid: int
    role: str
    version: str
    python: str
    started: int
    began: float = 0.0


class Usage(msgspec.Struct, frozen=True):
    """The bytes are those that a disk really read and wrote; None where the kernel does not tell."""

    started: int
    cpu_seconds: float
    resident_bytes: int
    open_files: int
    disk_read_bytes: int | None
    disk_written_bytes: int | None


@contextmanager
def registered(config: TelemetryConfig, role: str) -> Iterator[None]:
    """Have this process in the metrics as a `role` (api, worker) until the block ends.

    Raises StartupError when the processes of a container would not share their metrics as configured.
    """
    shared = bool(getattr(values.ValueClass, "_multiprocess", False))
    if shared != bool(config.metrics_dir):
        raise StartupError(
            "telemetry.metrics_dir and the environment variable PROMETHEUS_MULTIPROC_DIR: set both or neither"
        )
    if not shared:
        yield
        return
    folder, own = Path(config.metrics_dir), this_process(role)
    file = folder / f"process_{own.pid}"
    try:
        with _locked(folder):
            _bury(folder, [process for process in _known(folder) if process != own and _lives(process)])
            _replace(file, msgspec.json.encode(own))
    except OSError as error:
        raise StartupError(f"telemetry.metrics_dir {folder} cannot be used: {error.strerror or error}") from error
    try:
        yield
    finally:
        with suppress(OSError), _locked(folder):
            file.unlink(missing_ok=True)
            for gauges in folder.glob(f"gauge_*_{own.pid}.db"):
                gauges.unlink()


@contextmanager
def living(folder: Path) -> Iterator[list[Process]]:
    """Who lives; until the block ends, the folder's *.db files are complete and nobody merges any of them."""
    with _locked(folder):
        known = _known(folder)
        live = [process for process in known if _lives(process)]
        try:
            _bury(folder, live, unknown_may_live=True)
        except OSError as error:  # a full disk; what is there can be read all the same
            _log.warning("the metrics of dead processes were not merged: %s", error)
        yield live


def this_process(role: str) -> Process:
    found = usage(os.getpid())
    started = found.started if found else 0
    began = _boot_time() + started / os.sysconf("SC_CLK_TCK")
    return Process(os.getpid(), role, __version__, platform.python_version(), started, began)


def usage(pid: int) -> Usage | None:
    """What a process uses; None if it has ended, or where there is no /proc.

    Source: https://man7.org/linux/man-pages/man5/proc_pid_stat.5.html
    """
    try:
        # The second field is the program's name, which may hold blanks and brackets itself.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        if fields[0] in ("Z", "X"):
            return None
        open_files = len(os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208  # names are enough
    except (OSError, IndexError):
        return None
    moved = _disk_bytes(pid)
    return Usage(
        started=int(fields[19]),
        cpu_seconds=(int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"),
        resident_bytes=int(fields[21]) * os.sysconf("SC_PAGE_SIZE"),
        open_files=open_files,
        disk_read_bytes=moved.get("read_bytes"),
        disk_written_bytes=moved.get("write_bytes"),
    )


def _boot_time() -> float:
    with suppress(OSError):
        for line in Path("/proc/stat").read_text().splitlines():
            if line.startswith("btime "):
                return float(line.split()[1])
    return 0.0


def _disk_bytes(pid: int) -> dict[str, int]:
    """What /proc/<pid>/io says; nothing of a process whose memory we may not look at, or without the file.

    Source: https://man7.org/linux/man-pages/man5/proc_pid_io.5.html
    """
    try:
        lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    except OSError:
        return {}
    return {name: int(value) for name, _, value in (line.partition(":") for line in lines)}


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _known(folder: Path) -> list[Process]:
    known = []
    for file in folder.glob("process_*"):
        with suppress(OSError, msgspec.MsgspecError):
            known.append(msgspec.json.decode(file.read_bytes(), type=Process))
    return known


def _lives(process: Process) -> bool:
    found = usage(process.pid)
    return found.started == process.started if found else not process.started and _exists(process.pid)


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _bury(folder: Path, live: list[Process], *, unknown_may_live: bool = False) -> None:
    """Remove the files of the dead, once their counts are in the sums.

    `unknown_may_live`: a process that has not registered keeps its files while its pid exists. Whoever
    registers has opened none yet, so files under its own pid are a dead one's.
    """
    _finish_merge(folder)
    spared = {process.pid for process in live}
    known = {process.pid for process in _known(folder)}

    def lives(pid: int) -> bool:
        if pid in spared:
            return True
        if pid == os.getpid():
            return unknown_may_live
        return pid not in known and _exists(pid)

    dead = [file for file in folder.glob("*.db") if (pid := _pid_of(file)) is not None and not lives(pid)]
    merged = [file for file in dead if file.name.startswith(_MERGED)]
    if merged:
        for kind in _MERGED:
            _add_up(folder, kind, [file for file in merged if file.name.startswith(kind)])
        # From here on the merge counts: whoever dies in the middle of what follows, the next one finishes it.
        _replace(folder / _JOURNAL, msgspec.json.encode([file.name for file in merged]))
        _finish_merge(folder)
    for file in dead:
        file.unlink(missing_ok=True)
    for process in _known(folder):
        if process.pid not in spared:
            (folder / f"process_{process.pid}").unlink(missing_ok=True)


def _pid_of(file: Path) -> int | None:
    end = file.stem.rpartition("_")[2]
    return int(end) if end.isdecimal() else None


def _finish_merge(folder: Path) -> None:
    """Put the new sums in place of the files they were made of, also if another process had begun to."""
    journal = folder / _JOURNAL
    try:
        merged = msgspec.json.decode(journal.read_bytes(), type=list[str])
    except FileNotFoundError:
        return
    for kind in _MERGED:
        with suppress(FileNotFoundError):
            (folder / f"{kind}_dead.sums").replace(folder / f"{kind}_dead.db")
    for name in merged:
        (folder / name).unlink(missing_ok=True)
    journal.unlink()


def _add_up(folder: Path, kind: str, files: list[Path]) -> None:
    """Write the sums of `files` and of the dead before them to <kind>_dead.sums."""
    sums: defaultdict[str, float] = defaultdict(float)
    for file in (folder / f"{kind}_dead.db", *files):
        try:
            for key, value, _, _ in MmapedDict.read_all_values_from_file(str(file)):  # type: ignore[no-untyped-call]
                sums[key] += value
        except FileNotFoundError:
            continue
        except (struct.error, RuntimeError, UnicodeDecodeError):
            # Killed while it opened the file, before it had counted anything.
            _log.debug("%s has no numbers in it", file)
    content = bytearray(8)
    for key, value in sums.items():
        # As MmapedDict._init_value does it. Not through an mmap: on a full disk that is SIGBUS, and this an OSError.
        encoded = key.encode()
        padded = encoded + b" " * (8 - (len(encoded) + 4) % 8)
        content += struct.pack(f"i{len(padded)}sdd", len(encoded), padded, value, 0.0)
    struct.pack_into("i", content, 0, len(content))
    (folder / f"{kind}_dead.sums").write_bytes(content)


def _replace(file: Path, content: bytes) -> None:
    fresh = file.with_name(f"new.{file.name}")
    fresh.write_bytes(content)
    fresh.replace(file)
