"""Logs of every process: one JSON object a line on stdout, or readable text for a terminal.

The JSON shape is `level, timestamp, service, traceId, spanId, requestId,
message, context{jobId, fileId, userId, ...}`, and `error` where something was
raised. A record gets its fields from what its task works for (`working_for`) and
from `extra={"context": {...}, "request_id": ...}`.

    SIGUSR1    debug, from here on
    SIGUSR2    log.level again
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from contextvars import ContextVar
from types import TracebackType
from typing import Any

import msgspec

from delineate.config import LogConfig
from delineate.job import Job
from delineate.telemetry.tracing import present_ids

_log = logging.getLogger(__name__)
_ours = logging.getLogger("delineate")
_ENCODER = msgspec.json.Encoder(enc_hook=str)
STDOUT = 1

_work: ContextVar[tuple[str, Mapping[str, object]]] = ContextVar("work", default=("", {}))

# A net under the code, which logs none of these: texts of other libraries' errors may quote a URL or a header.
_SECRETS = re.compile(
    r"(X-Amz-(?:Signature|Credential|Security-Token)=|delineate_session=)[^&;\s\"\\]+"
    r"|(?<=://)[^/\s\"\\]+(?=@)"  # who, and their password, in a URL
    r"|(://[^\s?\"'\\]+\?)[^\s\"'\\]+"  # its query
)


def set_up_logs(config: LogConfig, service: str) -> None:
    """Send all that this process has to say to stdout, bugs and warnings too; `service` is e.g. `delineate-api`."""
    handler = _Lines()
    handler.setFormatter(JsonFormatter(service) if config.format == "json" else TextFormatter(service))
    # Libraries speak when something is wrong. What they say besides is not ours to ship: Tornado, for one, tells at
    # level info whose request it could not read.
    logging.basicConfig(level=max(logging.WARNING, _number(config.level)), handlers=[handler], force=True)
    logging.getLogger("asyncio").addFilter(_is_news)
    logging.captureWarnings(True)
    sys.excepthook = _on_crash
    threading.excepthook = lambda crash: _on_crash(crash.exc_type, crash.exc_value, crash.exc_traceback)
    sys.unraisablehook = lambda lost: _log.error(
        "an exception could not be raised: %s", lost.err_msg or lost.object, exc_info=lost.exc_value
    )
    faulthandler.enable()  # a crash of the interpreter: plain text on stderr, as nothing else can be had then
    _follow_signals(config)


def working_for(request_id: str, **context: object) -> None:
    """What the current task logs from here on, and tasks that it starts, is about this."""
    _work.set((request_id, context))


def job_fields(job: Job) -> dict[str, object]:
    """What the context of a line about `job` has: of its files the one, where it is only one."""
    fields: dict[str, object] = {"jobId": job.id, "userId": job.user}
    if job.total_files == 1:
        fields["fileId"] = job.file_ids[0]
    return fields


def _follow_signals(config: LogConfig) -> None:
    """Two signals and no toggle: a process that was started since the first one is not at another level than the rest.

    Handled at any moment, and so also in the middle of a line's logging: `_Lines` allows that.
    """

    def follow(number: int, _: object) -> None:
        level = "debug" if number == signal.SIGUSR1 else config.level
        _ours.setLevel(_number(level))
        _ours.log(_ours.level, "the log level is %s", level)

    _ours.setLevel(_number(config.level))
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, follow)


def _number(level: str) -> int:
    return logging.getLevelNamesMapping()[level.upper()]


def _on_crash(kind: type[BaseException], error: BaseException | None, traceback: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error or kind(), traceback)
    elif error is not None and kind is not SystemExit:  # a thread's way to end itself
        _log.critical("a bug ended the process or one of its threads", exc_info=(kind, error, traceback))


def _is_news(record: logging.LogRecord) -> bool:
    """Not that a look-up of uvloop failed after its connect had given up: nobody is left to await it, by design
    (its create_connection waits through asyncio.wait), and whoever gave up has said so.
    """
    lost = record.msg.startswith("Future exception was never retrieved")
    return not (lost and record.exc_info and isinstance(record.exc_info[1], socket.gaierror))


class _Lines(logging.Handler):
    """Writes each line with one system call, and without a buffer.

    A pipe takes up to 4 KB of it as a whole, and a signal's handler may log while a line is being logged.
    """

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record).encode(errors="backslashreplace") + b"\n"
            while line:
                line = line[os.write(STDOUT, line) :]
        except Exception:
            self.handleError(record)


class _Formatter(logging.Formatter):
    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service
        self._second, self._moment = -1, ""

    def _timestamp(self, record: logging.LogRecord) -> str:
        second = int(record.created)
        if second != self._second:
            self._second, self._moment = second, time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        return f"{self._moment}.{int(record.msecs):03d}Z"


class JsonFormatter(_Formatter):
    """One object a line; an exception's stack is text in `error.stack`, never lines of its own."""

    def format(self, record: logging.LogRecord) -> str:
        request_id, context = _work.get()
        trace_id, span_id = present_ids()
        entry: dict[str, Any] = {
            "level": record.levelname.lower(),
            "timestamp": self._timestamp(record),
            "service": self._service,
            "traceId": trace_id,
            "spanId": span_id,
            "requestId": getattr(record, "request_id", request_id),
            "message": record.getMessage(),
            "context": {**context, **getattr(record, "context", {})},
        }
        if record.exc_info and record.exc_info[1] is not None:
            entry["error"] = {
                "type": type(record.exc_info[1]).__name__,
                "message": str(record.exc_info[1]),
                "stack": self.formatException(record.exc_info),
            }
        return without_secrets(_encode(entry))


class TextFormatter(_Formatter):
    """`12:30:01.250 INFO    api  message  jobId=...` for a person at a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        context = {**_work.get()[1], **getattr(record, "context", {})}
        fields = "".join(f"  {key}={value}" for key, value in context.items())
        service = self._service.removeprefix("delineate-")
        line = f"{self._timestamp(record)[11:23]} {record.levelname:<7} {service:<6} {record.getMessage()}{fields}"
        if record.exc_info:
            line = f"{line}\n{self.formatException(record.exc_info)}"
        return without_secrets(line)


def _encode(entry: dict[str, Any]) -> str:
    try:
        return _ENCODER.encode(entry).decode()
    except (ValueError, TypeError, OverflowError):  # half a surrogate pair, keys of any type, numbers beyond 64 bits
        return json.dumps(entry, default=str, skipkeys=True)


def without_secrets(line: str) -> str:
    # Searching for these first costs a tenth of what the expression does.
    if "X-Amz-" in line or "delineate_session" in line or ("://" in line and ("@" in line or "?" in line)):
        return _SECRETS.sub(r"\1\2(hidden)", line)
    return line
