"""The API's own description, OpenAPI 3.1, from the schemas that check requests and the ones answers are made of."""

from __future__ import annotations

import html
from typing import Any, NamedTuple

import msgspec

from delineate import __version__
from delineate.api.documents import (
    Availability,
    Created,
    DownloadDocument,
    HealthDocument,
    JobDocument,
    JobPage,
    ProgressDocument,
    StartDocument,
)
from delineate.api.handler import REASONS, ErrorDocument
from delineate.api.schemas import ExportRequest, FileRequest

Schema = dict[str, Any]


class Operation(NamedTuple):
    """One method of one path. `answers` by status: a type, a media type for what is not JSON, None for no body."""

    method: str
    path: str
    summary: str
    answers: dict[int, type | str | None]
    body: type | None = None
    parameters: tuple[str, ...] = ()
    older_name_of: str = ""


# Every counted operation can also be refused by the limit and by an outage of Redis.
_ALWAYS = (429, 500, 503, 504)
_SUMMARY_STREAM = (
    "Follow an export: events progress, completed, failed and cancelled; the first is the present state, "
    "a final one ends the stream. 204 if Last-Event-ID names the final event."
)

OPERATIONS = (
    Operation(
        "POST", "/v1/export", "Ask for an archive of up to 1,000 files; answers at once.",
        {200: Created, 400: None, 413: None, 415: None, 422: None}, ExportRequest, ("Idempotency-Key",),
    ),
    Operation(
        "GET", "/v1/export/{jobId}", "Look at an export.", {200: JobDocument, 304: None, 404: None},
        parameters=("jobId", "If-None-Match"),
    ),
    Operation(
        "GET", "/v1/export/{jobId}/progress", _SUMMARY_STREAM,
        {200: "text/event-stream", 204: None, 404: None}, parameters=("jobId", "Last-Event-ID"),
    ),
    Operation(
        "GET", "/v1/export/{jobId}/download", "A fresh link to the finished archive; ?redirect=1 goes there.",
        {200: DownloadDocument, 302: DownloadDocument, 404: None, 409: None, 410: None},
        parameters=("jobId", "redirect"),
    ),
    Operation(
        "DELETE", "/v1/export/{jobId}", "Cancel an unfinished export; may be repeated.",
        {200: JobDocument, 404: None, 409: None}, parameters=("jobId",),
    ),
    Operation(
        "POST", "/v1/export/{jobId}/retry", "Put a failed or cancelled export back into the queue.",
        {200: JobDocument, 404: None, 409: None}, parameters=("jobId",),
    ),
    Operation(
        "GET", "/v1/exports", "The caller's own exports (by session cookie), newest first, without links.",
        {200: JobPage, 400: None}, parameters=("limit", "cursor"),
    ),
    Operation(
        "POST", "/v1/download/check", "Is a file there?", {200: Availability, 400: None, 413: None, 415: None},
        FileRequest,
    ),
    Operation(
        "POST", "/v1/download/start", "Export one file and wait for it; 202 when that takes too long.",
        {200: StartDocument, 202: Created, 400: None, 413: None, 415: None, 422: None},
        FileRequest, ("Idempotency-Key",),
    ),
    Operation("GET", "/health", "Can the service work?", {200: HealthDocument, 503: HealthDocument}),
    Operation("GET", "/health/live", "Is this process alive?", {200: dict}),
    Operation("GET", "/metrics", "Prometheus text of every process of this container.", {200: "text/plain"}),
    Operation("GET", "/openapi.json", "This description.", {200: dict}),
    Operation("GET", "/docs", "This description, for people.", {200: "text/html"}),
    Operation("GET", "/", "The page to a browser, a list of links to others.", {200: dict}),
)  # fmt: skip
OLDER_NAMES = (
    ("POST", "/v1/download/initiate", "/v1/export"),
    ("GET", "/v1/download/status/{jobId}", "/v1/export/{jobId}"),
    ("GET", "/v1/download/subscribe/{jobId}", "/v1/export/{jobId}/progress"),
    ("DELETE", "/v1/download/{jobId}", "/v1/export/{jobId}"),
)

