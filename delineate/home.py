"""DELINEATE_HOME: the folder where `delineate up` keeps its data, secrets and ports, and the lock on it.

    redis/           append-only files of the embedded Redis, and its redis.conf (0600)
    s3/files         the source bucket
    s3/archives      the archive bucket
    metrics/         what the processes share for /metrics; emptied at every start
    run/             socket, pid file and lock of what runs now
    settings.json    ports and secrets, made once (0600): links and stored jobs outlive a restart

The whole folder is its owner's alone (0700). To start anew, stop the service and remove it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import socket
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import msgspec

from delineate.errors import StartupError

# Below the range that Linux hands out to outgoing connections (32768 and up),
# so that a remembered port is not lost to somebody's client while we are down.
FIRST_PORT, PORTS = 20_000, 10_000
DEFAULT_HOME = ".delineate"
FOLDERS = ("redis", "s3/files", "s3/archives", "metrics", "run")


class Settings(msgspec.Struct, kw_only=True):
    """What a home remembers. Ports are 0 until chosen; `seeded` once the samples were put."""

    redis_port: int = 0
    s3_port: int = 0
    redis_password: str = msgspec.field(default_factory=secrets.token_urlsafe)
    access_key_id: str = msgspec.field(default_factory=lambda: secrets.token_hex(10))
    secret_access_key: str = msgspec.field(default_factory=secrets.token_urlsafe)
    seeded: bool = False


class Home:
    """An opened home: its folders exist and no other `delineate up` uses it."""

    def __init__(self, path: Path, settings: Settings) -> None:
        self.path = path
        self.settings = settings

    @property
    def lock(self) -> Path:
        return self.path / "run" / "lock"

    def save(self) -> None:
        """Keep the settings; a crash leaves the old or the new ones, never half of them."""
        file = self.path / "settings.json"
        _write_private(file.with_suffix(".new"), msgspec.json.format(msgspec.json.encode(self.settings)))
        file.with_suffix(".new").replace(file)

    def write_redis_conf(self, text: str) -> Path:
        file = self.path / "redis" / "redis.conf"
        _write_private(file, text.encode())
        return file


@contextmanager
def open_home(path: Path, *, patience: float = 10) -> Iterator[Home]:
    """The home at `path`, made if it is missing, locked until the block ends.

    The lock is also held by every process that was started from it
    (`tether.hold`): `patience` seconds are given to those that still end.

    Raises StartupError if it is in use, cannot be written or makes no sense.
    """
    ours = {"settings.json", *(Path(folder).parts[0] for folder in FOLDERS)}
    if path.is_dir() and any(entry.name not in ours for entry in path.iterdir()):
        raise StartupError(
            f"{path} has files that are not delineate's; DELINEATE_HOME must name a new or an empty folder, "
            "or one that was its home before"
        )
    make_folders(path, FOLDERS)
    lock = os.open(path / "run" / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        _take(lock, path, patience)
        home = Home(path, _read_settings(path / "settings.json"))
        _choose_ports(home)
        forget_processes(path)
        # From here on it is shared with the processes that are started (tether.hold).
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        yield home
    finally:
        os.close(lock)


def home_path(environ: Mapping[str, str]) -> Path:
    """The folder that DELINEATE_HOME names, absolute."""
    return Path(environ.get("DELINEATE_HOME") or DEFAULT_HOME).absolute()


def make_folders(path: Path, folders: Iterable[str]) -> None:
    """Make `path`, its owner's alone, with these folders in it. Raises StartupError."""
    try:
        for folder in folders:
            (path / folder).mkdir(parents=True, exist_ok=True)
        path.chmod(0o700)
        (path / "run").chmod(0o700)
        (path / "run" / "lock").touch(0o600)
    except OSError as error:
        raise StartupError(
            f"{path} cannot be used: {error.strerror}: {error.filename}; DELINEATE_HOME names it"
        ) from error


