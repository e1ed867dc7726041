"""requirements.lock is what the image installs: complete, within the bounds of pyproject.toml, and hashed."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
LOCK = (ROOT / "requirements.lock").read_text()
DEPENDENCIES = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
PYTHONS = ["3.11.0", "3.11.14", "3.12.12", "3.13.9", "3.14.0"]


def entries() -> list[tuple[Requirement, str]]:
    """Each entry and the text that belongs to it: hashes, and who asks for it."""
    found = re.findall(r"^(?=[A-Za-z0-9])([^\\\n]+)(.*(?:\n[ \t].*)*)", LOCK, re.MULTILINE)
    return [(Requirement(requirement), rest) for requirement, rest in found]


def locked(python: str, machine: str) -> dict[str, str]:
    """name -> version of what pip would install there."""
    environment = {
        **{name: str(value) for name, value in default_environment().items()},
        "python_full_version": python,
        "python_version": python.rpartition(".")[0],
        "platform_machine": machine,
        "sys_platform": "linux",
        "platform_system": "Linux",
    }
    chosen = [
        requirement
        for requirement, _ in entries()
        if requirement.marker is None or requirement.marker.evaluate(environment)
    ]
    versions: dict[str, str] = {canonicalize_name(one.name): str(one.specifier).removeprefix("==") for one in chosen}
    assert len(versions) == len(chosen), "two versions of one package for one Python"
    return versions


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize("python", PYTHONS)
def test_every_dependency_is_locked_within_its_bound(python: str, machine: str) -> None:
    versions = locked(python, machine)
    for dependency in map(Requirement, DEPENDENCIES):
        version = versions.get(canonicalize_name(dependency.name))
        assert version is not None, f"{dependency.name} is not in requirements.lock; `make lock` puts it there"
        assert dependency.specifier.contains(version), f"{dependency} is locked at {version}; run `make lock`"


def test_every_entry_is_one_version_with_hashes() -> None:
    assert len(entries()) == len(re.findall(r"^[A-Za-z0-9]", LOCK, re.MULTILINE)) > len(DEPENDENCIES)
    for requirement, rest in entries():
        assert re.fullmatch(r"==[^,*]+", str(requirement.specifier)), requirement
        assert re.search(r"--hash=sha256:[0-9a-f]{64}\b", rest), f"{requirement} has no hash"


def test_the_lock_names_no_place_but_pypi() -> None:
    """No folder, index or URL of the machine that made it."""
    assert not re.search(r"file:|https?:|^\s*--(?!hash)|@ |/", re.sub(r"#.*", "", LOCK), re.MULTILINE)
