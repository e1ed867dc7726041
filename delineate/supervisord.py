"""`python -m delineate.supervisord`: supervisord, whose log has the same shape as every other process's.

It takes supervisord's own arguments. Exit codes: 0 stopped, 1 a program did not
stay up (supervision.py) or supervisord has a bug, 2 it cannot start.
"""

from __future__ import annotations

import logging
import re
import signal
import sys
from typing import NoReturn

from supervisor import loggers, supervisord
from supervisor.options import ServerOptions
from supervisor.states import SupervisorStates

from delineate.config import load_config
from delineate.telemetry.logs import set_up_logs

_log = logging.getLogger("delineate.supervisord")  # this module's name is __main__

# Where supervisord's own level says less than the event does, or more: what stopped was told to, whatever it made of
# that, every stop is asked for by a signal, and orphans are the first process's to reap.
_LEVELS = (
    ("spawnerr:", logging.ERROR),
    ("gave up:", logging.ERROR),
    ("stopped:", logging.INFO),
    ("received SIGTERM", logging.INFO),
    ("reaped unknown pid", logging.DEBUG),
)
_FACTS = re.compile(
    r"(?:spawned|success|exited|stopped|gave up): '?(?P<program>[\w-]+)'?"
    r"(?:.* with pid (?P<pid>\d+))?(?:.*exit status (?P<exitStatus>\d+))?(?:.*terminated by (?P<signal>SIG\w+))?"
)


def main() -> int:
    config = load_config()
    set_up_logs(config.log, "delineate-supervisord")
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # one level for good: supervisord has a use of its own for SIGUSR2
    if config.log.format == "text":
        _log.setLevel(logging.WARNING)  # at a terminal, that all is as usual needs no words
    first = True
    while True:  # as supervisor.supervisord.main does: `supervisorctl reload` starts anew
        options = _Options()
        options.realize(doc=supervisord.__doc__)
        options.first, options.test = first, False
        supervisord.go(options)
        options.close_httpservers()
        options.close_logger()
        first = False
        if options.mood < SupervisorStates.RESTARTING:
            return 1 if options.gave_up else 0


class _Options(ServerOptions):  # type: ignore[misc]  # the package has no types
    gave_up = False

    def make_logger(self) -> None:
        self.logger = loggers.getLogger(self.loglevel)
        self.logger.addHandler(_Bridge())
        for message in self.parse_criticals:
            self.logger.critical(message)
        for message in self.parse_warnings:
            self.logger.warn(message)
        for message in self.parse_infos:
            self.logger.info(message)

    def usage(self, msg: object) -> NoReturn:
        _log.critical("supervisord cannot start: %s", msg)
        sys.exit(2)


class _Bridge(loggers.StreamHandler):  # type: ignore[misc]
    """Hands supervisord's records on; the stream is for its base class, and nothing is written there."""

    def __init__(self) -> None:
        super().__init__(sys.stdout)
        self._pids: dict[str, str] = {}

    def emit(self, record: loggers.LogRecord) -> None:
        message = record.asdict()["message"].rstrip()
        own = max(record.level, logging.DEBUG)
        level = next((level for start, level in _LEVELS if message.startswith(start)), own)
        _log.log(level, "%s", message, extra={"context": self._facts(message)})

    def _facts(self, message: str) -> dict[str, int | str]:
        """What a message about a program says; of its pid supervisord speaks only when it starts."""
        found = _FACTS.match(message)
        if found is None:
            return {}
        facts = {name: value for name, value in found.groupdict().items() if value}
        program = facts["program"]
        facts["pid"] = self._pids[program] = facts.get("pid") or self._pids.get(program, "")
        return {name: int(value) if value.isdigit() else value for name, value in facts.items() if value}


if __name__ == "__main__":
    sys.exit(main())
