"""Signed S3 requests over one shared aiohttp session: the way of every byte of a file or an archive."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from urllib.parse import parse_qsl, unquote

import aiohttp
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http import StreamWriter
from aiohttp.payload import Payload
from yarl import URL

from delineate.storage.faults import Refused
from delineate.storage.metering import metered
from delineate.storage.signing import Signer
from delineate.telemetry.spans import S3Target, answered_s3

_SLICE_BYTES = 256 * 1024
_ERROR_BYTES = 16 * 1024
_OPERATIONS = {"GET": "GetObject", "HEAD": "HeadObject"}
_CODE = re.compile(rb"<Code>\s*([A-Za-z0-9.]{1,64})\s*</Code>")


class Wire:
    """Sends one request at a time per call; retrying is its callers' business, because they know what may be repeated.

    `stall_seconds` bounds the wait for the next byte in either direction. `buckets` are names by URL, for traces.
    """

    def __init__(
        self,
        http: aiohttp.ClientSession,
        signer: Signer,
        proxy: str | None,
        stall_seconds: float,
        buckets: Mapping[str, str],
    ) -> None:
        self._http = http
        self._signer = signer
        self._proxy = proxy
        self._stall_seconds = stall_seconds
        self._buckets = buckets

    @asynccontextmanager
    async def send(
        self, method: str, url: str, unsigned: Mapping[str, str] | None = None, *, operation: str | None = None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """The answer to a request without a body, once its headers are here.

        `unsigned` headers are sent but not signed: signing costs CPU for each, and S3 asks
        only for Host and x-amz-*. `operation` names the request in metrics where the
        method does not. Raises Refused for every status from 300.
        """
        headers = await self._signer.headers(method, url, {})
        if unsigned:
            headers.update(unsigned)
        with metered(operation or _OPERATIONS[method], lambda: self._target(url)) as span:
            async with self._http.request(
                method, URL(url, encoded=True), headers=headers, proxy=self._proxy, allow_redirects=False
            ) as response:
                answered_s3(span, response.status)
                if response.status >= 300:
                    raise await _refusal(response)
                yield response

    async def put(self, url: str, body: memoryview, headers: Mapping[str, str]) -> Mapping[str, str]:
        """PUT `body`, which is never copied as a whole; the headers of the answer. Raises Refused."""
        signed = await self._signer.headers("PUT", url, headers)
        # aiohttp's sock_read does not watch the sending side: a store that stops reading would hold us forever.
        operation = "UploadPart" if "?partNumber=" in url else "PutObject"
        with metered(operation, lambda: self._target(url)) as span:
            async with asyncio.timeout(self._stall_seconds) as deadline:
                slices = _Slices(body, deadline, self._stall_seconds)
                try:
                    async with self._http.put(
                        URL(url, encoded=True), headers=signed, data=slices, proxy=self._proxy, allow_redirects=False
                    ) as response:
                        answered_s3(span, response.status)
                        if response.status >= 300:
                            raise await _refusal(response)
                        await response.read()
                        return response.headers.copy()
                except BaseException:
                    slices.abandon()
                    raise

    def _target(self, url: str) -> S3Target:
        path, _, query = url.partition("?")
        base = next((base for base in self._buckets if path.startswith(f"{base}/")), "")
        number = dict(parse_qsl(query)).get("partNumber", "")
        return S3Target(self._buckets.get(base, ""), unquote(path[len(base) + 1 :]), int(number) if number else None)


class _Slices(Payload):
    """A body sent slice by slice out of a caller's buffer; every slice that the socket takes moves `deadline`.

    A Payload and not an async generator, because aiohttp itself sends a PUT again
    when a kept-alive connection turns out to be closed: a generator would be
    empty by then. Not bytes either: aiohttp would copy them, and warns.
    """

    _value: memoryview
    _autoclose = True  # nothing to close: the buffer is the caller's

    def __init__(self, body: memoryview, deadline: asyncio.Timeout, stall_seconds: float) -> None:
        super().__init__(body, content_type="application/octet-stream")
        self._size = body.nbytes
        self._deadline = deadline
        self._stall_seconds = stall_seconds
        self._transport: asyncio.WriteTransport | None = None

    def abandon(self) -> None:
        """Drop what the socket has not sent: a polite close would keep it open until the store has read that."""
        if self._transport is not None and self._transport.get_write_buffer_size() > 0:
            self._transport.abort()

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        raise TypeError("the bytes of an archive are no text")

    async def write(self, writer: AbstractStreamWriter) -> None:
        loop = asyncio.get_running_loop()
        self._transport = writer.transport if isinstance(writer, StreamWriter) else None
        for start in range(0, self._value.nbytes, _SLICE_BYTES):
            await writer.write(self._value[start : start + _SLICE_BYTES])
            self._deadline.reschedule(loop.time() + self._stall_seconds)


async def _refusal(response: aiohttp.ClientResponse) -> Refused:
    """The error in `response`, whose body may be missing, cut off or no XML at all."""
    body = b""
    try:
        async for chunk in response.content.iter_any():
            body += chunk
            if len(body) >= _ERROR_BYTES:
                break
    except (aiohttp.ClientError, TimeoutError):
        pass  # the status alone says enough
    code = _CODE.search(body)
    return Refused(response.status, code[1].decode() if code else "")
