"""Fixtures of the tests that run the whole service.

service    one `delineate up` for a module's tests, ready and seeded
make_up    makes further ones; everything they start ends with the test
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.run.up import Up


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    up = Up(tmp_path_factory.mktemp("a home"), DELINEATE__RATE_LIMIT__ENABLED="false")
    try:
        up.start()
        yield up
        assert up.stop() == 0
        assert up.processes() == {}
    finally:
        up.end()


@pytest.fixture
def make_up(tmp_path: Path) -> Iterator[Callable[..., Up]]:
    made: list[Up] = []

    def make(**environ: str) -> Up:
        made.append(Up(tmp_path / f"up{len(made)}", DELINEATE__RATE_LIMIT__ENABLED="false", **environ))
        return made[-1]

    yield make
    for up in made:
        up.end()
