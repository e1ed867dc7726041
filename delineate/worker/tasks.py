"""Tasks that have an owner: each lives as long as a block of code does."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager

log = logging.getLogger(__name__)

REPEAT_CANCEL_SECONDS = 0.5


@asynccontextmanager
async def beside(work: Coroutine[object, object, object]) -> AsyncIterator[asyncio.Task[object]]:
    """Run `work` while the block runs; it is cancelled, and its end awaited, when the block ends.

    What it raises of its own is logged: whoever must react watches the task.
    """
    task = asyncio.create_task(work)
    try:
        yield task
    finally:
        # Once is not always enough: on Python 3.11 libraries that use asyncio.wait_for can lose a cancel.
        while not task.done():
            task.cancel()
            await asyncio.wait([task], timeout=REPEAT_CANCEL_SECONDS)
        if not task.cancelled() and (error := task.exception()):
            log.error("a task of the worker ended with a bug", exc_info=error)
