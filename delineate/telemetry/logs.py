"""Logs of every process: one JSON object a line on stdout, or readable text for a terminal.

The JSON shape is `level, timestamp, service, traceId, spanId, requestId,
message, context{jobId, fileId, userId, ...}`. Fields reach a record through
`extra={"context": {...}, "request_id": ...}`.
"""

from __future__ import annotations

import datetime
import logging
import sys
from typing import Any

import msgspec

from delineate.config import LogConfig
from delineate.telemetry.tracing import present_ids

_ENCODER = msgspec.json.Encoder(enc_hook=str)


def set_up_logs(config: LogConfig, service: str) -> None:
    """Send every log record of this process to stdout; `service` is e.g. `delineate-api`."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(JsonFormatter(service) if config.format == "json" else TextFormatter(service))
    logging.basicConfig(level=config.level.upper(), handlers=[handler], force=True)
    # Libraries speak when something is wrong; their debug chatter is not ours to ship.
    for name in ("asyncio", "botocore", "aiobotocore", "tornado.access", "aiohttp", "urllib3"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _timestamp(record: logging.LogRecord) -> str:
    moment = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


class JsonFormatter(logging.Formatter):
    """One object a line; an exception's stack is text in `error.stack`, never lines of its own."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        trace_id, span_id = present_ids()
        entry: dict[str, Any] = {
            "level": record.levelname.lower(),
            "timestamp": _timestamp(record),
            "service": self._service,
            "traceId": trace_id,
            "spanId": span_id,
            "requestId": getattr(record, "request_id", ""),
            "message": record.getMessage(),
            "context": getattr(record, "context", {}),
        }
        if record.exc_info and record.exc_info[1] is not None:
            entry["error"] = {
                "type": type(record.exc_info[1]).__name__,
                "message": str(record.exc_info[1]),
                "stack": self.formatException(record.exc_info),
            }
        return _ENCODER.encode(entry).decode()


class TextFormatter(logging.Formatter):
    """`12:30:01.250 INFO    api  message  jobId=...` for a person at a terminal."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service.removeprefix("delineate-")

    def format(self, record: logging.LogRecord) -> str:
        context = getattr(record, "context", {})
        fields = "".join(f"  {key}={value}" for key, value in context.items())
        line = f"{_timestamp(record)[11:23]} {record.levelname:<7} {self._service:<6} {record.getMessage()}{fields}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line
