"""From method and path to a route, in two dictionary look-ups; what nobody serves has a route too, which says so."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple
from urllib.parse import unquote_to_bytes

from delineate.api.handler import Answer, Handler, Request, Route, refusal
from delineate.errors import InvalidRequest, RouteNotFound

_PLACE = "{jobId}"
_BAD_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")
# The label for requests that match nothing: a path sent by a client must never become a metric's label.
NO_PATH = "(none)"


class Match(NamedTuple):
    """`path_id` stands where the route has `{jobId}`."""

    route: Route
    path_id: str = ""


class Table:
    """Every route by path; HEAD goes to GET, OPTIONS and wrong methods are answered for every path."""

    def __init__(self, routes: Iterable[Route]) -> None:
        self._paths: dict[str, dict[str, Route]] = {}
        # (how many segments, which of them is the id): the shapes to try for a path that is not fixed
        self._shapes: dict[int, list[int]] = {}
        self._wrong: dict[str, Route] = {}
        for route in routes:
            self._paths.setdefault(route.path, {})[route.method] = route
        for path, methods in self._paths.items():
            segments = path.split("/")
            if _PLACE in segments:
                places = self._shapes.setdefault(len(segments), [])
                if segments.index(_PLACE) not in places:
                    places.append(segments.index(_PLACE))
            if "GET" in methods:
                methods["HEAD"] = methods["GET"]
            allow = ", ".join([*sorted(methods), "OPTIONS"])
            methods["OPTIONS"] = Route("OPTIONS", path, _answers_options(allow), counted=False)
            self._wrong[path] = Route("", path, _answers_wrong_method(allow), counted=False)

    def find(self, method: str, target: str) -> Match:
        """`target` is the path as it was sent, without its query."""
        path = target
        if not path.startswith("/"):
            # RFC 9112: a server must take the absolute form too, and OPTIONS has "*".
            path = f"/{path.partition('://')[2].partition('/')[2]}" if "://" in path else path
            if path == "*" and method == "OPTIONS":
                return Match(_ANY_OPTIONS)
        if "%" in path:
            decoded = _decode(path)
            if decoded is None:
                return Match(_BAD_PATH)
            path = decoded
        if path in self._paths and _PLACE not in path:
            return self._of(path, method, "")
        segments = path.split("/")
        for place in self._shapes.get(len(segments), ()):
            path_id = segments[place]
            segments[place] = _PLACE
            template = "/".join(segments)
            segments[place] = path_id
            if path_id and template in self._paths:
                return self._of(template, method, path_id)
        return Match(_UNKNOWN)

    def _of(self, path: str, method: str, path_id: str) -> Match:
        return Match(self._paths[path].get(method) or self._wrong[path], path_id)


def _decode(path: str) -> str | None:
    if _BAD_ESCAPE.search(path):
        return None
    try:
        return unquote_to_bytes(path).decode()
    except UnicodeError:
        return None


def _answers_options(allow: str) -> Handler:
    answer = Answer(status=204, headers=(("Allow", allow),))

    async def handle(_: Request) -> Answer:
        return answer

    return handle


def _answers_wrong_method(allow: str) -> Handler:
    async def handle(request: Request) -> Answer:
        message = f"{request.method[:32]} is not possible here; {allow} are"
        return refusal(405, "method_not_allowed", message, request.request_id, headers=(("Allow", allow),))

    return handle


async def _unknown(_: Request) -> Answer:
    raise RouteNotFound("there is nothing at this path; /docs lists what there is")


async def _bad_path(_: Request) -> Answer:
    raise InvalidRequest("the path has a percent-encoding that cannot be read", code="invalid_path")


async def _no_host(_: Request) -> Answer:
    raise InvalidRequest("the header Host is missing")


NO_HOST = Route("", NO_PATH, _no_host, counted=False)
_UNKNOWN = Route("", NO_PATH, _unknown, counted=False)
_BAD_PATH = Route("", NO_PATH, _bad_path, counted=False)
_ANY_OPTIONS = Route("OPTIONS", NO_PATH, _answers_options("GET, HEAD, POST, DELETE, OPTIONS"), counted=False)
