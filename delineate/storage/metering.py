"""Counts, times and traces every request to the store, on both ways to it, under the name of its S3 operation."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from opentelemetry.trace import Span

from delineate.telemetry.metrics import count_s3
from delineate.telemetry.spans import answered_s3, end_s3, start_s3

if TYPE_CHECKING:
    from types_aiobotocore_s3.client import S3Client

_BEGUN = "delineate_begun"


@contextmanager
def metered(operation: str, url: str) -> Iterator[Span]:
    """Count what happens in the block as one request, with its body."""
    span = start_s3(operation, url)
    started = time.perf_counter()
    failure: BaseException | None = None
    try:
        yield span
    except BaseException as error:
        failure = error
        raise
    finally:
        count_s3(operation, "error" if failure else "ok", time.perf_counter() - started)
        end_s3(span, failure)


def meter(client: S3Client) -> None:
    """Have every request of a botocore client counted.

    Source: https://docs.aws.amazon.com/boto3/latest/guide/events.html
    """

    def begin(context: dict[str, Any], event_name: str, params: dict[str, Any], **_: object) -> None:
        span = start_s3(_operation(event_name), params["url"])
        context[_BEGUN] = (time.perf_counter(), span)

    def answered(context: dict[str, Any], event_name: str, http_response: Any, **_: object) -> None:
        if _BEGUN in context:  # address.py lets requests be made that are never sent
            started, span = context[_BEGUN]
            status = http_response.status_code
            count_s3(_operation(event_name), "ok" if status < 300 else "error", time.perf_counter() - started)
            answered_s3(span, status)
            end_s3(span, None)

    def broke(context: dict[str, Any], event_name: str, exception: BaseException, **_: object) -> None:
        if _BEGUN in context:
            started, span = context[_BEGUN]
            count_s3(_operation(event_name), "error", time.perf_counter() - started)
            end_s3(span, exception)

    events = client.meta.events
    events.register("before-call.s3", begin)
    events.register("after-call.s3", answered)
    events.register("after-call-error.s3", broke)


def _operation(event_name: str) -> str:
    return event_name.rpartition(".")[2]
