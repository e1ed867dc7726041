"""Who is asking: the address that limits are counted for, and the session that groups a browser's jobs.

Access is anonymous: whoever knows a job's id may use it, so ids are random
UUIDs. The session cookie decides only which jobs `GET /v1/exports` lists and
whose Idempotency-Key is meant.
"""

from __future__ import annotations

import functools
import hashlib
import ipaddress
import re
import secrets
from collections.abc import Callable, Iterable
from typing import NamedTuple

from delineate.api.handler import Headers, Request
from delineate.errors import ConfigError

COOKIE = "delineate_session"
# Characters of X-Forwarded-For, from its end: six hops of IPv6. A hop that is cut in two is no address and ends it.
MAX_FORWARDED = 256
_COOKIE_VALUE = re.compile(r"[A-Za-z0-9_-]{43}")
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class Session(NamedTuple):
    """`user` is what Redis and logs see; `headers` sets or prolongs the cookie."""

    user: str
    headers: Headers


def open_session(request: Request, *, idempotency_key: str | None = None) -> Session:
    """The session of the request's cookie, or a new one.

    A program without cookies gets a new session each time, which would make
    its Idempotency-Key useless: with a key but no cookie the user is derived
    from the address and the key, and no cookie is set, since others could derive it too.
    """
    value = _cookie(request.headers.get("Cookie", ""))
    if value is None and idempotency_key is not None:
        return Session(f"key-{_digest(f'{request.caller} {idempotency_key}')}", ())
    value = value or secrets.token_urlsafe(32)
    return Session(_user(value), (("Set-Cookie", _set_cookie(value, request)),))


def _cookie(header: str) -> str | None:
    for part in header.split(";"):
        name, _, value = part.strip().partition("=")
        if name == COOKIE and _COOKIE_VALUE.fullmatch(value):
            return value
    return None


def _user(value: str) -> str:
    # A digest, so that whoever reads Redis or a log cannot take the session over.
    return f"session-{_digest(value)}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _set_cookie(value: str, request: Request) -> str:
    config = request.services.config
    # Whoever forges the header makes only the cookie that it gets itself stricter.
    over_tls = config.api.secure_cookies or request.headers.get("X-Forwarded-Proto") == "https"
    secure = "; Secure" if over_tls else ""
    lifetime = int(config.retention.user_jobs)
    return f"{COOKIE}={value}; Path=/; Max-Age={lifetime}; HttpOnly; SameSite=Lax{secure}"


def make_caller(trusted: Iterable[str]) -> Callable[[str, str], str]:
    """A function from (peer address, X-Forwarded-For) to the caller's address, as text.

    The header is read from its end, as proxies append to it, for as long as
    the hop that vouches is in `trusted`; what a client wrote in front is
    never believed. IPv6 callers are counted by their /64: one household has
    that many addresses to spend. Raises ConfigError for what is not a network.
    """
    networks: list[Network] = []
    for text in trusted:
        try:
            networks.append(ipaddress.ip_network(text, strict=False))
        except ValueError:
            raise ConfigError(
                f"configuration: api.trusted_proxies: {text!r} is not allowed, expected networks such as 10.0.0.0/8"
            ) from None

    def caller(peer: str, forwarded: str) -> str:
        # Only the last hops can vouch, and a key of the cache must not be as long as a client likes.
        return find(peer, forwarded[-MAX_FORWARDED:])

    # Cached: parsing addresses costs more than the rest of routing.
    @functools.lru_cache(maxsize=4096)
    def find(peer: str, forwarded: str) -> str:
        address = _address(peer)
        if address is None:
            return peer
        hops = forwarded.split(",") if forwarded else []
        while hops and any(address in network for network in networks):
            before = _address(hops.pop().strip())
            if before is None:
                break
            address = before
        if address.version == 6:
            return str(ipaddress.ip_network((address, 64), strict=False))
        return str(address)

    return caller


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address
