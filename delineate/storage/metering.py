"""Counts and times every request to the store, on both ways to it, under the name of its S3 operation."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from delineate.telemetry.metrics import count_s3

if TYPE_CHECKING:
    from types_aiobotocore_s3.client import S3Client

_STARTED = "delineate_started"


@contextmanager
def metered(operation: str) -> Iterator[None]:
    """Count what happens in the block as one request, with its body."""
    started = time.perf_counter()
    status = "error"
    try:
        yield
        status = "ok"
    finally:
        count_s3(operation, status, time.perf_counter() - started)


def meter(client: S3Client) -> None:
    """Have every request of a botocore client counted.

    Source: https://docs.aws.amazon.com/boto3/latest/guide/events.html
    """

    def begin(context: dict[str, Any], **_: object) -> None:
        context[_STARTED] = time.perf_counter()

    def answered(context: dict[str, Any], event_name: str, http_response: Any, **_: object) -> None:
        if _STARTED in context:  # address.py lets requests be made that are never sent
            status = "ok" if http_response.status_code < 300 else "error"
            count_s3(event_name.rpartition(".")[2], status, time.perf_counter() - context[_STARTED])

    def broke(context: dict[str, Any], event_name: str, **_: object) -> None:
        if _STARTED in context:
            count_s3(event_name.rpartition(".")[2], "error", time.perf_counter() - context[_STARTED])

    events = client.meta.events
    events.register("before-call.s3", begin)
    events.register("after-call.s3", answered)
    events.register("after-call-error.s3", broke)