def forget_processes(path: Path) -> None:
    """Remove what the processes of the last run left behind: their metrics, and that they were ready."""
    for file in (*(path / "metrics").iterdir(), *(path / "run").glob("*.ready")):
        file.unlink(missing_ok=True)


def supervisor_socket(path: Path) -> Path:
    """Where the supervisord of the home at `path` listens: inside, unless that is a link (up.py)."""
    inside = path / "run" / "supervisor.sock"
    return inside.readlink() if inside.is_symlink() else inside


def environment_of(pid: int) -> dict[str, str] | None:
    """What a process was started with; None if it has gone, is another user's, or this is not Linux."""
    try:
        block = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return None
    pairs = (os.fsdecode(entry).partition("=") for entry in block.split(b"\0") if entry)
    return {name: value for name, _, value in pairs}


def service_environment(given: Mapping[str, str]) -> Mapping[str, str]:
    """The environment of the service that runs in the home, else `given`; also when that names a Redis of its own."""
    if any(name.startswith(("DELINEATE__REDIS__URL", "DELINEATE__REDIS__SENTINELS")) for name in given):
        return given
    path = home_path(given)
    try:
        pid = int((path / "run" / "supervisord.pid").read_text())
    except (OSError, ValueError):
        return given
    found = environment_of(pid)
    # The number may be another process's by now.
    return found if found and found.get("DELINEATE_HOME") == str(path) else given


def _take(lock: int, path: Path, patience: float) -> None:
    """Lock for this process alone and write its pid into the file, for whoever is refused."""
    end = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            pid = os.pread(lock, 20, 0).decode().strip()
            if _alive(pid) or time.monotonic() > end:
                raise StartupError(
                    f"{path} is in use by another delineate (pid {pid}); stop it, or set DELINEATE_HOME and "
                    "DELINEATE_PORT to run a second one beside it"
                ) from None
            time.sleep(0.1)  # its owner was killed; what it started is on its way out
    os.truncate(lock, 0)
    os.pwrite(lock, str(os.getpid()).encode(), 0)


def _alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except PermissionError:
        return True
    except (OSError, ValueError):
        return False
    return True


def _read_settings(file: Path) -> Settings:
    try:
        return msgspec.json.decode(file.read_bytes(), type=Settings)
    except FileNotFoundError:
        return Settings()
    except (OSError, msgspec.MsgspecError) as error:
        raise StartupError(
            f"{file} cannot be read: {error}; repair it, or remove {file.parent} to start anew"
        ) from error


def _choose_ports(home: Home) -> None:
    """Keep the remembered ports; choose others where they are taken or not chosen yet."""
    settings = home.settings
    first = zlib.crc32(str(home.path).encode()) % PORTS
    candidates = iter([FIRST_PORT + (first + step) % PORTS for step in range(PORTS)])
    for name in ("redis_port", "s3_port"):
        port = getattr(settings, name)
        # The iterator goes on where it stopped, so the two never get the same port.
        while not port or not port_is_free("127.0.0.1", port):
            port = next(candidates, None)
            if port is None:
                raise StartupError(f"no free port from {FIRST_PORT} to {FIRST_PORT + PORTS - 1} on 127.0.0.1")
        setattr(settings, name, port)
    home.save()


def port_is_free(host: str, port: int) -> bool:
    """Whether a server could listen there. Without SO_REUSEPORT, so that a server that set it counts, too.

    Raises StartupError if `host` is no address of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(address)
            except PermissionError as error:
                raise StartupError(
                    f"port {port} may not be used by this user; DELINEATE_PORT chooses another"
                ) from error
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    return False
                raise
    except (OSError, OverflowError) as error:
        raise StartupError(f"cannot listen on {host}:{port}: {error}") from error
    return True


def _write_private(file: Path, content: bytes) -> None:
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as stream:
        os.fchmod(descriptor, 0o600)
        stream.write(content)
