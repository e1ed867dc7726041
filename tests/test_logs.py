"""One JSON object a line, in one shape, whatever is logged or goes wrong; and no secret, should one come along."""

from __future__ import annotations

import contextvars
import json
import logging
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from delineate.telemetry.logs import JsonFormatter, TextFormatter, working_for

ROOT = Path(__file__).resolve().parent.parent


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


def test_what_a_task_works_for_is_in_its_lines() -> None:
    def work() -> str:
        working_for("r1", jobId="j1", attempt=1)
        return JsonFormatter("delineate-worker").format(record("part stored", context={"part": 3, "attempt": 2}))

    entry = json.loads(contextvars.copy_context().run(work))
    assert (entry["requestId"], entry["context"]) == ("r1", {"jobId": "j1", "attempt": 2, "part": 3})
    after = json.loads(JsonFormatter("delineate-worker").format(record("idle")))
    assert (after["requestId"], after["context"]) == ("", {})


@pytest.mark.parametrize("odd", ["half a pair \ud800", 1 << 80, {1: "one", None: "none"}, float("nan"), b"\xff", {3}])
def test_what_json_cannot_have_stays_one_object(odd: object) -> None:
    line = JsonFormatter("delineate-api").format(record("odd", context={"what": odd}))
    assert json.loads(line)["message"] == "odd"
    assert line.encode()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("redis://:pass@word@h:6379/0", "redis://(hidden)@h:6379/0"),
        ("http://user:word@h/key", "http://(hidden)@h/key"),
        (
            "k?X-Amz-Algorithm=A&X-Amz-Credential=AK%2F2026&X-Amz-Signature=0a1b&x=1",
            "k?X-Amz-Algorithm=A&X-Amz-Credential=(hidden)&X-Amz-Signature=(hidden)&x=1",
        ),
        ("Cookie: a=b; delineate_session=abc-_1; c=d", "Cookie: a=b; delineate_session=(hidden); c=d"),
        ("see http://h:1/a@b and [::1]:3 of x@y", "see http://h:1/a@b and [::1]:3 of x@y"),
    ],
)
def test_secrets_in_the_words_of_others_are_hidden(text: str, shown: str) -> None:
    json_line = JsonFormatter("delineate-api").format(record("%s", text, exception=OSError(text)))
    entry = json.loads(json_line)
    assert (entry["message"], entry["error"]["message"]) == (shown, shown)
    assert shown in entry["error"]["stack"]
    assert TextFormatter("delineate-api").format(record(text)).endswith(shown)


def run(code: str) -> tuple[int, list[dict[str, Any]], str]:
    """A process with `code` at its end: its exit code, its lines and what else it said."""
    done = subprocess.run([sys.executable, "-c", PROLOGUE + code], cwd=ROOT, capture_output=True, text=True, timeout=20)
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()], done.stderr


PROLOGUE = """\
import asyncio, gc, socket, threading, uvloop, warnings
from delineate.config import LogConfig
from delineate.telemetry.logs import set_up_logs

set_up_logs(LogConfig(level="info", format="json"), "delineate-worker")


async def bug():
    raise ValueError("two\\nlines")


class Broken:
    def __del__(self):
        raise ValueError("two\\nlines")


async def let_a_task_fail():
    asyncio.create_task(bug())
    await asyncio.sleep(0.01)
    gc.collect()


async def give_up():
    try:
        async with asyncio.timeout(0):
            await asyncio.get_running_loop().create_connection(asyncio.Protocol, "nobody.invalid", 80)
    except TimeoutError:
        pass
    # Waits for the same answer, which the first look-up has had by then.
    try:
        await asyncio.get_running_loop().getaddrinfo("nobody.invalid", 80)
    except socket.gaierror:
        pass
    await asyncio.sleep(0.1)
    gc.collect()


"""


@pytest.mark.parametrize(
    ("code", "ends_with", "level"),
    [
        ("asyncio.run(bug())", 1, "critical"),
        ("uvloop.run(let_a_task_fail())", 0, "error"),
        ("asyncio.run(let_a_task_fail())", 0, "error"),
        ("threading.Thread(target=lambda: uvloop.run(bug())).start()", 0, "critical"),
        ("Broken()", 0, "error"),
    ],
)
def test_what_nobody_caught_is_one_object(code: str, ends_with: int, level: str) -> None:
    code_of_exit, (line,), errors = run(code)
    assert (code_of_exit, errors) == (ends_with, "")
    assert (line["level"], line["service"]) == (level, "delineate-worker")
    assert (line["error"]["type"], line["error"]["message"]) == ("ValueError", "two\nlines")
    assert "Traceback" in line["error"]["stack"]


def test_a_warning_is_one_object() -> None:
    _, (line,), errors = run("warnings.warn('careful')")
    assert (line["level"], errors) == ("warning", "")
    assert "UserWarning: careful" in line["message"]


def test_a_lookup_that_nobody_waits_for_any_more_is_no_news() -> None:
    assert run("uvloop.run(give_up())") == (0, [], "")


def test_libraries_speak_when_something_is_wrong() -> None:
    """Tornado says at level info whose request it could not read."""
    code = "import logging\nfor say in (logging.getLogger('tornado.general').info, logging.warning): say('127.0.0.1')"
    _, (line,), _ = run(code)
    assert line["level"] == "warning"


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_signals_change_the_level_at_any_moment(loop: str) -> None:
    """Also while lines are being written: none is torn, lost or written twice."""
    body = """
import logging, sys
log = logging.getLogger("delineate.test")

async def talk():
    log.info("started")
    for number in range(30000):
        log.info("%d", number)
        if number % 1000 == 0:
            await asyncio.sleep(0)
    await asyncio.sleep(60)

LOOP.run(talk())
"""
    process = subprocess.Popen(
        [sys.executable, "-c", PROLOGUE + body.replace("LOOP", loop)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    lines = [json.loads(process.stdout.readline())]
    levels: list[str] = []
    while len(lines) < 30_000 or levels[-1] != "the log level is info":
        if len(lines) % 100 == 1:
            process.send_signal(signal.SIGUSR1 if len(lines) % 200 == 1 else signal.SIGUSR2)
        lines.append(json.loads(process.stdout.readline()))
        if "level is" in lines[-1]["message"]:
            levels.append(lines[-1]["message"])
            assert lines[-1]["level"] == lines[-1]["message"].rpartition(" ")[2]
        if len(lines) >= 30_000:
            process.send_signal(signal.SIGUSR2)
    process.kill()
    _, errors = process.communicate()
    assert errors == ""
    numbers = [line["message"] for line in lines if line["message"].isdigit()]
    assert numbers == [str(number) for number in range(len(numbers))]
    assert {"the log level is debug", "the log level is info"} == set(levels)
