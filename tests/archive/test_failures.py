"""A build that fails or is cancelled ends whole: the first error as it was, no task left, no more work started."""

from __future__ import annotations

import asyncio
import gc
import random
from collections.abc import Awaitable, Callable

import pytest

from delineate.archive.build import PartReceipt, PutPart, Read, build_archive
from delineate.archive.plan import ArchivePlan
from delineate.errors import InternalError, StorageTimeout, StorageUnavailable
from delineate.job import SourceFile
from tests.archive.fakes import Store, plan_of, source

OnChunk = Callable[[memoryview], None]
CONTENTS = {f"files/{number}": bytes(200) for number in range(20)}


def plan_of_twenty(*, slots: int = 3) -> ArchivePlan:
    return plan_of([source(number, 200) for number in range(20)], part_bytes=256, slots=slots)


async def build(
    read: Read,
    put_part: PutPart,
    *,
    fetch_concurrency: int = 4,
    on_part: Callable[[PartReceipt], Awaitable[None]] | None = None,
    plan: ArchivePlan | None = None,
) -> None:
    async with asyncio.timeout(10):
        await build_archive(
            plan or plan_of_twenty(),
            read,
            put_part,
            slots=3,
            fetch_concurrency=fetch_concurrency,
            on_progress=lambda bytes_done, files_done: None,
            on_part=on_part,
        )


def store() -> Store:
    return Store(CONTENTS, random.Random(1))


def assert_alone() -> None:
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_failed_read_is_raised_as_it_was() -> None:
    files = store()
    cause, context = OSError("reset"), KeyError("while looking")
    failure = StorageUnavailable("the store is away")
    failure.__cause__, failure.__context__ = cause, context

    async def read(file: SourceFile, start: int, into: memoryview, on_chunk: OnChunk) -> None:
        if file.key == "files/5":
            raise failure
        await files.read(file, start, into, on_chunk)

    with pytest.raises(StorageUnavailable) as caught:
        await build(read, files.put_part)
    assert caught.value is failure
    assert (failure.__cause__, failure.__context__) == (cause, context)
    assert_alone()


async def test_a_failed_upload_is_raised_as_it_was() -> None:
    files = store()

    async def put_part(number: int, body: memoryview) -> str:
        if number == 2:
            raise StorageTimeout("part 2")
        return await files.put_part(number, body)

    with pytest.raises(StorageTimeout, match="part 2"):
        await build(files.read, put_part)
    assert_alone()


async def test_a_failure_after_the_last_part_was_admitted_is_raised_as_it_was() -> None:
    """The build then only waits for its tasks, and that is where a TaskGroup once left a cancel behind."""
    files = store()
    plan = plan_of_twenty()

    async def put_part(number: int, body: memoryview) -> str:
        if number == plan.part_count:
            await asyncio.sleep(0.01)
            raise StorageTimeout("the last part")
        return await files.put_part(number, body)

    task = asyncio.current_task()
    assert task is not None
    with pytest.raises(StorageTimeout, match="the last part"):
        await build(files.read, put_part, plan=plan)
    assert task.cancelling() == 0
    assert_alone()


async def test_a_failed_record_of_a_part_is_raised_as_it_was() -> None:
    async def on_part(receipt: PartReceipt) -> None:
        raise LookupError(receipt.number)

    with pytest.raises(LookupError):
        await build(store().read, store().put_part, on_part=on_part)
    assert_alone()


async def test_the_first_failure_wins_over_those_it_causes() -> None:
    began = asyncio.Event()

    async def read(file: SourceFile, start: int, into: memoryview, on_chunk: OnChunk) -> None:
        if file.key == "files/1":
            await began.wait()
            raise StorageTimeout("first")
        try:
            began.set()
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise StorageUnavailable("echo") from None

    with pytest.raises(StorageTimeout, match="first"):
        await build(read, store().put_part)
    assert_alone()


