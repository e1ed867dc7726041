"""What a person sees: the page, its files, the documentation; and the index for programs at the same address."""

from __future__ import annotations

import functools
import hashlib
from importlib import resources

from delineate import __version__
from delineate.api.handler import Answer, Headers, Request, Route, encode_json, json_answer
from delineate.api.openapi import describe_api, describe_api_as_html

PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
_FILES = {"/app.js": "text/javascript; charset=utf-8", "/style.css": "text/css; charset=utf-8"}
_INDEX = {
    "name": "delineate",
    "version": __version__,
    "links": {
        "export": "/v1/export",
        "exports": "/v1/exports",
        "docs": "/docs",
        "openapi": "/openapi.json",
        "health": "/health",
        "metrics": "/metrics",
    },
}


async def show_index(request: Request) -> Answer:
    """The same page for everybody, so that nginx can keep it: the session begins with the page's first question."""
    vary: Headers = (("Vary", "Accept"),)
    if "text/html" not in request.headers.get("Accept", ""):
        return json_answer(_INDEX, headers=vary)
    return _page(request, "index.html", "text/html; charset=utf-8", (*vary, ("Content-Security-Policy", PAGE_POLICY)))


async def show_file(request: Request) -> Answer:
    return _page(request, request.path.removeprefix("/"), _FILES[request.path])


def _page(request: Request, name: str, content_type: str, headers: Headers = ()) -> Answer:
    body = _file(name)
    etag = f'"{hashlib.sha256(body).hexdigest()[:16]}"'
    headers = (*headers, ("ETag", etag), ("Cache-Control", "no-cache"))
    if etag in request.headers.get("If-None-Match", ""):
        return Answer(status=304, headers=headers)
    return Answer(body, content_type=content_type, headers=headers)


async def show_openapi(_: Request) -> Answer:
    return Answer(_openapi())


async def show_docs(_: Request) -> Answer:
    return Answer(_docs(), content_type="text/html; charset=utf-8", headers=(("Content-Security-Policy", PAGE_POLICY),))


@functools.cache
def _openapi() -> bytes:
    return encode_json(describe_api())


@functools.cache
def _docs() -> bytes:
    return describe_api_as_html(describe_api()).encode()


@functools.cache
def _file(name: str) -> bytes:
    return (resources.files("delineate") / "web" / name).read_bytes()


ROUTES = [
    Route("GET", "/", show_index, counted=False),
    Route("GET", "/docs", show_docs, counted=False),
    Route("GET", "/openapi.json", show_openapi, counted=False),
    *(Route("GET", path, show_file, counted=False) for path in _FILES),
]
