"""Entry names are safe on every system, different from each other, and what the user would recognise."""

from __future__ import annotations

import time
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from delineate.archive.names import entry_names

HOSTILE = st.one_of(
    st.sampled_from(
        ["/", "\\", "..", ".", ":", "C:\\", " ", "a", "A", " (2)", ".tar.gz", ".pdf", "x" * 300, "漢" * 100]
    ),
    st.sampled_from(["CON", "nul.txt", "com¹", "e\u0301", "é", "ß", "SS", "K", "\u212a", "😀"]),
    st.sampled_from(["\u202e", "\u200b", "\0", "\n", "\ud800", "\u3000", "\u2028"]),
)
NAMES = st.one_of(
    st.lists(HOSTILE, max_size=6).map("".join),
    st.text(st.characters(), max_size=40),
    st.sampled_from(["a.txt", "A.TXT", "a (2).txt", "a (3).txt", "a", "a (2)"]),
)


def one(name: str, max_bytes: int = 255) -> str:
    return entry_names([name], max_bytes)[0]


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        ("report.pdf", "report.pdf"),
        ("reports/2024.pdf", "reports_2024.pdf"),
        ("/etc/passwd", "etc_passwd"),
        ("../../etc/passwd", "etc_passwd"),
        ("a/./b/../c.txt", "a_b_c.txt"),
        ("C:\\Users\\me\\cv.doc", "Users_me_cv.doc"),
        ("\u200bC:\\cv.doc", "cv.doc"),
        ("c:cv.doc", "c_cv.doc"),
        ('<a>:"b"|c?*.txt', "_a___b__c__.txt"),
        ("a\tb\r\nc.txt", "abc.txt"),
        ("invoice\u202efdp.exe", "invoicefdp.exe"),
        ("bad\ud800.txt", "bad_.txt"),
        ("e\u200d\u0301.txt", "é.txt"),
        ("cafe\u0301.txt", "café.txt"),
        ("trailing. . ", "trailing"),
        ("  leading", "leading"),
        ("\u3000wide\u00a0", "wide"),
        ("", "file"),
        ("...", "file"),
        ("/", "file"),
        ("..\\..", "file"),
        (".bashrc", ".bashrc"),
        ("CON", "CON_"),
        ("nul.txt", "nul_.txt"),
        ("Com1 .tar.gz", "Com1_ .tar.gz"),
        ("LPT³", "LPT³_"),
        ("CONIN$", "CONIN$_"),
        ("console.log", "console.log"),
        ("com10.txt", "com10.txt"),
        ("x" * 300 + ".pdf", "x" * 251 + ".pdf"),
        ("漢" * 100 + ".pdf", "漢" * 83 + ".pdf"),
        ("x" * 300 + ".tar.gz", "x" * 248 + ".tar.gz"),
        ("x" * 250 + "." + "y" * 30, "x" * 250 + "." + "y" * 4),
    ],
)
def test_a_name_becomes_safe_and_stays_recognisable(raw: str, name: str) -> None:
    assert one(raw) == name


def test_a_cut_that_leaves_a_device_name_is_noticed() -> None:
    assert one("con" + " " * 300 + "x", 32) == "con_"


@pytest.mark.parametrize(
    ("raw", "names"),
    [
        (["a.txt", "a.txt", "a.txt"], ["a.txt", "a (2).txt", "a (3).txt"]),
        (["a.txt", "A.TXT"], ["a.txt", "A (2).TXT"]),
        (["a.txt", "a.txt", "a (2).txt"], ["a.txt", "a (3).txt", "a (2).txt"]),
        (["x/a", "x_a"], ["x_a", "x_a (2)"]),
        (["é", "e\u0301"], ["é", "é (2)"]),
        (["straße", "STRASSE"], ["straße", "STRASSE (2)"]),
        (["b.tar.gz", "b.tar.gz"], ["b.tar.gz", "b (2).tar.gz"]),
        (["Mr. Smith", "Mr. Smith"], ["Mr. Smith", "Mr. Smith (2)"]),
        ([".bashrc", ".bashrc"], [".bashrc", ".bashrc (2)"]),
        (["", ""], ["file", "file (2)"]),
        (["NUL", "nul"], ["NUL_", "nul_ (2)"]),
        (["x" * 255] * 2, ["x" * 255, "x" * 251 + " (2)"]),
    ],
)
def test_later_files_of_a_name_get_a_number(raw: list[str], names: list[str]) -> None:
    assert entry_names(raw, 255) == names


@given(st.lists(NAMES, max_size=30), st.integers(32, 300))
def test_any_names_become_safe_and_distinct(raw: list[str], max_bytes: int) -> None:
    names = entry_names(raw, max_bytes)
    assert len(names) == len(raw)
    assert len({name.casefold() for name in names}) == len(raw)
    assert entry_names(raw, max_bytes) == names
    for name in names:
        assert 1 <= len(name.encode()) <= max_bytes
        assert unicodedata.is_normalized("NFC", name)
        assert not set(name) & set('/\\<>:"|?*')
        assert not {unicodedata.category(char) for char in name} & {"Cc", "Cf", "Cs", "Zl", "Zp"}
        assert name[-1] not in " ."
        assert not name.startswith(" ")
        assert name.split(".")[0].strip().upper() not in {"CON", "PRN", "AUX", "NUL", "COM1", "COM¹", "LPT9", "CONIN$"}


@given(st.lists(NAMES, max_size=30))
def test_the_first_file_of_a_name_keeps_it(raw: list[str]) -> None:
    alone = [one(name) for name in raw]
    together = entry_names(raw, 255)
    seen: set[str] = set()
    for name, given_name in zip(alone, together, strict=True):
        folded = unicodedata.normalize("NFD", unicodedata.normalize("NFD", name).casefold())
        assert (given_name == name) == (folded not in seen)
        seen.add(folded)


@pytest.mark.parametrize(
    "raw",
    [
        ["same.txt"] * 50_000,
        [f"{'x' * 248}{number:05}.t" for number in range(25_000)] * 2,
        ["same.txt"] * 25_000 + [f"same ({number}).txt" for number in range(25_000)],
    ],
    ids=["equal", "differing-only-where-they-are-cut", "numbers-taken"],
)
def test_many_equal_names_take_linear_time(raw: list[str]) -> None:
    began = time.process_time()
    names = entry_names(raw, 255)
    # Linear: about 0.3 s. Quadratic: minutes.
    assert time.process_time() - began < 10
    assert len(set(names)) == len(raw)


def test_a_limit_too_small_for_any_name_is_refused() -> None:
    with pytest.raises(ValueError, match="32"):
        entry_names(["a"], 31)