async def test_a_failure_starts_no_more_work() -> None:
    files = store()
    after_failure: list[int] = []
    failed = False

    async def put_part(number: int, body: memoryview) -> str:
        nonlocal failed
        if failed:
            after_failure.append(number)
        if number == 3:
            failed = True
            raise StorageTimeout("part 3")
        return await files.put_part(number, body)

    with pytest.raises(StorageTimeout):
        await build(files.read, put_part)
    parts_before = dict(files.parts)
    await asyncio.sleep(0.01)
    assert files.parts == parts_before
    assert max(files.parts, default=0) <= 6
    assert len(after_failure) <= 2


async def test_a_cancelled_build_leaves_no_task() -> None:
    reading = asyncio.Event()

    async def read(file: SourceFile, start: int, into: memoryview, on_chunk: OnChunk) -> None:
        reading.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(build(read, store().put_part))
    await reading.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert_alone()


async def test_a_build_that_is_cancelled_as_it_starts_has_begun_nothing() -> None:
    task = asyncio.create_task(build(store().read, store().put_part))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert_alone()


async def test_a_cancel_wins_over_the_failures_it_causes() -> None:
    reading = asyncio.Event()

    async def read(file: SourceFile, start: int, into: memoryview, on_chunk: OnChunk) -> None:
        try:
            reading.set()
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise StorageUnavailable("echo") from None

    task = asyncio.create_task(build(read, store().put_part))
    await reading.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert_alone()


@pytest.mark.parametrize("where", ["read", "put_part"])
async def test_a_cancel_that_nobody_asked_for_is_an_error_and_no_hang(where: str) -> None:
    files = store()

    async def read(file: SourceFile, start: int, into: memoryview, on_chunk: OnChunk) -> None:
        if where == "read" and file.key == "files/3":
            raise asyncio.CancelledError
        await files.read(file, start, into, on_chunk)

    async def put_part(number: int, body: memoryview) -> str:
        if where == "put_part" and number == 2:
            raise asyncio.CancelledError
        return await files.put_part(number, body)

    with pytest.raises(InternalError, match="not by the build"):
        await build(read, put_part)
    assert_alone()


@pytest.mark.parametrize("reported", [0, 150])
async def test_a_read_that_ends_short_is_not_taken_for_the_file(reported: int) -> None:
    async def read(file: SourceFile, start: int, into: memoryview, on_chunk: OnChunk) -> None:
        on_chunk(into[:reported])

    with pytest.raises(InternalError, match=f"reported {reported}"):
        await build(read, store().put_part, fetch_concurrency=1)


async def test_a_failed_build_frees_its_buffers_at_once() -> None:
    """A failure must not keep slots x part_bytes until the garbage collector comes by."""

    class Marker:
        alive = 0

        def __init__(self) -> None:
            Marker.alive += 1

        def __del__(self) -> None:
            Marker.alive -= 1

    async def read(file: SourceFile, start: int, into: memoryview, on_chunk: OnChunk) -> None:
        marker = Marker()  # lives as long as the frame that the traceback refers to
        raise StorageTimeout(repr(marker))

    gc.collect()
    gc.disable()
    try:
        with pytest.raises(StorageTimeout):
            await build(read, store().put_part)
        await asyncio.sleep(0)
        assert Marker.alive == 0
    finally:
        gc.enable()


async def test_memory_is_bounded_by_slots_while_uploads_stall() -> None:
    """Uploads stand still: reading must stop when every slot is full, and take one part more for each one freed."""
    files = store()
    gate = asyncio.Semaphore(0)
    waiting: set[int] = set()
    full = asyncio.Event()

    async def put_part(number: int, body: memoryview) -> str:
        waiting.add(number)
        if len(waiting) == 3:
            full.set()
        await gate.acquire()
        waiting.discard(number)
        return await files.put_part(number, body)

    plan = plan_of_twenty(slots=1)  # no header waits for a later part
    task = asyncio.create_task(build(files.read, put_part, plan=plan))
    await full.wait()
    await asyncio.sleep(0.01)
    assert waiting == {1, 2, 3}
    assert len(files.buffers) <= 3
    for _ in range(plan.part_count):
        gate.release()
        await asyncio.sleep(0.001)
        assert len(waiting) <= 3
    await task
    assert len(files.buffers) <= 3
