"""The plan of an archive: every byte's place is fixed before the first byte is read.

Stored files have known sizes, so every offset follows from names and sizes.
That makes progress exact, limits checkable before work starts, parts
independent of each other, and a taken-over job able to go on with the upload
of the worker that died: the same plan gives the same bytes.
"""

from __future__ import annotations

import enum
import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

import msgspec
from isal import isal_zlib

from delineate.archive.names import entry_names
from delineate.archive.records import (
    Entry,
    central_header,
    central_header_bytes,
    clamp_time,
    end_bytes,
    end_records,
    local_header_bytes,
)
from delineate.errors import ArchiveTooLarge
from delineate.job import SourceFile

FORMAT_VERSION = 1  # raise it when the same files would give other bytes: running uploads then start again
MAX_PARTS = 10_000  # https://docs.aws.amazon.com/AmazonS3/latest/userguide/qfacts.html
MEBIBYTE = 1 << 20

Extra = tuple[str, bytes, float]  # an entry made in memory: its name, content and modification time in Unix seconds


class Region(enum.Enum):
    """What a stretch of the archive is."""

    HEADER = enum.auto()
    DATA = enum.auto()
    DESCRIPTOR = enum.auto()
    TAIL = enum.auto()  # the central directory and the end records


class Piece(NamedTuple):
    """What one part holds of one region: `length` bytes from `start` of the region, at `at` in the part.

    `entry` is the entry's index in the plan, -1 for the tail.
    """

    region: Region
    entry: int
    start: int
    length: int
    at: int


