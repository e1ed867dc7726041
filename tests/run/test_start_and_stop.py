"""`delineate up` starts or says in one line why not, and whatever ends it, nothing is left behind."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from delineate.config import Config, load_config
from delineate.errors import StartupError
from delineate.home import open_home
from delineate.seed import SAMPLES, put_samples
from delineate.up import embedded_environment
from tests.run.up import ROOT, Up, unzip
from tests.servers import wait_until

MakeUp = Callable[..., Up]


@pytest.fixture
def port_taken() -> Iterator[int]:
    """A port on which somebody else listens, with SO_REUSEPORT as our own API processes do."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port: int = listener.getsockname()[1]
        yield port


def refused(up: Up) -> str:
    """The one line on stderr with which `up` refuses to start."""
    done = subprocess.run(
        [sys.executable, "-m", "delineate", "up"], cwd=ROOT, env=up.environ, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    assert up.processes() == {}
    return done.stderr


def test_port_in_use_is_one_line(make_up: MakeUp, port_taken: int) -> None:
    line = refused(make_up(DELINEATE_PORT=str(port_taken)))
    assert f"port {port_taken} is in use" in line
    assert f"DELINEATE_PORT={port_taken + 1} make run" in line


def test_bad_yaml_is_one_line(make_up: MakeUp, tmp_path: Path) -> None:
    for file in (ROOT / "conf").glob("*.yml"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "development.yml").write_text("queue:\n  max_waitng: 5\n")
    up = make_up(DELINEATE_CONF_DIR=str(tmp_path))
    assert "development.yml: queue.max_waitng: no such key" in refused(up)
    assert not up.home.exists()


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"DELINEATE_PORT": "http"}, "DELINEATE_PORT: 'http' is not allowed, expected a whole number from 1 to 65535"),
        ({"DELINEATE_PORT": "70000"}, "DELINEATE_PORT: '70000' is not allowed"),
        ({"DELINEATE_API_PROCESSES": "0"}, "DELINEATE_API_PROCESSES: '0' is not allowed"),
        ({"DELINEATE_WORKER_PROCESSES": "two"}, "DELINEATE_WORKER_PROCESSES: 'two' is not allowed"),
        ({"DELINEATE__API__PORT": "3000"}, "DELINEATE_PORT and DELINEATE__API__PORT both set api.port"),
        ({"DELINEATE_ENV": "prod"}, "DELINEATE_ENV: 'prod' is not allowed"),
        ({"DELINEATE__API__HOST": "no-such-host.invalid"}, "cannot listen on no-such-host.invalid"),
        ({"DELINEATE_HOME": "/proc/nowhere"}, "/proc/nowhere cannot be used"),
    ],
)
def test_bad_variable_is_one_line(make_up: MakeUp, environ: dict[str, str], said: str) -> None:
    assert said in refused(make_up(**environ))


@pytest.mark.parametrize(
    ("host", "held"), [("127.0.0.1", "tcp://127.0.0.1:3000"), ("0.0.0.0", "tcp://0.0.0.0:3000"), ("::1", "unix:///")]
)
def test_supervisord_holds_the_socket_of_an_ipv4_address(tmp_path: Path, host: str, held: str) -> None:
    given = {"DELINEATE_CONF_DIR": str(ROOT / "conf"), "DELINEATE__API__HOST": host, "DELINEATE__API__PORT": "3000"}
    with open_home(tmp_path / "home") as home:
        environ = embedded_environment(home, given, tmp_path / "supervisor.sock", load_config(given))
    assert environ["DELINEATE_API_SOCKET"].startswith(held)


def test_spoiled_settings_are_one_line(make_up: MakeUp) -> None:
    up = make_up()
    up.home.mkdir(parents=True)
    (up.home / "settings.json").write_text("{")
    assert "settings.json cannot be read" in refused(up)


def test_nothing_is_lost_or_left_when_it_is_killed_or_stopped(make_up: MakeUp, tmp_path: Path) -> None:
    up = make_up()
    up.start()
    job = up.post([sample.file_id for sample in SAMPLES])
    before = up.completed(job)
    link = before["downloadUrl"]

    same_home = make_up(DELINEATE_HOME=str(up.home))
    same_home.home = Path("/nonexistent")  # the processes of this home are not the refused one's
    assert "is in use by another delineate" in refused(same_home)

    assert up.process is not None
    up.process.kill()
    up.process.wait(10)
    wait_until(lambda: up.processes() == {}, "the end of everything after SIGKILL", 10)

    warm = up.start()
    assert warm < 10
    assert up.get(f"/v1/export/{job}")["status"] == "completed"
    assert len(up.fetch(job).read_bytes()) == before["size"]
    # The port of the store is kept, so a link from before still works.
    assert subprocess.run(["curl", "-sf", "-o", os.devnull, link], check=False).returncode == 0
    # The embedded store forgets names; the samples have theirs all the same.
    again = up.post([70000, 70003])
    up.completed(again)
    assert set(unzip(up.fetch(again), tmp_path / "again")) == {"read me first.txt", "Übersicht 概要.md"}

    started = time.monotonic()
    assert up.stop(signal.SIGTERM) == 0
    assert time.monotonic() - started < 10
    assert up.processes() == {}


