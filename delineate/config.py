"""Configuration: YAML files and the environment in, one frozen `Config` out; the only reader of os.environ.

`conf/base.yml` holds every key with its default; there are no defaults here.
An overlay named by DELINEATE_ENV and then DELINEATE__SECTION__KEY variables
change single keys. Whatever is wrong ends as one `ConfigError` line that
names the place, the key, the value and what is allowed.
"""

from __future__ import annotations

import ipaddress
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args
from urllib.parse import urlsplit

import msgspec
import yaml

from delineate.errors import ConfigError

ENVIRONMENTS = ("development", "production", "test")
PREFIX = "DELINEATE__"
# Names that an operator's tools set already: https://opentelemetry.io/docs/specs/otel/protocol/exporter/
STANDARD_NAMES = {"OTEL_EXPORTER_OTLP_ENDPOINT": ("telemetry", "traces", "endpoint")}
SECRET_KEYS = frozenset(
    {
        "redis.password",
        "redis.sentinel_password",
        "redis.url",
        "storage.secret_access_key",
        "storage.access_key_id",
    }
)
MAX_SECRET_FILE_BYTES = 65536
ORIGIN = re.compile(r"https?://[^/?#@\s]+")
FILE_PATH = re.compile(r"[A-Za-z0-9._/+@-]+")
ADDRESS = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9_.-]+)):([0-9]{1,5})")

