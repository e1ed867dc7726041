"""compose.yml and the files beside it, as Docker reads them: valid everywhere, closed, bounded, and without secrets."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from delineate.config import load_config
from tests.compose.stack import COMBINATIONS, PRODUCTION, PROFILES, ROOT, Rendered, Stack, services

EVERY = [(files, profile) for files in COMBINATIONS.values() for profile in PROFILES]
every_combination = pytest.mark.parametrize(
    ("files", "profile"), EVERY, ids=[f"{name}-{profile or 'none'}" for name in COMBINATIONS for profile in PROFILES]
)
every_store = pytest.mark.parametrize("profile", PROFILES, ids=lambda profile: profile or "none")
OURS = ("nginx", "app", "buckets")
OUR_IMAGE = "delineate:latest"
PINNED = re.compile(r"^[\w./-]+:(v|RELEASE\.)?\d+\.?\d*[\w.-]*\d[\w.-]*$")
ONCE = ("buckets", "minio-user", "seed")
NO_SHELL = ("nginx-exporter",)


@every_combination
def test_docker_compose_accepts_every_combination(stack: Stack, files: tuple[str, ...], profile: str) -> None:
    assert {"nginx", "app", "redis"} <= services(stack.compose(files, profile)).keys()


@pytest.mark.parametrize("files", [("compose.yml",), ("compose.yml", "compose.tls.yml")], ids=["plain", "tls"])
def test_swarm_accepts_the_same_file(stack: Stack, files: tuple[str, ...]) -> None:
    rendered = services(stack.swarm(files))
    assert {"nginx", "app", "buckets", "redis", "s3"} <= rendered.keys()
    update = rendered["app"]["deploy"]["update_config"]
    assert (update["order"], update["failure_action"]) == ("start-first", "rollback")
    assert update["monitor"]


def test_swarm_scales_by_the_settings(stack: Stack) -> None:
    class Scaled(Stack):
        def settings(self) -> dict[str, str]:
            return {**super().settings(), "DELINEATE_REPLICAS": "3", "DELINEATE_S3_REPLICAS": "0"}

    rendered = services(Scaled(stack.checkout).swarm(("compose.yml",)))
    assert rendered["app"]["deploy"]["replicas"] == 3
    assert rendered["s3"]["deploy"]["replicas"] == rendered["buckets"]["deploy"]["replicas"] == 0


@every_store
def test_production_publishes_nginx_and_grafana_on_loopback_alone(stack: Stack, profile: str) -> None:
    assert published(stack.compose(PRODUCTION, profile)) == {("nginx", "", "80"), ("grafana", "127.0.0.1", "3001")}
    with_tls = published(stack.compose((*PRODUCTION, "compose.tls.yml"), profile))
    assert with_tls - published(stack.compose(PRODUCTION, profile)) == {("nginx", "", "443")}


def test_swarm_publishes_nginx_alone(stack: Stack) -> None:
    assert published(stack.swarm(("compose.yml",))) == {("nginx", "", "80")}


def test_development_publishes_on_loopback_alone(stack: Stack) -> None:
    ports = published(stack.compose(COMBINATIONS["development"], "seaweedfs"))
    assert {host for _, host, _ in ports} == {"127.0.0.1"}
    assert {"80", "3000", "6379", "8333", "9090", "3100", "3001", "16686", "4318"} <= {port for *_, port in ports}


def test_nginx_does_not_run_out_of_ports(stack: Stack) -> None:
    """It opens a connection for each request; how many a second that allows is in docs/scaling.md."""
    for rendered in (stack.compose(PRODUCTION, "seaweedfs"), stack.swarm(("compose.yml",))):
        assert services(rendered)["nginx"]["sysctls"] == {
            "net.ipv4.ip_unprivileged_port_start": "0",
            "net.ipv4.tcp_tw_reuse": "1",
        }


@every_store
def test_only_what_publishes_is_outside_the_internal_network(stack: Stack, profile: str) -> None:
    rendered = stack.compose(PRODUCTION, profile)
    outside = {name for name, service in services(rendered).items() if "edge" in service["networks"]}
    assert outside == {"nginx", "grafana"}
    assert rendered["networks"]["backend"]["internal"] is True
    assert all("backend" in service["networks"] for service in services(rendered).values())


@every_combination
def test_every_image_is_pinned(stack: Stack, files: tuple[str, ...], profile: str) -> None:
    images = {service["image"] for service in services(stack.compose(files, profile)).values()} - {OUR_IMAGE}
    assert not [image for image in images if not PINNED.match(image)]


@every_combination
def test_every_service_is_bounded(stack: Stack, files: tuple[str, ...], profile: str) -> None:
    for name, service in services(stack.compose(files, profile)).items():
        limits = service["deploy"]["resources"]["limits"]
        assert limits.keys() >= {"cpus", "memory"}, name
        assert service["logging"] == {"driver": "json-file", "options": {"max-file": "5", "max-size": "10m"}}, name


@every_store
def test_every_server_is_started_again_and_has_a_health_check(stack: Stack, profile: str) -> None:
    for name, service in services(stack.compose(PRODUCTION, profile)).items():
        if name in ONCE:
            assert service["restart"] == "no", name
            continue
        assert service["restart"] == "unless-stopped", name
        # Ours have theirs in the image.
        assert name in NO_SHELL or service["image"] == OUR_IMAGE or service["healthcheck"]["test"], name


@every_store
def test_no_container_keeps_privileges(stack: Stack, profile: str) -> None:
    for name, service in services(stack.compose(PRODUCTION, profile)).items():
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert not service.get("privileged"), name
    for name in OURS:
        service = services(stack.compose(PRODUCTION, "seaweedfs"))[name]
        assert service["read_only"] is True
        assert not service.get("cap_add")
        assert [volume["type"] for volume in service["volumes"]] == ["tmpfs"]


@every_combination
def test_every_mounted_file_exists(stack: Stack, files: tuple[str, ...], profile: str) -> None:
    rendered = stack.compose(files, profile)
    volumes = [volume for service in services(rendered).values() for volume in service.get("volumes", ())]
    paths = {
        *(volume["source"] for volume in volumes if volume["type"] == "bind"),
        *(config["file"] for config in rendered.get("configs", {}).values()),
        *(secret["file"] for secret in rendered.get("secrets", {}).values()),
    } - {"/var/run/docker.sock", "/"}
    brought_by_the_operator = {str(stack.checkout / "secrets" / name) for name in ("tls.crt", "tls.key")}
    missing = {path for path in paths if not Path(path).exists()}
    assert missing <= brought_by_the_operator
    assert all(path.startswith(str(stack.checkout)) for path in paths)


@every_combination
def test_no_secret_is_in_a_file_or_in_the_environment(stack: Stack, files: tuple[str, ...], profile: str) -> None:
    rendered = stack.compose(files, profile)
    values = [file.read_text() for file in (stack.checkout / "secrets").iterdir()]
    assert not [value for value in values if value in str(rendered)]
    for name, service in services(rendered).items():
        for variable, value in service.get("environment", {}).items():
            if re.search(r"PASSWORD|SECRET|ACCESS_KEY|TOKEN|ROOT_USER", variable):
                assert variable.endswith("_FILE"), f"{name}: {variable}"
                assert value.removeprefix("/run/secrets/") in secrets_of(service), f"{name}: {variable}"


@every_combination
def test_every_setting_is_one_that_delineate_knows(stack: Stack, files: tuple[str, ...], profile: str) -> None:
    for name, service in services(stack.compose(files, profile)).items():
        if service["image"] == OUR_IMAGE:
            config = load_config(settings_of(stack, service), ROOT / "conf")
            worked_on = name in ("app", "nginx", "seed") and "compose.dev.yml" in files
            assert config.environment == ("development" if worked_on else "production"), name


def test_nothing_starts_before_what_it_needs(stack: Stack) -> None:
    seaweedfs = services(stack.compose(PRODUCTION, "seaweedfs"))
    assert needs(seaweedfs, "nginx") == {"app": "service_healthy"}
    assert needs(seaweedfs, "app") == {
        "redis": "service_healthy",
        "buckets": "service_completed_successfully",
        "jaeger": "service_started",
    }
    assert needs(seaweedfs, "buckets") == {"s3": "service_healthy"}
    assert needs(seaweedfs, "grafana") == dict.fromkeys(("prometheus", "loki", "jaeger"), "service_healthy")
    minio = services(stack.compose(PRODUCTION, "minio"))
    assert needs(minio, "buckets") == {"minio": "service_healthy"}
    assert needs(minio, "app")["minio-user"] == "service_completed_successfully"
    outside = services(stack.compose(PRODUCTION, ""))
    assert needs(outside, "app") == {"redis": "service_healthy", "jaeger": "service_started"}
    assert not outside.keys() & {"s3", "minio", "buckets", "minio-user"}


def test_the_service_works_with_less_than_the_admins_keys(stack: Stack) -> None:
    for files in COMBINATIONS.values():
        rendered = services(stack.compose(files, "minio"))
        assert secrets_of(rendered["app"]) == {"redis_password", "s3_access_key", "s3_secret_key"}
        assert not secrets_of(rendered["nginx"]) - {"tls_crt", "tls_key"}


def test_development_is_slow_verbose_and_reloads(stack: Stack) -> None:
    app = services(stack.compose(COMBINATIONS["development"], "seaweedfs"))["app"]
    config = load_config(settings_of(stack, app), ROOT / "conf")
    delay = config.processing.simulated_delay
    assert (delay.enabled, delay.min, delay.max) == (True, 5, 15)
    assert (config.log.level, config.log.format) == ("debug", "text")
    code = {
        mount["target"]: mount["source"].removeprefix(f"{stack.checkout}/")
        for mount in app["volumes"]
        if mount["type"] == "bind" and mount["read_only"]
    }
    assert code == {"/app/delineate": "delineate", "/app/conf": "conf"}
    assert app["environment"]["PYTHONPATH"] == "/app"
    assert app["entrypoint"] == ["/bin/sh", "-c", "sh conf/reload & exec delineate serve"]
    assert app["read_only"] is True


def test_tls_redirects_and_keeps_the_cookie_to_itself(stack: Stack) -> None:
    rendered = services(stack.compose(COMBINATIONS["production with TLS"], "seaweedfs"))
    assert load_config(settings_of(stack, rendered["app"]), ROOT / "conf").api.secure_cookies is True
    assert rendered["nginx"]["environment"]["DELINEATE__NGINX__REDIRECT_TO_HTTPS"] == "true"
    targets = {secret["source"]: secret["target"] for secret in rendered["nginx"]["secrets"]}
    config = load_config({}, ROOT / "conf").nginx
    assert targets == {"tls_crt": config.certificate, "tls_key": config.certificate_key}


def test_what_stops_has_time_to_finish(stack: Stack) -> None:
    rendered = services(stack.compose(PRODUCTION, "seaweedfs"))
    app = load_config(settings_of(stack, rendered["app"]), ROOT / "conf")
    assert rendered["app"]["stop_grace_period"] == "1m0s"
    assert app.worker.drain_timeout + 10 < 60
    assert app.api.drain_timeout + 10 < 60
    assert (rendered["nginx"]["stop_signal"], rendered["nginx"]["stop_grace_period"]) == ("SIGQUIT", "30s")
    assert load_config(settings_of(stack, rendered["nginx"]), ROOT / "conf").api.drain_timeout < 30


def test_every_variable_of_the_compose_files_is_in_env_example() -> None:
    used = {name for file in ROOT.glob("compose*.yml") for name in re.findall(r"\$\{(\w+)", file.read_text())}
    text = (ROOT / ".env.example").read_text()
    documented = set(re.findall(r"^#?(\w+)=", text, re.MULTILINE))
    assert used - documented == {"COMPOSE_PROJECT_NAME"}  # compose sets it
    assert documented - used == {"COMPOSE_FILE", "COMPOSE_PROFILES", "DELINEATE__STORAGE__SOURCE_KEY"}


def settings_of(stack: Stack, service: dict[str, Any]) -> dict[str, str]:
    """The environment of one of our containers, with its secrets where they are on this machine."""
    return {
        variable: value.replace("/run/secrets", str(stack.checkout / "secrets"))
        for variable, value in service["environment"].items()
        if value is not None  # passed on from .env if it is there
    }


def published(rendered: Rendered) -> set[tuple[str, str, str]]:
    return {
        (name, port.get("host_ip", ""), str(port["published"]))
        for name, service in services(rendered).items()
        for port in service.get("ports", ())
    }


def secrets_of(service: dict[str, Any]) -> set[str]:
    return {secret["source"] for secret in service.get("secrets", ())}


def needs(rendered: dict[str, dict[str, Any]], name: str) -> dict[str, str]:
    return {
        needed: rule["condition"] for needed, rule in rendered[name].get("depends_on", {}).items() if needed in rendered
    }