def test_own_redis_and_s3_are_used_instead_of_embedded_ones(make_up: MakeUp, config: Config) -> None:
    up = make_up(
        DELINEATE__REDIS__URL=config.redis.url,
        DELINEATE__REDIS__PREFIX=config.redis.prefix,
        DELINEATE__STORAGE__ENDPOINT_URL=config.storage.endpoint_url,
        DELINEATE__STORAGE__ACCESS_KEY_ID=config.storage.access_key_id,
        DELINEATE__STORAGE__SECRET_ACCESS_KEY=config.storage.secret_access_key,
        DELINEATE__STORAGE__ARCHIVE_PREFIX=config.storage.archive_prefix,
        DELINEATE__STORAGE__SOURCE_KEY=config.storage.source_key,
    )
    asyncio.run(put_samples(config, [70005]))
    up.start()
    job = up.post([70005])
    assert up.completed(job)["downloadUrl"].startswith(config.storage.endpoint_url)
    states = {line.split()[0]: line.split()[1] for line in up.supervisorctl("status").splitlines()}
    assert states["redis"] == states["s3"] == "STOPPED"
    assert up.stop() == 0


def test_the_embedded_redis_follows_the_configured_durability(make_up: MakeUp) -> None:
    up = make_up(DELINEATE__QUEUE__DURABILITY="always")
    up.start()  # the API and the workers refuse a Redis that does not sync every write
    assert 'appendfsync "always"' in (up.home / "redis" / "redis.conf").read_text()


def test_stop_in_the_middle_of_a_job_takes_seconds_and_the_job_goes_on(make_up: MakeUp) -> None:
    slow = {
        "DELINEATE__PROCESSING__SIMULATED_DELAY__ENABLED": "true",
        "DELINEATE__PROCESSING__SIMULATED_DELAY__MIN": "60",
        "DELINEATE__PROCESSING__SIMULATED_DELAY__MAX": "60",
    }
    up = make_up(**slow)
    up.start()
    job = up.post([70000, 70001])
    wait_until(lambda: up.get(f"/v1/export/{job}")["status"] == "processing", "the start of the job")
    stream = subprocess.Popen(["curl", "-sN", f"{up.base}/v1/export/{job}/progress"], stdout=subprocess.DEVNULL)
    try:
        started = time.monotonic()
        assert up.stop(signal.SIGINT) == 0
        assert time.monotonic() - started < 10
        assert up.processes() == {}
    finally:
        stream.kill()
        stream.wait()

    for name in slow:
        del up.environ[name]
    up.start()
    up.completed(job)
    assert up.stop() == 0


def test_all_ends_when_supervisord_is_killed(make_up: MakeUp) -> None:
    up = make_up()
    up.start()
    (supervisord,) = (pid for pid, words in up.processes().items() if "delineate.supervisord" in words)
    os.kill(supervisord, signal.SIGKILL)
    assert up.process is not None
    assert up.process.wait(10) == 1
    assert up.processes() == {}
    assert "supervisord ended with -9" in up.log.read_text()


def test_program_that_does_not_stay_up_ends_all_with_an_error(make_up: MakeUp) -> None:
    up = make_up(DELINEATE_API_PROCESSES="1", DELINEATE_WORKER_PROCESSES="1", DELINEATE__LOG__FORMAT="json")
    (up.home / "redis" / "appendonlydir").mkdir(parents=True)
    (up.home / "redis" / "appendonlydir" / "appendonly.aof.manifest").write_text("not a manifest\n")
    process = up.launch()
    assert process.wait(40) == 1
    assert up.processes() == {}
    lines = [json.loads(line) for line in up.log.read_text().splitlines() if line.startswith("{")]
    serious = [line for line in lines if line["level"] in ("error", "critical")]
    assert {line["service"] for line in serious} == {"delineate-supervisord"}
    assert [line["message"] for line in serious] == [
        "redis did not stay up; everything stops",
        "gave up: redis entered FATAL state, too many start retries too quickly",
    ]
    of_redis = [line["context"] for line in lines if line["context"].get("program") == "redis" and line not in serious]
    starts = [context["pid"] for context in of_redis if "exitStatus" not in context]
    ends = [context["pid"] for context in of_redis if context.get("exitStatus") == 1]
    assert len(ends) == len(set(ends)) >= 4
    assert set(starts) == set(ends)


def test_a_folder_that_is_not_a_home_is_refused_and_left_alone(tmp_path: Path) -> None:
    mine = tmp_path / "project"
    (mine / "metrics").mkdir(parents=True)
    (mine / "metrics" / "thesis.csv").write_text("mine")
    (mine / "notes.txt").write_text("mine")
    mine.chmod(0o755)
    with pytest.raises(StartupError, match="DELINEATE_HOME"), open_home(mine):
        pass
    assert (mine / "metrics" / "thesis.csv").read_text() == "mine"
    assert mine.stat().st_mode & 0o777 == 0o755