# Upper bounds keep a slip of the keyboard (or .inf) from disabling a limit.
Seconds = Annotated[float, msgspec.Meta(gt=0, le=31_536_000, description="seconds above 0")]
Count = Annotated[int, msgspec.Meta(ge=1, le=1_000_000_000, description="a whole number from 1")]
CountOrZero = Annotated[int, msgspec.Meta(ge=0, le=1_000, description="a whole number from 0 to 1000")]
Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=255)]
BucketName = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$")]


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every section: frozen, an unknown key is an error, and a secret does not show when it is printed."""

    def __repr__(self) -> str:
        hidden = {key.rpartition(".")[2] for key in SECRET_KEYS}
        shown = (
            f"{name}={'(hidden)' if name in hidden and getattr(self, name) else repr(getattr(self, name))}"
            for name in self.__struct_fields__
        )
        return f"{type(self).__name__}({', '.join(shown)})"


class ApiConfig(Section, frozen=True, kw_only=True):
    host: Name
    port: Port
    request_timeout: Seconds
    drain_timeout: Seconds
    max_body_bytes: Annotated[int, msgspec.Meta(ge=1024, le=10_485_760)]
    idle_timeout: Seconds
    cors_origins: tuple[str, ...]
    trusted_proxies: tuple[str, ...]
    secure_cookies: bool


class SseConfig(Section, frozen=True, kw_only=True):
    heartbeat: Annotated[float, msgspec.Meta(gt=0, lt=100)]
    max_duration: Seconds
    retry: Seconds
    max_buffer_bytes: Annotated[int, msgspec.Meta(ge=4096, le=16_777_216)]


class RedisConfig(Section, frozen=True, kw_only=True):
    url: Name
    password: str
    sentinels: tuple[str, ...]
    sentinel_master: Name
    sentinel_password: str
    prefix: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_.:-]{1,64}$")]
    operation_timeout: Seconds
    connect_timeout: Seconds
    max_connections: Annotated[int, msgspec.Meta(ge=4, le=10_000)]


class QueueConfig(Section, frozen=True, kw_only=True):
    durability: Literal["everysec", "always"]
    max_waiting: Count
    max_waiting_of_user: Count
    attempts: Annotated[int, msgspec.Meta(ge=1, le=100)]
    internal_attempts: Annotated[int, msgspec.Meta(ge=1, le=100)]
    backoff: Seconds
    max_crashes: Annotated[int, msgspec.Meta(ge=0, le=1000)]
    claim_wait: Annotated[float, msgspec.Meta(gt=0, le=60)]
    heartbeat: Seconds
    dead_after: Seconds
    janitor_interval: Seconds


class RetentionConfig(Section, frozen=True, kw_only=True):
    job: Seconds
    failed: Seconds
    user_jobs: Seconds
    idempotency: Seconds


class RateLimitConfig(Section, frozen=True, kw_only=True):
    enabled: bool
    requests: Count
    window: Seconds


class StorageConfig(Section, frozen=True, kw_only=True):
    endpoint_url: str
    public_endpoint_url: str
    region: Name
    access_key_id: str
    secret_access_key: str
    addressing_style: Literal["path", "virtual", "auto"]
    source_bucket: BucketName
    archive_bucket: BucketName
    create_buckets: bool
    source_key: Name
    archive_prefix: str
    archive_days: Annotated[int, msgspec.Meta(ge=1, le=3650)]
    orphan_age: Seconds
    orphan_interval: Seconds
    connections: Annotated[int, msgspec.Meta(ge=1, le=10_000)]
    operation_timeout: Seconds
    connect_timeout: Seconds
    retries: CountOrZero
    link_lifetime: Annotated[int, msgspec.Meta(ge=1, le=604_800)]


class ArchiveConfig(Section, frozen=True, kw_only=True):
    # S3 refuses parts under 5 MiB and over 5 GiB:
    # https://docs.aws.amazon.com/AmazonS3/latest/userguide/qfacts.html
    part_bytes: Annotated[int, msgspec.Meta(ge=5_242_880, le=1_073_741_824)]
    slots: Annotated[int, msgspec.Meta(ge=1, le=64)]
    fetch_concurrency: Annotated[int, msgspec.Meta(ge=1, le=1000)]
    probe_bytes: Annotated[int, msgspec.Meta(ge=1, le=1_048_576)]
    max_bytes: Annotated[int, msgspec.Meta(ge=1024, le=5_497_558_138_880)]
    max_name_bytes: Annotated[int, msgspec.Meta(ge=32, le=65_535)]


class WorkerConfig(Section, frozen=True, kw_only=True):
    concurrency: Annotated[int, msgspec.Meta(ge=1, le=1000)]
    job_timeout: Seconds
    drain_timeout: Seconds
    progress_interval: Annotated[float, msgspec.Meta(ge=0.05, le=60)]


class SimulatedDelayConfig(Section, frozen=True, kw_only=True):
    enabled: bool
    min: Annotated[float, msgspec.Meta(ge=0, le=3600)]
    max: Annotated[float, msgspec.Meta(ge=0, le=3600)]


class ProcessingConfig(Section, frozen=True, kw_only=True):
    simulated_delay: SimulatedDelayConfig


class NginxConfig(Section, frozen=True, kw_only=True):
    http_port: Port
    https_port: Port
    internal_port: Port
    internal_networks: tuple[str, ...]
    certificate: str
    certificate_key: str
    redirect_to_https: bool
    trusted_proxies: tuple[str, ...]
    upstream: str
    processes: Annotated[int, msgspec.Meta(ge=1, le=256)]
    connections_of_address: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]


class LogConfig(Section, frozen=True, kw_only=True):
    level: Literal["debug", "info", "warning", "error"]
    format: Literal["json", "text"]


class TracesConfig(Section, frozen=True, kw_only=True):
    endpoint: str
    ratio: Annotated[float, msgspec.Meta(ge=0, le=1, description="a number from 0 to 1")]
    request_ratio: Annotated[float, msgspec.Meta(ge=0, le=1, description="a number from 0 to 1")]
    per_minute: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]


class TelemetryConfig(Section, frozen=True, kw_only=True):
    metrics_dir: str
    traces: TracesConfig


class Config(Section, frozen=True, kw_only=True):
    """Everything a process needs to know; `environment` is DELINEATE_ENV."""

    environment: Literal["development", "production", "test"]
    api: ApiConfig
    sse: SseConfig
    redis: RedisConfig
    queue: QueueConfig
    retention: RetentionConfig
    rate_limit: RateLimitConfig
    storage: StorageConfig
    archive: ArchiveConfig
    worker: WorkerConfig
    processing: ProcessingConfig
    nginx: NginxConfig
    log: LogConfig
    telemetry: TelemetryConfig


def load_config(environ: Mapping[str, str] | None = None, conf_dir: Path | None = None) -> Config:
    """Read base.yml, the overlay and the environment; the result is complete and checked.

    `environ` stands for os.environ, `conf_dir` for DELINEATE_CONF_DIR; without
    either it is ./conf, or the checkout's conf/ beside this package.

    Raises ConfigError with one line that names place, key, value and what is allowed.
    """
    environ = os.environ if environ is None else environ
    environment = environ.get("DELINEATE_ENV", "development")
    if environment not in ENVIRONMENTS:
        raise ConfigError(
            f"environment variable DELINEATE_ENV: {environment!r} is not allowed, use one of {', '.join(ENVIRONMENTS)}"
        )
    folder = conf_dir or find_conf_dir(environ)
    values: dict[str, Any] = {}
    places: dict[str, str] = {}
    for file in (folder / "base.yml", folder / f"{environment}.yml"):
        _merge(values, places, _read_yaml(file), str(file), ())
    if "environment" in values:
        raise ConfigError(f"{places['environment']}: environment: no such key; DELINEATE_ENV chooses the overlay")
    known = dict(_leaves(Config))
    for key, raw, place in _from_environment(environ, known):
        _put(values, key, raw)
        places[".".join(key)] = place
    values["environment"] = environment
    config = _convert(values, places, folder / "base.yml")
    _check_relations(config, places)
    return config


def read_environment() -> dict[str, str]:
    """A copy of the environment, for `delineate up`, which makes one for the processes that it starts."""
    return dict(os.environ)


def find_conf_dir(environ: Mapping[str, str]) -> Path:
    """The folder of base.yml and the overlays: DELINEATE_CONF_DIR, else ./conf, else the checkout's."""
    named = environ.get("DELINEATE_CONF_DIR")
    if named:
        return Path(named)
    here = Path("conf")
    return here if (here / "base.yml").is_file() else Path(__file__).resolve().parent.parent / "conf"


