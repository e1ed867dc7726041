"""An OTLP collector: takes spans over HTTP, decodes the protobuf, and keeps them for a test to look at.

As a program, in a container of the image, it prints each as a line of JSON.

Source: https://opentelemetry.io/docs/specs/otel/protocol/ and the messages of opentelemetry-proto.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from typing import Any

from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span as ProtoSpan
from opentelemetry.proto.trace.v1.trace_pb2 import Status


@dataclass(frozen=True)
class Received:
    """One span; ids are hex, times Unix seconds, `links` the ids of spans."""

    name: str
    kind: str
    service: str
    trace_id: str
    span_id: str
    parent_id: str
    began: float
    ended: float
    attributes: dict[str, Any]
    links: list[str]
    events: list[dict[str, Any]]
    failed: bool
    description: str


class Collector:
    def __init__(self) -> None:
        self.spans: list[Received] = []
        self.bodies: list[bytes] = []
        self.port = 0
        self.hangs = False
        self.held = 0  # requests that get no answer
        self._runner: web.AppRunner | None = None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> None:
        app = web.Application(client_max_size=64 * 1024 * 1024)
        app.router.add_post("/v1/traces", self._take)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, host, port or self.port)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    async def _take(self, request: web.Request) -> web.Response:
        assert request.content_type == "application/x-protobuf"
        body = await request.read()
        self.held += self.hangs
        while self.hangs:
            await asyncio.sleep(0.05)
        self.bodies.append(body)
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            service = _values(resource.resource.attributes)["service.name"]
            for scope in resource.scope_spans:
                self.spans += [_received(span, service) for span in scope.spans]
        return web.Response(
            body=ExportTraceServiceResponse().SerializeToString(), content_type="application/x-protobuf"
        )

    def named(self, name: str) -> list[Received]:
        return [span for span in self.spans if span.name == name]

    async def until(self, condition: Callable[[Collector], bool], what: str, seconds: float = 20) -> None:
        end = time.monotonic() + seconds
        while not condition(self):
            assert time.monotonic() < end, f"{what}; there are {[span.name for span in self.spans]}"
            await asyncio.sleep(0.05)


@asynccontextmanager
async def collecting() -> AsyncIterator[Collector]:
    collector = Collector()
    await collector.start()
    try:
        yield collector
    finally:
        await collector.stop()


def _received(span: ProtoSpan, service: str) -> Received:
    return Received(
        name=span.name,
        kind=ProtoSpan.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_"),
        service=service,
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        began=span.start_time_unix_nano / 1e9,
        ended=span.end_time_unix_nano / 1e9,
        attributes=_values(span.attributes),
        links=[link.span_id.hex() for link in span.links],
        events=[{"name": event.name, **_values(event.attributes)} for event in span.events],
        failed=span.status.code == Status.STATUS_CODE_ERROR,
        description=span.status.message,
    )


def _values(attributes: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    pair: KeyValue
    for pair in attributes:
        found[pair.key] = getattr(pair.value, pair.value.WhichOneof("value") or "string_value")
    return found


async def _print_forever(port: int) -> None:
    collector = Collector()
    await collector.start("0.0.0.0", port)
    while True:
        while collector.spans:
            print(json.dumps(asdict(collector.spans.pop(0))), flush=True)
        await asyncio.sleep(0.1)


if __name__ == "__main__":
    asyncio.run(_print_forever(4318))
