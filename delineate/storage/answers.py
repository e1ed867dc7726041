"""What the headers of an S3 answer say: size, ETag, time, and which bytes of how many came."""

from __future__ import annotations

import re
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import NamedTuple

import msgspec

_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


class ObjectInfo(msgspec.Struct, frozen=True, kw_only=True):
    """An object as HEAD describes it: `size` in bytes, `modified` in Unix seconds, 0 if the store does not say."""

    size: int
    etag: str
    modified: float


class ByteRange(NamedTuple):
    """`first` and `last` byte of an answer, both included, and the `total` of the object."""

    first: int
    last: int
    total: int


def info_of(headers: Mapping[str, str]) -> ObjectInfo:
    """Describe the whole object of an answer, be it complete or a part."""
    sent = range_of(headers)
    size = sent.total if sent else int(headers.get("Content-Length", "0"))
    return ObjectInfo(size=size, etag=headers.get("ETag", ""), modified=_modified(headers))


def range_of(headers: Mapping[str, str]) -> ByteRange | None:
    """The Content-Range of an answer, whatever its status: rclone sends one with status 200."""
    match = _CONTENT_RANGE.fullmatch(headers.get("Content-Range", ""))
    return ByteRange(int(match[1]), int(match[2]), int(match[3])) if match else None


def _modified(headers: Mapping[str, str]) -> float:
    try:
        return parsedate_to_datetime(headers["Last-Modified"]).timestamp()
    except (KeyError, ValueError):
        return 0.0
