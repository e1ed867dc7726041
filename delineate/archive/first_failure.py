"""Two corrections to asyncio.TaskGroup for work that either succeeds whole or fails with one reason."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, ParamSpec

from delineate.errors import InternalError

P = ParamSpec("P")


async def raise_first_failure(work: Callable[[], Awaitable[None]]) -> None:
    """Do `work`, a function around one TaskGroup; raise what failed first, as it was raised, without the group.

    Callers choose what to do by the error's class, and the failures that follow the
    first are only its echo. A cancel from outside wins over failures it caused.
    """
    cancels = _cancels_of_this_task()
    # In a task of its own: before Python 3.13 a TaskGroup cancels its task when it fails while it waits for its end,
    # and leaves that cancel counted, so that nobody can tell it from one that came from outside.
    # Source: https://docs.python.org/3/whatsnew/3.13.html#asyncio
    failure = await asyncio.create_task(_first_failure(work))
    try:
        if _cancels_of_this_task() > cancels:
            raise asyncio.CancelledError
        if failure is not None:
            raise failure
    finally:
        del failure  # the traceback refers to this frame: a cycle, whose frames hold every buffer


async def _first_failure(work: Callable[[], Awaitable[None]]) -> BaseException | None:
    """Returned and not raised: the task would keep the traceback, and with it itself."""
    try:
        await work()
    except BaseExceptionGroup as group:
        # Before Python 3.13 TaskGroup leaves a cycle of the group and its traceback.
        group.__traceback__ = None
        return group.exceptions[0]
    return None


def never_cancelled_alone(
    work: Callable[P, Coroutine[Any, Any, None]],
) -> Callable[P, Coroutine[Any, Any, None]]:
    """Turn a CancelledError that nobody asked for into an InternalError.

    A library may let one slip out of its own plumbing. A TaskGroup takes it for the
    normal end of the task, and those who wait for that task's result wait for ever.
    """

    @functools.wraps(work)
    async def watched(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            await work(*args, **kwargs)
        except asyncio.CancelledError as error:
            if _cancels_of_this_task():
                raise
            raise InternalError("A task of the build was cancelled, but not by the build.") from error

    return watched


def _cancels_of_this_task() -> int:
    task = asyncio.current_task()
    return task.cancelling() if task else 0
