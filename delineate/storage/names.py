"""File names on their way through HTTP headers: read from an object's headers, written into Content-Disposition."""

from __future__ import annotations

import email.errors
import email.header
import re
import unicodedata
from collections.abc import Mapping
from urllib.parse import quote, unquote_to_bytes

_METADATA = "x-amz-meta-filename"
_ENCODED = re.compile(r"[A-Za-z0-9\-._~!$&'()*+,;=:@/]*(?:%[0-9A-Fa-f]{2}[A-Za-z0-9\-._~!$&'()*+,;=:@/]*)+")
_EXTENDED = re.compile(r"filename\*\s*=\s*([A-Za-z0-9\-]+)'[^']*'([^;\s]+)", re.IGNORECASE)
_PLAIN = re.compile(r'filename\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^;]+))', re.IGNORECASE)


def name_of(headers: Mapping[str, str], key: str) -> str:
    """What an object's owner calls it: its `filename` metadata, else Content-Disposition, else the key's last part.

    Unsanitised: it may hold slashes and control characters.
    """
    return (
        _decoded(headers.get(_METADATA, ""))
        or _from_disposition(headers.get("Content-Disposition", ""))
        or key.rstrip("/").rpartition("/")[2]
        or key
    )


def metadata_value(name: str) -> str:
    """`name` as a value of S3 metadata, which is ASCII: percent-encoded unless it is plain; `name_of` reads it back."""
    plain = name.isascii() and name.isprintable() and "%" not in name and "=?" not in name and name == name.strip()
    return name if plain else quote(name, safe="")


def content_disposition(name: str) -> str:
    """An `attachment` header for `name`: an ASCII stand-in for old clients and the true name in UTF-8 (RFC 6266)."""
    # Decomposed, "é" keeps its "e"; what has no ASCII part becomes "_". Quotes, backslashes and percent signs
    # are read differently by different browsers.
    decomposed = "".join(char for char in unicodedata.normalize("NFKD", name) if not unicodedata.combining(char))
    stand_in = re.sub(r'[^\x20-\x7e]|["\\%]', "_", decomposed)
    return f"attachment; filename=\"{stand_in}\"; filename*=UTF-8''{quote(name, safe='')}"


def _decoded(value: str) -> str:
    """Undo RFC 2047 (how AWS returns metadata beyond ASCII) or percent-encoding (how most clients store it)."""
    value = _as_utf8(value.strip())
    if value.startswith("=?") and value.endswith("?="):
        try:
            return str(email.header.make_header(email.header.decode_header(value)))
        except (email.errors.HeaderParseError, LookupError, ValueError):
            return value
    # Only a value without a single character that encoding would have replaced:
    # "100%25 sure.txt" has a space, so its percent sign is its owner's.
    if _ENCODED.fullmatch(value):
        try:
            return unquote_to_bytes(value).decode()
        except UnicodeDecodeError:
            return value
    return value


def _from_disposition(header: str) -> str:
    if extended := _EXTENDED.search(header):
        try:
            return unquote_to_bytes(extended[2]).decode(extended[1])
        except (LookupError, UnicodeDecodeError):
            pass  # a charset nobody knows: the plain name serves
    if plain := _PLAIN.search(header):
        quoted = plain[1]
        return _decoded(re.sub(r"\\(.)", r"\1", quoted) if quoted is not None else plain[2])
    return ""


def _as_utf8(value: str) -> str:
    """Repair what a header parser made of raw bytes: surrogates of UTF-8 that was no UTF-8 are Latin-1."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return value.encode("utf-8", "surrogateescape").decode("latin-1")
    return value
