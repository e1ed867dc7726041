"""Tasks that have an owner: each lives as long as a block of code does."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from delineate.errors import QueueUnavailable

log = logging.getLogger(__name__)

FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.2, 5.0


@asynccontextmanager
async def beside(work: Coroutine[object, object, object]) -> AsyncIterator[asyncio.Task[object]]:
    """Run `work` while the block runs; it is cancelled, and its end awaited, when the block ends.

    What it raises of its own is logged: whoever must react watches the task.
    """
    task = asyncio.create_task(work)
    try:
        yield task
    finally:
        await end({task})
        if not task.cancelled() and (error := task.exception()):
            log.error("a task of the worker ended with a bug", exc_info=error)


async def until_recorded(call: Callable[[], Awaitable[None]], on_wait: Callable[[QueueUnavailable], None]) -> None:
    """Make `call` until Redis has taken it, however long it is away; `on_wait` hears of the first failure."""
    wait = FIRST_WAIT_SECONDS
    while True:
        try:
            return await call()
        except QueueUnavailable as error:
            if wait == FIRST_WAIT_SECONDS:
                on_wait(error)
            await asyncio.sleep(wait * random.uniform(0.5, 1))
            wait = min(wait * 2, LONGEST_WAIT_SECONDS)


async def end(tasks: Collection[asyncio.Task[Any]], repeat_seconds: float = 0.5) -> None:
    """Cancel `tasks` and wait until all have ended.

    Once is not always enough: on Python 3.11 libraries that use asyncio.wait_for can lose a cancel.
    """
    while unfinished := [task for task in tasks if not task.done()]:
        for task in unfinished:
            task.cancel()
        await asyncio.wait(unfinished, timeout=repeat_seconds)
