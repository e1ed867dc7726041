"""nginx's configuration: nginx.conf with the values of conf/*.yml put in, checked by nginx itself.

A template and not a file with variables, because most directives of nginx
take none. What is put in has been validated (config.py), so nothing in it can
end a directive.
"""

from __future__ import annotations

import errno
import functools
import ipaddress
import json
import math
import os
import re
import resource
import shutil
import socket
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from delineate.config import Config
from delineate.errors import StartupError

CHECK_SECONDS = 20
# Each takes 250 bytes of memory at the start, used or not.
MAX_CONNECTIONS = 32_768
# Below any drain_timeout that makes sense: a connection that was idle for so long is closed by nginx, not by the API.
IDLE_SECONDS = 4
# `http2 on` came with this version, which warns about the older way (https://nginx.org/en/docs/http/ngx_http_v2_module.html).
HTTP2_DIRECTIVE = (1, 25, 1)

# Mozilla's "intermediate" recommendation: https://ssl-config.mozilla.org/guidelines/5.7.json
CIPHERS = (
    "ECDHE-ECDSA-AES128-GCM-SHA256:ECDHE-RSA-AES128-GCM-SHA256:ECDHE-ECDSA-AES256-GCM-SHA384:"
    "ECDHE-RSA-AES256-GCM-SHA384:ECDHE-ECDSA-CHACHA20-POLY1305:ECDHE-RSA-CHACHA20-POLY1305"
)

# Where nginx answers by itself: status (its own 49x ones among them) -> what is sent.
ERRORS: dict[str, tuple[int, str, str, str]] = {
    "400 494 501 505": (400, "Bad Request", "bad_request", "This is not a request that can be understood."),
    "495 496": (400, "Bad Request", "bad_certificate", "The TLS certificate of the client cannot be used."),
    "497": (400, "Bad Request", "tls_required", "This port speaks HTTPS."),
    "403": (403, "Forbidden", "forbidden", "This is not for everybody."),
    "404": (404, "Not Found", "not_found", "There is nothing at this path; /docs lists what there is."),
    "405": (405, "Method Not Allowed", "method_not_allowed", "This method is not possible here."),
    "408": (408, "Request Timeout", "request_timeout", "The request took too long to arrive."),
    "411": (411, "Length Required", "length_required", "The request has a body of unknown length."),
    "413": (413, "Content Too Large", "body_too_large", "The body is larger than {body_bytes} bytes."),
    "414": (414, "URI Too Long", "uri_too_long", "The address is too long."),
    "429": (429, "Too Many Requests", "too_many_connections", "Too many connections from this address; repeat later."),
    "500": (500, "Internal Server Error", "internal_error", "Something went wrong here; it has been logged."),
    "502": (502, "Bad Gateway", "bad_gateway", "The service does not answer now; repeat later."),
    "503": (503, "Service Unavailable", "unavailable", "The service is not available now; repeat later."),
    "504": (504, "Gateway Timeout", "gateway_timeout", "The service did not answer in time."),
}
# Nginx finds these before it has understood the path, and without one it cannot go to a named location.
PATHLESS = {"400 494 501 505", "414"}
LINK_ERRORS: dict[str, tuple[int, str, str, str]] = {
    "link": (403, "Forbidden", "link_refused", "This link has expired or was changed; ask for the download once more."),
    "gone": (410, "Gone", "archive_expired", "The archive has been deleted; start the export again."),
}


