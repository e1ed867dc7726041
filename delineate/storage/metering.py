"""Counts, times and traces every request to the store, on both ways to it, under the name of its S3 operation."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from opentelemetry.trace import Span

from delineate.storage.faults import refusal_of
from delineate.telemetry.metrics import count_s3
from delineate.telemetry.spans import S3Target, answered_s3, end_s3, start_s3

if TYPE_CHECKING:
    from types_aiobotocore_s3.client import S3Client


@contextmanager
def metered(operation: str, target: Callable[[], S3Target]) -> Iterator[Span]:
    """Count what happens in the block as one request, with its body; `target` is asked if the request is traced."""
    span = start_s3(operation, target)
    started = time.perf_counter()
    try:
        yield span
    except BaseException as error:
        count_s3(operation, "error", time.perf_counter() - started)
        refusal = refusal_of(error) if isinstance(error, Exception) else None
        end_s3(span, error, refusal.status if refusal else 0)
        raise
    count_s3(operation, "ok", time.perf_counter() - started)
    end_s3(span)


def meter(client: S3Client) -> None:
    """Have every request of a botocore client counted.

    By its one method for all operations, where other instrumentations also are: botocore's events
    say nothing of a request that is cancelled. Each call is one request, because the client does not retry.
    """
    call: Callable[..., Any] = client._make_api_call  # type: ignore[attr-defined]

    async def metered_call(operation: str, parameters: dict[str, Any]) -> Any:
        def target() -> S3Target:
            return S3Target(parameters.get("Bucket", ""), parameters.get("Key", ""))

        with metered(operation, target) as span:
            answer = await call(operation, parameters)
            if span.is_recording():
                answered_s3(span, answer["ResponseMetadata"]["HTTPStatusCode"])
            return answer

    client._make_api_call = metered_call  # type: ignore[attr-defined]
