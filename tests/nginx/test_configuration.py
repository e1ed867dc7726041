"""What is put into nginx.conf is what nginx takes without a warning, or one line that says what to change."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from delineate.config import Config
from delineate.errors import StartupError
from delineate.nginx import Machine, Store, check, command, render
from tests.api.running import changed
from tests.nginx.certificates import make_certificate
from tests.nginx.door import CA_FILE, TEMPLATE, rendered, steady_port, store_of, with_ports
from tests.proxies.fronts import find

HTTPS = Store(url="https://s3.example.org/archives", ca_file=CA_FILE)
CASES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "trusted proxies": {"keys": {"trusted_proxies": ("10.0.0.0/8", "fd00::/8", "192.0.2.7/32")}},
    "one store over TLS": {"store": HTTPS},
    "edge": {"edge": True, "keys": {"upstream": "app.example.org:80"}},
    "edge of an address": {"edge": True, "keys": {"upstream": "[::1]:80"}},
    "no IPv6": {"machine": {"ipv6": False}},
    "no DNS, addresses alone": {"machine": {"resolvers": ()}},
    "IPv6 DNS": {"machine": {"resolvers": ("[fd00::1]", "10.0.0.1")}},
    "a name of /etc/hosts": {"store": HTTPS, "machine": {"resolvers": (), "hosts": {"s3.example.org": "fd00::2"}}},
    "a name nobody knows": {"store": Store(url="http://none.invalid:9000/archives", ca_file="")},
}


def written(
    config: Config,
    folder: Path,
    *,
    store: Store | None = None,
    edge: bool = False,
    keys: dict[str, Any] | None = None,
    machine: dict[str, Any] | None = None,
) -> Path:
    find("nginx")
    conf = folder / "nginx.conf"
    here = replace(Machine.look(), **(machine or {}))
    conf.write_text(rendered(with_ports(config, **(keys or {})), folder, store=store, edge=edge, machine=here))
    return conf


def words_of(conf: Path) -> list[str]:
    done = subprocess.run(command(conf, test=True), capture_output=True, text=True, timeout=20)
    return [line for line in (done.stdout + done.stderr).splitlines() if line]


@pytest.mark.parametrize("case", CASES)
def test_nginx_takes_it_without_a_warning(config: Config, tmp_path: Path, case: str) -> None:
    conf = written(config, tmp_path, **CASES[case])
    assert [re.sub(".*nginx.conf ", "", line) for line in words_of(conf)] == ["syntax is ok", "test is successful"]


@pytest.mark.parametrize("redirect", [False, True])
def test_nginx_takes_a_certificate_without_a_warning(config: Config, tmp_path: Path, redirect: bool) -> None:
    files = make_certificate(tmp_path)
    conf = written(config, tmp_path, keys={**files.keys, "redirect_to_https": redirect})
    assert len(words_of(conf)) == 2
    assert "ssl_certificate" in conf.read_text()


def test_http2_is_asked_for_as_each_nginx_wants_it(config: Config, tmp_path: Path) -> None:
    config = with_ports(config, **make_certificate(tmp_path).keys)
    for version, words in (((1, 22, 1), " ssl http2 "), ((1, 25, 0), " ssl http2 "), ((1, 25, 1), "http2 on;")):
        text = rendered(config, tmp_path, machine=replace(Machine.look(), version=version))
        assert words in text
        assert ("http2 on;" in text) is (words == "http2 on;")


def refusal(conf: Path) -> str:
    with pytest.raises(StartupError) as caught:
        check(conf)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_port_in_use_is_one_line(config: Config, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = run_delineate(
            tmp_path,
            "edge",
            DELINEATE__NGINX__UPSTREAM="127.0.0.1:80",
            DELINEATE__NGINX__HTTP_PORT=str(steady_port()),
            DELINEATE__NGINX__INTERNAL_PORT=str(port),
        )
    assert done.returncode == 2
    assert done.stderr == f"delineate edge: nginx.internal_port {port} is in use by another program\n"


def test_bad_certificates_are_one_line(config: Config, tmp_path: Path) -> None:
    files, other = make_certificate(tmp_path), make_certificate(tmp_path, "other")
    with pytest.raises(StartupError, match=r"^nginx\.certificate .* is there, but nginx\.certificate_key .* is not$"):
        written(config, tmp_path, keys={**files.keys, "certificate_key": str(tmp_path / "none")})
    mixed = {**files.keys, "certificate_key": other.keys["certificate_key"]}
    assert "key values mismatch" in refusal(written(config, tmp_path, keys=mixed))
    (tmp_path / "bad").write_text("no certificate")
    bad = {**files.keys, "certificate": str(tmp_path / "bad")}
    assert f'cannot load certificate "{tmp_path}/bad"' in refusal(written(config, tmp_path, keys=bad))


def test_store_without_its_authorities_is_one_line(config: Config, tmp_path: Path) -> None:
    store = Store(url="https://127.0.0.1/archives", ca_file=str(tmp_path / "none.pem"))
    assert "none.pem" in refusal(written(config, tmp_path, store=store))


def test_name_without_dns_is_one_line(config: Config, tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"^nginx cannot look s3\.example\.org up: /etc/resolv\.conf names no serv"):
        written(config, tmp_path, store=HTTPS, machine={"resolvers": (), "hosts": {}})


def test_every_value_of_the_template_is_known_and_used(config: Config, tmp_path: Path) -> None:
    template = TEMPLATE.read_text()
    for text in (f"{template}@surprise@", template.replace("@processes@", "2")):
        with pytest.raises(StartupError, match=r"^nginx\.conf: @(surprise|processes)@ stands there"):
            render(text, config, store_of(config), tmp_path, Machine.look(), edge=False)


def test_edge_without_upstream_is_one_line(tmp_path: Path) -> None:
    done = run_delineate(tmp_path, "edge")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "nginx.upstream" in done.stderr


def test_root_keeps_its_workers_and_others_have_no_choice(config: Config, tmp_path: Path) -> None:
    for root in (True, False):
        text = rendered(config, tmp_path, machine=replace(Machine.look(), root=root))
        assert ("\nuser root;\n" in text) is root


def run_delineate(home: Path, command: str, **given: str) -> subprocess.CompletedProcess[str]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("DELINEATE")}
    return subprocess.run(
        [sys.executable, "-m", "delineate", command],
        env=environ | {"DELINEATE_HOME": str(home), "DELINEATE_ENV": "test"} | given,
        capture_output=True,
        text=True,
        timeout=30,
    )


def test_long_waits_are_changed_with_the_configuration(config: Config, tmp_path: Path) -> None:
    text = rendered(changed(config, "sse", max_duration=50.5), tmp_path)
    assert "proxy_read_timeout 61s;" in text