@dataclass(frozen=True, kw_only=True)
class Store:
    """The archives' bucket: its URL, and the file with the certificates that the store's is checked with."""

    url: str
    ca_file: str


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What of this machine goes into the configuration: DNS servers, /etc/hosts, IPv6, limits, root or not, and nginx's
    version."""

    resolvers: tuple[str, ...]
    hosts: dict[str, str]
    ipv6: bool
    open_files: int
    root: bool
    version: tuple[int, ...]

    @classmethod
    def look(cls) -> Machine:
        """Raises StartupError if there is no nginx."""
        return cls(
            resolvers=tuple(_resolvers(_text(Path("/etc/resolv.conf")))),
            hosts=dict(_hosts(_text(Path("/etc/hosts")))),
            ipv6=_has_ipv6(),
            open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
            root=os.geteuid() == 0,
            version=_version(),
        )


def render(template: str, config: Config, store: Store, folder: Path, machine: Machine, *, edge: bool) -> str:
    """The text of nginx.conf; `folder` is for its pid, caches and temporary files.

    `edge` spreads requests over `nginx.upstream` instead of this container's
    own API. Raises StartupError for a name that nginx could not look up.
    """
    nginx, api = config.nginx, config.api
    url = urlsplit(store.url)
    host = url.hostname or ""
    tls = _tls_lines(config, machine)
    values: dict[str, object] = {
        # Otherwise nginx gives its workers to nobody, who may not enter the home.
        "user": "user root;" if machine.root else "",
        "processes": nginx.processes,
        "connections": min(MAX_CONNECTIONS, machine.open_files),
        "drain_seconds": math.ceil(api.drain_timeout),
        "folder": folder,
        "real_ip": _lines(f"set_real_ip_from {network};" for network in nginx.trusted_proxies),
        "from_proxy": _lines(f"{network} 1;" for network in nginx.trusted_proxies),
        "redirect": int(nginx.redirect_to_https and bool(tls)),
        "https_suffix": "" if nginx.https_port == 443 else f":{nginx.https_port}",
        "body_bytes": api.max_body_bytes,
        "connections_of_address": nginx.connections_of_address,
        "resolver": f"resolver {' '.join(machine.resolvers)} valid=2s;" if machine.resolvers else "",
        "api": _api_address(config),
        "idle_seconds": max(1, min(IDLE_SECONDS, math.floor(api.drain_timeout / 2))),
        "api_seconds": math.ceil(api.request_timeout) + 5,
        "long_seconds": max(300, math.ceil(api.request_timeout) + 30),
        "stream_seconds": math.ceil(config.sse.max_duration) + 10,
        "store_seconds": math.ceil(config.storage.operation_timeout),
        "http": _listen(nginx.http_port, machine, "default_server backlog=4096"),
        "tls": tls,
        "internal": _listen(nginx.internal_port, machine, "default_server"),
        "internal_networks": _lines(f"allow {network};" for network in nginx.internal_networks),
        "upstream": _found(nginx.upstream, machine) if edge else "api",
        "metrics": "" if edge else "location = /metrics { proxy_read_timeout 5s; proxy_pass http://$upstream; }",
        "store_scheme": url.scheme,
        "store_host": url.netloc,
        "store_path": url.path,
        "store_address": _found(url.netloc, machine),
        "store_tls": _store_tls(host, store.ca_file) if url.scheme == "https" else "",
        "errors": _errors(api.max_body_bytes),
    }
    unknown = set(re.findall(r"@([a-z_]+)@", template)) ^ values.keys()
    if unknown:
        raise StartupError(f"nginx.conf: @{unknown.pop()}@ stands there and has no value, or the other way round")
    return re.sub(r"^( *)@([a-z_]+)@$|@([a-z_]+)@", functools.partial(_put, values), template, flags=re.MULTILINE)


def check(conf: Path) -> None:
    """Let nginx read the file and open its ports. Raises StartupError with nginx's own words.

    A port that another program has is no error in its eyes (check_ports).
    """
    done = subprocess.run(command(conf, test=True), capture_output=True, text=True, timeout=CHECK_SECONDS)
    if done.returncode:
        # The last line but "test failed" says what; before it are the time and "[emerg]".
        words = [line for line in done.stderr.splitlines() if "[emerg]" in line] or done.stderr.splitlines()[-1:]
        reason = re.sub(r"^.*\[emerg\] (?:\d+#\d+: )?", "", " ".join(words))
        raise StartupError(f"nginx cannot start: {reason}")


def check_ports(config: Config) -> None:
    """Raises StartupError if another program has a port: nginx would try five times, and say so in ten lines."""
    nginx = config.nginx
    ports = {"http_port": nginx.http_port, "internal_port": nginx.internal_port}
    if Path(nginx.certificate).exists():
        ports["https_port"] = nginx.https_port
    for name, port in ports.items():
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    raise StartupError(f"nginx.{name} {port} is in use by another program") from error
                # Whatever else there is, nginx says in its own words.


def command(conf: Path, *, test: bool = False) -> list[str]:
    """nginx in the foreground, or its check of the file `conf`."""
    return [_nginx(), "-p", str(conf.parent), "-e", "stderr", "-c", str(conf), *(("-t",) if test else ())]


def _put(values: dict[str, object], match: re.Match[str]) -> str:
    indent, block, inline = match.groups()
    if inline:
        return str(values[inline])
    return "\n".join(indent + line if line else "" for line in str(values[block]).splitlines())


def _lines(lines: Iterable[str]) -> str:
    return "\n".join(lines)


def _listen(port: int, machine: Machine, options: str) -> str:
    addresses = (str(port), f"[::]:{port}") if machine.ipv6 else (str(port),)
    return _lines(f"listen {address} {options};" for address in addresses)


def _tls_lines(config: Config, machine: Machine) -> str:
    nginx = config.nginx
    certificate, key = Path(nginx.certificate), Path(nginx.certificate_key)
    if not certificate.exists():
        return ""
    if not key.exists():
        raise StartupError(f"nginx.certificate {certificate} is there, but nginx.certificate_key {key} is not")
    http2 = machine.version < HTTP2_DIRECTIVE
    return _lines(
        [
            _listen(nginx.https_port, machine, f"default_server ssl{' http2' if http2 else ''} backlog=4096"),
            *([] if http2 else ["http2 on;"]),
            f"ssl_certificate {certificate};",
            f"ssl_certificate_key {key};",
            "ssl_protocols TLSv1.2 TLSv1.3;",
            f"ssl_ciphers {CIPHERS};",
            "ssl_prefer_server_ciphers off;",
            "ssl_session_cache shared:tls:10m;",
            "ssl_session_timeout 1d;",
            "ssl_session_tickets off;",
        ]
    )


def _store_tls(host: str, ca_file: str) -> str:
    return _lines(
        [
            "proxy_ssl_server_name on;",
            f"proxy_ssl_name {host};",
            "proxy_ssl_verify on;",
            "proxy_ssl_verify_depth 4;",
            f"proxy_ssl_trusted_certificate {ca_file};",
        ]
    )


def _errors(body_bytes: int) -> str:
    lines = []
    for statuses, error in ERRORS.items():
        status = error[0]
        pathless = statuses in PATHLESS
        name = f"/errors/{status}" if pathless else f"@{statuses.split()[0]}"
        lines.append(f"error_page {statuses} ={status} {name};")
        lines.append(_error_location(f"= {name}" if pathless else name, error, body_bytes))
    lines += [_error_location(f"@{name}", error, body_bytes) for name, error in LINK_ERRORS.items()]
    return _lines(lines)


def _error_location(name: str, error: tuple[int, str, str, str], body_bytes: int) -> str:
    status, words, code, message = error
    document = json.dumps(
        {
            "error": words,
            "code": code,
            "message": message.format(body_bytes=f"{body_bytes:,}"),
            "requestId": "$request_key",
            "details": [],
        },
        separators=(",", ":"),
    )
    internal = "" if name.startswith("@") else "internal; "
    return f"location {name} {{ {internal}default_type application/json; return {status} '{document}'; }}"


def _api_address(config: Config) -> str:
    host = config.api.host
    if host in ("0.0.0.0", "localhost"):
        host = "127.0.0.1"
    elif host == "::":
        host = "::1"
    return f"[{host}]:{config.api.port}" if ":" in host else f"{host}:{config.api.port}"


def _found(address: str, machine: Machine) -> str:
    """`address`, with the name replaced if /etc/hosts has it: nginx asks DNS servers alone."""
    name, _, port = address.rpartition(":") if re.search(r":\d+$", address) else (address, "", "")
    known = machine.hosts.get(name.lower())
    if known is not None:
        host = f"[{known}]" if ":" in known else known
        return f"{host}:{port}" if port else host
    if not machine.resolvers and not _is_address(name.strip("[]")):
        raise StartupError(f"nginx cannot look {name} up: /etc/resolv.conf names no server")
    return address


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _resolvers(text: str) -> Iterable[str]:
    for line in text.splitlines():
        words = line.split()
        if len(words) >= 2 and words[0] == "nameserver" and _is_address(words[1]):
            yield f"[{words[1]}]" if ":" in words[1] else words[1]


def _hosts(text: str) -> Iterable[tuple[str, str]]:
    # The first entry of a name counts, so it comes last.
    for line in reversed(text.splitlines()):
        address, *names = line.partition("#")[0].split() or [""]
        if _is_address(address):
            yield from ((name.lower(), address) for name in names)


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::", 0))
    except OSError:
        return False
    return True


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""


def _nginx() -> str:
    found = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
    if found is None:
        raise StartupError("there is no nginx on PATH; install it (Debian and Ubuntu: apt-get install nginx)")
    return found


def _version() -> tuple[int, ...]:
    done = subprocess.run([_nginx(), "-v"], capture_output=True, text=True, timeout=CHECK_SECONDS)
    found = re.search(r"nginx/(\d+)\.(\d+)\.(\d+)", done.stderr + done.stdout)
    if found is None:
        raise StartupError(f"nginx does not tell its version: {done.stderr.strip()}")
    return tuple(map(int, found.groups()))
