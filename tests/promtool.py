"""Prometheus' own tool, which tells whether it would take what we give it."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest


def promtool_check(what: str, *words: str, text: str = "") -> str:
    """`promtool check WHAT WORDS` on `text`; what it said. Skips where it is not installed, and fails in CI."""
    promtool = shutil.which("promtool")
    if promtool is None:
        missing = f"promtool is not installed (Debian package: prometheus): the {what} are not checked by it"
        if os.environ.get("CI") == "true":
            pytest.fail(missing)
        pytest.skip(missing)
    done = subprocess.run([promtool, "check", what, *words], input=text, capture_output=True, text=True, timeout=30)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    return said
