"""What a newcomer does with a running service, from the summary to the files on their disk."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from delineate.seed import SAMPLES
from tests.run.up import ROOT, Up, unzip
from tests.servers import wait_until


def test_summary_names_everything(service: Up) -> None:
    log = service.log.read_text()
    for path in ("/", "/docs", "/health", "/metrics"):
        assert f"http://localhost:{service.port}{path}\n" in log
    assert str(service.home) in log
    assert "supervisorctl" in log
    assert "Ctrl-C" in log


def test_health_knows_storage_redis_and_workers(service: Up) -> None:
    health = service.get("/health")
    assert health["status"] == "healthy"
    assert set(health["checks"]) >= {"storage", "redis", "workers"}


def test_what_was_stored_is_what_is_unpacked(service: Up, tmp_path: Path) -> None:
    job_id = service.post([sample.file_id for sample in SAMPLES])
    job = service.completed(job_id)
    archive = service.fetch(job_id)
    assert archive.stat().st_size == job["size"]
    unpacked = unzip(archive, tmp_path / "unpacked")
    assert sorted(unpacked.values()) == sorted(sample.body() for sample in SAMPLES)
    for sample in SAMPLES:
        if sample.filename != "report.csv":  # two have that name, so one of them gets another
            assert unpacked[sample.filename] == sample.body()


def test_readme_names_every_path_of_the_api_as_it_is(service: Up) -> None:
    paths = service.get("/openapi.json")["paths"]
    rows = re.findall(r"^\| `(GET|POST|DELETE) (/v1/[^`]+)`", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(rows) >= 7
    for method, path in rows:
        assert method.lower() in paths[path], f"{method} {path}"


def test_session_of_the_readme_runs_as_written(service: Up, tmp_path: Path) -> None:
    found = re.search(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert found
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", found[1]],
        cwd=tmp_path,
        env=os.environ | {"DELINEATE_URL": service.base, "LC_ALL": "C.UTF-8"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "event: completed" in done.stdout
    assert '"status":"completed"' in done.stdout
    asked = json.loads(re.findall(r"-d '(\{.*?\})'", found[1])[0])["file_ids"]
    expected = [sample.body() for sample in SAMPLES if sample.file_id in asked]
    unpacked = [file.read_bytes() for file in (tmp_path / "export").rglob("*") if file.is_file()]
    assert len(asked) == len(expected)
    assert sorted(unpacked) == sorted(expected)


def test_supervisorctl_works_from_the_checkout_without_any_variable(service: Up, tmp_path: Path) -> None:
    (tmp_path / "supervisord.conf").write_bytes((ROOT / "supervisord.conf").read_bytes())
    (tmp_path / ".delineate" / "run").mkdir(parents=True)
    (tmp_path / ".delineate" / "run" / "supervisor.sock").symlink_to(service.supervisor_url.removeprefix("unix://"))

    def states() -> dict[str, str]:
        done = subprocess.run(
            [str(Path(sys.executable).with_name("supervisorctl")), "-c", "supervisord.conf", "status"],
            cwd=tmp_path,
            env={"PATH": os.environ["PATH"]},
            capture_output=True,
            text=True,
            timeout=20,
        )
        assert done.stderr == ""
        return {name: state for name, state, *_ in map(str.split, done.stdout.splitlines())}

    programs = ("api:api_00", "api:api_01", "worker:worker_00", "worker:worker_01", "redis", "s3")
    wait_until(lambda: states() == dict.fromkeys(programs, "RUNNING"), "RUNNING of every program")


def test_restarted_workers_lose_no_job(service: Up) -> None:
    everything = [sample.file_id for sample in SAMPLES]
    jobs = [service.post(everything) for _ in range(20)]
    answer = service.supervisorctl("restart", "worker:*")
    assert answer.count("stopped") == 2, answer
    assert answer.count("started") == 2, answer
    jobs += [service.post(everything) for _ in range(5)]
    sizes = {service.completed(job)["size"] for job in jobs}
    assert len(sizes) == 1


def test_the_log_level_is_two_signals_that_end_nobody(service: Up) -> None:
    def pids() -> list[int]:
        return [int(pid) for pid in service.supervisorctl("pid", "all").split()]

    before = pids()
    for number, level in (("USR1", "DEBUG"), ("USR2", "INFO")):
        assert service.supervisorctl("signal", number, "all").count("signalled") == 6
        says = re.compile(rf"{level} +(api|worker) +the log level is {level.lower()}$", re.MULTILINE)
        wait_until(lambda says=says: len(says.findall(service.log.read_text())) == 4, f"level {level}")  # type: ignore[misc]
    assert pids() == before
    service.supervisorctl("signal", "USR1", "api:*")
    service.get("/v1/exports?limit=1")
    wait_until(lambda: "answered  method=GET  path=/v1/exports  status=200" in service.log.read_text(), "a line")
    service.supervisorctl("signal", "USR2", "api:*")


def test_killed_process_is_started_again(service: Up) -> None:
    def pid() -> int:
        return int(service.supervisorctl("pid", "worker:worker_00"))

    before = pid()
    os.kill(before, 9)
    wait_until(lambda: pid() not in (0, before), "a new worker")
    service.completed(service.post([70000]))


def test_secrets_are_private_and_not_in_ps(service: Up) -> None:
    settings = json.loads((service.home / "settings.json").read_text())
    secrets = [settings[name] for name in ("redis_password", "access_key_id", "secret_access_key")]
    assert all(len(secret) >= 20 for secret in secrets)
    commands = " ".join(word for words in service.processes().values() for word in words)
    log = service.log.read_text()
    for secret in secrets:
        assert secret not in commands
        assert secret not in log
    for file in ("settings.json", "redis/redis.conf"):
        assert (service.home / file).stat().st_mode & 0o777 == 0o600
    assert service.home.stat().st_mode & 0o777 == 0o700


def test_second_service_runs_beside_the_first(service: Up, make_up: Callable[..., Up]) -> None:
    second = make_up()
    # So deep that the path of a socket in it would be too long.
    second.home = second.folder / "deep" / ("er" * 60)
    second.environ["DELINEATE_HOME"] = str(second.home)
    second.start()
    assert "worker:worker_00" in second.supervisorctl("status")
    job = second.post([70000])
    second.completed(job)
    first, other = (json.loads((up.home / "settings.json").read_text()) for up in (service, second))
    for name in ("redis_port", "s3_port", "redis_password", "secret_access_key"):
        assert first[name] != other[name]
    assert second.stop() == 0
    assert not Path(second.supervisor_url.removeprefix("unix://")).parent.exists()
    assert service.get("/health")["status"] == "healthy"


def test_a_file_that_is_copied_into_the_folder_can_be_exported_soon(service: Up, tmp_path: Path) -> None:
    service.completed(service.post([70000]))  # the store has listed its folder by now
    body = os.urandom(300_000)
    (service.home / "s3" / "files" / "80500").write_bytes(body)

    def packed() -> bool:
        job = service.get(f"/v1/export/{service.post([80500])}")
        while job["status"] not in ("completed", "failed"):
            time.sleep(0.1)
            job = service.get(f"/v1/export/{job['jobId']}")
        if job["status"] == "failed":
            return False
        return unzip(service.fetch(job["jobId"]), tmp_path / job["jobId"]) == {"80500": body}

    wait_until(packed, "the export of a new file", 10)
