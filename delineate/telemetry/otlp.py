"""Spans on their way to a collector: OTLP over HTTP, in protobuf, by a thread that nobody waits for.

Loaded only where there is a collector: it costs a process 0.1 s and some megabytes.

Source: https://opentelemetry.io/docs/specs/otlp/#otlphttp. What else the exporter can do - headers, certificates,
compression - is told to it by the variables OTEL_EXPORTER_OTLP_* of that specification.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Mapping, Sequence

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace import NonRecordingSpan, Span, SpanContext, SpanKind

from delineate import __version__
from delineate.telemetry.metrics import SPANS_LOST, SPANS_SENT

log = logging.getLogger(__name__)

MAX_WAITING_SPANS = 8192
MAX_BATCH_SPANS = 256  # encoding one span holds the interpreter for 40 us
BATCH_INTERVAL_MS = 1000
ATTEMPT_SECONDS = 5.0
# What a collector that hangs has not taken by then is lost: the end of a process must not wait for it.
LAST_BATCH_SECONDS = 1.0


class Recorder:
    """What this process has to record with; `close` hands over what is left."""

    def __init__(self, endpoint: str, service: str, environment: str) -> None:
        resource = Resource.create(
            {
                "service.name": service,
                "service.namespace": "delineate",
                "service.version": __version__,
                "service.instance.id": f"{socket.gethostname()}-{os.getpid()}",
                "deployment.environment.name": environment,
            }
        )
        self._ids = _Ids()
        # Whether to record is decided before a span is begun (tracing.py), because even "no" costs 5 us in here.
        self._provider = TracerProvider(ALWAYS_ON, resource, id_generator=self._ids, shutdown_on_exit=False)
        self._batches = _Batches(_Sender(endpoint))
        self._provider.add_span_processor(self._batches)
        self._tracer = self._provider.get_tracer("delineate", __version__)

    def start(
        self,
        name: str,
        kind: SpanKind,
        attributes: Mapping[str, str | int | float | bool] | None,
        parent: SpanContext | None,
        links: Sequence[SpanContext],
        started: float | None,
        span_id: int | None,
    ) -> Span:
        self._ids.next_span_id = span_id
        return self._tracer.start_span(
            name,
            None if parent is None else trace.set_span_in_context(NonRecordingSpan(parent)),
            kind,
            attributes,
            [trace.Link(link) for link in links],
            None if started is None else round(started * 1_000_000_000),
        )

    def close(self) -> None:
        # The provider waits for as long as its exporter does; a daemon thread may be left behind.
        last = threading.Thread(target=self._provider.shutdown, name="last spans", daemon=True)
        last.start()
        last.join(LAST_BATCH_SECONDS)
        SPANS_LOST.inc(self._batches.waiting)


class _Batches(BatchSpanProcessor):
    """Where spans come faster than they go, the library drops the oldest, and counts none: this the newest, counted."""

    def __init__(self, sender: _Sender) -> None:
        super().__init__(
            sender,
            max_queue_size=2 * MAX_WAITING_SPANS,
            schedule_delay_millis=BATCH_INTERVAL_MS,
            max_export_batch_size=MAX_BATCH_SPANS,
        )
        self._sender = sender
        self._taken = 0

    @property
    def waiting(self) -> int:
        return self._taken - self._sender.done

    def on_end(self, span: ReadableSpan) -> None:
        if self.waiting >= MAX_WAITING_SPANS:
            SPANS_LOST.inc()
            return
        self._taken += 1
        super().on_end(span)


class _Ids(RandomIdGenerator):
    next_span_id: int | None = None

    def generate_span_id(self) -> int:
        chosen, self.next_span_id = self.next_span_id, None
        return chosen or super().generate_span_id()


class _Sender(SpanExporter):
    """The OTLP exporter, which speaks of an outage once and not with every batch. Called by the processor's thread."""

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint
        self._exporter = OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces", timeout=ATTEMPT_SECONDS)
        self._failing = False
        self.done = 0  # spans, sent or lost
        # Its logger says why, and that with every try: kept for our line.
        self._reason = _FirstLine()
        logger = logging.getLogger("opentelemetry.exporter")
        logger.addHandler(self._reason)
        logger.propagate = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self._reason.text = ""
        result = SpanExportResult.FAILURE
        try:
            result = self._exporter.export(spans)
        finally:
            self.done += len(spans)
            (SPANS_SENT if result is SpanExportResult.SUCCESS else SPANS_LOST).inc(len(spans))
        failed = result is not SpanExportResult.SUCCESS
        if failed and not self._failing:
            context = {"endpoint": self._endpoint, "cause": self._reason.text}
            log.warning("traces cannot be delivered, and are dropped until they can", extra={"context": context})
        elif self._failing and not failed:
            log.info("traces are delivered again", extra={"context": {"endpoint": self._endpoint}})
        self._failing = failed
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()  # type: ignore[no-untyped-call]


class _FirstLine(logging.Handler):
    """The first of what was said about one batch: the cause; the last is that it is given up."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text = self.text or record.getMessage()[:300]
