"""What decides about a trace: the form of its context, who asked for it, and how many there were."""

from __future__ import annotations

import time

import pytest

from delineate.config import TracesConfig, load_config
from delineate.telemetry import tracing
from delineate.telemetry.tracing import Sampler, parse_traceparent, present_ids, traceparent, unrecorded

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def settings(ratio: float = 1.0, per_minute: int = 1000) -> TracesConfig:
    return TracesConfig(endpoint="", ratio=ratio, request_ratio=0.0, per_minute=per_minute)


@pytest.mark.parametrize(
    ("text", "sampled"),
    [
        (f"00-{TRACE}-{SPAN}-01", True),
        (f"00-{TRACE}-{SPAN}-00", False),
        (f"00-{TRACE}-{SPAN}-03", True),
        (f"00-{TRACE}-{SPAN}-fe", False),
        (f"42-{TRACE}-{SPAN}-01", True),
        (f"42-{TRACE}-{SPAN}-01-of-a-version-to-come", True),
    ],
)
def test_a_context_is_read(text: str, sampled: bool) -> None:
    found = parse_traceparent(text)
    assert found is not None
    assert (f"{found.trace_id:032x}", f"{found.span_id:016x}") == (TRACE, SPAN)
    assert found.trace_flags.sampled is sampled
    assert found.is_remote


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-01-more",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE}-{SPAN}-1",
        f"00-{TRACE}-{SPAN}-01\n",
        f"00-{TRACE}{SPAN}-01",
        f" 00-{TRACE}-{SPAN}-01",
    ],
)
def test_what_is_no_context_is_ignored(text: str) -> None:
    assert parse_traceparent(text) is None


def test_a_context_goes_on_as_it_came() -> None:
    remote = parse_traceparent(f"00-{TRACE}-{SPAN}-01")
    assert remote is not None
    assert (traceparent(), present_ids()) == ("", ("", ""))
    with tracing.current(unrecorded(remote, sampled=True)):
        assert traceparent() == f"00-{TRACE}-{SPAN}-01"
        assert present_ids() == (TRACE, SPAN)
        with tracing.current(unrecorded(remote, sampled=False)):
            assert traceparent() == f"00-{TRACE}-{SPAN}-00"
        assert traceparent() == f"00-{TRACE}-{SPAN}-01"
    assert traceparent() == ""


def test_the_share_is_of_those_who_did_not_decide() -> None:
    yes, no = parse_traceparent(f"00-{TRACE}-{SPAN}-01"), parse_traceparent(f"00-{TRACE}-{SPAN}-00")
    never, always = Sampler(settings(ratio=0)), Sampler(settings(ratio=1))
    assert not any(never.wants(None, makes_job=True) for _ in range(100))
    assert all(always.wants(None, makes_job=True) for _ in range(100))
    assert never.wants(yes, makes_job=True)
    assert not always.wants(no, makes_job=True)
    some = Sampler(settings(ratio=0.5))
    assert 20 < sum(some.wants(None, makes_job=True) for _ in range(100)) < 80


def test_jobs_and_other_requests_have_an_allowance_each(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    yes = parse_traceparent(f"00-{TRACE}-{SPAN}-01")
    sampler = Sampler(settings(per_minute=6))
    assert sum(sampler.wants(yes, makes_job=False) for _ in range(50)) == 6
    assert sum(sampler.wants(None, makes_job=True) for _ in range(50)) == 6
    now += 20
    assert sum(sampler.wants(None, makes_job=True) for _ in range(50)) == 2
    now += 3600
    assert sum(sampler.wants(None, makes_job=True) for _ in range(50)) == 6


def test_the_standard_variable_names_the_collector() -> None:
    standard = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"}
    assert load_config(standard).telemetry.traces.endpoint == "http://collector:4318"
    own = {**standard, "DELINEATE__TELEMETRY__TRACES__ENDPOINT": "http://other:4318"}
    assert load_config(own).telemetry.traces.endpoint == "http://other:4318"
    assert load_config({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}).telemetry.traces.endpoint == ""