class ArchivePlan(msgspec.Struct, frozen=True, kw_only=True):
    """The layout of one archive; sizes and offsets are bytes, parts are numbered from 1 as S3 does.

    `digest` is the same exactly when the archive's bytes, its parts and the objects
    they come from are. `slots` is how many parts the builder must be able to hold
    (`build.py` says why).
    """

    entries: tuple[Entry, ...]
    part_bytes: int
    slots: int
    directory_offset: int
    total_bytes: int
    digest: str

    @property
    def part_count(self) -> int:
        return -(-self.total_bytes // self.part_bytes)

    @property
    def file_count(self) -> int:
        """Entries that are stored files; the rest are made in memory and come last."""
        return sum(entry.file is not None for entry in self.entries)

    def part_size(self, number: int) -> int:
        """Bytes of part `number`: `part_bytes`, but the last one what is left. Raises IndexError if there is none."""
        if not 1 <= number <= self.part_count:
            raise IndexError(f"part {number} of {self.part_count}")
        return min(self.part_bytes, self.total_bytes - (number - 1) * self.part_bytes)

    def pieces(self, number: int) -> list[Piece]:
        """What part `number` is made of, in order and without a gap."""
        first = (number - 1) * self.part_bytes
        end = first + self.part_size(number)
        pieces = []

        def cut(region: Region, index: int, region_start: int, region_end: int) -> None:
            low, high = max(region_start, first), min(region_end, end)
            if low < high:
                pieces.append(Piece(region, index, low - region_start, high - low, low - first))

        index = max(0, bisect_right(self.entries, first, key=lambda entry: entry.offset) - 1)
        while index < len(self.entries) and (entry := self.entries[index]).offset < end:
            cut(Region.HEADER, index, entry.offset, entry.data_offset)
            cut(Region.DATA, index, entry.data_offset, entry.data_end)
            cut(Region.DESCRIPTOR, index, entry.data_end, entry.end)
            index += 1
        cut(Region.TAIL, -1, self.directory_offset, self.total_bytes)
        return pieces

    def segment_count(self, index: int) -> int:
        """How many parts hold data of entry `index`."""
        entry = self.entries[index]
        if not entry.size:
            return 0
        return (entry.data_end - 1) // self.part_bytes - entry.data_offset // self.part_bytes + 1

    def tail(self, crcs: Sequence[int]) -> bytes:
        """The central directory and the end records; `crcs` has the CRC-32 of every entry."""
        directory = b"".join(map(central_header, self.entries, crcs))
        return directory + end_records(len(self.entries), self.directory_offset, len(directory))


def plan_archive(
    files: Sequence[SourceFile],
    *,
    part_bytes: int,
    max_bytes: int,
    max_name_bytes: int,
    slots: int,
    extra: Sequence[Extra] = (),
) -> ArchivePlan:
    """Lay out `files` in their order, then `extra`; sizes are bytes.

    Parts grow by whole MiB while the archive would need more than MAX_PARTS of
    them. The names of `extra` stay as they are if they are safe: a file of the
    same name gets a number. Without entries the plan is an empty, valid archive.

    Raises ArchiveTooLarge if the archive would have more than `max_bytes`.
    """
    if part_bytes < 1 or slots < 1:
        raise ValueError(f"part_bytes is {part_bytes}, slots is {slots}; both are at least 1")
    drafts = _drafts(files, extra, max_name_bytes)
    while True:
        entries, directory_offset = _lay_out(drafts, part_bytes, slots)
        directory_bytes = sum(map(central_header_bytes, entries))
        total_bytes = directory_offset + directory_bytes + end_bytes(len(entries), directory_offset, directory_bytes)
        if total_bytes > max_bytes:
            raise ArchiveTooLarge(
                f"These files make an archive of {total_bytes:,} bytes; at most {max_bytes:,} bytes "
                f"({max_bytes / 1e9:,.1f} GB) are allowed. Ask for fewer files at a time."
            )
        # Another part size moves the descriptors and so the total: lay out again until it fits.
        lacking = total_bytes - part_bytes * MAX_PARTS
        if lacking <= 0:
            break
        part_bytes += -(-lacking // (MEBIBYTE * MAX_PARTS)) * MEBIBYTE
    return ArchivePlan(
        entries=tuple(entries),
        part_bytes=part_bytes,
        slots=slots,
        directory_offset=directory_offset,
        total_bytes=total_bytes,
        digest=_digest(entries, part_bytes),
    )


class _Draft(NamedTuple):
    """An entry that has no place yet."""

    name: bytes
    size: int
    seconds: int
    crc: int | None
    file: SourceFile | None
    content: bytes


def _drafts(files: Sequence[SourceFile], extra: Sequence[Extra], max_name_bytes: int) -> list[_Draft]:
    # The first of a name keeps it, so the extra entries are named first, though they come last.
    names = entry_names([name for name, _, _ in extra] + [file.name for file in files], max_name_bytes)
    encoded = [name.encode() for name in names]
    stored = [
        _Draft(name, file.size, clamp_time(file.modified), None if file.size else 0, file, b"")
        for name, file in zip(encoded[len(extra) :], files, strict=True)
    ]
    made = [
        _Draft(name, len(content), clamp_time(modified), isal_zlib.crc32(content), None, content)
        for name, (_, content, modified) in zip(encoded, extra, strict=False)
    ]
    return stored + made


def _lay_out(drafts: Sequence[_Draft], part_bytes: int, slots: int) -> tuple[list[Entry], int]:
    """The entries in their places, and the offset where the last one ends."""
    entries = []
    offset = 0
    for draft in drafts:
        data_offset = offset + local_header_bytes(draft.name, draft.size, draft.seconds)
        # The header can wait for the CRC if all parts from its first byte to the data's last are held at once.
        last_part = (data_offset + draft.size - 1) // part_bytes
        entry = Entry(
            name=draft.name,
            size=draft.size,
            seconds=draft.seconds,
            offset=offset,
            data_offset=data_offset,
            has_descriptor=draft.crc is None and last_part - offset // part_bytes >= slots,
            crc=draft.crc,
            file=draft.file,
            content=draft.content,
        )
        entries.append(entry)
        offset = entry.end
    return entries, offset


def _digest(entries: Sequence[Entry], part_bytes: int) -> str:
    """SHA-256 over all that decides the bytes. `slots` decides only who has a descriptor, and so is not in it."""
    described = [
        (
            entry.name,
            entry.size,
            entry.seconds,
            entry.has_descriptor,
            entry.content if entry.file is None else (entry.file.key, entry.file.etag),
        )
        for entry in entries
    ]
    return hashlib.sha256(msgspec.msgpack.encode((FORMAT_VERSION, part_bytes, described))).hexdigest()
