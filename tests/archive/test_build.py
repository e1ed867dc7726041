"""Whatever the files, parts, slots and order of events: the bytes uploaded are the planned archive."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from delineate.archive.build import PartReceipt
from delineate.archive.plan import FORMAT_VERSION, ArchivePlan, plan_archive
from tests.archive.fakes import MODIFIED, Store, build, check_archive, plan_of, source

NAMES = st.one_of(
    st.sampled_from(["a.txt", "A.txt", "b/c", "", "\u202e", "漢字.pdf", "x" * 300]),
    st.text(st.characters(), max_size=8),
)
SIZES = st.one_of(st.integers(0, 3), st.integers(0, 200), st.sampled_from([0, 1, 1000]))
TIMES = st.one_of(st.just(MODIFIED), st.floats(allow_nan=True), st.floats(0, 5e9))
SHAPES = st.lists(st.tuples(NAMES, SIZES, TIMES), max_size=12)
EXTRAS = st.lists(
    st.tuples(st.sampled_from(["a.txt", "delineate-skipped.txt"]), st.binary(max_size=80), TIMES), max_size=2
)
PARTS = st.one_of(st.integers(1, 10), st.integers(10, 300), st.sampled_from([30, 64, 5000]))
SLOTS = st.integers(1, 4)
RANDOM = st.randoms(use_true_random=True)


class Case(msgspec.Struct):
    plan: ArchivePlan
    contents: list[bytes]
    by_key: dict[str, bytes]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    shapes, extra = draw(SHAPES), draw(EXTRAS)
    files = [source(number, size, name=name, modified=at) for number, (name, size, at) in enumerate(shapes)]
    contents = [random.Random(file.file_id).randbytes(file.size) for file in files]
    plan = plan_archive(
        files,
        part_bytes=draw(PARTS),
        max_bytes=1 << 40,
        max_name_bytes=draw(st.integers(32, 60)),
        slots=draw(SLOTS),
        extra=extra,
    )
    by_key = {file.key: content for file, content in zip(files, contents, strict=True)}
    return Case(plan, contents + [content for _, content, _ in extra], by_key)


@settings(max_examples=150, deadline=None)
@given(cases(), st.integers(0, 2), st.integers(1, 8), st.booleans(), RANDOM)
def test_any_archive_is_valid_and_as_planned(
    case: Case, spare_slots: int, fetch_concurrency: int, in_order: bool, rng: random.Random
) -> None:
    store = Store(case.by_key, rng, in_order=in_order)
    slots = case.plan.slots + spare_slots
    progress: list[tuple[int, int]] = []
    receipts = build(case.plan, store, slots=slots, fetch_concurrency=fetch_concurrency, progress=progress)

    check_archive(store.archive(), case.plan, case.contents)
    assert [receipt.number for receipt in receipts] == list(range(1, case.plan.part_count + 1))
    assert [receipt.etag for receipt in receipts] == [f"etag-{n}" for n in range(1, case.plan.part_count + 1)]
    assert all(len(store.parts[n]) == case.plan.part_size(n) for n in store.parts)
    assert store.most_reading <= fetch_concurrency
    assert len(store.buffers) <= slots
    assert progress == sorted(progress)
    assert [files for _, files in progress] == sorted(files for _, files in progress)
    assert progress[-1] == (case.plan.total_bytes, case.plan.file_count)
    assert [bytes_done for bytes_done, _ in progress].index(case.plan.total_bytes) == len(progress) - 1


@settings(max_examples=150, deadline=None)
@given(cases(), RANDOM, st.floats(0, 1), st.booleans())
def test_a_build_that_goes_on_repeats_nothing_and_gives_the_same_bytes(
    case: Case, rng: random.Random, share: float, in_order: bool
) -> None:
    first = Store(case.by_key, rng)
    receipts = build(case.plan, first)
    done = {receipt.number: receipt for receipt in receipts if rng.random() < share}

    second = Store(case.by_key, rng, in_order=in_order)
    second.parts.update({number: first.parts[number] for number in done})
    progress: list[tuple[int, int]] = []
    before = dict(second.parts)
    again = build(case.plan, second, done=done, progress=progress)

    assert again == receipts
    assert second.archive() == first.archive()
    assert all(second.parts[number] is part for number, part in before.items())
    assert sorted(second.reads) == sorted(reads_of_parts(case.plan, set(range(1, len(receipts) + 1)) - set(done)))
    assert progress == sorted(progress)
    assert progress[0][0] >= sum(case.plan.part_size(number) for number in done)
    assert progress[-1] == (case.plan.total_bytes, case.plan.file_count)


def reads_of_parts(plan: ArchivePlan, numbers: set[int]) -> Sequence[tuple[str, int, int]]:
    """What must be read for these parts, worked out from offsets alone."""
    reads = []
    for number in numbers:
        low, high = (number - 1) * plan.part_bytes, number * plan.part_bytes
        for entry in plan.entries:
            start, end = max(low, entry.data_offset), min(high, entry.data_end)
            if start < end and entry.file is not None:
                reads.append((entry.file.key, start - entry.data_offset, end - start))
    return reads


def test_a_receipt_that_does_not_fit_the_plan_is_not_believed() -> None:
    plan = plan_of([source(0, 100)])
    whole = Store({"files/0": b"x" * 100}, random.Random(1))
    receipts = build(plan, whole)
    wrong = {1: PartReceipt(1, "etag-1", ()), 99: PartReceipt(99, "etag-99", (1,)), 2: receipts[1]}
    second = Store({"files/0": b"x" * 100}, random.Random(1))
    assert build(plan, second, done=wrong) == receipts
    assert set(second.parts) == set(range(1, len(receipts) + 1)) - {2}


def test_a_finished_build_asks_the_store_for_nothing() -> None:
    plan = plan_of([source(0, 100), source(1, 0)])
    receipts = build(plan, Store({"files/0": b"x" * 100}, random.Random(1)))
    store = Store({}, random.Random(1))
    progress: list[tuple[int, int]] = []
    assert build(plan, store, done={r.number: r for r in receipts}, progress=progress) == receipts
    assert (store.reads, store.parts, progress) == ([], {}, [(plan.total_bytes, 2)])


def test_an_archive_of_nothing_is_an_empty_zip() -> None:
    plan = plan_of([])
    store = Store({}, random.Random(1))
    build(plan, store)
    assert store.archive() == b"PK\5\6" + bytes(18)


def test_a_header_waits_for_its_crc_exactly_when_its_parts_fit_the_slots() -> None:
    header = plan_of([source(0, 1)]).entries[0].data_offset
    fits, misses = (plan_of([source(0, 192 - header + more)], part_bytes=64, slots=3) for more in (0, 1))
    assert [plan.entries[0].has_descriptor for plan in (fits, misses)] == [False, True]


def test_fewer_slots_than_planned_are_refused() -> None:
    with pytest.raises(ValueError, match="slots is 1, the plan needs 2"):
        build(plan_of([], slots=2), Store({}, random.Random(1)), slots=1)


def test_small_archives_take_small_buffers() -> None:
    store = Store({"files/0": b"x" * 100}, random.Random(1))
    plan = plan_of([source(0, 100)], part_bytes=8 << 20)
    build(plan, store)
    assert [len(buffer) for buffer in store.buffers.values() if isinstance(buffer, bytearray)] == [plan.total_bytes]


def test_this_version_of_the_format_stays_as_it_is() -> None:
    """If this fails, the bytes or the digest changed: raise FORMAT_VERSION, so that no upload mixes two formats."""
    files = [source(0, 100), source(1, 0, name="\u00e9"), source(2, 20)]
    plan = plan_of(files, part_bytes=100, slots=1, extra=[("delineate-skipped.txt", b"1", 0.0)])
    store = Store({"files/0": b"x" * 100, "files/2": b"y" * 20}, random.Random(1))
    build(plan, store)
    assert [entry.has_descriptor for entry in plan.entries] == [True, False, False, False]
    assert (FORMAT_VERSION, plan.digest, hashlib.sha256(store.archive()).hexdigest()) == (
        1,
        "49b49d70dfb4e00121037a1dd71706f581622653219323bedaa9aa3148326db0",
        "80c82a277dc36d47ddc3def3aca1aba736ebec833677d83ae963bc04779a4967",
    )
