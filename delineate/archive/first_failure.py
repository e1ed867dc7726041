"""Two corrections to asyncio.TaskGroup for work that either succeeds whole or fails with one reason."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, ParamSpec

from delineate.errors import InternalError

P = ParamSpec("P")


async def raise_first_failure(work: Awaitable[None]) -> None:
    """Await `work`, a function around one TaskGroup; raise what failed first, as it was raised, without the group.

    Callers choose what to do by the error's class, and the failures that follow the
    first are only its echo. A cancel from outside wins over failures it caused.
    """
    cancels = _cancels_of_this_task()
    failure: BaseException | None = None
    try:
        await work
    except BaseExceptionGroup as group:
        failure = group.exceptions[0]
        # Before Python 3.13 TaskGroup leaves a cycle of the group and its traceback, whose frames hold every buffer.
        group.__traceback__ = None
    if failure is None:
        return
    try:
        if _cancels_of_this_task() > cancels:
            raise asyncio.CancelledError
        # Outside the except block, which would replace the failure's own context by the group.
        raise failure
    finally:
        del failure  # the traceback refers to this frame: such a cycle too


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
