"""Tasks that have an owner: each lives as long as a block of code does."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Collection, Coroutine
from contextlib import asynccontextmanager
from typing import Any

log = logging.getLogger(__name__)


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


async def end(tasks: Collection[asyncio.Task[Any]], repeat_seconds: float = 0.5) -> None:
    """Cancel `tasks` and wait until all have ended.

    Once is not always enough: on Python 3.11 libraries that use asyncio.wait_for can lose a cancel.
    """
    while unfinished := [task for task in tasks if not task.done()]:
        for task in unfinished:
            task.cancel()
        await asyncio.wait(unfinished, timeout=repeat_seconds)
