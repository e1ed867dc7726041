"""The ZIP records around the files' bytes: exact lengths while planning, exact bytes while building.

Nothing is compressed (STORE), names are UTF-8, and ZIP64 fields appear only
where a value does not fit the classic field, so that old readers can open
every archive that they could.

Source: https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT (section numbers below)
"""

from __future__ import annotations

import struct
import time

import msgspec

from delineate.job import SourceFile

U16 = 0xFFFF
U32 = 0xFFFFFFFF
EARLIEST = 315_532_800  # 1980-01-01T00:00:00Z and 2107-12-31T23:59:58Z: what DOS dates reach
LATEST = 4_354_819_198
LATEST_TIMESTAMP = 0x7FFFFFFF  # 2038-01-19T03:14:07Z: what the extended timestamp reaches

UTF8_NAME = 1 << 11  # 4.4.4
CRC_FOLLOWS = 1 << 3  # 4.4.4
VERSION_PLAIN, VERSION_ZIP64 = 20, 45  # 4.4.3.2
MADE_BY_UNIX = 3 << 8 | 63  # 4.4.2.2: Unix; 6.3 is the version that brought UTF-8 names
REGULAR_FILE_0644 = 0o100644 << 16

_LOCAL = struct.Struct("<IHHHHHIIIHH")
_CENTRAL = struct.Struct("<IHHHHHHIIIHHHHHII")
_END = struct.Struct("<IHHHHIIH")
_END64 = struct.Struct("<IQHHIIQQQQ")
_LOCATOR = struct.Struct("<IIQI")
_TIMESTAMP = struct.Struct("<HHBi")


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One file of the archive and where it lies; offsets and sizes are bytes.

    `seconds` is the modification time in Unix seconds, within what DOS dates reach.
    `crc` is the CRC-32 if it is known before anything is read, else None. `file` is
    None for an entry made in memory, whose bytes are `content`. `has_descriptor`:
    the CRC comes after the bytes, because the header has left by then.
    """

    name: bytes
    size: int
    seconds: int
    offset: int
    data_offset: int
    has_descriptor: bool
    crc: int | None
    file: SourceFile | None
    content: bytes = b""

    @property
    def data_end(self) -> int:
        return self.data_offset + self.size

    @property
    def end(self) -> int:
        return self.data_end + (descriptor_bytes(self.size) if self.has_descriptor else 0)


def clamp_time(modified: float) -> int:
    """Whole Unix seconds that a DOS date can express; not-a-number becomes the latest."""
    return int(max(EARLIEST, min(LATEST, modified)))


def local_header_bytes(name: bytes, size: int, seconds: int) -> int:
    return _LOCAL.size + len(name) + len(_local_extra(size, seconds))


def descriptor_bytes(size: int) -> int:
    return 24 if size >= U32 else 16


def central_header_bytes(entry: Entry) -> int:
    return _CENTRAL.size + len(entry.name) + len(_central_extra(entry))


def end_bytes(count: int, directory_offset: int, directory_bytes: int) -> int:
    needs_zip64 = count >= U16 or directory_offset >= U32 or directory_bytes >= U32
    return _END.size + (_END64.size + _LOCATOR.size if needs_zip64 else 0)


def local_header(entry: Entry, crc: int) -> bytes:
    """The record before a file's bytes (4.3.7).

    With a descriptor the CRC is 0 but the sizes stay, against 4.4.4: a reader that
    streams has no other way to know where a stored file ends.
    """
    dos_time, dos_date = _dos(entry.seconds)
    extra = _local_extra(entry.size, entry.seconds)
    size = min(entry.size, U32)
    return (
        _LOCAL.pack(
            0x04034B50,
            VERSION_ZIP64 if entry.size >= U32 else VERSION_PLAIN,
            UTF8_NAME | (CRC_FOLLOWS if entry.has_descriptor else 0),
            0,
            dos_time,
            dos_date,
            0 if entry.has_descriptor else crc,
            size,
            size,
            len(entry.name),
            len(extra),
        )
        + entry.name
        + extra
    )


def descriptor(entry: Entry, crc: int) -> bytes:
    """The record after a file's bytes (4.3.9), with 8-byte sizes if the header has a ZIP64 field (4.3.9.2)."""
    return struct.pack("<IIQQ" if entry.size >= U32 else "<IIII", 0x08074B50, crc, entry.size, entry.size)


def central_header(entry: Entry, crc: int) -> bytes:
    """The file's record in the central directory (4.3.12)."""
    dos_time, dos_date = _dos(entry.seconds)
    extra = _central_extra(entry)
    size = min(entry.size, U32)
    return (
        _CENTRAL.pack(
            0x02014B50,
            MADE_BY_UNIX,
            VERSION_ZIP64 if entry.size >= U32 or entry.offset >= U32 else VERSION_PLAIN,
            UTF8_NAME | (CRC_FOLLOWS if entry.has_descriptor else 0),
            0,
            dos_time,
            dos_date,
            crc,
            size,
            size,
            len(entry.name),
            len(extra),
            0,
            0,
            0,
            REGULAR_FILE_0644,
            min(entry.offset, U32),
        )
        + entry.name
        + extra
    )


def end_records(count: int, directory_offset: int, directory_bytes: int) -> bytes:
    """What closes the archive: the end record (4.3.16), after its ZIP64 form and locator (4.3.14, 4.3.15) if needed."""
    end = _END.pack(
        0x06054B50, 0, 0, min(count, U16), min(count, U16), min(directory_bytes, U32), min(directory_offset, U32), 0
    )
    if end_bytes(count, directory_offset, directory_bytes) == _END.size:
        return end
    # 4.3.14.1: the size leaves out the signature and itself.
    end64 = _END64.pack(
        0x06064B50,
        _END64.size - 12,
        MADE_BY_UNIX,
        VERSION_ZIP64,
        0,
        0,
        count,
        count,
        directory_bytes,
        directory_offset,
    )
    return end64 + _LOCATOR.pack(0x07064B50, 0, directory_offset + directory_bytes, 1) + end


def _local_extra(size: int, seconds: int) -> bytes:
    """4.5.3: in a local header the ZIP64 field holds both sizes, or is absent."""
    zip64 = struct.pack("<HHQQ", 1, 16, size, size) if size >= U32 else b""
    return zip64 + _timestamp(seconds)


def _central_extra(entry: Entry) -> bytes:
    """4.5.3: the ZIP64 field holds, in this order, only those of sizes and offset that do not fit."""
    values = [entry.size, entry.size] if entry.size >= U32 else []
    if entry.offset >= U32:
        values.append(entry.offset)
    zip64 = struct.pack(f"<HH{len(values)}Q", 1, 8 * len(values), *values) if values else b""
    return zip64 + _timestamp(entry.seconds)


def _timestamp(seconds: int) -> bytes:
    """The time in UTC (4.6.1, 0x5455): a DOS time has no zone. Left out where it overflows; the DOS time still serves.

    Source: https://libzip.org/specifications/extrafld.txt ("Extended Timestamp")
    """
    return _TIMESTAMP.pack(0x5455, 5, 1, seconds) if seconds <= LATEST_TIMESTAMP else b""


def _dos(seconds: int) -> tuple[int, int]:
    """Time and date in MS-DOS format (4.4.6), in UTC, so that the bytes do not depend on this machine's zone."""
    at = time.gmtime(seconds)
    return (
        at.tm_hour << 11 | at.tm_min << 5 | at.tm_sec >> 1,
        (at.tm_year - 1980) << 9 | at.tm_mon << 5 | at.tm_mday,
    )
