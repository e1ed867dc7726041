"""One JSON object a line, in one shape, whatever is logged."""

from __future__ import annotations

import json
import logging
from typing import Any

from delineate.telemetry.logs import JsonFormatter, TextFormatter


def record(message: str, *args: object, exception: BaseException | None = None, **extra: Any) -> logging.LogRecord:
    info = (type(exception), exception, exception.__traceback__) if exception else None
    made = logging.LogRecord("delineate", logging.WARNING, __file__, 1, message, args, info)
    made.__dict__.update(extra)
    return made


def test_a_record_has_the_shape_that_the_collector_reads() -> None:
    line = JsonFormatter("delineate-worker").format(
        record("job %s", "claimed", request_id="r1", context={"jobId": "j1", "fileId": 70000})
    )
    entry = json.loads(line)
    assert entry.pop("timestamp").endswith("Z")
    assert entry == {
        "level": "warning",
        "service": "delineate-worker",
        "traceId": "",
        "spanId": "",
        "requestId": "r1",
        "message": "job claimed",
        "context": {"jobId": "j1", "fileId": 70000},
    }


def test_an_exception_and_line_breaks_stay_on_one_line() -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError as error:
        line = JsonFormatter("delineate-api").format(record("bad\nthing", exception=error, context={"what": object()}))
    assert "\n" not in line
    entry = json.loads(line)
    assert (entry["error"]["type"], entry["error"]["message"]) == ("ValueError", "two\nlines")
    assert "Traceback" in entry["error"]["stack"]


def test_text_for_a_terminal_shows_time_level_and_fields() -> None:
    line = TextFormatter("delineate-worker").format(record("job claimed", context={"jobId": "j1"}))
    assert "WARNING" in line
    assert "worker" in line
    assert line.endswith("job claimed  jobId=j1")
