"""`make env`: everything that the first start needs, once, and never a secret overwritten."""

from __future__ import annotations

import json
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from tests.compose.stack import ROOT, make_env

RANDOM = {
    "redis_password": 40,
    "grafana_password": 40,
    "s3_admin_access_key": 20,
    "s3_admin_secret_key": 40,
    "s3_access_key": 20,
    "s3_secret_key": 40,
}
DERIVED = {"redis_exporter.json", "s3.json"}


@pytest.fixture
def fresh(tmp_path: Path) -> Path:
    """A checkout on a server with nothing but Docker, a shell and make."""
    (tmp_path / "conf").mkdir()
    for name in (".env.example", "Makefile", "conf/make-env"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def read(folder: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in (folder / "secrets").iterdir()}


def test_everything_is_made_with_random_values(fresh: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    make_env(fresh)
    assert (fresh / ".env").read_bytes() == (fresh / ".env.example").read_bytes()
    made = read(fresh)
    assert made.keys() == RANDOM.keys() | DERIVED
    for name, length in RANDOM.items():
        assert len(made[name]) == length
        assert made[name].isalnum()
        assert made[name].isascii()
    assert len({made[name] for name in RANDOM}) == len(RANDOM)
    other = tmp_path_factory.mktemp("other")
    shutil.copytree(fresh, other, dirs_exist_ok=True, ignore=shutil.ignore_patterns("secrets", ".env"))
    make_env(other)
    assert not set(made.values()) & set(read(other).values())


def test_only_the_owner_gets_through_the_folder_and_containers_can_read_the_files(fresh: Path) -> None:
    make_env(fresh)
    assert stat.S_IMODE((fresh / "secrets").stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in (fresh / "secrets").iterdir()} == {0o444}
    assert stat.S_IMODE((fresh / ".env").stat().st_mode) == 0o600


def test_the_store_knows_an_admin_and_a_user_who_may_do_less(fresh: Path) -> None:
    make_env(fresh)
    made = read(fresh)
    admin, user = json.loads(made["s3.json"])["identities"]
    assert admin["credentials"] == [
        {"accessKey": made["s3_admin_access_key"], "secretKey": made["s3_admin_secret_key"]}
    ]
    assert user["credentials"] == [{"accessKey": made["s3_access_key"], "secretKey": made["s3_secret_key"]}]
    assert "Admin" in admin["actions"]
    assert set(user["actions"]) == {"Read:files", "List:files", "Read:archives", "Write:archives", "List:archives"}
    assert json.loads(made["redis_exporter.json"]) == {"redis://redis:6379": made["redis_password"]}


def test_the_buckets_are_those_of_the_settings(fresh: Path) -> None:
    (fresh / ".env").write_text('DELINEATE_SOURCE_BUCKET="my-files"\nDELINEATE_ARCHIVE_BUCKET=my-archives\n')
    make_env(fresh)
    _, user = json.loads(read(fresh)["s3.json"])["identities"]
    assert {action.partition(":")[2] for action in user["actions"]} == {"my-files", "my-archives"}


def test_a_second_run_changes_nothing(fresh: Path) -> None:
    make_env(fresh)
    (fresh / ".env").write_text((fresh / ".env").read_text().replace("DELINEATE_REPLICAS=1", "DELINEATE_REPLICAS=5"))
    before = read(fresh), (fresh / ".env").read_text()
    assert make_env(fresh).stdout == "Nothing was missing: .env and secrets/ are as they were.\n"
    assert (read(fresh), (fresh / ".env").read_text()) == before


def test_only_what_is_missing_is_added(fresh: Path) -> None:
    make_env(fresh)
    before = read(fresh)
    (fresh / "secrets" / "grafana_password").unlink()
    (fresh / ".env").write_text(
        "DELINEATE_REPLICAS=5\nCOMPOSE_PROFILES="
    )  # from an older release, no newline at its end
    done = make_env(fresh)
    after = read(fresh)
    assert after.pop("grafana_password") != before.pop("grafana_password")
    assert after == before
    lines = (fresh / ".env").read_text().splitlines()
    assert lines[:2] == ["DELINEATE_REPLICAS=5", "COMPOSE_PROFILES="]
    assert "DELINEATE_BACKEND_INTERNAL=true" in lines
    names = [line.partition("=")[0] for line in lines]
    assert len(names) == len(set(names))
    assert "secrets/grafana_password" in done.stdout
    assert "DELINEATE_REPLICAS" not in done.stdout


def test_a_secret_brought_along_is_used(fresh: Path) -> None:
    (fresh / "secrets").mkdir()
    (fresh / "secrets" / "redis_password").write_text("from-the-vault")
    make_env(fresh)
    assert json.loads(read(fresh)["redis_exporter.json"]) == {"redis://redis:6379": "from-the-vault"}


def test_no_secret_is_printed(fresh: Path) -> None:
    done = make_env(fresh)
    assert "docker compose up -d" in done.stdout
    assert not [value for value in read(fresh).values() if value in done.stdout + done.stderr]


def test_no_settings_to_copy_is_one_line(fresh: Path) -> None:
    (fresh / ".env.example").unlink()
    done = subprocess.run(["sh", "conf/make-env"], cwd=fresh, capture_output=True, text=True, timeout=30)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [f"make env: no .env.example in {fresh}"]


def test_make_env_needs_no_python(fresh: Path) -> None:
    (fresh / "bin").mkdir()
    tools = ("make", "sh", "rm", "cp", "mv", "cat", "tr", "head", "tail", "sed", "grep", "chmod", "mkdir", "dirname")
    for tool in tools:
        found = shutil.which(tool)
        assert found
        (fresh / "bin" / tool).symlink_to(found)
    done = subprocess.run(
        [str(fresh / "bin" / "make"), "env"],
        cwd=fresh,
        env={"PATH": str(fresh / "bin")},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert read(fresh).keys() == RANDOM.keys() | DERIVED
    assert not (fresh / ".venv").exists()


def test_git_ignores_settings_and_secrets() -> None:
    for path in (".env", "secrets/redis_password", "secrets/tls.key"):
        done = subprocess.run(["git", "check-ignore", "--quiet", "--no-index", path], cwd=ROOT, timeout=30)
        assert done.returncode == 0, path
