"""TLS at nginx: HTTP/2, old versions, HSTS, the redirect, and certificates that are renewed."""

from __future__ import annotations

import os
import signal
import socket
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from delineate.config import Config
from tests.nginx.certificates import Certificate, make_certificate
from tests.nginx.door import Door, RawReply, door
from tests.nginx.test_answers import check_error, get
from tests.proxies.fronts import Api
from tests.servers import wait_until


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return make_certificate(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def secure(
    shared_config: Config, api: Api, files: Certificate, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Door]:
    """TLS, and everybody is sent there."""
    folder = tmp_path_factory.mktemp("nginx")
    with door(shared_config, folder, api=api.port, redirect_to_https=True, **files.keys) as started:
        yield started


def over_tls(nginx: Door, files: Certificate, request: bytes) -> RawReply:
    context = ssl.create_default_context(cafile=str(files.certificate))
    with (
        socket.create_connection(("127.0.0.1", nginx.tls_port), 10) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as sock,
    ):
        sock.sendall(request)
        data = b""
        while piece := sock.recv(65536):
            data += piece
    return RawReply.parse(data)


def curl(nginx: Door, files: Certificate, path: str, *options: str) -> subprocess.CompletedProcess[str]:
    url = f"https://localhost:{nginx.tls_port}{path}"
    words = ["curl", "-sS", "--cacert", str(files.certificate), "--max-time", "10", *options, url]
    return subprocess.run(words, capture_output=True, text=True)


def test_http_2_is_agreed_on(secure: Door, files: Certificate) -> None:
    done = curl(secure, files, "/v1/exports", "-o", "/dev/null", "-w", "%{http_version} %{http_code}")
    assert done.stdout == "2 200", done.stderr
    error = curl(secure, files, "/metrics", "-D", "-", "-H", "X-Request-ID: over-two")
    assert "HTTP/2 404" in error.stdout
    assert error.stdout.count("over-two") == 2  # its header and its document
    assert secure.logged("over-two")["context"]["protocol"] == "HTTP/2.0"


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
def test_old_versions_are_refused(secure: Door, files: Certificate) -> None:
    def agreed(version: ssl.TLSVersion) -> str | None:
        context = ssl.create_default_context(cafile=str(files.certificate))
        context.set_ciphers("ALL:@SECLEVEL=0")  # or OpenSSL would not even try the old ones
        context.minimum_version = context.maximum_version = version
        with (
            socket.create_connection(("127.0.0.1", secure.tls_port), 10) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as sock,
        ):
            return sock.version()

    for old in (ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1):
        with pytest.raises(ssl.SSLError, match="ALERT_PROTOCOL_VERSION"):
            agreed(old)
    assert agreed(ssl.TLSVersion.TLSv1_2) == "TLSv1.2"
    assert agreed(ssl.TLSVersion.TLSv1_3) == "TLSv1.3"


def test_hsts_and_secure_cookies_are_for_tls_alone(secure: Door, files: Certificate) -> None:
    reply = over_tls(secure, files, get("/v1/exports"))
    assert reply.all("strict-transport-security") == ["max-age=31536000; includeSubDomains"]
    assert "; Secure" in reply.all("set-cookie")[0]
    error = over_tls(secure, files, get("/metrics"))
    assert len(error.all("strict-transport-security")) == 1


async def test_everybody_is_sent_to_tls_with_path_and_query(secure: Door) -> None:
    for method in ("GET", "POST"):
        reply = await secure.raw(get("/v1/export/x%20y?a=%2F&b", method=method))
        assert reply.status == 308
        assert reply.all("location") == [f"https://x:{secure.tls_port}/v1/export/x%20y?a=%2F&b"]
        assert reply.all("strict-transport-security") == []
        assert len(reply.all("x-request-id")) == 1


async def test_health_checks_are_not_sent_away(secure: Door) -> None:
    assert (await secure.ask("GET", "/health/live")).status == 200
    assert (await secure.ask("GET", "/health")).status in (200, 503)
    assert (await secure.raw(get("/healthy"))).status == 308


async def test_errors_before_the_redirect_are_errors(secure: Door) -> None:
    check_error(await secure.raw(b"nonsense\r\n\r\n"), 400, "bad_request")


async def test_plain_http_at_the_port_of_tls_is_told_so(secure: Door) -> None:
    nginx = Door(secure.tls_port, 0, 0, secure.folder, secure.server)
    check_error(await nginx.raw(get("/v1/exports")), 400, "tls_required")


def test_renewed_certificate_counts_after_a_hangup(shared_config: Config, tmp_path: Path, api: Api) -> None:
    files = make_certificate(tmp_path)
    with door(shared_config, tmp_path / "n", api=api.port, **files.keys) as nginx:
        old = ssl.get_server_certificate(("127.0.0.1", nginx.tls_port))
        make_certificate(tmp_path)
        assert ssl.get_server_certificate(("127.0.0.1", nginx.tls_port)) == old
        assert nginx.server.process is not None
        os.kill(nginx.server.process.pid, signal.SIGHUP)
        new = files.certificate.read_text()
        # The old worker takes a connection or two while the new one starts.
        wait_until(
            lambda: all(ssl.get_server_certificate(("127.0.0.1", nginx.tls_port)) == new for _ in range(5)),
            "the new certificate",
        )
        assert over_tls(nginx, files, get("/health/live")).status == 200
