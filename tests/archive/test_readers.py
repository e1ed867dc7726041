"""Archives open in the programs that people have, also where ZIP64 is needed.

Info-ZIP, 7-Zip and libarchive (Windows' and macOS' own reader) judge the bytes.
A developer without one of them skips its tests; CI must have them all.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import subprocess
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from delineate.archive.build import build_archive
from delineate.archive.plan import ArchivePlan
from delineate.job import SourceFile
from tests.archive.fakes import MODIFIED, Store, build, plan_of, source

TESTERS = [["unzip", "-tq"], ["7z", "t"], ["bsdtar", "-tvf"]]
MEBIBYTE = 1 << 20
ZEROS = bytes(8 * MEBIBYTE)


UTF8 = {**os.environ, "LC_ALL": "C.UTF-8", "TZ": "UTC"}


def require(tool: str) -> None:
    if shutil.which(tool) is None:
        message = f"{tool} is not installed (apt-get install unzip p7zip-full libarchive-tools)"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)


def judge(command: Sequence[str]) -> None:
    """Run a program over an archive; its verdict must be good, without a warning."""
    require(command[0])
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=UTF8)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning" not in (done.stdout + done.stderr).lower()


class SparseStore:
    """Every file is zeros; parts of zeros are holes on disk, so that gigabytes take no room."""

    def __init__(self, path: Path, plan: ArchivePlan) -> None:
        self._part_bytes = plan.part_bytes
        self._file = os.open(path, os.O_RDWR | os.O_CREAT)
        os.truncate(self._file, plan.total_bytes)

    async def read(
        self, file: SourceFile, start: int, into: memoryview, on_chunk: Callable[[memoryview], None]
    ) -> None:
        into[:] = ZEROS[: len(into)]
        on_chunk(into)

    async def put_part(self, number: int, body: memoryview) -> str:
        await asyncio.sleep(0)
        if body.tobytes() != ZEROS[: len(body)]:
            os.pwrite(self._file, body, (number - 1) * self._part_bytes)
        return "etag"

    def close(self) -> None:
        os.close(self._file)


def build_sparse(path: Path, plan: ArchivePlan) -> None:
    store = SparseStore(path, plan)
    asyncio.run(
        build_archive(
            plan,
            store.read,
            store.put_part,
            slots=plan.slots,
            fetch_concurrency=8,
            on_progress=lambda bytes_done, files_done: None,
        )
    )
    store.close()


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small files in every shape: empty, with and without descriptor, a ZIP inside, names of many scripts."""
    inner = random.Random(1).randbytes(3000) + b"PK\7\10" + bytes(12) + b"PK\3\4" + bytes(500)
    contents = {"files/0": inner, "files/1": b"", "files/2": b"hello", "files/3": inner}
    names = ["inner.zip", "empty", "Grüße 漢字 😀.txt", "INNER.ZIP"]
    files = [source(n, len(contents[f"files/{n}"]), name=name) for n, name in enumerate(names)]
    plan = plan_of(files, part_bytes=512, slots=2, extra=[("delineate-skipped.txt", b"70004\r\n", MODIFIED)])
    assert [entry.has_descriptor for entry in plan.entries] == [True, False, False, True, False]
    store = Store(contents, random.Random(1))
    build(plan, store)
    path = tmp_path_factory.mktemp("mixed") / "mixed.zip"
    path.write_bytes(store.archive())
    return path


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = Store({}, random.Random(1))
    build(plan_of([]), store)
    path = tmp_path_factory.mktemp("empty") / "empty.zip"
    path.write_bytes(store.archive())
    return path


