"""The Makefile on machines that lack what it needs: one line says what to install."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.run.up import ROOT


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A checkout on a machine with make, a shell and nothing else; programs go into its bin/."""
    (tmp_path / "bin").mkdir()
    for tool in ("make", "sh", "rm", "touch"):
        found = shutil.which(tool)
        assert found
        (tmp_path / "bin" / tool).symlink_to(found)
    for file in ("Makefile", "pyproject.toml"):
        (tmp_path / file).write_bytes((ROOT / file).read_bytes())
    return tmp_path


def make(checkout: Path, target: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(checkout / "bin" / "make"), target],
        cwd=checkout,
        env={"PATH": str(checkout / "bin")},
        capture_output=True,
        text=True,
        timeout=30,
    )


def program(checkout: Path, name: str, script: str) -> None:
    file = checkout / "bin" / name
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)


@pytest.mark.parametrize("target", ["run", "test"])
def test_no_python_is_one_line(bare: Path, target: str) -> None:
    program(bare, "python3", "echo 'an older Python does not say what it is'; exit 1")
    done = make(bare, target)
    assert done.returncode == 2
    assert done.stderr.splitlines()[0].startswith("make: no Python 3.11 or newer on PATH")
    assert not (bare / ".venv").exists()


def test_python_without_venv_is_one_line(bare: Path) -> None:
    program(bare, "python3.12", 'case "$2" in *ensurepip*) exit 1;; esac')
    done = make(bare, "run")
    assert done.returncode == 2
    assert "python3.12 has no venv module" in done.stderr.splitlines()[0]
    assert "apt-get install python3-venv" in done.stderr
    assert not (bare / ".venv").exists()


def test_missing_test_tools_are_named_when_they_cannot_be_installed(bare: Path) -> None:
    program(bare, "id", "echo 1000")
    done = make(bare, "tools")
    assert done.returncode == 2
    assert "the tests need unzip 7z bsdtar curl; install them" in done.stderr.splitlines()[0]
