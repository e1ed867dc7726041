"""The worker process: claim -> run -> settle, with a heartbeat beside it, until it is told to stop.

    fetch      claims as many jobs as there are free slots; waits in Redis when there are none
    run        each job in a task of its own (attempt.py), which also settles it
    heartbeat  keeps the worker's lease and learns, at once when told to look, which jobs were taken away
    drain      on SIGTERM: no new jobs; running ones get `drain_timeout`, then they are handed back

A worker that was stopped for too long is declared dead by the others. Its next
heartbeat tells it: it drops all its jobs at once and goes on under a new id.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import signal
import socket
import time
import uuid
from contextlib import suppress
from pathlib import Path

from delineate.config import Config
from delineate.errors import LeaseLost, QueuePaused, QueueUnavailable
from delineate.job import Lease
from delineate.queue import Queue, open_queue
from delineate.queue.progress import JobEvent, JobEvents, open_job_events
from delineate.ready import ready
from delineate.storage import Storage, open_storage, wait_for_storage
from delineate.worker.attempt import Attempt, hand_back
from delineate.worker.janitor import Janitor
from delineate.worker.tasks import beside, end

log = logging.getLogger(__name__)

AUDIT_SECONDS = 30.0
HAND_BACK_SECONDS = 2.0
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.2, 2.0


async def serve(config: Config, ready_file: Path | None = None) -> None:
    """Work until SIGTERM or SIGINT, then drain; `ready_file` exists while it claims jobs.

    Raises OperatorError if the store refuses this configuration.
    """
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with (
        open_storage(config.storage, service="worker") as storage,
        open_queue(config) as queue,
        open_job_events(config) as events,
    ):
        await wait_for_storage(storage, stop)
        if not stop.is_set():
            await Worker(config, queue, storage, events).run(stop, ready_file)


class Worker:
    """One worker process; `run` is all there is to call."""

    def __init__(self, config: Config, queue: Queue, storage: Storage, events: JobEvents) -> None:
        self._config = config
        self._queue = queue
        self._storage = storage
        self._events = events
        # By lease: a job that was cancelled and retried may be here twice while its first attempt ends.
        self._running: dict[tuple[str, int], Attempt] = {}
        self._slot_freed = asyncio.Event()
        self._look_now = asyncio.Event()
        self._renamed = asyncio.Event()
        self.id = _new_worker_id()

    async def run(self, stop: asyncio.Event, ready_file: Path | None = None) -> None:
        """Work until `stop` is set, then drain. Raises StartupError if Redis may evict keys."""
        if not await self._join(stop):
            return
        janitor = Janitor(self._queue, self._storage, self._config)
        async with (
            beside(self._heartbeat_forever(janitor)) as heartbeat,
            beside(self._listen_forever()) as listening,
            beside(janitor.run()) as tidying,
            beside(janitor.abort_uploads_forever()) as aborting,
            beside(janitor.abort_orphans_forever()) as looking,
        ):
            async with beside(self._fetch_forever()) as fetching, beside(stop.wait()) as stopped:
                # None of the loops ends by itself: one that does has a bug, and the process must not go on without it.
                loops = {fetching, heartbeat, listening, tidying, aborting, looking}
                with ready(ready_file):
                    await asyncio.wait({stopped, *loops}, return_when=asyncio.FIRST_COMPLETED)
            await self._return_unclaimed()
            await self._drain()
        await self._leave()
        if not stop.is_set():
            raise RuntimeError("a loop of the worker ended; see the log")

    async def _join(self, stop: asyncio.Event) -> bool:
        wait = 0.2
        while not stop.is_set():
            try:
                await self._queue.check_server()
                await self._queue.register(self.id)
            except QueueUnavailable as error:
                log.warning("%s; trying again in %.1f s", error, wait)
                await asyncio.sleep(wait * random.uniform(0.5, 1))
                wait = min(wait * 2, 5.0)
            else:
                log.info("worker started", extra={"context": {"worker": self.id}})
                return True
        return False

    async def _fetch_forever(self) -> None:
        unsure = False
        audited = time.monotonic()
        wait = FIRST_WAIT_SECONDS
        while True:
            free = self._config.worker.concurrency - len(self._running)
            if free <= 0:
                self._slot_freed.clear()
                await self._slot_freed.wait()
                continue
            worker = self.id
            try:
                unsure = unsure or time.monotonic() - audited > AUDIT_SECONDS
                if unsure:
                    await self._adopt(free)
                    unsure, audited = False, time.monotonic()
                else:
                    await self._claim(free)
                wait = FIRST_WAIT_SECONDS
            except LeaseLost:
                # The heartbeat notices the same and gives this worker a new id. What came under the old one goes back.
                await self._retire(worker)
                await asyncio.sleep(self._config.queue.heartbeat)
            except QueuePaused:
                await asyncio.sleep(self._config.queue.claim_wait * random.uniform(0.5, 1))
            except QueueUnavailable as error:
                # A reply may have been lost, and with it a job that now lies in our list.
                unsure = True
                # Said once an outage; the heartbeat says when it is over.
                log.log(logging.WARNING if wait == FIRST_WAIT_SECONDS else logging.DEBUG, "%s", error)
                await asyncio.sleep(wait * random.uniform(0.5, 1))
                wait = min(wait * 2, LONGEST_WAIT_SECONDS)

    async def _claim(self, free: int) -> None:
        worker = self.id  # one id for all three calls: the heartbeat may change it in between
        leases = await self._queue.claim(worker, free)
        if not leases:
            moved = await self._queue.wait_for_work(worker)
            if moved is None:
                return
            leases = await self._queue.claim(worker, free, job_ids=[moved])
        self._start(leases)

    async def _adopt(self, free: int) -> None:
        """Claim the jobs in the own list that this process does not know of."""
        unknown = await self._unknown_ids()
        if unknown:
            self._start(await self._queue.claim(self.id, 0, job_ids=unknown[:free]))

    async def _unknown_ids(self) -> list[str]:
        held = await self._queue.held_ids(self.id)
        known = {job_id for job_id, _ in self._running}
        return [job_id for job_id in held if job_id not in known]

    def _start(self, leases: list[Lease]) -> None:
        for lease in leases:
            attempt = Attempt(lease, self._queue, self._storage, self._config)
            self._running[lease.job.id, lease.token] = attempt
            attempt.start(on_end=self._forget)

    def _forget(self, attempt: Attempt) -> None:
        del self._running[attempt.lease.job.id, attempt.lease.token]
        self._slot_freed.set()

    async def _heartbeat_forever(self, janitor: Janitor) -> None:
        interval = self._config.queue.heartbeat
        reachable = True
        while True:
            # Sooner while Redis is away, and with jitter: a fleet's workers must not all come back in one instant.
            wait = interval if reachable else interval / 4 * random.uniform(0.5, 1.5)
            with suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._look_now.wait()
            self._look_now.clear()
            try:
                lost = await self._queue.heartbeat(self.id, [attempt.lease for attempt in self._running.values()])
            except QueueUnavailable as error:
                if reachable:
                    log.warning("%s; jobs go on", error)
                reachable = False
                janitor.pause_reaping()
                continue
            except LeaseLost:
                await self._start_over()
                lost = set()
            if not reachable:
                log.info("Redis is back", extra={"context": {"worker": self.id}})
            reachable = True
            for lease in lost & self._running.keys():
                self._running[lease].lose()

    async def _listen_forever(self) -> None:
        """Hear at once that a job was cancelled. The heartbeat would find out too, a little later."""

        def look(_: JobEvent | None) -> None:
            self._look_now.set()

        while True:
            worker = self.id
            try:
                await self._events.subscribe_worker(worker, look)
            except QueueUnavailable as error:
                log.debug("%s", error)
                await asyncio.sleep(self._config.queue.heartbeat)
                continue
            await self._renamed.wait()
            self._renamed.clear()
            self._events.unsubscribe_worker(worker, look)

    async def _start_over(self) -> None:
        """This process was silent for so long that its jobs are with others now."""
        new = _new_worker_id()
        context = {"worker": new, "was": self.id, "dropped": len(self._running)}
        for attempt in self._running.values():
            attempt.lose()
        try:
            await self._queue.register(new)
        except QueueUnavailable as error:
            log.warning("%s", error)  # the next heartbeat is refused again and comes back here
            return
        old, self.id = self.id, new
        self._renamed.set()
        log.warning("declared dead by the others: all jobs dropped, on as a new worker", extra={"context": context})
        await self._retire(old)

    async def _retire(self, worker: str) -> None:
        """Have `worker` remembered as dead from now on, and its list emptied, whatever lands there late."""
        try:
            await self._queue.retire(worker)
        except QueueUnavailable as error:
            log.warning("%s; the others will notice", error)

    async def _return_unclaimed(self) -> None:
        """Give back at once what the interrupted wait for work may have moved here."""
        try:
            for lease in await self._queue.claim(self.id, 0, job_ids=await self._unknown_ids()):
                await hand_back(self._queue, lease)
        except (QueueUnavailable, LeaseLost) as error:
            log.warning("%s", error)

    async def _drain(self) -> None:
        tasks = [attempt.task for attempt in self._running.values()]
        if not tasks:
            return
        log.info("draining", extra={"context": {"jobs": len(tasks)}})
        _, unfinished = await asyncio.wait(tasks, timeout=self._config.worker.drain_timeout)
        # A hand-back that this interrupts is made good by retire.
        await end(unfinished, repeat_seconds=HAND_BACK_SECONDS)

    async def _leave(self) -> None:
        try:
            handed_back = await self._queue.retire(self.id)
            log.info("worker stopped", extra={"context": {"worker": self.id, "handedBack": len(handed_back)}})
        except QueueUnavailable as error:
            log.warning("%s; the others will notice", error)


def _new_worker_id() -> str:
    return f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
