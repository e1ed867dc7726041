"""Entry names: what users called their files, made safe to unpack on every system and different from each other.

A stored file may be called anything; the archive is unpacked on Windows, macOS
and Linux, by tools that trust it. One file is one entry in one flat folder: a
name with slashes ("reports/2024.pdf") is flattened ("reports_2024.pdf"), since
folders that the user never made would hide files, and "../" must not work.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

MIN_NAME_BYTES = 32  # leaves room for an extension, " (1000000)" and a letter of any script
MAX_EXTENSION_BYTES = 16
FALLBACK = "file"

_SPACES = " \u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000"
_SPACES_AND_DOTS = _SPACES + "."
_DRIVE = re.compile(r"[A-Za-z]:(?=[/\\])")
_SLASHES = re.compile(r"[/\\]")
_REPLACED = str.maketrans(dict.fromkeys('<>:"|?*', "_"))
# Windows opens a device for these, whatever follows the first dot; the superscript digits count too.
# https://learn.microsoft.com/en-us/windows/win32/fileio/naming-a-file
_DEVICE = re.compile(r"(CON|PRN|AUX|NUL|CONIN\$|CONOUT\$|(?:COM|LPT)[0-9¹²³])(?=\s*(?:\.|\Z))", re.IGNORECASE)


class _Invisible(dict[int, str | None]):
    """A `str.translate` table that drops what shows nothing and replaces what UTF-8 cannot carry.

    Cc are controls; Cf holds the bidi overrides that make "fdp.exe" of "exe.pdf"
    and other characters nobody sees; Zl and Zp break lines; Cs are lone
    surrogates. Only ASCII is stored: names decide how far the table would grow.
    """

    def __missing__(self, code: int) -> str | None:
        match unicodedata.category(chr(code)):
            case "Cc" | "Cf" | "Zl" | "Zp":
                return None
            case "Cs":
                return "_"
        return chr(code)


_INVISIBLE = _Invisible({code: None if code < 32 or code == 127 else chr(code) for code in range(128)})


def entry_names(raw: Sequence[str], max_bytes: int) -> list[str]:
    """One safe name for each of `raw`, in its order, no two the same even without regard to case.

    The first file of a name keeps it; later ones become "name (2).ext", "name (3).ext",
    never a name that any other file has by itself. Every name is NFC and has 1 to
    `max_bytes` bytes of UTF-8, its extension kept. The same input gives the same
    names. Takes O(n), also for n equal names.

    Raises ValueError if `max_bytes` is under MIN_NAME_BYTES.
    """
    if max_bytes < MIN_NAME_BYTES:
        raise ValueError(f"max_bytes is {max_bytes}; a name needs {MIN_NAME_BYTES}")
    names = [_sanitise(name, max_bytes) for name in raw]
    folded = [_fold(name) for name in names]
    taken = set(folded)
    unseen = set(folded)
    # No number rises above len(raw) + 1: each number tried is given away here or belongs to one of len(raw) names.
    stem_bytes = max_bytes - len(f" ({len(raw) + 1})")
    next_number: dict[str, int] = {}
    for index, name in enumerate(names):
        if folded[index] in unseen:
            unseen.remove(folded[index])
            continue
        stem, extension = _split(name)
        stem = _cut(stem, stem_bytes - len(extension.encode()))
        # Counted by the shortened stem: long names that differ only at the end come to share
        # one, and counting each from 2 again would be quadratic.
        family = _fold(f"{stem}\0{extension}")
        number = next_number.get(family, 2)
        while (candidate := _fold(numbered := f"{stem} ({number}){extension}")) in taken:
            number += 1
        next_number[family] = number + 1
        taken.add(candidate)
        names[index] = numbered
    return names


def _sanitise(raw: str, max_bytes: int) -> str:
    # Invisible characters go first: they could hide a "..", a drive or a composed character from what follows.
    visible = _DRIVE.sub("", raw.translate(_INVISIBLE), count=1)
    segments = [segment for segment in _SLASHES.split(visible) if segment.strip(_SPACES_AND_DOTS)]
    name = unicodedata.normalize("NFC", "_".join(segments).translate(_REPLACED))
    name = _fit(name.lstrip(_SPACES).rstrip(_SPACES_AND_DOTS), max_bytes)
    if device := _DEVICE.match(name):  # after the cut, which can leave a device's name
        name = _fit(f"{device[1]}_{name[device.end() :]}", max_bytes)
    return name


def _fit(name: str, max_bytes: int) -> str:
    if len(name.encode()) <= max_bytes:
        return name or FALLBACK
    stem, extension = _split(name)
    return _cut(stem, max_bytes - len(extension.encode())) + extension


def _cut(stem: str, max_bytes: int) -> str:
    """At most `max_bytes` of `stem`, whole code points, not ending in a space or dot, not empty."""
    return stem.encode()[:max_bytes].decode(errors="ignore").rstrip(_SPACES_AND_DOTS) or FALLBACK


def _split(name: str) -> tuple[str, str]:
    """Stem and extension with its dot; "" for what only looks like one: hidden files, "Mr. Smith", long tails."""
    stem, dot, last = name.rpartition(".")
    if stem[-4:].lower() == ".tar":
        stem, dot = stem[:-4], stem[-4:] + dot
    extension = dot + last
    plausible = len(extension.encode()) <= MAX_EXTENSION_BYTES and not any(char.isspace() for char in last)
    return (stem, extension) if plausible and stem.strip(_SPACES_AND_DOTS) else (name, "")


def _fold(name: str) -> str:
    """Equal for names that some file system takes for one (Unicode 3.13, D145: canonical caseless match)."""
    if name.isascii():
        return name.lower()
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", name).casefold())