_PARAMETERS: dict[str, tuple[str, str, Schema]] = {
    "jobId": ("path", "The job's id.", {"type": "string", "format": "uuid"}),
    "limit": ("query", "Jobs in one answer.", {"type": "integer", "minimum": 1, "maximum": 100, "default": 20}),
    "cursor": ("query", "nextCursor of an earlier answer.", {"type": "string"}),
    "redirect": ("query", "1 answers 302 to the archive.", {"type": "string", "enum": ["1", "true"]}),
    "Idempotency-Key": (
        "header", "The same key and body bring the same job back for 24 hours; with another body: 422.",
        {"type": "string", "pattern": "^[ -~]{1,255}$"},
    ),
    "If-None-Match": ("header", "An ETag: 304 if nothing has changed.", {"type": "string"}),
    "Last-Event-ID": ("header", "The last event that was seen.", {"type": "string"}),
}  # fmt: skip


def describe_api() -> Schema:
    """The OpenAPI document."""
    types = (
        *(ExportRequest, FileRequest, Created, JobDocument, ProgressDocument, DownloadDocument, JobPage),
        *(Availability, StartDocument, HealthDocument, ErrorDocument),
    )
    schemas, components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    refs = dict(zip(types, schemas, strict=True))
    paths: dict[str, Schema] = {}
    for operation in all_operations():
        paths.setdefault(operation.path, {})[operation.method.lower()] = _operation(operation, refs)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "delineate",
            "version": __version__,
            "description": "Many stored files in, one ZIP and a presigned URL out, in the background.",
        },
        "paths": paths,
        "components": {"schemas": components},
    }


def all_operations() -> list[Operation]:
    known = {(operation.method, operation.path): operation for operation in OPERATIONS}
    older = [known[method, newer]._replace(path=path, older_name_of=newer) for method, path, newer in OLDER_NAMES]
    return [*OPERATIONS, *older]


def _operation(operation: Operation, refs: dict[Any, Schema]) -> Schema:
    answers = dict(operation.answers)
    if operation.path.startswith("/v1/"):
        for status in _ALWAYS:
            answers.setdefault(status, None)
    summary = f"Older name of {operation.older_name_of}." if operation.older_name_of else operation.summary
    described: Schema = {
        "summary": summary,
        "responses": {str(status): _answer(status, answers[status], refs) for status in sorted(answers)},
    }
    if operation.parameters:
        described["parameters"] = [_parameter(name) for name in operation.parameters]
    if operation.body is not None:
        content = {"application/json": {"schema": refs[operation.body]}}
        described["requestBody"] = {"required": True, "content": content}
    return described


def _answer(status: int, content: type | str | None, refs: dict[Any, Schema]) -> Schema:
    described: Schema = {"description": REASONS[status]}
    if content is None and status >= 400:
        content = ErrorDocument
    if isinstance(content, str):
        described["content"] = {content: {"schema": {"type": "string"}}}
    elif content is not None:
        described["content"] = {"application/json": {"schema": refs.get(content, {"type": "object"})}}
    return described


def _parameter(name: str) -> Schema:
    place, description, schema = _PARAMETERS[name]
    return {"name": name, "in": place, "required": place == "path", "description": description, "schema": schema}


def describe_api_as_html(document: Schema) -> str:
    """The same to read: no scripts, nothing from other hosts."""
    rows = []
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            statuses = ", ".join(operation["responses"])
            takes = ", ".join(parameter["name"] for parameter in operation.get("parameters", ()))
            body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
            takes = ", ".join(filter(None, (takes, body.get("$ref", "").rpartition("/")[2])))
            cells = (
                f"<b>{method.upper()}</b>",
                f"<code>{html.escape(path)}</code>",
                html.escape(operation["summary"]),
                html.escape(takes),
                statuses,
            )
            rows.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    schemas = "".join(
        f"<h3 id='{html.escape(name)}'>{html.escape(name)}</h3><p>{html.escape(schema.get('description', ''))}</p>"
        f"<pre>{html.escape(msgspec.json.format(msgspec.json.encode(schema), indent=2).decode())}</pre>"
        for name, schema in document["components"]["schemas"].items()
    )
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>delineate API</title>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'><link rel='icon' href='data:,'>"
        "<link rel='stylesheet' href='/style.css'></head><body><main class='wide'><h1>delineate API</h1>"
        f"<p>{html.escape(document['info']['description'])} The same for programs: "
        "<a href='/openapi.json'>/openapi.json</a>.</p><div class='scroll'><table><thead><tr><th>Method</th>"
        "<th>Path</th><th>What it does</th><th>Takes</th><th>Answers</th></tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div><h2>Schemas</h2>{schemas}</main></body></html>"
    )
