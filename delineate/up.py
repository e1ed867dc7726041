"""`delineate up`: the whole service on one machine, Redis and S3 included, until Ctrl-C.

    load_config       whatever is wrong with YAML or environment ends here, as one line
    open_home         folders, lock, ports and secrets (home.py)
    supervisord       the same supervisord.conf as in production, and the two embedded servers
    seed              sample files, if the store is new
    /health           healthy: the summary is printed
    SIGINT, SIGTERM   supervisord stops workers and API together, then S3 and Redis

Nothing outlives it: every process is tethered to its parent (tether.py), and
orphans of a killed supervisord become children of this process and end with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import os
import shlex
import signal
import socket
import sys
import tempfile
import time
import xmlrpc.client
from collections.abc import Iterator, Mapping
from pathlib import Path

from delineate.config import Config, load_config, read_environment
from delineate.embedded import (
    drop_unfinished_uploads,
    redis_conf,
    redis_file_command,
    s3_command,
    s3_environment,
)
from delineate.errors import ConfigError, JobError, StartupError
from delineate.home import Home, home_path, open_home, port_is_free
from delineate.launch import (
    allow_many_open_files,
    find_file,
    launch_environment,
    process_settings,
    supervisord_command,
    whole_number,
)
from delineate.restart import supervisor_at
from delineate.tether import adopt_orphans

START_SECONDS = 60
# A path in a sockaddr_un has 108 bytes on Linux and 104 on macOS; supervisord first binds to `<path>.<pid>`.
MAX_SOCKET_BYTES = 104 - len(".4194304") - 1


def run_embedded() -> int:
    """Run everything until it is stopped: 0 after Ctrl-C or SIGTERM, 130 after a second one, 1 if a program gave up.

    Raises ConfigError or StartupError before anything has been started, or
    StartupError after it has been stopped again because it did not come up.
    """
    environ = _with_port(read_environment())
    config = load_config(environ)
    find_file("supervisord.conf")
    with open_home(home_path(environ)) as home, _socket(home) as sock:
        environ = embedded_environment(home, environ, sock, config)
        config = load_config(environ)
        if not port_is_free(config.api.host, config.api.port):
            raise StartupError(
                f"port {config.api.port} is in use on {config.api.host}; stop what listens there, or choose another: "
                f"DELINEATE_PORT={config.api.port + 1} make run"
            )
        if environ["DELINEATE_EMBEDDED_S3"] == "true":
            drop_unfinished_uploads(home.path / "s3" / config.storage.archive_bucket)
        allow_many_open_files()
        adopt_orphans()
        return asyncio.run(_Run(home, environ, config, sock).until_stopped())


def embedded_environment(home: Home, given: Mapping[str, str], sock: Path, config: Config) -> dict[str, str]:
    """The environment of everything that is started: `given`, and what points it at `home` and the two servers.

    What `given` says about Redis or S3 is left alone; the embedded server is then not started.
    """
    settings = home.settings
    own_redis = not config.redis.sentinels and not any(name.startswith("DELINEATE__REDIS__URL") for name in given)
    own_s3 = not any(name.startswith("DELINEATE__STORAGE__ENDPOINT_URL") for name in given)
    # RCLONE_* would change the embedded S3 server in ways that nobody tested.
    environ = {name: value for name, value in given.items() if not name.startswith("RCLONE_")}
    defaults = {
        "DELINEATE_ENV": "development",
        # Together with the servers' own time this keeps the promise to be gone within ten seconds.
        "DELINEATE__WORKER__DRAIN_TIMEOUT": "3",
        "DELINEATE__API__DRAIN_TIMEOUT": "1",
    }
    environ |= {name: value for name, value in defaults.items() if not environ.get(name)}
    environ = launch_environment(environ, home.path, sock, "embedded") | {
        "DELINEATE_EMBEDDED_REDIS": str(own_redis).lower(),
        "DELINEATE_EMBEDDED_S3": str(own_s3).lower(),
        "DELINEATE_REDIS_COMMAND": "false",
        "DELINEATE_S3_COMMAND": "false",
    }
    # A proxy from the environment must not see requests that stay on this machine.
    for name in ("no_proxy", "NO_PROXY"):
        environ[name] = ",".join(filter(None, (environ.get(name), "127.0.0.1", "localhost")))
    if own_redis:
        folder = home.path / "redis"
        file = home.write_redis_conf(
            redis_conf(folder, settings.redis_port, settings.redis_password, config.queue.durability)
        )
        environ["DELINEATE_REDIS_COMMAND"] = shlex.join(redis_file_command(file))
        environ["DELINEATE__REDIS__URL"] = f"redis://127.0.0.1:{settings.redis_port}/0"
        environ["DELINEATE__REDIS__PASSWORD"] = settings.redis_password
        environ.pop("DELINEATE__REDIS__PASSWORD_FILE", None)
    if own_s3:
        environ["DELINEATE_S3_COMMAND"] = shlex.join(s3_command(home.path / "s3", settings.s3_port))
        environ |= s3_environment(settings.access_key_id, settings.secret_access_key)
        environ["DELINEATE__STORAGE__ENDPOINT_URL"] = f"http://127.0.0.1:{settings.s3_port}"
        environ["DELINEATE__STORAGE__ACCESS_KEY_ID"] = settings.access_key_id
        environ["DELINEATE__STORAGE__SECRET_ACCESS_KEY"] = settings.secret_access_key
        for name in ("ACCESS_KEY_ID_FILE", "SECRET_ACCESS_KEY_FILE"):
            environ.pop(f"DELINEATE__STORAGE__{name}", None)
    return environ | process_settings(load_config(environ), sock)


class _Run:
    """Supervisord from start to end, and what `up` does while it runs."""

    def __init__(self, home: Home, environ: dict[str, str], config: Config, sock: Path) -> None:
        self._home, self._environ, self._config, self._sock = home, environ, config, sock
        self._asked_to_stop = asyncio.Event()
        self._signals = 0

    async def until_stopped(self) -> int:
        started = time.monotonic()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
                loop.add_signal_handler(number, self._on_signal)
        # A session of its own: Ctrl-C must reach `up` alone, which then stops things in order. Its output comes
        # through a pipe, because /dev/fd/1 cannot be opened when it is a socket or another user's terminal.
        supervisord = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "delineate.tether", str(self._home.lock)),
            *supervisord_command(find_file("supervisord.conf")),
            env=self._environ,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
        )
        output = asyncio.create_task(_copy(supervisord))
        ended = asyncio.create_task(supervisord.wait())
        stop = asyncio.create_task(self._asked_to_stop.wait())
        ready = asyncio.create_task(self._become_ready(started))
        watching = asyncio.create_task(self._watch_files())
        try:
            await asyncio.wait({ended, stop, ready}, return_when=asyncio.FIRST_COMPLETED)
            if ready.done():
                ready.result()
                await asyncio.wait({ended, stop, watching}, return_when=asyncio.FIRST_COMPLETED)
                if watching.done():
                    watching.result()
        finally:
            for task in (ready, stop, watching):
                task.cancel()
            await asyncio.gather(ready, stop, watching, return_exceptions=True)
            await self._end(supervisord, ended)
            await output
        return self._exit_code(supervisord.returncode)

    def _on_signal(self) -> None:
        self._signals += 1
        if not self._asked_to_stop.is_set():
            print("\nStopping; running jobs go back to the queue and continue at the next start.", flush=True)
        self._asked_to_stop.set()

    async def _become_ready(self, started: float) -> None:
        """Wait for health, put samples into a new store, print the summary."""
        if self._environ["DELINEATE_EMBEDDED_S3"] == "true":
            try:
                await self._seed()
            except JobError as error:
                raise StartupError(f"no sample files, stopped again: {error} ({error.__cause__})") from error
        while time.monotonic() < started + START_SECONDS:
            # Each process first: /health of one remembers for a second what was missing when another's is fine.
            if not self._not_ready():
                healthy, _ = await asyncio.to_thread(_health, self._config)
                if healthy:
                    print(self._summary(time.monotonic() - started), flush=True)
                    return
            await asyncio.sleep(0.05)
        _, said = await asyncio.to_thread(_health, self._config)
        raise StartupError(
            f"not healthy within {START_SECONDS} s, stopped again; "
            f"not ready: {', '.join(self._not_ready()) or 'none'}; /health said: {said}"
        )

    def _not_ready(self) -> list[str]:
        counts = (("api", "DELINEATE_API_PROCESSES"), ("worker", "DELINEATE_WORKER_PROCESSES"))
        names = [f"{kind}_{number:02d}" for kind, count in counts for number in range(int(self._environ[count]))]
        return [name for name in names if not (self._home.path / "run" / f"{name}.ready").exists()]

    async def _seed(self) -> None:
        from delineate.seed import SAMPLES, put_samples, seed

        settings, config = self._home.settings, self._config
        port = settings.s3_port
        while not await asyncio.to_thread(_listens, port):  # noqa: ASYNC110  # another process' port has no event
            await asyncio.sleep(0.02)
        if not settings.seeded:
            settings.seeded = await seed(config) > 0
            self._home.save()
            return
        # The embedded store keeps bodies but forgets names when it stops: put the samples that are still as we
        # left them once more, and leave alone what was deleted or replaced.
        bucket = self._home.path / "s3" / config.storage.source_bucket
        unchanged = []
        for sample in SAMPLES:
            file = bucket / config.storage.source_key.format(file_id=sample.file_id)
            with contextlib.suppress(OSError):
                if file.read_bytes() == sample.body():
                    unchanged.append(sample.file_id)
        await put_samples(config, unchanged)

    async def _watch_files(self) -> None:
        """Make files that are copied into the embedded store's folder known to it.

        By itself it looks at a folder every five minutes. A shorter time would cost
        more than this: with its list of a folder it forgets every file's hash.
        """
        folder = self._home.path / "s3" / self._config.storage.source_bucket
        seen = await asyncio.to_thread(_newest, folder)
        while self._environ["DELINEATE_EMBEDDED_S3"] == "true":
            await asyncio.sleep(1)
            newest = await asyncio.to_thread(_newest, folder)
            if newest != seen:
                seen = newest
                # https://rclone.org/commands/rclone_serve_s3/ (VFS directory cache): SIGHUP flushes it
                with contextlib.suppress(OSError, xmlrpc.client.Error):  # on its way up or down; the next change counts
                    await asyncio.to_thread(_signal, self._sock, "s3", "HUP")
        await asyncio.Event().wait()

    def _summary(self, seconds: float) -> str:
        api = self._config.api
        host = "localhost" if api.host in ("127.0.0.1", "0.0.0.0") else api.host
        base = f"http://{f'[{host}]' if ':' in host else host}:{api.port}"
        default = find_file("supervisord.conf").parent / ".delineate" / "run" / "supervisor.sock"
        where = "" if self._sock == default else f" -s {shlex.quote(f'unix://{self._sock}')}"
        ctl = Path(sys.executable).with_name("supervisorctl")
        shown = os.path.relpath(ctl) if ctl.is_relative_to(Path.cwd()) else str(ctl)
        return f"""
