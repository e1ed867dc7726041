"""Fixtures of the chaos tests."""

from __future__ import annotations

from tests.run.conftest import make_up

__all__ = ["make_up"]
