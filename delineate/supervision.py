"""What runs inside supervisord itself, and what it hands to the API processes: their listening socket.

A connection waits in the queue of the socket that it came to, and is reset
when the last process closes that socket. Were it each process's own
(SO_REUSEPORT), a process that ends would take its waiting clients along. This
one is the same for all and stays open as long as supervisord runs: while
processes are restarted or crash, clients wait for the next one to accept.

    [fcgi-program:api]       opens the socket and hands it over as file descriptor 0, as FastCGI does;
                             what comes through it is HTTP all the same
    attend                   the [rpcinterface:] of supervisord.conf. It keeps the socket open when no API process
                             runs, stops all processes at once, and ends everything when a program is beyond help
    handed_over              the socket in an API process; None if it was started without supervisord

Source: http://supervisord.org/configuration.html#fcgi-program-x-section-settings
"""

from __future__ import annotations

import logging
import os
import socket
import stat
import time
from typing import Any

_log = logging.getLogger(__name__)

STDIN = 0
# Nginx has read by then what it was about to pass on.
NGINX_SECONDS = 0.5


class Attendant:
    """The namespace of remote calls that an [rpcinterface:] must be. It has none."""

    def __init__(self, supervisord: Any) -> None:
        self._supervisord = supervisord
        self._socket: object = supervisord.process_groups["api"].socket_manager.get_socket()

    def _stop(self, _: object) -> None:
        """Supervisord stops one group after the other, and so would take the sum of their times.

        These do not need each other to end: nginx takes no new connections and passes on what
        it has, workers finish or hand back, and the API answers what it has. Redis and the S3 store of
        `delineate up` do have to wait, and stay with supervisord's own order.
        """
        groups = self._supervisord.process_groups
        # Without this one, clients would be left waiting instead of being refused once the API has ended.
        self._socket = None
        groups["worker"].stop_all()
        if "nginx" in groups:
            groups["nginx"].stop_all()
            time.sleep(NGINX_SECONDS)
        groups["api"].stop_all()

    def _give_up(self, event: Any) -> None:
        """A program that will not stay up becomes FATAL, and supervisord would keep the rest running without it:
        a container that looks alive and serves nobody. So it stops the rest in order, and ends with 1.
        """
        from supervisor.states import SupervisorStates

        options = self._supervisord.options
        if options.mood < SupervisorStates.RUNNING:
            return  # it stops already; the first is the cause of the rest
        options.gave_up, options.mood = True, SupervisorStates.SHUTDOWN
        program = event.process.config.name
        _log.critical("%s did not stay up; everything stops", program, extra={"context": {"program": program}})


def attend(supervisord: Any) -> Attendant:
    """Called before the first process starts."""
    from supervisor import events

    attendant = Attendant(supervisord)
    events.subscribe(events.SupervisorStoppingEvent, attendant._stop)
    events.subscribe(events.ProcessStateFatalEvent, attendant._give_up)
    return attendant


def handed_over() -> socket.socket | None:
    """The listening TCP socket that is this process's stdin, if it is one; stdin is then /dev/null."""
    try:
        if not stat.S_ISSOCK(os.fstat(STDIN).st_mode):
            return None
        sock = socket.socket(fileno=os.dup(STDIN))
    except OSError:  # closed, or a socket of a kind that Python does not know
        return None
    internet = sock.family in (socket.AF_INET, socket.AF_INET6)
    if not (internet and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)):
        sock.close()
        return None
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, STDIN)
    os.close(null)
    sock.setblocking(False)
    return sock
