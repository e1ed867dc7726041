"""The stack of compose.yml as a test runs it: its own files, with stand-ins for the images that are not ours."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.compose.stack import ROOT, make_checkout
from tests.image.app import Served
from tests.image.docker import Docker
from tests.image.standins import build_redis, build_s3
from tests.servers import free_port

# The others watch; their images cannot be pulled everywhere, and nothing here depends on them.
SERVICES = ("nginx", "app", "buckets", "redis", "s3")
S3_PORT = 8333


class Door(Served):
    """The stack through its one port."""

    def __init__(self, base: str) -> None:
        self._base = base

    @property
    def base(self) -> str:
        return self._base


class Checkout:
    """A copy of the checkout with `make env` done, and `standins.yml`, to be read after the other files."""

    def __init__(self, docker: Docker, image: str, folder: Path, **settings: str) -> None:
        self.docker, self.folder = docker, make_checkout(folder / "delineate")
        self.port = free_port()
        self.settings = {
            "DELINEATE_IMAGE": image,
            "DELINEATE_HTTP_PORT": str(self.port),
            "DELINEATE_DOWNLOADS_URL": f"http://{docker.host}:{self.port}/downloads",
            "DELINEATE_APP_CPUS": "1",
            **settings,
        }
        (self.folder / "standins.yml").write_text(yaml.safe_dump({"services": self._standins()}))
        # In the file itself: swarm would append another test to this one.
        compose = (self.folder / "compose.yml").read_text()
        test = f"[CMD, wget, -qO, /dev/null, http://127.0.0.1:{S3_PORT}/healthz]"
        assert test in compose
        instead = f'[CMD, bash, -c, "</dev/tcp/127.0.0.1/{S3_PORT}"]'
        (self.folder / "compose.yml").write_text(compose.replace(test, instead))

    @property
    def nginx(self) -> Door:
        return Door(f"http://{self.docker.host}:{self.port}")

    def secret(self, name: str) -> str:
        return (self.folder / "secrets" / name).read_text()

    def environment(self) -> Mapping[str, str]:
        """.env as `set -a; . ./.env` reads it, with this test's settings."""
        lines = (self.folder / ".env").read_text().splitlines()
        known = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
        # COMPOSE_FILE and COMPOSE_PROFILES are said on the command line.
        known = {name: value for name, value in known.items() if not name.startswith("COMPOSE_")}
        return {**os.environ, **known, **self.settings}

    def run(self, *words: str, seconds: float = 300) -> str:
        """`docker WORDS` in the checkout. Raises AssertionError with what it said on stderr."""
        done = subprocess.run(
            ["docker", *words],
            cwd=self.folder,
            env=dict(self.environment()),
            capture_output=True,
            text=True,
            timeout=seconds,
        )
        assert done.returncode == 0, f"docker {' '.join(words)}: {done.stderr[-4000:]}"
        return done.stdout

    def _standins(self) -> dict[str, object]:
        pairs = (("s3_admin_access_key", "s3_admin_secret_key"), ("s3_access_key", "s3_secret_key"))
        keys = ",".join(f'"{self.secret(user)},{self.secret(secret)}"' for user, secret in pairs)
        slow = {  # so that faults and updates meet jobs in the middle
            "DELINEATE__PROCESSING__SIMULATED_DELAY__ENABLED": "true",
            "DELINEATE__PROCESSING__SIMULATED_DELAY__MIN": "0.5",
            "DELINEATE__PROCESSING__SIMULATED_DELAY__MAX": "2",
            "DELINEATE__RATE_LIMIT__ENABLED": "false",
        }
        redis, store = build_redis(self.docker), build_s3(self.docker)
        return {
            # Has all that a collector needs to decode what it gets.
            "jaeger": {
                "image": self.settings["DELINEATE_IMAGE"],
                "entrypoint": ["/opt/delineate/bin/python", "/collector.py"],
                "volumes": [f"{ROOT / 'tests' / 'collector.py'}:/collector.py:ro"],
                "healthcheck": {"test": ["CMD", "true"], "interval": "1s"},
            },
            # The base image's redis has another number, and it may not chown.
            "redis": {"image": redis, "user": "0:0"},
            "s3": {
                "image": store,
                "command": ["--addr", f":{S3_PORT}"],
                "environment": {"RCLONE_AUTH_KEY": keys},
            },
            "app": {"environment": slow, "healthcheck": {"interval": "2s"}},
            "nginx": {"healthcheck": {"interval": "2s"}},
        }


def objects(listing: str) -> list[dict[str, Any]]:
    """What `--format json` printed, one object a line."""
    return [json.loads(line) for line in listing.splitlines() if line]
