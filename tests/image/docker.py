"""The docker command line as the image tests use it.

Whatever is made here bears the run's label, and `Docker.clean_up` removes all
that bears it. Ports are published on the engine's loopback address, under
numbers chosen beforehand: they stay the same when a container starts again.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.servers import free_port

LABEL = "delineate.test"
# Between two looks: each starts a docker command or wakes a whole stack, which have better things to do.
PAUSE_SECONDS = 0.25


class DockerError(Exception):
    """A docker command failed or took too long: the command, and what it said on stderr."""


class Docker:
    """One run's use of the engine; `run_id` is in the name and label of everything made by it."""

    def __init__(self, prefix: str = "delineate-test") -> None:
        self.run_id = f"{prefix}-{uuid.uuid4().hex[:8]}"
        self._made = 0
        self._tags: list[str] = []

    @property
    def host(self) -> str:
        """The address at which published ports are reached: loopback, or a remote engine's own."""
        named = urlsplit(os.environ.get("DOCKER_HOST", ""))
        return named.hostname if named.scheme in ("tcp", "ssh") and named.hostname else "127.0.0.1"

    def answers(self) -> bool:
        try:
            self("version", "--format", "{{.Server.Version}}", seconds=10)
        except DockerError:
            return False
        return True

    def __call__(self, *words: str, seconds: float = 60, stdin: str | None = None) -> str:
        """Run `docker WORDS` and return its stdout.

        Raises DockerError if it fails, is not installed, or has not ended after `seconds`.
        """
        return self.both(*words, seconds=seconds, stdin=stdin)[0]

    def both(self, *words: str, seconds: float = 60, stdin: str | None = None) -> tuple[str, str]:
        """The same, with stderr as well."""
        command = " ".join(["docker", *words])
        try:
            done = subprocess.run(
                ["docker", *words], capture_output=True, input=stdin or "", text=True, timeout=seconds, errors="replace"
            )
        except subprocess.TimeoutExpired as error:
            raise DockerError(f"`{command}` has not ended within {seconds:g} s") from error
        except OSError as error:
            raise DockerError(f"`{command}` cannot run: {error}") from error
        if done.returncode:
            raise DockerError(f"`{command}` ended with {done.returncode}: {done.stderr.strip()[-4000:]}")
        return done.stdout, done.stderr

    def unique(self, what: str) -> str:
        self._made += 1
        return f"{self.run_id}-{what}-{self._made}"

    def build(self, context: Path, *options: str, tag: str, seconds: float = 900) -> float:
        """Build `context` as `tag`, with the host's network where the bridge leads nowhere; the seconds it took."""
        if not self._bridge_reaches_the_world:
            options = ("--network", "host", *options)
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy"):
            options = ("--build-arg", name, *options) if name in os.environ else options
        self._tags.append(tag)
        started = time.monotonic()
        self(
            *("buildx", "build", "--load", "--progress", "plain", "--label", f"{LABEL}={self.run_id}"),
            *("--tag", tag, *options, str(context)),
            seconds=seconds,
        )
        return time.monotonic() - started

    @cached_property
    def _bridge_reaches_the_world(self) -> bool:
        try:
            reach = "timeout 5 bash -c '</dev/tcp/deb.debian.org/80'"
            self("run", "--rm", "--label", f"{LABEL}={self.run_id}", "debian:trixie-slim", "sh", "-c", reach)
        except DockerError:
            return False
        return True

    def keep(self, tag: str) -> None:
        """Leave `tag` there when this run ends."""
        self._tags.remove(tag)

    def network(self) -> str:
        """A new bridge network, on which containers find each other by name; its name."""
        name = self.unique("network")
        self("network", "create", "--label", f"{LABEL}={self.run_id}", name)
        return name

    def remove_network(self, name: str) -> None:
        self("network", "rm", name)

    def volume(self) -> str:
        """A new volume; its name."""
        name = self.unique("volume")
        self("volume", "create", "--label", f"{LABEL}={self.run_id}", name)
        return name

    def start(
        self,
        image: str,
        *options: str,
        what: str = "container",
        command: Sequence[str] = (),
        network: str | None = None,
        alias: str | None = None,
        env: Mapping[str, str] | None = None,
        publish: Iterable[int] | Mapping[int, int] = (),
    ) -> Container:
        """Start a container in the background.

        `options` go to `docker run` as they are, `command` to the container; `alias` is its name on `network`;
        `publish` are ports of it that the host shall reach (`Container.address`), or each with its number on the host.
        """
        ports = dict(publish) if isinstance(publish, Mapping) else {inside: free_port() for inside in publish}
        words = ["--detach", "--name", self.unique(what), "--label", f"{LABEL}={self.run_id}"]
        words += ["--network", network] if network else []
        words += ["--network-alias", alias] if network and alias else []
        for name, value in (env or {}).items():
            words += ["--env", f"{name}={value}"]
        for inside, outside in ports.items():
            words += ["--publish", f"{'' if self.host != '127.0.0.1' else '127.0.0.1:'}{outside}:{inside}"]
        self("run", *words, *options, image, *command)
        return Container(self, words[2], ports)

    def clean_up(self) -> None:
        """Remove everything of this run: containers, networks, volumes, images. Nothing stops halfway."""
        ours = ("--quiet", "--filter", f"label={LABEL}={self.run_id}")
        failed = []
        for listing, removal in (
            (("ps", "--all"), ("rm", "--force", "--volumes")),
            (("network", "ls"), ("network", "rm")),
            (("volume", "ls"), ("volume", "rm", "--force")),
        ):
            try:
                found = self(*listing, *ours).split()
                if found:
                    self(*removal, *found)
            except DockerError as error:
                failed.append(str(error))
        for tag in self._tags:
            try:
                if self("images", "--quiet", tag).strip():
                    self("rmi", tag)
            except DockerError as error:
                failed.append(str(error))
        if failed:
            raise DockerError("; ".join(failed))


