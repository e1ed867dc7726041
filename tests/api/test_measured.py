"""What the API counts, and when: each thing once."""

from __future__ import annotations

import asyncio

from prometheus_client import REGISTRY

from delineate.config import Config
from tests.api.running import changed, next_event, running_api, until


def value(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


async def test_every_request_over_the_limit_is_counted(config: Config) -> None:
    limited = changed(config, "rate_limit", enabled=True, requests=2, window=60)
    async with running_api(limited) as running:
        before = value("rate_limited_requests_total")
        statuses = [(await running.fetch("GET", "/v1/exports")).status for _ in range(5)]
        assert statuses == [200, 200, 429, 429, 429]
        assert value("rate_limited_requests_total") - before == 3


async def test_a_client_that_leaves_before_its_answer_is_counted_once_as_499(config: Config) -> None:
    def gone() -> float:
        return value("http_requests_total", method="POST", path="/v1/download/start", status="499")

    async with running_api(config) as running:
        before = gone()
        asked = asyncio.create_task(running.fetch("POST", "/v1/download/start", {"file_id": 70000}))
        await until(lambda: len(running.api.services.feeds) == 1, "the request")
        asked.cancel()
        await until(lambda: gone() == before + 1, "counting it")


async def test_streams_and_their_events_are_counted_by_how_they_end(config: Config) -> None:
    def counts() -> dict[str, float]:
        reasons = ("job_ended", "client_gone", "max_duration", "drain", "job_gone")
        events = ("progress", "completed")
        return {
            **{reason: value("sse_streams_ended_total", reason=reason) for reason in reasons},
            **{event: value("sse_events_total", event=event) for event in events},
        }

    async with running_api(changed(config, "sse", max_duration=1)) as running:
        before = counts()
        job = await running.completed()
        async with running.stream(job.id) as events:
            assert [event.name async for event in events] == ["retry", "completed"]
        waiting = await running.queued()
        async with running.stream(waiting.id) as events:
            await next_event(events)
        await until(lambda: counts()["client_gone"] == before["client_gone"] + 1, "noticing that it left")
        async with running.stream(waiting.id) as events:
            assert [event.name async for event in events] == ["retry", "progress", "retry"]
        async with running.stream(waiting.id) as events:
            await next_event(events)
            running.api.services.streams.end_all()
            assert [event.name async for event in events] == ["retry"]
        difference = {name: count - before[name] for name, count in counts().items()}
        ends = {"job_ended": 1, "client_gone": 1, "max_duration": 1, "drain": 1, "job_gone": 0}
        assert difference == {**ends, "progress": 3, "completed": 1}


async def test_the_wait_is_from_the_line_to_the_first_claim_also_of_a_job_that_starts_over(config: Config) -> None:
    async with running_api(config) as running:
        name = "export_job_wait_seconds"
        count, seconds = value(f"{name}_count"), value(f"{name}_sum")
        job = await running.queued()
        await asyncio.sleep(0.3)
        await running.queue.register(running.worker)
        (lease,) = await running.queue.claim(running.worker, 1)
        assert value(f"{name}_count") == count + 1
        assert 0.3 <= value(f"{name}_sum") - seconds < 5
        # Handed back and claimed again: what it waited for then is no want of workers.
        await running.queue.release(lease)
        (lease,) = await running.queue.claim(running.worker, 1)
        assert value(f"{name}_count") == count + 1
        await running.queue.cancel(job.id)
        await asyncio.sleep(0.3)
        seconds = value(f"{name}_sum")
        await running.queue.requeue(job.id)
        await running.queue.claim(running.worker, 1)
        assert value(f"{name}_count") == count + 2
        assert value(f"{name}_sum") - seconds < 0.3


async def test_dependencies_and_the_line_are_looked_up_when_somebody_asks(config: Config) -> None:
    async with running_api(config) as running:
        await running.queued()
        await running.queue.pause()
        await asyncio.sleep(0.1)
        text = (await running.fetch("GET", "/metrics")).text
        assert '\ndependency_up{dependency="redis"} 1.0' in text
        assert '\ndependency_up{dependency="workers"} 0.0' in text
        assert "\nexport_queue_paused 1.0" in text
        assert "\nworkers_live 0.0" in text
        assert "\nexport_queue_oldest_seconds 0.0" not in text
