"""The layout is exact for every size, ZIP64 appears exactly where a field overflows, and the digest sees all."""

from __future__ import annotations

import io
import zipfile
from typing import TYPE_CHECKING

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from delineate.archive import plan as plan_module
from delineate.archive.plan import ArchivePlan, plan_archive
from delineate.archive.records import EARLIEST, LATEST, clamp_time, descriptor, local_header
from delineate.errors import ArchiveTooLarge
from delineate.job import SourceFile
from tests.archive.fakes import plan_of, source

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

U32 = 0xFFFFFFFF
MEBIBYTE = 1 << 20
# A size is about where its own field overflows, or where it pushes the next entry's offset over.
SIZES = st.one_of(st.integers(0, 100), st.integers(U32 - 400, U32 + 400), st.integers(U32 // 2 - 100, U32 // 2 + 100))


class TailOnly(io.RawIOBase):
    """A file that holds only an archive's last bytes; what is before them reads as zeros."""

    def __init__(self, size: int, tail: bytes) -> None:
        self._size, self._tail, self._at = size, tail, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, into: WriteableBuffer) -> int:
        view = memoryview(into)
        tail_at = self._size - len(self._tail)
        found = bytes(max(0, min(len(view), tail_at - self._at)))
        start = self._at + len(found) - tail_at
        found += self._tail[start : start + len(view) - len(found)]
        view[: len(found)] = found
        self._at += len(found)
        return len(found)


def directory_of(plan: ArchivePlan) -> list[zipfile.ZipInfo]:
    tail = plan.tail([number * 7 for number in range(len(plan.entries))])
    assert plan.directory_offset + len(tail) == plan.total_bytes
    with zipfile.ZipFile(io.BufferedReader(TailOnly(plan.total_bytes, tail))) as archive:
        return archive.infolist()


@given(st.lists(SIZES, max_size=5), st.integers(1, 4), st.integers(1, 10_000 * MEBIBYTE))
def test_any_sizes_give_an_exact_layout(sizes: list[int], slots: int, part_bytes: int) -> None:
    plan = plan_of([source(n, size) for n, size in enumerate(sizes)], part_bytes=part_bytes, slots=slots)
    offset = 0
    for entry in plan.entries:
        assert entry.offset == offset
        assert len(local_header(entry, 1)) == entry.data_offset - entry.offset
        assert len(descriptor(entry, 1) if entry.has_descriptor else b"") == entry.end - entry.data_end
        offset = entry.end
    assert plan.directory_offset == offset
    for info, entry in zip(directory_of(plan), plan.entries, strict=True):
        assert (info.header_offset, info.file_size, info.compress_size) == (entry.offset, entry.size, entry.size)
        assert (info.extract_version == 45) == (entry.size >= U32 or entry.offset >= U32)
    assert plan.part_count <= 10_000
    assert plan.part_bytes >= part_bytes
    assert (plan.part_bytes - part_bytes) % MEBIBYTE == 0
    assert plan.part_size(1) == min(plan.part_bytes, plan.total_bytes)
    assert plan.part_size(plan.part_count) == plan.total_bytes - (plan.part_count - 1) * plan.part_bytes


@pytest.mark.parametrize(("gap", "version"), [(-1, 20), (0, 45)])
def test_an_offset_needs_zip64_from_the_value_that_marks_it(gap: int, version: int) -> None:
    header = plan_of([source(0, 1)]).entries[0].data_offset
    first = source(0, U32 - header + gap)
    plan = plan_of([first, source(1, 0)], part_bytes=1 << 33)
    assert plan.entries[1].offset == U32 + gap
    infos = directory_of(plan)
    assert [info.extract_version for info in infos] == [20, version]
    assert [len(info.extra) for info in infos] == [9, 9 + (12 if version == 45 else 0)]


@pytest.mark.parametrize(("size", "header_extra", "descriptor_size"), [(U32 - 1, 9, 16), (U32, 29, 24)])
def test_a_size_needs_zip64_from_the_value_that_marks_it(size: int, header_extra: int, descriptor_size: int) -> None:
    plan = plan_of([source(0, size)], part_bytes=MEBIBYTE, slots=1)
    (entry,) = plan.entries
    assert entry.data_offset == len(local_header(entry, 1)) == 30 + len(entry.name) + header_extra
    assert entry.end - entry.data_end == len(descriptor(entry, 1)) == descriptor_size


@pytest.mark.parametrize(("count", "end"), [(0xFFFE, 22), (0xFFFF, 98)])
def test_a_count_needs_zip64_from_the_value_that_marks_it(count: int, end: int) -> None:
    plan = plan_of([source(number, 0) for number in range(count)], part_bytes=MEBIBYTE)
    assert len(directory_of(plan)) == count
    assert plan.tail([0] * count)[-end:][:4] == (b"PK\5\6" if end == 22 else b"PK\6\6")


def test_parts_grow_just_enough() -> None:
    size = 10_000 * 5 * MEBIBYTE
    plan = plan_of([source(0, size)], part_bytes=5 * MEBIBYTE)
    assert plan.part_bytes == 6 * MEBIBYTE
    assert plan_of([source(0, size - 1000)], part_bytes=5 * MEBIBYTE).part_bytes == 5 * MEBIBYTE
    assert plan_of([source(0, size * 7)], part_bytes=5 * MEBIBYTE).part_bytes == 36 * MEBIBYTE


def test_too_large_an_archive_is_refused_in_words_for_the_user() -> None:
    def plan(max_bytes: int) -> ArchivePlan:
        return plan_archive([source(0, 1000)], part_bytes=64, max_bytes=max_bytes, max_name_bytes=255, slots=2)

    total = plan(10_000).total_bytes
    assert plan(total).total_bytes == total
    with pytest.raises(ArchiveTooLarge, match=f"{total:,} bytes; at most {total - 1:,} bytes .* fewer files"):
        plan(total - 1)


def test_there_is_no_part_outside_the_plan() -> None:
    plan = plan_of([])
    for number in (0, 2):
        with pytest.raises(IndexError):
            plan.part_size(number)


def test_an_extra_entry_keeps_its_name_and_comes_last() -> None:
    files = [source(0, 1, name="Delineate-Skipped.txt"), source(1, 1, name="a")]
    plan = plan_of(files, extra=[("delineate-skipped.txt", b"70002\n", 0.0)])
    names = [entry.name for entry in plan.entries]
    assert names == [b"Delineate-Skipped (2).txt", b"a", b"delineate-skipped.txt"]
    assert plan.file_count == 2


@pytest.mark.parametrize(
    ("modified", "seconds"),
    [
        (0.0, EARLIEST),
        (-1e300, EARLIEST),
        (float("-inf"), EARLIEST),
        (1_700_000_000.9, 1_700_000_000),
        (1e300, LATEST),
        (float("inf"), LATEST),
        (float("nan"), LATEST),
    ],
)
def test_any_time_fits_a_dos_date(modified: float, seconds: int) -> None:
    assert clamp_time(modified) == seconds


@pytest.mark.parametrize(("seconds", "extra_bytes"), [(0x7FFFFFFF, 9), (0x80000000, 0)])
def test_a_time_after_2038_is_told_by_the_dos_date_alone(seconds: int, extra_bytes: int) -> None:
    (info,) = directory_of(plan_of([source(0, 1, modified=seconds)]))
    assert len(info.extra) == extra_bytes
    assert info.date_time[:5] == (2038, 1, 19, 3, 14)


def test_the_digest_tells_apart_all_that_decides_the_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    files = [source(0, 100), source(1, 200)]

    def changed(**fields: object) -> list[SourceFile]:
        return [msgspec.structs.replace(files[0], **fields), files[1]]

    plans = [
        plan_of(files),
        plan_of(files[::-1]),
        plan_of(files[:1]),
        plan_of(files, part_bytes=65),
        plan_of(files, slots=9),  # no descriptors
        plan_of(files, extra=[("x", b"1", 0.0)]),
        plan_of(files, extra=[("x", b"2", 0.0)]),
        *(
            plan_of(changed(**fields))
            for fields in ({"name": "b"}, {"size": 101}, {"etag": "f"}, {"modified": 1e9}, {"key": "other"})
        ),
    ]
    monkeypatch.setattr(plan_module, "FORMAT_VERSION", 2)
    plans.append(plan_of(files))
    assert len({plan.digest for plan in plans}) == len(plans)


def test_the_digest_is_the_same_for_the_same_bytes() -> None:
    files = [source(0, 10), source(1, 20)]
    assert plan_of(files, part_bytes=1000, slots=2).digest == plan_of(files, part_bytes=1000, slots=4).digest
    renumbered = [msgspec.structs.replace(file, modified=file.modified + 0.1) for file in files]
    assert plan_of(files).digest == plan_of(renumbered).digest
