from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from delineate.storage.names import content_disposition, metadata_value, name_of

META = "x-amz-meta-filename"
DISPOSITION = "Content-Disposition"


@pytest.mark.parametrize(
    ("headers", "name"),
    [
        ({META: "report.pdf"}, "report.pdf"),
        ({META: "F%C3%BC%C3%9Fe%20%26%20100%25.txt"}, "Füße & 100%.txt"),
        ({META: "100%25 sure.txt"}, "100%25 sure.txt"),
        ({META: "50%off.txt"}, "50%off.txt"),
        ({META: "caf%E9.txt"}, "caf%E9.txt"),
        ({META: "=?UTF-8?Q?F=C3=BC=C3=9Fe.txt?="}, "Füße.txt"),
        ({META: "=?UTF-8?B?8J+Ygi50eHQ=?="}, "😂.txt"),
        ({META: "=?no-such-charset?Q?x?="}, "=?no-such-charset?Q?x?="),
        ({META: "日本.txt"}, "日本.txt"),
        ({META: "caf\udce9.txt"}, "café.txt"),
        ({META: "  ", DISPOSITION: 'attachment; filename="b.txt"'}, "b.txt"),
        ({DISPOSITION: "attachment; filename=\"e.txt\"; filename*=UTF-8''%E2%82%AC.txt"}, "€.txt"),
        ({DISPOSITION: "attachment; filename*=nonsense''x; filename=b.txt"}, "b.txt"),
        ({DISPOSITION: r'attachment; filename="a \"b\".txt"'}, 'a "b".txt'),
        ({DISPOSITION: "inline"}, "70000.bin"),
        ({}, "70000.bin"),
    ],
)
def test_name_is_metadata_then_disposition_then_key(headers: dict[str, str], name: str) -> None:
    assert name_of(headers, "deep/down/70000.bin") == name


@given(st.text(min_size=1).filter(lambda name: name.strip() and name.isprintable()))
def test_every_name_survives_metadata_and_disposition(name: str) -> None:
    assert metadata_value(name).isascii()
    assert name_of({META: metadata_value(name)}, "key") == name
    assert content_disposition(name).isascii()
    assert name_of({DISPOSITION: content_disposition(name)}, "key") == name


def test_disposition_has_a_stand_in_for_old_clients() -> None:
    assert content_disposition('é "5%".zip') == (
        "attachment; filename=\"e _5__.zip\"; filename*=UTF-8''%C3%A9%20%225%25%22.zip"
    )


def test_disposition_lets_no_header_in() -> None:
    assert "\r" not in content_disposition("a\r\nSet-Cookie: b")
    assert "\n" not in content_disposition("a\r\nSet-Cookie: b")
