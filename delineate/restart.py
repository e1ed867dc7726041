"""`delineate restart`: new processes for old ones, one at a time, while the service goes on.

    look        at what runs, and whether the configuration on disk is one that a new process would accept
    per process, workers first (they must understand what a newer API asks of them):
        stop        SIGTERM; it drains and ends, or supervisord kills it when its time is over
        start       the program as it is on disk now
        ready       it says so itself (ready.py) and supervisord calls it RUNNING; only then the next one

The first process that does not get ready ends the restart: it is stopped
before supervisord gives up on it (which would end everything, supervision.py),
and the others keep running as they are.
"""

from __future__ import annotations

import fcntl
import http.client
import signal
import socket
import sys
import time
import xmlrpc.client
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, cast

from supervisor.xmlrpc import SupervisorTransport

from delineate.config import load_config, read_environment
from delineate.errors import StartupError
from delineate.home import environment_of, home_path, supervisor_socket
from delineate.ready import is_ready

ORDER = ("worker", "api")
START_SECONDS = 60
POLL_SECONDS = 0.1
ANSWER_SECONDS = 10
GONE_WRONG = ("BACKOFF", "EXITED", "FATAL", "UNKNOWN")
UNREACHABLE = (OSError, http.client.HTTPException, xmlrpc.client.Error)


class Supervisor(Protocol):
    """What is used of supervisord. Source: http://supervisord.org/api.html"""

    def getPID(self) -> int: ...  # noqa: N802
    def getAllProcessInfo(self) -> list[dict[str, Any]]: ...  # noqa: N802
    def getProcessInfo(self, name: str) -> dict[str, Any]: ...  # noqa: N802
    def startProcess(self, name: str, wait: bool) -> bool: ...  # noqa: N802
    def stopProcess(self, name: str, wait: bool) -> bool: ...  # noqa: N802
    def signalProcess(self, name: str, number: str) -> bool: ...  # noqa: N802


@contextmanager
def supervisor_at(sock: Path) -> Iterator[Supervisor]:
    """Supervisord's remote calls; they raise what UNREACHABLE names."""
    transport = SupervisorTransport("delineate", "delineate", f"unix://{sock}")
    try:
        yield cast(Supervisor, xmlrpc.client.ServerProxy("http://127.0.0.1", transport=transport).supervisor)
    finally:
        transport.close()


def restart(names: Sequence[str]) -> int:
    """Restart the named processes or groups, or all of `ORDER`: 0 done, 1 one did not get ready, 130 interrupted.

    Raises ConfigError or StartupError while nothing has been touched.
    """
    environ = read_environment()
    home = home_path(environ)
    sock = Path(environ.get("DELINEATE_SUPERVISOR_SOCKET") or supervisor_socket(home))
    socket.setdefaulttimeout(ANSWER_SECONDS)  # supervisor's client knows no other way
    with supervisor_at(sock) as supervisor:
        try:
            infos = supervisor.getAllProcessInfo()
            pid = supervisor.getPID()
        except UNREACHABLE as error:
            raise StartupError(
                f"no service answers at {sock} ({error}); start it, or name its home with DELINEATE_HOME"
            ) from error
        chosen = _choose(infos, names)
        _check_configuration(pid)
        with _alone(home), _one_interrupt() as interrupted:
            return _Rolling(supervisor, home, interrupted).restart(chosen)


def _choose(infos: Iterable[dict[str, Any]], names: Sequence[str]) -> list[str]:
    """`worker` and `worker:*` mean every worker, `worker:worker_00` that one; no name means all of ORDER."""
    groups = {f"{info['group']}:{info['name']}": str(info["group"]) for info in infos if info["group"] in ORDER}
    wanted = [name.removesuffix(":*") for name in names] or list(ORDER)
    for name in wanted:
        if name not in groups and name not in groups.values():
            known = ", ".join([*ORDER, *groups])
            raise StartupError(f"{name} is no process that can be restarted here; there are {known}")
    return sorted(
        (process for process, group in groups.items() if process in wanted or group in wanted),
        key=lambda process: (ORDER.index(groups[process]), process),
    )


