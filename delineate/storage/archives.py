"""The archives that jobs write: one PUT for a small one, a multipart upload for the rest, and links to both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from delineate.errors import JobError, StorageUnavailable
from delineate.storage.address import object_url
from delineate.storage.answers import ObjectInfo
from delineate.storage.connection import Connected
from delineate.storage.faults import FAILURES, refusal_of, translate
from delineate.storage.names import content_disposition
from delineate.telemetry.metrics import ARCHIVE_BYTES

if TYPE_CHECKING:
    from types_aiobotocore_s3.type_defs import ListMultipartUploadsRequestTypeDef

_ZIP = "application/zip"
_UPLOADING = "while the archive was stored"


class StoredPart(NamedTuple):
    """A part that the store already has: its `number` from 1, its `etag` for completion, its `size` in bytes."""

    number: int
    etag: str
    size: int


class UnfinishedUpload(NamedTuple):
    """An upload that was neither completed nor aborted; `initiated` is Unix seconds by the clock of the store."""

    key: str
    upload_id: str
    initiated: float


class Archives(Connected):
    async def put_archive(self, key: str, body: memoryview, filename: str) -> None:
        """Store a whole archive with one request. Raises JobError."""
        headers = {"Content-Type": _ZIP, "Content-Disposition": content_disposition(filename)}
        url = object_url(self._store.archives_url, key)
        await self._repeat(lambda: self._store.wire.put(url, body, headers), _UPLOADING)
        ARCHIVE_BYTES.inc(body.nbytes)

    async def start_upload(self, key: str, filename: str) -> str:
        """Begin a multipart upload and return its id. Raises JobError.

        A try whose answer was lost leaves an upload without parts behind, which
        nobody but `list_uploads` knows of.
        """
        answer = await self._repeat(
            lambda: self._store.client.create_multipart_upload(
                Bucket=self._store.config.archive_bucket,
                Key=key,
                ContentType=_ZIP,
                ContentDisposition=content_disposition(filename),
            ),
            _UPLOADING,
        )
        return answer["UploadId"]

    async def put_part(self, key: str, upload_id: str, number: int, body: memoryview) -> str:
        """Store part `number`, from 1, and return its ETag; a part sent twice counts once. Raises JobError."""
        url = object_url(self._store.archives_url, key, {"partNumber": str(number), "uploadId": upload_id})
        headers = {"Content-Type": "application/octet-stream"}
        answer = await self._repeat(lambda: self._store.wire.put(url, body, headers), _UPLOADING)
        ARCHIVE_BYTES.inc(body.nbytes)
        etag = answer.get("ETag")
        if not etag:
            raise StorageUnavailable("The file store accepted a part of the archive but did not name it.")
        return etag

    async def complete_upload(self, key: str, upload_id: str, parts: Sequence[tuple[int, str]], size: int) -> None:
        """Turn the parts, each a number and an ETag in order, into the archive, and see that it has `size` bytes.

        The answer may be lost after the store has done its work, and a second
        request then gets NoSuchUpload: so whatever the answer was, the archive
        itself decides. Its key names its content, so the size is proof enough.
        Raises JobError.
        """
        failure: JobError | None = None
        try:
            await self._repeat(
                lambda: self._store.client.complete_multipart_upload(
                    Bucket=self._store.config.archive_bucket,
                    Key=key,
                    UploadId=upload_id,
                    MultipartUpload={"Parts": [{"PartNumber": number, "ETag": etag} for number, etag in parts]},
                ),
                _UPLOADING,
            )
        except JobError as error:
            failure = error
        try:
            found = await self.stat_archive(key)
        except JobError:
            if failure is not None:
                raise failure from failure.__cause__  # it says more: an answer to HEAD has no words
            raise
        if found is not None and found.size == size:
            return
        if failure is not None:
            raise failure
        there = f"{found.size} bytes" if found else "nothing"
        raise StorageUnavailable(f"The file store reported success but holds {there} in place of {size} bytes.")

    async def abort_upload(self, key: str, upload_id: str) -> None:
        """Forget an upload and its parts; one that is gone already is fine. Raises JobError."""

        async def abort() -> None:
            try:
                await self._store.client.abort_multipart_upload(
                    Bucket=self._store.config.archive_bucket, Key=key, UploadId=upload_id
                )
            except FAILURES as error:
                if not _is_unknown_upload(error):
                    raise

        await self._repeat(abort, "while an upload was cancelled")

    async def list_parts(self, key: str, upload_id: str) -> list[StoredPart] | None:
        """The parts of an unfinished upload by number; None if the store does not know the upload. Raises JobError."""

        async def page(marker: int) -> tuple[list[StoredPart], int | None]:
            answer = await self._store.client.list_parts(
                Bucket=self._store.config.archive_bucket, Key=key, UploadId=upload_id, PartNumberMarker=marker
            )
            found = [StoredPart(part["PartNumber"], part["ETag"], part["Size"]) for part in answer.get("Parts", [])]
            return found, answer["NextPartNumberMarker"] if answer.get("IsTruncated") else None

        async def every_page() -> list[StoredPart] | None:
            parts: list[StoredPart] = []
            marker: int | None = 0
            while marker is not None:
                try:
                    found, marker = await page(marker)
                except FAILURES as error:
                    if _is_unknown_upload(error):
                        return None
                    raise
                parts += found
            return parts

        return await self._repeat(every_page, "while an upload was continued")

    async def delete_archive(self, key: str) -> None:
        """Remove an archive; one that is gone already is fine. Raises JobError."""
        await self._repeat(
            lambda: self._store.client.delete_object(Bucket=self._store.config.archive_bucket, Key=key),
            "while an archive was deleted",
        )

    async def list_uploads(self) -> list[UnfinishedUpload] | None:
        """Every unfinished upload under `storage.archive_prefix`; None if the store cannot list them. Raises JobError.

        Source: https://docs.aws.amazon.com/AmazonS3/latest/API/API_ListMultipartUploads.html
        """
        config = self._store.config

        async def every_page() -> list[UnfinishedUpload] | None:
            uploads: list[UnfinishedUpload] = []
            page: ListMultipartUploadsRequestTypeDef = {
                "Bucket": config.archive_bucket,
                "Prefix": config.archive_prefix,
            }
            while True:
                try:
                    answer = await self._store.client.list_multipart_uploads(**page)
                except FAILURES as error:
                    if _is_unsupported(error):
                        return None
                    if _is_unknown_upload(error):
                        return uploads  # rclone's words for none at all
                    raise
                uploads += [
                    UnfinishedUpload(found["Key"], found["UploadId"], found["Initiated"].timestamp())
                    for found in answer.get("Uploads", [])
                ]
                if not answer.get("IsTruncated"):
                    return uploads
                page["KeyMarker"] = answer["NextKeyMarker"]
                page["UploadIdMarker"] = answer["NextUploadIdMarker"]

        return await self._repeat(every_page, "while unfinished uploads were listed")

    async def stat_archive(self, key: str) -> ObjectInfo | None:
        """Describe an archive; None if there is none under `key`. Raises JobError."""
        return await self._stat(object_url(self._store.archives_url, key), "while the archive was checked")

    async def presign(self, key: str, filename: str, lifetime: int) -> str:
        """A URL with which anyone can GET the archive for `lifetime` seconds, saved as `filename`; nothing is sent.

        It names the store as clients reach it. The host is part of the signature:
        a proxy on the way has to send the one that was signed.
        Raises JobError if there are no credentials to sign with.
        """
        query = {
            "response-content-disposition": content_disposition(filename),
            "response-content-type": _ZIP,
        }
        store = self._store
        try:
            signed = await store.signer.link(object_url(store.signed_url, key, query), lifetime)
        except FAILURES as error:
            raise translate(error, "while a link was made") from error
        return store.links_url + signed.removeprefix(store.signed_url)


def _is_unknown_upload(error: Exception) -> bool:
    refusal = refusal_of(error)
    # MinIO and Ceph answer a bare 404 to some of these; a missing bucket is another matter.
    return refusal is not None and (
        refusal.code == "NoSuchUpload" or (refusal.status == 404 and refusal.code != "NoSuchBucket")
    )


def _is_unsupported(error: Exception) -> bool:
    refusal = refusal_of(error)
    return refusal is not None and (refusal.status in (405, 501) or refusal.code == "NotImplemented")
