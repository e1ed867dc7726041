"""The API's listening socket: supervisord opens it once, and every API process gets it as its stdin.

A connection waits in the queue of the socket that it came to, and is reset
when the last process closes that socket. Were it each process's own
(SO_REUSEPORT), a process that ends would take its waiting clients along. This
one is the same for all and stays open as long as supervisord runs: while
processes are restarted or crash, clients wait for the next one to accept.

    [fcgi-program:api]       opens the socket and hands it over as file descriptor 0, as FastCGI does;
                             what comes through it is HTTP all the same
    hold                     keeps it open when no API process runs; the [rpcinterface:] of supervisord.conf
    handed_over              the socket in an API process; None if it was started without supervisord

Source: http://supervisord.org/configuration.html#fcgi-program-x-section-settings
"""

from __future__ import annotations

import os
import socket
import stat
from typing import Any

STDIN = 0


class Held:
    """The namespace of remote calls that an [rpcinterface:] must be. It has none."""

    def __init__(self, sock: object) -> None:
        self._socket = sock

    def _release(self, _: object) -> None:
        """Let the socket close with the last API process, so that clients are refused instead of left waiting."""
        self._socket = None


def hold(supervisord: Any) -> Held:
    """Count as one more user of the socket, from before the first process starts until supervisord stops."""
    from supervisor import events

    held = Held(supervisord.process_groups["api"].socket_manager.get_socket())
    events.subscribe(events.SupervisorStoppingEvent, held._release)
    return held


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
