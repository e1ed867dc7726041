"""What a new store needs: `delineate buckets` makes the buckets, `delineate seed` puts sample files for a first try.

The samples are the same on every machine, so that a test can compare what
comes out of an archive, byte by byte, with `SAMPLES`.
"""

from __future__ import annotations

import logging
import random
import struct
import zlib
from collections.abc import Callable, Iterable
from typing import NamedTuple

import msgspec

from delineate.config import Config
from delineate.storage import open_storage, wait_for_storage

log = logging.getLogger(__name__)


class Sample(NamedTuple):
    file_id: int
    filename: str
    body: Callable[[], bytes]


async def seed(config: Config) -> int:
    """Put every sample into the source bucket if it is empty; the number of files put.

    Raises BucketMissing, and StorageUnavailable or StorageTimeout if the store does not answer.
    """
    async with open_storage(config.storage) as storage:
        if await storage.has_sources():
            log.info("the source bucket has files already: no samples put")
            return 0
    return await put_samples(config, (sample.file_id for sample in SAMPLES))


async def make_buckets(config: Config) -> None:
    """Wait for the store, create the buckets that are missing, and set the rule that removes old archives.

    Raises StartupError or BucketMissing for what waiting does not cure.
    """
    creating = msgspec.structs.replace(config.storage, create_buckets=True)
    async with open_storage(creating) as storage:
        await wait_for_storage(storage)
        await storage.set_lifecycle()
    context = {"files": creating.source_bucket, "archives": creating.archive_bucket}
    log.info("both buckets are there", extra={"context": context})


async def seed_when_ready(config: Config) -> None:
    """`seed`, as soon as the store answers. Raises StartupError or BucketMissing for what waiting does not cure."""
    async with open_storage(config.storage) as storage:
        await wait_for_storage(storage)
    await seed(config)


async def put_samples(config: Config, file_ids: Iterable[int]) -> int:
    """Put the samples with these ids, over whatever is there; the number of files put."""
    wanted = set(file_ids)
    chosen = [sample for sample in SAMPLES if sample.file_id in wanted]
    async with open_storage(config.storage) as storage:
        for sample in chosen:
            await storage.put_source(sample.file_id, sample.body(), sample.filename)
    log.info("%d sample files put", len(chosen))
    return len(chosen)


def _text(sentence: str, lines: int) -> Callable[[], bytes]:
    return lambda: "".join(f"{number:05d} {sentence}\n" for number in range(1, lines + 1)).encode()


def _noise(seed_value: int, size: int) -> Callable[[], bytes]:
    return lambda: random.Random(seed_value).randbytes(size)


def _png() -> bytes:
    """A square of 64 x 64 pixels that fades from blue to orange, stored (level 0) so that no zlib changes a byte."""
    side = 64
    rows = b"".join(
        b"\0" + b"".join(bytes((40 + 3 * x, 90 + y, 220 - 3 * x)) for x in range(side)) for y in range(side)
    )

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 0)) + chunk(b"IEND", b"")


# Two share a name, one is not ASCII, one is empty: what an archive has to get right.
SAMPLES = (
    Sample(70000, "read me first.txt", _text("These files were made up for a first try of delineate.", 10)),
    Sample(70001, "report.csv", _text("2026-01-31;north;1,204.50", 400)),
    Sample(70002, "report.csv", _text("2026-02-28;south;987.25", 300)),
    Sample(70003, "Übersicht 概要.md", _text("Grüße aus Köln, ご挨拶, поздрав", 40)),
    Sample(70004, "empty.dat", lambda: b""),
    Sample(70005, "fading.png", _png),
    Sample(70006, "settings.json", lambda: b'{"theme": "dark", "columns": [3, 5, 8]}\n'),
    Sample(70007, "server.log", _text("INFO  a line like all the others", 3000)),
    Sample(70008, "one byte.bin", lambda: b"\n"),
    Sample(70009, "photo.raw", _noise(70009, 300_000)),
    Sample(70010, "one megabyte.bin", _noise(70010, 1_000_000)),
    Sample(70011, "five megabytes.bin", _noise(70011, 5_000_000)),
)
