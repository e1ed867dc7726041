"""Prometheus' own tool, which tells whether it would take what we give it."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest


def promtool_check(what: str, *words: str, text: str = "") -> str:
    """`promtool check WHAT WORDS` on `text`; what it said. Skips where it is not installed, and fails in CI."""
    return _promtool("check", what, *words, text=text)


def promtool_test_rules(file: str) -> str:
    """`promtool test rules FILE`; skips and fails as the other does."""
    return _promtool("test", "rules", file)


def _promtool(*words: str, text: str = "") -> str:
    promtool = shutil.which("promtool")
    if promtool is None:
        missing = f"promtool is not installed (Debian package: prometheus): no `promtool {' '.join(words[:2])}`"
        if os.environ.get("CI") == "true":
            pytest.fail(missing)
        pytest.skip(missing)
    done = subprocess.run([promtool, *words], input=text, capture_output=True, text=True, timeout=300)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    return said
