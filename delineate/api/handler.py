"""What a handler of the API sees: a Request comes in, an Answer goes out, errors become JSON.

A handler is an async function from `Request` to `Answer`; it raises what
delineate/errors.py has and never writes to a socket. `exchange.py` is the
other side: it reads the request off the connection and writes the answer.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING
from urllib.parse import parse_qs

import msgspec
from tornado.httputil import HTTPHeaders

from delineate.errors import (
    AccessRefused,
    BucketMissing,
    Detail,
    InvalidRequest,
    JobNotFound,
    QueueUnavailable,
    RequestError,
    StorageTimeout,
    StorageUnavailable,
)
from delineate.job import JOB_ID

if TYPE_CHECKING:
    import asyncio

    from delineate.api.events import Streams
    from delineate.api.feeds import Feeds
    from delineate.api.health import Checks
    from delineate.api.limits import Limiter
    from delineate.api.links import Links
    from delineate.config import Config
    from delineate.queue import Queue, RateLimit
    from delineate.storage import Storage

_log = logging.getLogger(__name__)

# The names of RFC 9110; http.HTTPStatus changes its mind about 413 and 422 between Python versions.
REASONS = {status.value: status.phrase for status in HTTPStatus} | {
    413: "Content Too Large",
    422: "Unprocessable Content",
}
UNAVAILABLE_RETRY_AFTER_SECONDS = 2
JSON_TYPE = "application/json"
Headers = tuple[tuple[str, str], ...]

encode_json = msgspec.json.Encoder().encode


class ErrorDetail(msgspec.Struct, frozen=True):
    path: str
    message: str


class ErrorDocument(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """Every answer from 400 up: `error` is the status in words, `code` is for programs."""

    error: str
    code: str
    message: str
    request_id: str
    details: list[ErrorDetail] = []


class Answer:
    """What goes back; `headers` are those that only this answer has."""

    __slots__ = ("body", "content_type", "headers", "status")

    def __init__(
        self, body: bytes = b"", *, status: int = 200, content_type: str = JSON_TYPE, headers: Headers = ()
    ) -> None:
        for name, value in headers:
            # Here and not on the wire: a handler that raises still gets its client an answer.
            if "\r" in value or "\n" in value:
                raise ValueError(f"header {name} would break the answer: {value!r}")
        self.body = body
        self.status = status
        self.content_type = content_type
        self.headers = headers


def json_answer(document: object, *, status: int = 200, headers: Headers = ()) -> Answer:
    return Answer(encode_json(document), status=status, headers=headers)


@dataclass(frozen=True, slots=True)
class Services:
    """What handlers work with; one set for the life of the process."""

    config: Config
    queue: Queue
    storage: Storage
    links: Links
    feeds: Feeds
    limiter: Limiter
    streams: Streams
    checks: Checks
    draining: asyncio.Event


Handler = Callable[["Request"], Awaitable[Answer]]


@dataclass(frozen=True, slots=True)
class Route:
    """`path` may have one `{jobId}`, and is the label that metrics use.

    `counted` requests fall under the rate limit. `patient` ones end by
    themselves instead of by api.request_timeout, and are cancelled when
    their client goes. `streams` ones take the connection over. `makes_job` ones begin
    the trace of their job.
    """

    method: str
    path: str
    handle: Handler
    counted: bool = True
    patient: bool = False
    streams: bool = False
    makes_job: bool = False


class Request:
    """One request, complete. `caller` is the address of its sender; `job_id` is from the path, unchecked."""

    __slots__ = (
        "body",
        "caller",
        "headers",
        "method",
        "path",
        "path_id",
        "query_string",
        "rate",
        "request_id",
        "services",
    )

    def __init__(
        self,
        services: Services,
        *,
        method: str,
        path: str,
        query: str,
        headers: HTTPHeaders,
        caller: str,
        request_id: str,
        path_id: str = "",
    ) -> None:
        self.services = services
        self.method = method
        self.path = path
        self.query_string = query
        self.headers = headers
        self.caller = caller
        self.request_id = request_id
        self.path_id = path_id
        self.body = b""
        self.rate: RateLimit | None = None

    @property
    def job_id(self) -> str:
        """The id in the path, in lower case (RFC 9562: UUIDs compare without case). Raises JobNotFound."""
        job_id = self.path_id.lower()
        if not JOB_ID.fullmatch(job_id):
            # Not 400: what cannot be an id is the id of no job, and a client can handle that one answer.
            raise JobNotFound("there is no such job")
        return job_id

    def query(self, name: str) -> str | None:
        """The value of one query parameter; raises InvalidRequest if it comes twice or is not UTF-8."""
        if not self.query_string:
            return None
        try:
            values = parse_qs(self.query_string, keep_blank_values=True, errors="strict", max_num_fields=50)
        except ValueError:
            raise InvalidRequest("the query string cannot be read", code="invalid_query") from None
        found = values.get(name, [])
        if len(found) > 1:
            raise invalid_query(name, "must be given once")
        return found[0] if found else None

    def log_context(self) -> dict[str, object]:
        """Neither query nor caller: the one may hold a signature, the other is personal data."""
        fields: dict[str, object] = {"method": self.method, "path": self.path}
        if self.path_id and JOB_ID.fullmatch(job_id := self.path_id.lower()):
            fields["jobId"] = job_id
        return fields


def invalid_query(name: str, problem: str) -> InvalidRequest:
    return InvalidRequest(
        f"the query parameter {name} {problem}", code="invalid_query", details=[Detail(f"?{name}", problem)]
    )


def error_answer(error: BaseException, request: Request) -> Answer:
    """The JSON for any error; what is ours to repair is logged, with its stack if nobody foresaw it."""
    match error:
        case RequestError():
            return refusal(
                error.status, error.code, error.message, request.request_id, error.details, error.retry_after
            )
        case QueueUnavailable():
            _log.warning("%s", error)
            return _away("queue_unavailable", "The queue is not available now; repeat the request later.", request)
        case StorageTimeout():
            _log.warning("%s", error)
            return refusal(504, "storage_timeout", "The file store did not answer in time.", request.request_id)
        case StorageUnavailable() | AccessRefused() | BucketMissing():
            _log.warning("%s", error)
            return _away("storage_unavailable", "The file store is not available now; repeat later.", request)
        case TimeoutError():
            _log.warning("the request took too long")
            return refusal(504, "request_timeout", "The request took too long.", request.request_id)
    _log.error("unexpected error while answering", exc_info=error)
    return refusal(500, "internal_error", "Something went wrong here; it has been logged.", request.request_id)


def _away(code: str, message: str, request: Request) -> Answer:
    return refusal(503, code, message, request.request_id, retry_after=UNAVAILABLE_RETRY_AFTER_SECONDS)


def refusal(
    status: int,
    code: str,
    message: str,
    request_id: str,
    details: Sequence[Detail] = (),
    retry_after: float | None = None,
    headers: Headers = (),
) -> Answer:
    """An error as JSON. Messages may quote the client, so they are made encodable here."""
    document = ErrorDocument(
        error=REASONS[status],
        code=code,
        message=_encodable(message),
        request_id=request_id,
        details=[ErrorDetail(_encodable(path), _encodable(text)) for path, text in details],
    )
    if retry_after is not None:
        headers = (*headers, ("Retry-After", str(max(1, round(retry_after + 0.499)))))
    return json_answer(document, status=status, headers=headers)


def _encodable(text: str) -> str:
    # JSON may carry half a surrogate pair ("\ud800"), which no UTF-8 answer can repeat.
    return text.encode("utf-8", "backslashreplace").decode()
