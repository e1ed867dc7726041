"""What the documents say is so: variables, defaults, links, commands and paths."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from delineate import __version__
from delineate.config import keys, load_config

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")})
README = (ROOT / "README.md").read_text()
# What `delineate up` reads beside the keys of the configuration.
LAUNCH = {
    "DELINEATE_PORT",
    "DELINEATE_HOME",
    "DELINEATE_ENV",
    "DELINEATE_CONF_DIR",
    "DELINEATE_URL",
    "DELINEATE_API_PROCESSES",
    "DELINEATE_WORKER_PROCESSES",
}
# What the compose files read from .env.
STACK = set(re.findall(r"^#?(DELINEATE_\w+)=", (ROOT / ".env.example").read_text(), re.MULTILINE))


def key_of(variable: str) -> str:
    key = variable.removeprefix("DELINEATE__").lower().replace("__", ".")
    return key if key in keys() else key.removesuffix("_file")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: file.name)
def test_every_variable_exists(document: Path) -> None:
    for variable in set(re.findall(r"\bDELINEATE_\w+", document.read_text())):
        assert variable in LAUNCH | STACK or key_of(variable) in keys(), variable


def test_defaults_in_the_readme_are_those_of_base_yml() -> None:
    config = msgspec.to_builtins(load_config({"DELINEATE_ENV": "production"}, ROOT / "conf"))
    rows = re.findall(r"^\| `(DELINEATE__\w+)` \| (\S+) \|", README, re.MULTILINE)
    assert len(rows) >= 4
    for variable, default in rows:
        section, _, name = key_of(variable).partition(".")
        assert str(config[section][name]).removesuffix(".0") == default, variable


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: file.name)
def test_every_link_to_a_file_leads_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
        if not target.startswith(("http:", "https:")):
            assert (document.parent / target).exists(), target


def test_every_make_target_that_is_named_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for document in DOCUMENTS:
        for target in re.findall(r"`?make (run|test|check|\w+)`", document.read_text()):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{document.name}: make {target}"


def test_every_program_that_is_named_is_in_supervisord_conf() -> None:
    conf = (ROOT / "supervisord.conf").read_text() + (ROOT / "conf" / "supervisord.embedded.conf").read_text()
    for group in re.findall(r"\b(\w+):\*", README):
        assert f"program:{group}]" in conf


def test_the_changelog_has_this_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert "## [Unreleased]" in changelog
    assert f"## [{__version__}]" in changelog