def split_address(address: str) -> tuple[str, int]:
    """Host and port of `host:port`; an IPv6 host is in brackets. Raises ValueError."""
    found = ADDRESS.fullmatch(address)
    if found is None or not 0 < int(found[3]) < 65_536:
        raise ValueError(address)
    return found[1] or found[2], int(found[3])


def keys() -> list[str]:
    """Every dotted key that exists, e.g. `queue.max_waiting`."""
    return [".".join(key) for key, _ in _leaves(Config)]


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys and aliases, which would hide or multiply values."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.constructor.ConstructorError(None, None, "aliases are not allowed", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is not text", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file; DELINEATE_CONF_DIR names the folder that has base.yml") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from error
    try:
        content = yaml.load(text, _StrictLoader)  # noqa: S506 - a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise ConfigError(f"{file}{where}: {error.problem or 'not valid YAML'}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: not valid YAML: {str(error).splitlines()[0]}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: expected sections such as 'queue:', got {type(content).__name__}")
    return content


def _leaves(section: type[Section], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for field in msgspec.structs.fields(section):
        if isinstance(field.type, type) and issubclass(field.type, Section):
            yield from _leaves(field.type, (*path, field.name))
        elif path:
            yield (*path, field.name), field.type


def _merge(
    into: dict[str, Any], places: dict[str, str], new: Mapping[str, Any], place: str, path: tuple[str, ...]
) -> None:
    for key, value in new.items():
        here = (*path, key)
        if isinstance(value, dict):
            current = into.setdefault(key, {})
            if not isinstance(current, dict):
                raise ConfigError(f"{place}: {'.'.join(here)}: expected one value, got a section")
            _merge(current, places, value, place, here)
            continue
        if isinstance(into.get(key), dict):
            raise ConfigError(f"{place}: {'.'.join(here)}: expected a section with keys of its own, got {value!r}")
        into[key] = value
        places[".".join(here)] = place


def _from_environment(
    environ: Mapping[str, str], known: Mapping[tuple[str, ...], Any]
) -> Iterator[tuple[tuple[str, ...], Any, str]]:
    seen: dict[tuple[str, ...], str] = {}
    for name in sorted(environ):
        if not name.startswith(PREFIX):
            continue
        key = tuple(name[len(PREFIX) :].lower().split("__"))
        text = environ[name]
        if key not in known and key[-1].endswith("_file"):
            key = (*key[:-1], key[-1].removesuffix("_file"))
            text = _read_secret(name, text)
        if key not in known:
            raise ConfigError(f"environment variable {name}: there is no key {'.'.join(key)}; conf/base.yml lists them")
        if key in seen:
            raise ConfigError(f"environment variables {seen[key]} and {name} both set {'.'.join(key)}: keep one")
        seen[key] = name
        yield key, _parse(text, known[key]), f"environment variable {name}"
    for name, key in STANDARD_NAMES.items():
        if environ.get(name) and key not in seen:
            yield key, environ[name], f"environment variable {name}"


def _read_secret(name: str, path: str) -> str:
    try:
        with Path(path).open("rb") as file:
            content = file.read(MAX_SECRET_FILE_BYTES + 1)
        if len(content) > MAX_SECRET_FILE_BYTES:
            raise ConfigError(f"environment variable {name}: {path} is larger than {MAX_SECRET_FILE_BYTES} bytes")
        return content.decode().rstrip("\r\n")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise ConfigError(f"environment variable {name}: {path} cannot be read: {error}") from error


def _parse(text: str, wanted: Any) -> Any:
    """Text stays text where text is wanted (a password of digits); all else reads as YAML does."""
    base = get_args(wanted)[0] if hasattr(wanted, "__metadata__") else wanted
    if base is str:
        return text
    if base == tuple[str, ...] and not text.lstrip().startswith("["):
        return [item.strip() for item in text.split(",") if item.strip()]
    try:
        return yaml.load(text, _StrictLoader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError):
        return text  # not a value of any kind; the check that follows says what is wanted


def _put(values: dict[str, Any], key: tuple[str, ...], value: Any) -> None:
    section: Any = values
    for name in key[:-1]:
        section = section.setdefault(name, {})
        if not isinstance(section, dict):
            return  # a file has no section there; the check that follows names the file
    section[key[-1]] = value


def _convert(values: dict[str, Any], places: Mapping[str, str], base: Path) -> Config:
    try:
        return msgspec.convert(values, Config)
    except msgspec.ValidationError as error:
        problem, _, at = str(error).partition(" - at ")
        key = at.strip("`").removeprefix("$").removeprefix(".").split("[")[0]
        if problem.startswith("Object contains unknown field"):
            name = problem.split("`")[1]
            key = f"{key}.{name}".lstrip(".")
            place = next((where for known, where in places.items() if f"{known}.".startswith(f"{key}.")), str(base))
            raise ConfigError(f"{place}: {key}: no such key; conf/base.yml lists them all") from error
        if problem.startswith("Object missing required field"):
            name = problem.split("`")[1]
            raise ConfigError(f"{base}: {f'{key}.{name}'.lstrip('.')}: missing; the shipped file has it") from error
        value = _get(values, key)
        shown = "(hidden)" if key in SECRET_KEYS else repr(value)
        problem = problem[0].lower() + problem[1:]
        raise ConfigError(f"{places.get(key, base)}: {key}: {shown} is not allowed, {problem}") from error


def _get(values: Any, key: str) -> Any:
    for name in key.split("."):
        values = values.get(name) if isinstance(values, dict) else None
    return values


def _check_relations(config: Config, places: Mapping[str, str]) -> None:
    """What one key's type cannot say: relations between keys, and the form of URLs."""

    def refuse(key: str, value: object, allowed: str) -> ConfigError:
        return ConfigError(f"{places.get(key, 'conf/base.yml')}: {key}: {value!r} is not allowed, expected {allowed}")

    for key in keys():
        number = _get(msgspec.to_builtins(config), key)
        if isinstance(number, float) and not math.isfinite(number):
            raise refuse(key, number, "a finite number")
    if config.queue.dead_after < 2 * config.queue.heartbeat:
        raise refuse("queue.dead_after", config.queue.dead_after, "at least twice queue.heartbeat")
    delay = config.processing.simulated_delay
    if delay.min > delay.max:
        raise refuse("processing.simulated_delay.min", delay.min, "at most processing.simulated_delay.max")
    if _scheme(config.redis.url) not in ("redis", "rediss", "unix"):
        raise ConfigError(
            f"{places.get('redis.url', 'conf/base.yml')}: redis.url: (hidden) is not allowed, "
            "expected a URL that starts with redis://, rediss:// or unix://"
        )
    if config.redis.sentinels and _scheme(config.redis.url) == "unix":
        raise refuse("redis.sentinels", config.redis.sentinels, "nothing when redis.url is a unix socket")
    for address in config.redis.sentinels:
        try:
            split_address(address)
        except ValueError:
            shown = re.sub(r".*@", "(hidden)@", address)
            raise refuse("redis.sentinels", shown, "addresses such as sentinel1.example.org:26379") from None
    for key in ("storage.endpoint_url", "storage.public_endpoint_url", "telemetry.traces.endpoint"):
        url = _get(msgspec.to_builtins(config), key)
        if url and (_scheme(url) not in ("http", "https") or not urlsplit(url).hostname):
            raise refuse(key, _without_password(url), "a URL such as https://name.example.org, or nothing")
    for key in ("api.trusted_proxies", "nginx.trusted_proxies", "nginx.internal_networks"):
        for network in _get(msgspec.to_builtins(config), key):
            try:
                ipaddress.ip_network(network, strict=False)
            except ValueError:
                raise refuse(key, network, "networks such as 10.0.0.0/8 or ::1/128") from None
    nginx = config.nginx
    ports = {"http_port": nginx.http_port, "https_port": nginx.https_port, "internal_port": nginx.internal_port}
    for name, port in ports.items():
        if list(ports.values()).count(port) > 1:
            raise refuse(f"nginx.{name}", port, "another port than nginx's others")
    if nginx.upstream:
        try:
            split_address(nginx.upstream)
        except ValueError:
            raise refuse("nginx.upstream", nginx.upstream, "host and port, such as app:80, or nothing") from None
    for key in ("nginx.certificate", "nginx.certificate_key"):
        if not FILE_PATH.fullmatch(_get(msgspec.to_builtins(config), key)):
            raise refuse(key, _get(msgspec.to_builtins(config), key), "the path of a file, without spaces or quotes")
    for origin in config.api.cors_origins:
        if origin != "*" and not ORIGIN.fullmatch(origin):
            raise refuse("api.cors_origins", origin, "origins such as https://app.example.org, without a path, or *")
    storage = config.storage
    if storage.archive_days * 86_400 < config.retention.job:
        raise refuse("storage.archive_days", storage.archive_days, "at least retention.job, in days")
    if storage.orphan_age < config.worker.job_timeout:
        raise refuse("storage.orphan_age", storage.orphan_age, "at least worker.job_timeout")
    try:
        once = storage.source_key.format(file_id=70000)
    except (KeyError, IndexError, ValueError):
        once = ""
    if "70000" not in once:
        raise refuse("storage.source_key", storage.source_key, 'text with {file_id} in it, e.g. "files/{file_id}.bin"')
    if storage.source_bucket == storage.archive_bucket:
        raise refuse("storage.archive_bucket", storage.archive_bucket, "another bucket than storage.source_bucket")


def _scheme(url: str) -> str:
    """The scheme of a URL that makes sense as a whole, its port included; else nothing."""
    try:
        parts = urlsplit(url)
        return parts.scheme if parts.port is None or parts.port > 0 else ""
    except ValueError:
        return ""


def _without_password(url: str) -> str:
    return re.sub(r"//[^/]*@", "//(hidden)@", url)
