"""A store that lives in memory, and a reader of archives that trusts nothing but the format.

source           a SourceFile with everything but its size made up
Store            `read` and `put_part` in random order, with all that was asked of them
build            one whole build with a time limit: a deadlock fails, it does not hang
check_archive    every byte, name, time and CRC, by Python's zipfile and by hand
"""

from __future__ import annotations

import asyncio
import io
import random
import struct
import time
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence

from delineate.archive.build import PartReceipt, build_archive
from delineate.archive.plan import ArchivePlan, Extra, plan_archive
from delineate.job import SourceFile

MODIFIED = 1_700_000_001.7
BUILD_SECONDS = 10


def source(number: int, size: int, *, name: str = "", modified: float = MODIFIED, etag: str = '"e"') -> SourceFile:
    return SourceFile(
        file_id=70_000 + number,
        key=f"files/{number}",
        name=name or f"{number}.bin",
        size=size,
        etag=etag,
        modified=modified,
    )


def plan_of(
    files: Sequence[SourceFile], *, part_bytes: int = 64, slots: int = 2, extra: Sequence[Extra] = ()
) -> ArchivePlan:
    return plan_archive(files, part_bytes=part_bytes, max_bytes=1 << 43, max_name_bytes=255, slots=slots, extra=extra)


class Store:
    """Serves `contents` by key and keeps the parts; yields to the loop at random, so that every order comes up.

    `in_order` makes a part wait until all parts before it have come, as rclone does.
    """

    def __init__(self, contents: Mapping[str, bytes], rng: random.Random, *, in_order: bool = False) -> None:
        self.contents = contents
        self.parts: dict[int, bytes] = {}
        self.reads: list[tuple[str, int, int]] = []
        self.buffers: dict[int, object] = {}  # keeps them, so that no address comes up twice
        self.reading = 0
        self.most_reading = 0
        self._rng = rng
        self._in_order = in_order
        self._next = 1
        self._part_came = asyncio.Condition()

    async def read(
        self, file: SourceFile, start: int, into: memoryview, on_chunk: Callable[[memoryview], None]
    ) -> None:
        self.reads.append((file.key, start, len(into)))
        self.buffers[id(into.obj)] = into.obj
        self.reading += 1
        self.most_reading = max(self.most_reading, self.reading)
        await self._let_others_run()
        at = 0
        while at < len(into):
            length = min(self._rng.choice((1, 7, 50, 100_000)), len(into) - at)
            into[at : at + length] = self.contents[file.key][start + at : start + at + length]
            on_chunk(into[at : at + length])
            at += length
            await self._let_others_run()
        self.reading -= 1

    async def put_part(self, number: int, body: memoryview) -> str:
        self.buffers[id(body.obj)] = body.obj
        await self._let_others_run()
        async with self._part_came:
            if self._in_order:
                await self._part_came.wait_for(lambda: self._come_in_order() >= number)
            self.parts[number] = bytes(body)
            self._part_came.notify_all()
        return f"etag-{number}"

    def archive(self) -> bytes:
        return b"".join(self.parts[number] for number in sorted(self.parts))

    def _come_in_order(self) -> int:
        """The lowest part that has not come."""
        while self._next in self.parts:
            self._next += 1
        return self._next

    async def _let_others_run(self) -> None:
        for _ in range(self._rng.choice((0, 0, 1, 3))):
            await asyncio.sleep(0)


def build(
    plan: ArchivePlan,
    store: Store,
    *,
    slots: int | None = None,
    fetch_concurrency: int = 4,
    done: Mapping[int, PartReceipt] | None = None,
    progress: list[tuple[int, int]] | None = None,
) -> list[PartReceipt]:
    reports = [] if progress is None else progress

    async def limited() -> list[PartReceipt]:
        async with asyncio.timeout(BUILD_SECONDS):
            return await build_archive(
                plan,
                store.read,
                store.put_part,
                slots=slots or plan.slots,
                fetch_concurrency=fetch_concurrency,
                on_progress=lambda bytes_done, files_done: reports.append((bytes_done, files_done)),
                done=done,
            )

    return asyncio.run(limited())


def check_archive(data: bytes, plan: ArchivePlan, contents: Sequence[bytes]) -> None:
    """`data` is the archive of `plan` whose entries hold `contents`, in order."""
    assert len(data) == plan.total_bytes
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.testzip() is None
        infos = archive.infolist()
        assert len(infos) == len(plan.entries) == len(contents)
        assert archive.start_dir == plan.directory_offset
        for info, entry, content in zip(infos, plan.entries, contents, strict=True):
            assert info.filename == entry.name.decode()
            assert info.header_offset == entry.offset
            assert info.file_size == info.compress_size == len(content)
            assert zlib.crc32(content) == info.CRC
            assert info.compress_type == zipfile.ZIP_STORED
            assert info.external_attr == 0o100644 << 16
            moment = time.gmtime(entry.seconds)
            assert info.date_time == (*moment[:5], moment.tm_sec & ~1)
            assert archive.read(info) == content
            check_local_records(data, plan, info)


def check_local_records(data: bytes, plan: ArchivePlan, info: zipfile.ZipInfo) -> None:
    """The header before the bytes says what the directory says; zipfile does not look at it."""
    fields = struct.unpack_from("<IHHHHHIIIHH", data, info.header_offset)
    signature, _, flags, method, _, _, crc, packed, size, name_bytes, extra_bytes = fields
    name_at = info.header_offset + 30
    data_at = name_at + name_bytes + extra_bytes
    assert (signature, method, flags) == (0x04034B50, 0, info.flag_bits)
    assert data[name_at : name_at + name_bytes].decode() == info.filename
    assert packed == size == info.file_size
    if flags & 8:
        assert crc == 0
        assert struct.unpack_from("<IIII", data, data_at + size) == (0x08074B50, info.CRC, size, size)
    else:
        assert crc == info.CRC
    assert data[name_at + name_bytes : data_at] == info.extra
    assert plan.total_bytes >= data_at + size
