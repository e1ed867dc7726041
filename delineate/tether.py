"""Tie a process to its parent's life: `python -m delineate.tether LOCK COMMAND...` becomes COMMAND.

Everything `delineate up` and supervisord start goes through here, so that
whoever dies, however, takes its children along: the kernel sends SIGTERM to a
tethered process when its parent is gone. LOCK is a file that the command
holds a shared lock on for as long as it lives (`-` for none): nobody starts a
second Redis on the same folder while the first still writes.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import sys

# https://man7.org/linux/man-pages/man2/prctl.2.html
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36


def main() -> None:
    lock, *command = sys.argv[1:]
    die_with_parent()
    ignore_log_signals()
    if lock != "-":
        hold(lock)
    try:
        os.execvp(command[0], command)  # noqa: S606  # no shell wanted: the pid must stay the same
    except OSError as error:
        sys.exit(f"delineate: {command[0]} cannot be started: {error}")


def die_with_parent() -> None:
    """Get SIGTERM when the parent ends; it stays in force across exec. Linux only, elsewhere nothing happens."""
    parent = os.getppid()
    if _prctl(PR_SET_PDEATHSIG, signal.SIGTERM) and os.getppid() != parent:
        sys.exit(1)  # it ended before the kernel knew that we care


def ignore_log_signals() -> None:
    """They end who does not know them: Redis, or one of ours that is just starting (telemetry/logs.py)."""
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent ends. Linux only, elsewhere nothing happens."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def hold(lock: str) -> None:
    """Hold a shared lock on the file `lock` until this process ends, whatever it executes until then."""
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    os.set_inheritable(descriptor, True)


def _prctl(option: int, value: int) -> bool:
    if sys.platform != "linux":
        return False
    return bool(ctypes.CDLL(None).prctl(option, value, 0, 0, 0) == 0)


if __name__ == "__main__":
    main()
