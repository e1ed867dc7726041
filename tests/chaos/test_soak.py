"""A short soak: enough kills, pauses and outages to see that nothing is lost (`make soak` runs a long one)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.soak import Soak

SECONDS = 25


@pytest.mark.timeout(seconds=300)
async def test_no_job_is_lost_stuck_or_wrong_while_everything_breaks(tmp_path: Path) -> None:
    soak = Soak(tmp_path, seed=7)
    kept = await soak.run(SECONDS)
    assert kept, soak.counts
    assert soak.counts["completed and verified"] > 20
    assert soak.counts["streams that showed the end"] > 5
    for file in (tmp_path / "s3").rglob("*"):
        if file.is_file():
            file.unlink()