@dataclass
class Container:
    """A container; `ports` says for each published port inside it which one of the host leads there."""

    docker: Docker
    name: str
    ports: Mapping[int, int] = field(default_factory=dict)

    def inspect(self, template: str) -> str:
        """What `docker inspect` says, by a Go template: `{{.State.ExitCode}}`."""
        return self.docker("inspect", "--format", template, self.name).strip()

    @property
    def ip(self) -> str:
        """Its address on its network; another one after a restart, perhaps."""
        return self.inspect("{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}")

    def address(self, port: int) -> str:
        """HOST:PORT at which this machine reaches the container's `port`."""
        return f"{self.docker.host}:{self.ports[port]}"

    @property
    def running(self) -> bool:
        return self.inspect("{{.State.Running}}") == "true"

    @property
    def exit_code(self) -> int:
        return int(self.inspect("{{.State.ExitCode}}"))

    @property
    def health(self) -> str:
        """starting, healthy, unhealthy; none if the image has no health check."""
        return self.inspect("{{if .State.Health}}{{.State.Health.Status}}{{else}}none{{end}}")

    def logs(self) -> str:
        """All that it wrote, stdout and then stderr."""
        return "".join(self.docker.both("logs", self.name))

    def exec(self, *command: str, user: str | None = None, seconds: float = 60) -> str:
        """Run a command inside and return its stdout.

        Raises DockerError, with the command's stderr, if it fails.
        """
        return self.docker("exec", *(("--user", user) if user else ()), self.name, *command, seconds=seconds)

    def start(self) -> None:
        self.docker("start", self.name)

    def stop(self, seconds: int = 30) -> int:
        """SIGTERM, and SIGKILL after `seconds`; the exit code."""
        self.docker("stop", "-t", str(seconds), self.name, seconds=seconds + 30)
        return self.exit_code

    def kill(self, signal: str = "KILL") -> None:
        """Send a signal to its first process, and do not wait."""
        self.docker("kill", "--signal", signal, self.name)

    def wait(self, seconds: float = 30) -> int:
        """Wait until it has ended; the exit code."""
        return int(self.docker("wait", self.name, seconds=seconds))

    def remove(self) -> None:
        self.docker("rm", "--force", "--volumes", self.name)

    def wait_until(self, condition: Callable[[], bool], what: str, seconds: float = 60) -> float:
        """Wait for a condition; the seconds it took.

        Raises DockerError with the container's last lines when it ends before, or `seconds` are over.
        """
        started = time.monotonic()
        while not condition():
            gone = not self.running
            if gone or time.monotonic() - started > seconds:
                why = f"it ended with {self.exit_code}" if gone else f"not within {seconds:g} s"
                raise DockerError(f"{self.name}: waiting for {what}: {why}; it said:\n{self.logs()[-4000:]}")
            time.sleep(PAUSE_SECONDS)
        return time.monotonic() - started

    def wait_healthy(self, seconds: float = 60) -> float:
        """Wait until the image's own health check says so; the seconds it took."""
        return self.wait_until(lambda: self.health == "healthy", "health", seconds)


@dataclass(frozen=True)
class Answer:
    """An HTTP answer, of whatever status; header names are lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


# Neither follows redirects nor asks a proxy that the environment names.
_open = urllib.request.build_opener(_NoRedirect, urllib.request.ProxyHandler({})).open


def http(
    method: str, url: str, body: bytes | None = None, headers: Mapping[str, str] | None = None, seconds: float = 30
) -> Answer:
    """One request. Raises OSError if there is no answer."""
    request = urllib.request.Request(url, data=body, headers=dict(headers or {}), method=method)  # noqa: S310
    try:
        with _open(request, timeout=seconds) as response:
            return _answer(response, response.status)
    except urllib.error.HTTPError as error:
        with error:
            return _answer(error, error.code)


def _answer(response: Any, status: int) -> Answer:
    return Answer(status, {name.lower(): value for name, value in response.headers.items()}, response.read())
