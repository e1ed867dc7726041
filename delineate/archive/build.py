"""Building an archive: fetch the files' bytes into parts, add the ZIP records, upload the parts.

    admit      parts take a slot (a buffer) in ascending order; their reads join one queue, in order
    fetch      `fetch_concurrency` fetchers empty the queue; CRCs are taken as the bytes pass
    finish     a part that has its bytes gets its records - a header may wait for the CRC of a file that ends
               in a later part - and is uploaded; then its slot goes to the next part

Why this cannot deadlock, for any plan and any set of parts done before. Take the lowest part p that is not
done. Parts are admitted in order, so p holds a slot. Fetchers wait for nothing but the store and empty the
queue in order, so the reads of every admitted part end. Then p needs the CRCs of

    (a) files that end in p or before (for descriptors and the tail): all their parts are done or p itself; or
    (b) files whose header lies, at least partly, in p and whose data ends in a later part q. The plan gives
        such a header a CRC only if q - p < plan.slots <= slots. While q is not admitted, the slots are held
        by parts from p to q - 1, so at most q - p of them: one is free, and the next part gets it, until q
        is admitted. Then all the file's segments are done or being read, and its CRC becomes known.

So p gets its records and is uploaded, and by induction every part is. On this side no upload waits for
another; a store that takes parts in order (rclone) may make later ones wait for p, whose reads must then
find a connection: the store's client needs more of them than the process has slots.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol

import msgspec
from isal import isal_zlib

from delineate.archive.checksums import Checksums
from delineate.archive.first_failure import never_cancelled_alone, raise_first_failure
from delineate.archive.plan import ArchivePlan, Piece, Region
from delineate.archive.records import descriptor, local_header
from delineate.errors import InternalError
from delineate.job import SourceFile


class Read(Protocol):
    async def __call__(
        self, file: SourceFile, start: int, into: memoryview, on_chunk: Callable[[memoryview], None]
    ) -> None:
        """Fill `into` with the file's bytes from `start`.

        Calls `on_chunk` for each piece as it lands in `into`, in order, each byte
        exactly once. Does not touch `into` after it has returned or raised.
        """


class PutPart(Protocol):
    async def __call__(self, number: int, body: memoryview) -> str:
        """Upload part `number` (from 1) and return its ETag. Does not look at `body` after it has returned."""
        ...


class PartReceipt(msgspec.Struct, frozen=True):
    """A part that the store has. `crcs`: CRC-32 of each file segment in it, in order, for a build that goes on."""

    number: int
    etag: str
    crcs: tuple[int, ...]


async def build_archive(
    plan: ArchivePlan,
    read: Read,
    put_part: PutPart,
    *,
    slots: int,
    fetch_concurrency: int,
    on_progress: Callable[[int, int], None],
    done: Mapping[int, PartReceipt] | None = None,
    on_part: Callable[[PartReceipt], Awaitable[None]] | None = None,
) -> list[PartReceipt]:
    """Upload every part of `plan` that is not in `done`; the receipts of all parts, in order.

    Holds at most `slots` parts in memory and has at most `fetch_concurrency` reads
    running. `on_progress(bytes_done, files_done)` is called at the start, after every
    chunk and every part, and never falls: a byte of the archive counts half when it is
    in memory and half when it is uploaded, so that `plan.total_bytes` is reached with the last
    upload and not before; a file counts when all its bytes were read. `on_part` is
    awaited after each upload, while its slot is held. A receipt in `done` that
    does not fit the plan is not believed: its part is made again.

    On the first failure everything else is cancelled and awaited, and that failure
    is raised as it was. Raises ValueError if `slots` is less than the plan was made for.
    """
    if slots < plan.slots or fetch_concurrency < 1:
        raise ValueError(f"slots is {slots}, the plan needs {plan.slots}; fetch_concurrency is {fetch_concurrency}")
    build = _Build(plan, read, put_part, slots, on_progress, on_part)
    build.replay(done or {})
    await raise_first_failure(lambda: build.run(fetch_concurrency))
    return [build.receipts[number] for number in range(1, plan.part_count + 1)]


class _Part:
    """A part that holds a slot: its buffer, and the CRCs of its segments as they come."""

    def __init__(self, number: int, buffer: bytearray, size: int, pieces: list[Piece], segments: int) -> None:
        self.number = number
        self.buffer = buffer
        self.body = memoryview(buffer)[:size]
        self.pieces = pieces
        self.crcs = [0] * segments
        self.missing = segments
        self.fetched = asyncio.Event()
        if not segments:
            self.fetched.set()


class _Segment:
    """The stretch of one file that one part holds; `position` is its place among the part's segments."""

    __slots__ = ("_on_bytes", "crc", "file", "into", "part", "piece", "position", "received")

    def __init__(
        self, part: _Part, position: int, piece: Piece, file: SourceFile, on_bytes: Callable[[int], None]
    ) -> None:
        self.part = part
        self.position = position
        self.piece = piece
        self.file = file
        self.into = part.body[piece.at : piece.at + piece.length]
        self.crc = 0
        self.received = 0
        self._on_bytes = on_bytes

    def take(self, chunk: memoryview) -> None:
        self.crc = isal_zlib.crc32(chunk, self.crc)
        self.received += chunk.nbytes
        self._on_bytes(chunk.nbytes)


