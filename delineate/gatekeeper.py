"""Supervisord's event listener that ends everything when a program is beyond help: `python -m delineate.gatekeeper`.

A program that will not stay up becomes FATAL, and supervisord would keep the
rest running without it: a container that looks alive and serves nobody. The
gatekeeper writes the program's name to DELINEATE_HOME/run/fatal and sends
SIGTERM to supervisord, which stops the rest in order. Supervisord exits with 0
all the same; whoever started it finds the file and exits with an error.

Source: http://supervisord.org/events.html
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path
from typing import TextIO


def main() -> int:
    return watch(sys.stdin, sys.stdout, Path(sys.argv[1]), os.getppid())


def watch(events: TextIO, answers: TextIO, marker: Path, supervisord: int) -> int:
    """Answer supervisord's events until it closes the pipe; on the first FATAL, end it."""
    while True:
        _say(answers, "READY\n")
        header = events.readline()
        if not header:
            return 0
        headers = _fields(header)
        body = _fields(events.read(int(headers["len"])))
        if headers["eventname"] == "PROCESS_STATE_FATAL":
            group, program = body["groupname"], body["processname"]
            program = program if program == group else f"{group}:{program}"
            sys.stderr.write(f"gatekeeper: {program} does not stay up, stopping everything\n")
            sys.stderr.flush()
            with contextlib.suppress(FileExistsError), marker.open("x") as file:  # the first is the cause of the rest
                file.write(program)
            os.kill(supervisord, signal.SIGTERM)
        _say(answers, "RESULT 2\nOK")


def _fields(line: str) -> dict[str, str]:
    return dict(token.split(":", 1) for token in line.split())


def _say(answers: TextIO, words: str) -> None:
    answers.write(words)
    answers.flush()


if __name__ == "__main__":
    sys.exit(main())
