"""Fixtures of the stack's tests.

checkout   the compose files and what they mount, with `make env` done; one for all tests, read only
stack      the same as Docker's command line reads it; skips where Docker is not installed, except in CI
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.compose.stack import Stack, make_checkout


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkout(tmp_path_factory.mktemp("checkout") / "delineate")


@pytest.fixture(scope="session")
def stack(checkout: Path) -> Stack:
    if not docker_has_compose():
        missing = "docker with its compose plugin is not installed: the compose files are not checked"
        # .ci/run sets the second where there can be no Docker.
        if os.environ.get("CI") == "true" and os.environ.get("DELINEATE_TEST_IMAGE") != "skip":
            pytest.fail(missing)
        pytest.skip(missing)
    return Stack(checkout)


def docker_has_compose() -> bool:
    if shutil.which("docker") is None:
        return False
    return subprocess.run(["docker", "compose", "version"], capture_output=True, timeout=30).returncode == 0