@pytest.fixture(scope="module")
def huge(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ArchivePlan]:
    """One entry over 4 GiB, then entries whose offsets are over 4 GiB."""
    files = [source(0, 10), source(1, (1 << 32) + 5), source(2, 0), source(3, 9 * MEBIBYTE)]
    plan = plan_of(files, part_bytes=8 * MEBIBYTE, slots=3)
    path = tmp_path_factory.mktemp("huge") / "huge.zip"
    build_sparse(path, plan)
    return path, plan


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ArchivePlan]:
    """More entries than the classic end record can count."""
    plan = plan_of([source(number, number % 3) for number in range(65_540)], part_bytes=MEBIBYTE, slots=2)
    path = tmp_path_factory.mktemp("many") / "many.zip"
    build_sparse(path, plan)
    return path, plan


@pytest.mark.parametrize("command", TESTERS, ids=lambda command: command[0])
def test_small_archives_open_everywhere(mixed: Path, command: Sequence[str]) -> None:
    judge([*command, str(mixed)])


def test_names_times_and_modes_survive_unpacking(mixed: Path, tmp_path: Path) -> None:
    require("unzip")
    subprocess.run(["unzip", "-q", str(mixed), "-d", str(tmp_path)], check=True, env=UTF8)
    names = {"inner.zip", "empty", "Grüße 漢字 😀.txt", "INNER (2).ZIP", "delineate-skipped.txt"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert (tmp_path / "Grüße 漢字 😀.txt").read_bytes() == b"hello"
    for path in tmp_path.iterdir():
        assert path.stat().st_mtime == int(MODIFIED)
        assert path.stat().st_mode & 0o777 == 0o644


def test_a_reader_that_cannot_seek_gets_every_byte(mixed: Path) -> None:
    require("bsdtar")
    with zipfile.ZipFile(mixed) as archive:
        for name in archive.namelist():
            command = ["bsdtar", "-xOf", "-", name]
            streamed = subprocess.run(command, input=mixed.read_bytes(), capture_output=True, check=True, env=UTF8)
            assert streamed.stdout == archive.read(name)


def test_an_empty_archive_opens(empty: Path) -> None:
    for command in (["7z", "t"], ["bsdtar", "-tf"]):  # unzip calls every empty archive bad
        require(command[0])
        subprocess.run([*command, str(empty)], check=True, capture_output=True)


@pytest.mark.parametrize(
    "command",
    # unzip needs 30 s for the CRC of 4 GiB of one entry: it tests those around it, 7z tests all.
    [["unzip", "-tq", "{}", "-x", "1.bin"], ["7z", "t", "{}"], ["bsdtar", "-tvf", "{}"]],
    ids=lambda command: command[0],
)
def test_an_entry_over_4_gib_opens_everywhere(huge: tuple[Path, ArchivePlan], command: Sequence[str]) -> None:
    judge([part.format(huge[0]) for part in command])


def test_an_entry_over_4_gib_is_as_planned(huge: tuple[Path, ArchivePlan]) -> None:
    path, plan = huge
    assert path.stat().st_size == plan.total_bytes > 1 << 32
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
        assert [info.header_offset for info in infos] == [entry.offset for entry in plan.entries]
        assert [info.file_size for info in infos] == [entry.size for entry in plan.entries]
        # ZIP64 only where needed: of the entry's size, of the offsets behind it, not before.
        assert [info.extract_version for info in infos] == [20, 45, 45, 45]
        assert [bool(info.flag_bits & 8) for info in infos] == [False, True, False, False]
        for info in (infos[0], infos[2], infos[3]):
            assert archive.read(info) == bytes(info.file_size)


@pytest.mark.parametrize("command", TESTERS, ids=lambda command: command[0])
def test_more_than_65535_entries_open_everywhere(many: tuple[Path, ArchivePlan], command: Sequence[str]) -> None:
    judge([*command, str(many[0])])


def test_more_than_65535_entries_are_as_planned(many: tuple[Path, ArchivePlan]) -> None:
    path, plan = many
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
        assert [info.header_offset for info in infos] == [entry.offset for entry in plan.entries]
        assert {info.extract_version for info in infos} == {20}
        assert archive.testzip() is None