delineate is ready after {seconds:.1f} s

  page      {base}/
  API       {base}/docs
  health    {base}/health
  metrics   {base}/metrics
  data      {self._home.path}
  processes {shlex.quote(shown)} -c {shlex.quote(os.path.relpath(find_file("supervisord.conf")))}{where} status

  Pack four of the sample files (70000 to 70011) into one ZIP:
    curl -s -X POST {base}/v1/export -H 'Content-Type: application/json' \\
      -d '{{"file_ids": [70000, 70003, 70005, 70011]}}'
  and follow it, with the jobId of the answer:
    curl -sN {base}/v1/export/JOB_ID/progress

  Ctrl-C stops everything; jobs and archives are kept for the next start.
"""

    async def _end(self, supervisord: asyncio.subprocess.Process, ended: asyncio.Task[int]) -> None:
        """Stop supervisord in order; kill what has not ended in time. At the end no child of ours is left."""
        environ = self._environ
        # Each stop is followed by the next, and supervisord may notice a signal only after a second.
        seconds = 2 + int(environ["DELINEATE_API_STOP_SECONDS"]) + int(environ["DELINEATE_WORKER_STOP_SECONDS"])
        end = time.monotonic() + seconds
        signals = self._signals
        with contextlib.suppress(ProcessLookupError):
            supervisord.terminate()
        # A second Ctrl-C does not wait.
        while not ended.done() and time.monotonic() < end and self._signals <= max(signals, 1):
            _nudge(self._sock)
            await asyncio.wait({ended}, timeout=0.1)
        if not ended.done():
            with contextlib.suppress(ProcessLookupError):
                supervisord.kill()
            await ended
        end = time.monotonic() + 1
        while _children() and time.monotonic() < end:  # noqa: ASYNC110  # nor have adopted processes
            await asyncio.sleep(0.02)
        while children := _children():
            for pid in children:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            await asyncio.sleep(0.02)

    def _exit_code(self, code: int | None) -> int:
        if code == 1:
            return 1  # supervisord has said why
        if self._signals > 1:
            return 128 + signal.SIGINT
        if code:
            print(f"delineate up: supervisord ended with {code}; everything stopped", file=sys.stderr)
            return 1
        return 0


async def _copy(process: asyncio.subprocess.Process) -> None:
    """Print what the processes print, until the last of them has closed its end."""
    with contextlib.suppress(BrokenPipeError):
        while process.stdout and (chunk := await process.stdout.read(65536)):
            sys.stdout.buffer.write(chunk)
            sys.stdout.buffer.flush()


def _nudge(sock: Path) -> None:
    """Make supervisord look at its signals and children now, not at the end of its second: a stop has five steps."""
    with socket.socket(socket.AF_UNIX) as connection, contextlib.suppress(OSError):
        connection.setblocking(False)
        connection.connect(str(sock))


def _newest(folder: Path) -> tuple[int, int]:
    """How many entries a folder has, and when the newest of them was changed (ns)."""
    times = [0]
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                times.append(entry.stat().st_mtime_ns)
    return len(times), max(times)


def _signal(sock: Path, program: str, name: str) -> None:
    with supervisor_at(sock) as supervisor:
        supervisor.signalProcess(program, name)


def _health(config: Config) -> tuple[bool, str]:
    """Whether /health is 200, and what it said."""
    host = "127.0.0.1" if config.api.host in ("0.0.0.0", "") else config.api.host
    connection = http.client.HTTPConnection(host, config.api.port, timeout=5)
    try:
        connection.request("GET", "/health")
        response = connection.getresponse()
        return response.status == 200, response.read(2000).decode(errors="replace")
    except (OSError, http.client.HTTPException) as error:
        return False, f"no answer ({error})"
    finally:
        connection.close()


def _listens(port: int) -> bool:
    return not port_is_free("127.0.0.1", port)


def _children() -> list[int]:
    """Living children of this process, adopted ones included; the dead are reaped."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    try:
        return [
            int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()
        ]
    except OSError:  # not Linux: nothing was adopted
        return []


@contextlib.contextmanager
def _socket(home: Home) -> Iterator[Path]:
    """Where supervisord listens: inside the home, unless its path is too long for a socket; then a link is there."""
    inside = home.path / "run" / "supervisor.sock"
    inside.unlink(missing_ok=True)
    if len(os.fsencode(inside)) <= MAX_SOCKET_BYTES:
        yield inside
        return
    with tempfile.TemporaryDirectory(prefix="delineate-") as folder:  # mode 0700
        inside.symlink_to(Path(folder) / "supervisor.sock")
        yield inside.readlink()
        inside.unlink(missing_ok=True)


def _with_port(environ: dict[str, str]) -> dict[str, str]:
    """DELINEATE_PORT is the short name of DELINEATE__API__PORT."""
    if not environ.get("DELINEATE_PORT"):
        return environ
    if "DELINEATE__API__PORT" in environ:
        raise ConfigError("environment variables DELINEATE_PORT and DELINEATE__API__PORT both set api.port: keep one")
    return environ | {"DELINEATE__API__PORT": str(whole_number(environ, "DELINEATE_PORT", 1, 65535))}
