"""The stack as Docker's own command line reads it, from a checkout with `make env` done."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent.parent
PRODUCTION = ("compose.yml", "compose.override.yml")
COMBINATIONS = {
    "swarm's file alone": ("compose.yml",),
    "production": PRODUCTION,
    "production with TLS": (*PRODUCTION, "compose.tls.yml"),
    "development": (*PRODUCTION, "compose.dev.yml"),
}
PROFILES = ("seaweedfs", "minio", "")
MOUNTED = (
    "compose.yml",
    "compose.override.yml",
    "compose.tls.yml",
    "compose.dev.yml",
    ".env.example",
    "conf",
    "dashboards",
    "delineate",
)

Rendered = dict[str, Any]


def make_checkout(folder: Path) -> Path:
    """Copy what the compose files use to `folder`, and run conf/make-env there."""
    folder.mkdir()
    for name in MOUNTED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name)
        else:
            shutil.copy(source, folder / name)
    make_env(folder)
    return folder


def make_env(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["sh", "conf/make-env"], cwd=folder, capture_output=True, text=True, timeout=30, check=True)


class Stack:
    """One checkout. Each rendering is made once; the engine is not asked, only Docker's command line."""

    def __init__(self, checkout: Path) -> None:
        self.checkout = checkout
        self._rendered: dict[tuple[tuple[str, ...], str], Rendered] = {}

    def compose(self, files: tuple[str, ...], profile: str) -> Rendered:
        """What `docker compose config` makes of these files. Raises AssertionError with its own words."""
        known = self._rendered.get((files, profile))
        if known is None:
            named = [part for file in files for part in ("-f", file)]
            output = self._run("docker", "compose", *named, "config", "--format", "json", COMPOSE_PROFILES=profile)
            known = self._rendered[files, profile] = json.loads(output)
        return known

    def swarm(self, files: tuple[str, ...]) -> Rendered:
        """What `docker stack deploy` would send; its schema is older and stricter than compose's."""
        named = [part for file in files for part in ("-c", file)]
        rendered: Rendered = yaml.safe_load(self._run("docker", "stack", "config", *named, **self.settings()))
        return rendered

    def settings(self) -> dict[str, str]:
        """.env, as `set -a; . ./.env` reads it."""
        lines = (self.checkout / ".env").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))

    def _run(self, *command: str, **environment: str) -> str:
        done = subprocess.run(
            command,
            cwd=self.checkout,
            env={"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), **environment},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout


def services(rendered: Rendered) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = rendered["services"]
    return found