def _check_configuration(pid: int) -> None:
    """Load the configuration as a process that supervisord starts would. Raises ConfigError."""
    environ = environment_of(pid)
    if environ is not None:  # else the first new process will show
        load_config(environ)


@contextmanager
def _alone(home: Path) -> Iterator[None]:
    """Two restarts at once could stop the last process of a kind."""
    with (home / "run" / "restart.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StartupError("another restart is under way") from None
        yield


@contextmanager
def _one_interrupt() -> Iterator[Callable[[], bool]]:
    """Ctrl-C lets the present process get ready first: it must not stay stopped. A second one ends at once."""
    seen = False

    def on_signal(number: int, _: object) -> None:
        nonlocal seen
        if seen:
            raise KeyboardInterrupt
        seen = True
        print("\ninterrupted: finishing this process first; once more ends at once", file=sys.stderr, flush=True)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        if before[number] is not signal.SIG_IGN:  # nohup
            signal.signal(number, on_signal)
    try:
        yield lambda: seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Rolling:
    def __init__(self, supervisor: Supervisor, home: Path, interrupted: Callable[[], bool]) -> None:
        self._supervisor, self._home, self._interrupted = supervisor, home, interrupted

    def restart(self, processes: Sequence[str]) -> int:
        started = time.monotonic()
        left = list(processes)
        name = ""
        try:
            while left and not self._interrupted():
                name = left.pop(0)
                problem = self._replace(name, max(map(len, processes)))
                if problem:
                    return _say(1, f"{name} {problem}; its last words are in the service's log", left)
        except KeyboardInterrupt:
            return _say(130, f"ended at once; {name} may be stopped, restart it", left)
        except UNREACHABLE as error:
            return _say(1, f"the service went away while {name} was restarted ({error})", left)
        if left:
            return _say(130, "interrupted", left)
        print(f"{len(processes)} processes replaced in {time.monotonic() - started:.1f} s", flush=True)
        return 0

    def _replace(self, name: str, width: int) -> str:
        """Stop it, start it, and wait until it is ready; what went wrong, or nothing."""
        began = time.monotonic()
        print(f"{name:<{width}}  stopping", end="", flush=True)
        self._stop(name)
        stopped = time.monotonic()
        print(f" {stopped - began:.1f} s, starting", end="", flush=True)
        file = self._home / "run" / f"{name.partition(':')[2]}.ready"
        file.unlink(missing_ok=True)  # of one that was killed
        self._supervisor.startProcess(name, False)
        problem = self._until_ready(name, file)
        took = time.monotonic() - stopped
        print(f" {took:.1f} s, {'gave up' if problem else 'ready'}", flush=True)
        if problem:
            self._stop(name)
        return problem

    def _stop(self, name: str) -> None:
        """Returns when it has ended; supervisord sees to it that it does (stopwaitsecs)."""
        while (state := self._state(name)) not in ("STOPPED", "FATAL"):
            if state in ("RUNNING", "STARTING", "BACKOFF"):
                # It may end by itself at this moment; supervisord then starts it, and we are here again.
                with suppress(xmlrpc.client.Fault):
                    self._supervisor.stopProcess(name, False)
            time.sleep(POLL_SECONDS)

    def _until_ready(self, name: str, file: Path) -> str:
        end = time.monotonic() + START_SECONDS
        first = 0
        while time.monotonic() < end:
            info = self._supervisor.getProcessInfo(name)
            state, pid = info["statename"], info["pid"]
            first = first or pid
            if state in GONE_WRONG or pid != first:
                return "did not stay up and was stopped"
            if state == "RUNNING" and is_ready(file, pid):
                return ""
            time.sleep(POLL_SECONDS)
        return f"was not ready within {START_SECONDS} s and was stopped again"

    def _state(self, name: str) -> str:
        return str(self._supervisor.getProcessInfo(name)["statename"])


def _say(code: int, what: str, untouched: Sequence[str]) -> int:
    """One line on stderr; returns `code`."""
    rest = f"; still as before: {', '.join(untouched)}" if untouched else ""
    print(f"delineate restart: {what}{rest}", file=sys.stderr, flush=True)
    return code