class _Build:
    """One run of `build_archive`."""

    def __init__(
        self,
        plan: ArchivePlan,
        read: Read,
        put_part: PutPart,
        slots: int,
        on_progress: Callable[[int, int], None],
        on_part: Callable[[PartReceipt], Awaitable[None]] | None,
    ) -> None:
        self._plan = plan
        self._read = read
        self._put_part = put_part
        self._on_progress = on_progress
        self._on_part = on_part
        self._slots = asyncio.Semaphore(slots)
        self._free_buffers: list[bytearray] = []
        self._reads: asyncio.Queue[_Segment | None] = asyncio.Queue()
        self._checksums = Checksums(plan)
        self._tail = b""
        self._in_memory = self._uploaded = 0  # bytes, each also counting the parts done before
        self.receipts: dict[int, PartReceipt] = {}

    def replay(self, done: Mapping[int, PartReceipt]) -> None:
        """Take over what an earlier build did: the parts it uploaded need no work, but their CRCs are needed."""
        for number, receipt in done.items():
            if not 1 <= number <= self._plan.part_count:
                continue
            segments = self._file_segments(self._plan.pieces(number))
            if len(segments) != len(receipt.crcs):
                continue
            for (piece, _), crc in zip(segments, receipt.crcs, strict=True):
                self._checksums.add(piece.entry, number, piece.length, crc)
            self.receipts[number] = receipt
            self._in_memory += self._plan.part_size(number)
            self._uploaded += self._plan.part_size(number)
        self._report()

    async def run(self, fetch_concurrency: int) -> None:
        missing = [number for number in range(1, self._plan.part_count + 1) if number not in self.receipts]
        async with asyncio.TaskGroup() as group:
            for _ in range(fetch_concurrency):
                group.create_task(self._fetch())
            for number in missing:
                await self._slots.acquire()
                group.create_task(self._finish(self._admit(number)))
            for _ in range(fetch_concurrency):
                self._reads.put_nowait(None)

    def _admit(self, number: int) -> _Part:
        """Give part `number` a buffer and line up its reads; the caller has acquired its slot."""
        size = self._plan.part_size(number)
        pieces = self._plan.pieces(number)
        segments = self._file_segments(pieces)
        buffer = self._free_buffers.pop() if self._free_buffers else bytearray(size)
        part = _Part(number, buffer, size, pieces, len(segments))
        for position, (piece, file) in enumerate(segments):
            self._reads.put_nowait(_Segment(part, position, piece, file, self._count))
        self._count(size - sum(piece.length for piece, _ in segments))
        return part

    @never_cancelled_alone
    async def _fetch(self) -> None:
        while (segment := await self._reads.get()) is not None:
            piece, part = segment.piece, segment.part
            await self._read(segment.file, piece.start, segment.into, segment.take)
            if segment.received != piece.length:
                raise InternalError(f"a read of {piece.length} bytes reported {segment.received}")
            self._checksums.add(piece.entry, part.number, piece.length, segment.crc)
            part.crcs[segment.position] = segment.crc
            part.missing -= 1
            if not part.missing:
                part.fetched.set()
                self._report()

    @never_cancelled_alone
    async def _finish(self, part: _Part) -> None:
        await part.fetched.wait()
        for piece in part.pieces:
            if (source := await self._made_here(piece)) is not None:
                part.body[piece.at : piece.at + piece.length] = source[piece.start : piece.start + piece.length]
        etag = await self._put_part(part.number, part.body)
        receipt = PartReceipt(part.number, etag, tuple(part.crcs))
        if self._on_part is not None:
            await self._on_part(receipt)
        self.receipts[part.number] = receipt
        self._uploaded += part.body.nbytes
        self._report()
        # Not in a finally: a failure ends the build, and a slot freed by it would only admit more work.
        self._free_buffers.append(part.buffer)
        self._slots.release()

    async def _made_here(self, piece: Piece) -> bytes | memoryview | None:
        """All bytes of the region that `piece` is cut from, or None if a fetcher has put them in place."""
        if piece.region is Region.TAIL:
            # Built once, though many small parts may each hold a piece of it.
            self._tail = self._tail or self._plan.tail(await self._checksums.wait_for_all())
            return memoryview(self._tail)
        entry = self._plan.entries[piece.entry]
        if piece.region is Region.DATA:
            return memoryview(entry.content) if entry.file is None else None
        if piece.region is Region.DESCRIPTOR:
            return descriptor(entry, await self._checksums.wait(piece.entry))
        return local_header(entry, 0 if entry.has_descriptor else await self._checksums.wait(piece.entry))

    def _file_segments(self, pieces: list[Piece]) -> list[tuple[Piece, SourceFile]]:
        entries = self._plan.entries
        return [
            (piece, file)
            for piece in pieces
            if piece.region is Region.DATA and (file := entries[piece.entry].file) is not None
        ]

    def _count(self, length: int) -> None:
        self._in_memory += length
        self._report()

    def _report(self) -> None:
        self._on_progress((self._in_memory + self._uploaded) // 2, self._checksums.files_known)
