"""How a process says that it works: a file with its pid, for whoever restarts processes one after the other."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def ready(file: Path | None) -> Iterator[None]:
    """While the block runs, `file` has this process's pid in it."""
    if file is None:
        yield
        return
    file.write_text(str(os.getpid()))
    try:
        yield
    finally:
        file.unlink(missing_ok=True)


def is_ready(file: Path, pid: int) -> bool:
    """Whether the process `pid` has said so; what another one left there does not count."""
    try:
        return file.read_text() == str(pid)
    except OSError:
        return False
