"""The configuration keeps its promises: documented keys, one line for every mistake, no secret shown."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from delineate.config import ENVIRONMENTS, SECRET_KEYS, keys, load_config
from delineate.errors import ConfigError

CONF = Path(__file__).resolve().parent.parent / "conf"
SECRET = "hunter2-never-shown"


def leaves(node: yaml.MappingNode, path: tuple[str, ...] = ()) -> dict[str, int]:
    """Dotted key -> its line, counted from 0."""
    found: dict[str, int] = {}
    for key, value in node.value:
        here = (*path, key.value)
        if isinstance(value, yaml.MappingNode):
            found |= leaves(value, here)
        else:
            found[".".join(here)] = key.start_mark.line
    return found


def keys_of(file: Path) -> dict[str, int]:
    node = yaml.compose(file.read_text(), yaml.SafeLoader)
    return leaves(node) if isinstance(node, yaml.MappingNode) else {}


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    """A copy of conf/ that a test may spoil."""
    for file in CONF.glob("*.yml"):
        (tmp_path / file.name).write_text(file.read_text())
    return tmp_path


def refused(environ: Mapping[str, str], conf_dir: Path = CONF) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(environ, conf_dir)
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_base_yml_and_the_code_know_the_same_keys() -> None:
    assert sorted(keys_of(CONF / "base.yml")) == sorted(keys())


@pytest.mark.parametrize("key", sorted(keys_of(CONF / "base.yml")))
def test_every_key_has_a_comment_beside_it(key: str) -> None:
    line = (CONF / "base.yml").read_text().splitlines()[keys_of(CONF / "base.yml")[key]]
    assert re.search(r"\s# \w{2,}", line), f"{key} needs its unit and reason: {line}"


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_overlays_load_and_use_known_keys_only(environment: str) -> None:
    assert load_config({"DELINEATE_ENV": environment}, CONF).environment == environment
    assert set(keys_of(CONF / f"{environment}.yml")) <= set(keys())


def test_every_yml_in_conf_is_base_or_an_overlay() -> None:
    of_other_programs = {"loki"}  # compose.yml gives it this
    assert {file.stem for file in CONF.glob("*.yml")} == {"base", *ENVIRONMENTS} | of_other_programs


def test_secret_keys_exist() -> None:
    assert set(keys()) >= SECRET_KEYS


OVERRIDES: list[tuple[str, str, Callable[[Any], Any], Any]] = [
    ("DELINEATE__QUEUE__MAX_WAITING", "500", lambda c: c.queue.max_waiting, 500),
    ("DELINEATE__API__REQUEST_TIMEOUT", "2.5", lambda c: c.api.request_timeout, 2.5),
    ("DELINEATE__API__REQUEST_TIMEOUT", "7", lambda c: c.api.request_timeout, 7.0),
    ("DELINEATE__RATE_LIMIT__ENABLED", "false", lambda c: c.rate_limit.enabled, False),
    ("DELINEATE__RATE_LIMIT__ENABLED", "True", lambda c: c.rate_limit.enabled, True),
    ("DELINEATE__LOG__LEVEL", "debug", lambda c: c.log.level, "debug"),
    ("DELINEATE__REDIS__PASSWORD", "0123", lambda c: c.redis.password, "0123"),
    ("DELINEATE__REDIS__PASSWORD", "yes: [", lambda c: c.redis.password, "yes: ["),
    ("DELINEATE__API__CORS_ORIGINS", "https://a.example, http://b.example:81", lambda c: c.api.cors_origins,
     ("https://a.example", "http://b.example:81")),
    ("DELINEATE__API__CORS_ORIGINS", '["https://a.example"]', lambda c: c.api.cors_origins, ("https://a.example",)),
    ("DELINEATE__REDIS__SENTINELS", "s1.example:26379,[::1]:26380", lambda c: c.redis.sentinels,
     ("s1.example:26379", "[::1]:26380")),
    ("DELINEATE__API__CORS_ORIGINS", "", lambda c: c.api.cors_origins, ()),
    ("DELINEATE__PROCESSING__SIMULATED_DELAY__MIN", "0", lambda c: c.processing.simulated_delay.min, 0),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "read", "expected"), OVERRIDES)
def test_environment_overrides_every_type(name: str, text: str, read: Callable[[Any], Any], expected: Any) -> None:
    assert read(load_config({name: text}, CONF)) == expected


def test_environment_wins_over_overlay_and_overlay_over_base() -> None:
    assert load_config({"DELINEATE_ENV": "production"}, CONF).log.format == "json"
    assert load_config({"DELINEATE_ENV": "development"}, CONF).log.format == "text"
    assert load_config({"DELINEATE_ENV": "development", "DELINEATE__LOG__FORMAT": "json"}, CONF).log.format == "json"


def test_file_variant_reads_a_value_without_its_line_end(tmp_path: Path) -> None:
    (tmp_path / "password").write_text(f"{SECRET} \n")
    (tmp_path / "number").write_text("12\n")
    config = load_config(
        {
            "DELINEATE__REDIS__PASSWORD_FILE": str(tmp_path / "password"),
            "DELINEATE__WORKER__CONCURRENCY_FILE": str(tmp_path / "number"),
        },
        CONF,
    )
    assert config.redis.password == f"{SECRET} "
    assert config.worker.concurrency == 12


def test_conf_dir_from_the_environment(conf: Path) -> None:
    (conf / "development.yml").write_text("queue: {attempts: 9}\n")
    assert load_config({"DELINEATE_CONF_DIR": str(conf)}).queue.attempts == 9


def test_empty_overlay_changes_nothing(conf: Path) -> None:
    (conf / "production.yml").write_text("# nothing yet\n")
    assert load_config({"DELINEATE_ENV": "production"}, conf).api.secure_cookies is False


# environment -> what the one line must say: the place, the key, the value and what is allowed
BAD_ENVIRONMENT: list[tuple[dict[str, str], list[str]]] = [
    ({"DELINEATE_ENV": "prod"}, ["DELINEATE_ENV", "'prod'", "development, production, test"]),
    ({"DELINEATE__QUEUE__MAX_WAITNG": "5"}, ["DELINEATE__QUEUE__MAX_WAITNG", "queue.max_waitng", "conf/base.yml"]),
    ({"DELINEATE__QUEUE": "5"}, ["DELINEATE__QUEUE", "no key queue"]),
    ({"DELINEATE__": "5"}, ["DELINEATE__"]),
    (
        {"DELINEATE__QUEUE__MAX_WAITING": "many"},
        ["DELINEATE__QUEUE__MAX_WAITING", "queue.max_waiting", "'many'", "int"],
    ),
    ({"DELINEATE__QUEUE__MAX_WAITING": "0"}, ["queue.max_waiting", "0", ">= 1"]),
    ({"DELINEATE__QUEUE__MAX_WAITING": ""}, ["queue.max_waiting", "int"]),
    ({"DELINEATE__QUEUE__MAX_WAITING": "1.5"}, ["queue.max_waiting", "1.5", "int"]),
    ({"DELINEATE__QUEUE__MAX_WAITING": "9" * 30}, ["queue.max_waiting"]),
    ({"DELINEATE__QUEUE__MAX_WAITING": "{a: 1}"}, ["queue.max_waiting", "int"]),
    ({"DELINEATE__API__PORT": "65536"}, ["DELINEATE__API__PORT", "api.port", "65536", "<= 65535"]),
    ({"DELINEATE__API__REQUEST_TIMEOUT": "-1"}, ["api.request_timeout", "-1", "> 0"]),
    ({"DELINEATE__API__REQUEST_TIMEOUT": ".inf"}, ["api.request_timeout", "inf"]),
    ({"DELINEATE__API__REQUEST_TIMEOUT": ".nan"}, ["api.request_timeout", "nan", "> 0"]),
    ({"DELINEATE__RATE_LIMIT__ENABLED": "maybe"}, ["rate_limit.enabled", "'maybe'", "bool"]),
    ({"DELINEATE__LOG__LEVEL": "loud"}, ["log.level", "'loud'"]),
    ({"DELINEATE__API__TRUSTED_PROXIES": "10.0.0.0/99"}, ["api.trusted_proxies", "'10.0.0.0/99'", "10.0.0.0/8"]),
    ({"DELINEATE__API__CORS_ORIGINS": "app.example.org"}, ["api.cors_origins", "'app.example.org'", "https://"]),
    ({"DELINEATE__API__CORS_ORIGINS": "https://a.example/x"}, ["api.cors_origins", "without a path"]),
    ({"DELINEATE__STORAGE__ENDPOINT_URL": "s3.example.org"}, ["storage.endpoint_url", "'s3.example.org'", "https://"]),
    ({"DELINEATE__STORAGE__ENDPOINT_URL": "http://[::1"}, ["storage.endpoint_url", "https://"]),
    ({"DELINEATE__STORAGE__ENDPOINT_URL": "http://s3:99999"}, ["storage.endpoint_url", "99999"]),
    ({"OTEL_EXPORTER_OTLP_ENDPOINT": "jaeger:4318"}, ["OTEL_EXPORTER_OTLP_ENDPOINT", "telemetry.traces.endpoint"]),
    ({"DELINEATE__TELEMETRY__TRACES__RATIO": "1.5"}, ["telemetry.traces.ratio", "1.5", "<= 1"]),
    ({"DELINEATE__STORAGE__SOURCE_KEY": "files/{id}"}, ["storage.source_key", "{file_id}"]),
    ({"DELINEATE__STORAGE__SOURCE_KEY": "files/{"}, ["storage.source_key", "{file_id}"]),
    ({"DELINEATE__STORAGE__ARCHIVE_BUCKET": "files"}, ["storage.archive_bucket", "storage.source_bucket"]),
    ({"DELINEATE__STORAGE__SOURCE_BUCKET": "Bad_Name"}, ["storage.source_bucket", "'Bad_Name'"]),
    ({"DELINEATE__STORAGE__ADDRESSING_STYLE": "fancy"}, ["storage.addressing_style", "'fancy'"]),
    ({"DELINEATE__QUEUE__DEAD_AFTER": "1"}, ["queue.dead_after", "1", "twice queue.heartbeat"]),
    ({"DELINEATE__STORAGE__ORPHAN_AGE": "60"}, ["storage.orphan_age", "60", "worker.job_timeout"]),
    ({"DELINEATE__PROCESSING__SIMULATED_DELAY__MIN": "99"}, ["processing.simulated_delay.min", "99"]),
    ({"DELINEATE__REDIS__SENTINELS": "s1.example"}, ["redis.sentinels", "'s1.example'", "sentinel1.example.org:26379"]),
    ({"DELINEATE__REDIS__SENTINELS": "s1.example:0"}, ["redis.sentinels", "'s1.example:0'"]),
    ({"DELINEATE__REDIS__SENTINELS": "redis://s1.example:26379"}, ["redis.sentinels", "'redis://s1.example:26379'"]),
    ({"DELINEATE__REDIS__SENTINELS": "a:1, ::1:26379"}, ["redis.sentinels", "'::1:26379'"]),
    ({"DELINEATE__REDIS__SENTINELS": "a:1", "DELINEATE__REDIS__URL": "unix:///run/r"}, ["redis.sentinels", "unix"]),
    ({"DELINEATE__QUEUE__DURABILITY": "never"}, ["queue.durability", "'never'"]),
    ({"DELINEATE__REDIS__PASSWORD_FILE": "/nowhere/at/all"}, ["DELINEATE__REDIS__PASSWORD_FILE", "/nowhere/at/all"]),
    ({"DELINEATE__REDIS__PASSWORD_FILE": "/"}, ["DELINEATE__REDIS__PASSWORD_FILE", "cannot be read"]),
    ({"DELINEATE__REDIS__PASSWORD_FILE": "/dev/zero"}, ["DELINEATE__REDIS__PASSWORD_FILE", "larger than"]),
    (
        {"DELINEATE__REDIS__PASSWORD": SECRET, "DELINEATE__REDIS__PASSWORD_FILE": "/dev/null"},
        ["DELINEATE__REDIS__PASSWORD_FILE", "redis.password", "keep one"],
    ),
]


@pytest.mark.parametrize(("environ", "said"), BAD_ENVIRONMENT)
def test_a_bad_variable_is_one_line_that_names_it(environ: dict[str, str], said: list[str]) -> None:
    line = refused(environ)
    for words in said:
        assert words in line
    assert SECRET not in line


# content of development.yml -> what the one line must say
BAD_YAML: list[tuple[str, list[str]]] = [
    ("queue:\n  max_waiting: -1\n", ["development.yml", "queue.max_waiting", "-1", ">= 1"]),
    ("queue:\n  max_waitng: 1\n", ["development.yml", "queue.max_waitng", "no such key"]),
    ("cue:\n  max_waiting: 1\n", ["development.yml", "cue", "no such key"]),
    ("environment: production\n", ["development.yml", "environment", "DELINEATE_ENV"]),
    ("queue: 5\n", ["development.yml", "queue", "section", "5"]),
    ("queue:\n  attempts:\n    many: 1\n", ["development.yml", "queue.attempts", "one value"]),
    ("- a\n- b\n", ["development.yml", "list"]),
    ("just text\n", ["development.yml", "str"]),
    ("queue: [\n", ["development.yml:2:1"]),
    ("queue:\n\tattempts: 1\n", ["development.yml:2:1"]),
    ("log:\n  level: info\n  level: debug\n", ["development.yml:3:3", "'level'", "twice"]),
    ("log: &a\n  level: info\nqueue: *a\n", ["development.yml:3:8", "aliases"]),
    ("1: 2\n", ["development.yml", "key 1"]),
    ("? [a, b]\n: 1\n", ["development.yml"]),
    ("a: !!python/object:os.system 1\n", ["development.yml"]),
    ("a: \x07\n", ["development.yml"]),
    ("a: " + "[" * 5000, ["development.yml"]),
    ("api:\n  cors_origins: [1]\n", ["development.yml", "api.cors_origins", "str"]),
    ("log:\n  level: 2026-01-01\n", ["development.yml", "log.level"]),
]


@pytest.mark.parametrize(("content", "said"), BAD_YAML)
def test_a_bad_file_is_one_line_that_names_the_place(conf: Path, content: str, said: list[str]) -> None:
    (conf / "development.yml").write_text(content)
    line = refused({}, conf)
    for words in said:
        assert words in line


def test_a_file_that_is_not_text_is_one_line(conf: Path) -> None:
    (conf / "development.yml").write_bytes(b"\xff\xfe\x00")
    assert "development.yml" in refused({}, conf)


def test_a_missing_file_is_one_line(conf: Path) -> None:
    (conf / "production.yml").unlink()
    line = refused({"DELINEATE_ENV": "production"}, conf)
    assert "production.yml" in line
    assert "DELINEATE_CONF_DIR" in line


def test_a_key_missing_from_base_is_one_line(conf: Path) -> None:
    base = (conf / "base.yml").read_text()
    (conf / "base.yml").write_text(re.sub(r"(?m)^  max_waiting:.*\n", "", base))
    line = refused({}, conf)
    assert "base.yml" in line
    assert "queue.max_waiting" in line


@pytest.mark.parametrize("spoiled", ["5", ""])
def test_a_base_without_a_section_is_one_line_even_with_a_variable_for_it(conf: Path, spoiled: str) -> None:
    base = (conf / "base.yml").read_text()
    (conf / "base.yml").write_text(re.sub(r"(?ms)^sse:\n.*?\n\n", f"sse: {spoiled}\n\n", base))
    line = refused({"DELINEATE__SSE__RETRY": "3"}, conf)
    assert "base.yml" in line
    assert "sse" in line


@pytest.mark.parametrize(
    "content",
    [
        f"redis:\n  password: [{SECRET}]\n",
        f"storage:\n  secret_access_key: [{SECRET}]\n",
        f"storage:\n  access_key_id: [{SECRET}]\n",
        f"redis:\n  url: [{SECRET}]\n",
        f"redis:\n  sentinel_password: [{SECRET}]\n",
        f"redis:\n  sentinels: ['user:{SECRET}@example.org:26379']\n",
        f"redis:\n  url: http://user:{SECRET}@example.org\n",
        f"redis:\n  url: redis://user:{SECRET}@example.org:port/\n",
        f"storage:\n  endpoint_url: ftp://user:{SECRET}@example.org\n",
        f"storage:\n  public_endpoint_url: ftp://user:{SECRET}@example.org\n",
    ],
)
def test_no_error_shows_a_secret(conf: Path, content: str) -> None:
    (conf / "development.yml").write_text(content)
    assert SECRET not in refused({}, conf)


def test_the_configuration_does_not_show_secrets_when_printed() -> None:
    config = load_config({"DELINEATE__REDIS__PASSWORD": SECRET, "DELINEATE__STORAGE__SECRET_ACCESS_KEY": SECRET}, CONF)
    assert SECRET not in repr(config)
