"""The files that jobs pack: described by one small read, then read range by range, with every answer checked."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import aiohttp
import msgspec

from delineate.errors import SourceChanged
from delineate.job import SourceFile
from delineate.storage.address import object_url
from delineate.storage.answers import ObjectInfo, info_of, range_of
from delineate.storage.connection import Connected
from delineate.storage.faults import FAILURES, Garbled, Refused, may_pass, pause, translate
from delineate.storage.names import content_disposition, metadata_value, name_of
from delineate.telemetry.metrics import SOURCE_BYTES


class Probe(msgspec.Struct, frozen=True, kw_only=True):
    """A file as found, and its `body` if it was small enough to come along whole."""

    file: SourceFile
    body: bytes | None


class Sources(Connected):
    async def probe(self, file_id: int, probe_bytes: int) -> Probe | None:
        """Describe a file by a GET of its first `probe_bytes`; None if it does not exist.

        In place of HEAD, because small files are then here already: 2,922 files/s
        against 1,870 with HEAD and GET. Raises JobError.
        """
        key, url = self._locate(file_id)

        async def get() -> Probe | None:
            wanted = {"Range": f"bytes=0-{probe_bytes - 1}"}
            try:
                async with self._store.wire.send("GET", url, wanted) as response:
                    return await _probed(response, file_id, key, probe_bytes)
            except Refused as refusal:
                if refusal.status == 416:  # an empty object has no first byte
                    return await probe_empty()
                if refusal.status == 404 and refusal.code != "NoSuchBucket":
                    return None
                raise

        async def probe_empty() -> Probe | None:
            try:
                async with self._store.wire.send("HEAD", url) as response:
                    file = _described(response, file_id, key)
            except Refused as refusal:
                if refusal.status == 404:
                    return None
                raise
            return Probe(file=file, body=b"" if file.size == 0 else None)

        return await self._repeat(get, "while a file was looked up")

    async def read(
        self, file: SourceFile, start: int, into: memoryview, on_chunk: Callable[[memoryview], None]
    ) -> None:
        """Fill `into` with the bytes of `file` from offset `start`; call `on_chunk` once for each piece, in order.

        A body that breaks off is continued at the byte it stopped at. `retries` bounds
        the failures in a row that bring no new byte.

        Raises SourceChanged if the file is not, or no longer, the one that was probed.
        Raises another JobError if the store keeps failing.
        """
        doing = "while a file was read"
        received = tries = 0
        while received < into.nbytes:
            before = received
            try:
                async for chunk in self._stream(file, start + received, into.nbytes - received):
                    end = received + len(chunk)
                    piece = into[received:end]
                    piece[:] = chunk
                    received = end
                    on_chunk(piece)
                if received < into.nbytes:
                    raise Garbled(f"{received} of {into.nbytes} bytes")
            except FAILURES as error:
                tries = 0 if received > before else tries
                if tries >= self._store.config.retries or not may_pass(error):
                    raise translate(error, doing) from error
                await pause(tries, doing, error)
                tries += 1
            finally:
                # Here and not for each chunk, of which there are thousands a second.
                SOURCE_BYTES.inc(received - before)

    async def stat_source(self, file_id: int) -> tuple[str, ObjectInfo] | None:
        """The key a file is looked for under and what is there; None if nothing is. Raises JobError."""
        key, url = self._locate(file_id)
        info = await self._stat(url, "while a file was looked up")
        return (key, info) if info else None

    async def put_source(self, file_id: int, body: bytes, filename: str) -> None:
        """Store a sample file under the key that `probe` looks for. Raises JobError."""
        _, url = self._locate(file_id)
        headers = {
            "Content-Type": "application/octet-stream",
            "Content-Disposition": content_disposition(filename),
            "x-amz-meta-filename": metadata_value(filename),
        }
        await self._repeat(
            lambda: self._store.wire.put(url, memoryview(body), headers), "while a sample file was stored"
        )

    async def has_sources(self) -> bool:
        """True if the files' bucket holds anything at all. Raises JobError."""
        found = await self._repeat(
            lambda: self._store.client.list_objects_v2(Bucket=self._store.config.source_bucket, MaxKeys=1),
            "while the files were listed",
        )
        return bool(found.get("Contents"))

    def _locate(self, file_id: int) -> tuple[str, str]:
        key = self._store.config.source_key.format(file_id=file_id)
        return key, object_url(self._store.files_url, key)

    async def _stream(self, file: SourceFile, start: int, length: int) -> AsyncIterator[bytes]:
        """The bytes of one answer to one ranged GET, which may be fewer than `length` but never more."""
        last = start + length - 1
        wanted = {"Range": f"bytes={start}-{last}"}
        if file.etag:
            wanted["If-Match"] = file.etag
        try:
            async with self._store.wire.send("GET", object_url(self._store.files_url, file.key), wanted) as response:
                _check_is(response, file, start, length)
                # readchunk hands over each piece as it left the socket; iter_any would join, that is copy, them.
                while chunk := (await response.content.readchunk())[0]:
                    if len(chunk) > length:
                        raise Garbled("more bytes than asked for")
                    length -= len(chunk)
                    yield chunk
        except Refused as refusal:
            # Gone counts as changed: the next plan finds it missing and then does what the job says about that.
            if refusal.status in (412, 416) or (refusal.status == 404 and refusal.code != "NoSuchBucket"):
                raise _changed(file) from refusal
            raise


def _check_is(response: aiohttp.ClientResponse, file: SourceFile, start: int, length: int) -> None:
    """Raise SourceChanged or Garbled unless `response` carries the range asked for of the file that was planned.

    If-Match is not enough: rclone ignores it. Nor is the status: rclone answers 200 to a Range.
    """
    if file.etag and response.headers.get("ETag", file.etag) != file.etag:
        raise _changed(file)
    sent = range_of(response.headers)
    if sent is None:
        # A store may ignore Range, which is harmless when all was wanted.
        if start != 0 or length != file.size:
            raise Garbled("Range was ignored")
        if response.content_length not in (None, file.size):
            raise _changed(file)
    elif sent.total != file.size:
        raise _changed(file)
    elif (sent.first, sent.last) != (start, start + length - 1):
        raise Garbled("another Range than asked for")


def _changed(file: SourceFile) -> SourceChanged:
    return SourceChanged(f"File {file.file_id} changed while it was packed.")


async def _probed(response: aiohttp.ClientResponse, file_id: int, key: str, probe_bytes: int) -> Probe:
    file = _described(response, file_id, key)
    sent = range_of(response.headers)
    if file.size > probe_bytes:
        if sent is not None:
            # At most probe_bytes, and the connection stays usable.
            SOURCE_BYTES.inc(len(await response.read()))
        return Probe(file=file, body=None)
    if sent is not None and (sent.first, sent.last + 1) != (0, sent.total):
        raise Garbled("another Range than asked for")
    body = await response.read()
    SOURCE_BYTES.inc(len(body))
    if len(body) != file.size:
        raise Garbled(f"{len(body)} of {file.size} bytes")
    return Probe(file=file, body=body)


def _described(response: aiohttp.ClientResponse, file_id: int, key: str) -> SourceFile:
    info = info_of(response.headers)
    return SourceFile(
        file_id=file_id,
        key=key,
        name=name_of(response.headers, key),
        size=info.size,
        etag=info.etag,
        modified=info.modified,
    )
