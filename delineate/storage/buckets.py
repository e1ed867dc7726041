"""Is the store there, and are its two buckets: at start, and whenever /health asks."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from delineate.errors import AccessRefused, BucketMissing, StartupError, StorageTimeout, StorageUnavailable
from delineate.storage.connection import Connected
from delineate.storage.faults import FAILURES, Refused, refusal_of, translate

if TYPE_CHECKING:
    from types_aiobotocore_s3.type_defs import CreateBucketRequestTypeDef

log = logging.getLogger(__name__)
_CHECKING = "while it was checked"
_LONGEST_WAIT = 10.0


class Buckets(Connected):
    async def check(self) -> None:
        """Return if both buckets answer, within `connect_timeout` seconds and without a second try.

        Raises StorageUnavailable, StorageTimeout or AccessRefused; BucketMissing with the bucket's name.
        """
        config = self._store.config
        checks = (self._check(config.source_bucket), self._check(config.archive_bucket))
        # Collected, so that the second check never outlives the first one's failure.
        for outcome in await asyncio.gather(*checks, return_exceptions=True):
            if outcome is not None:
                raise outcome

    async def prepare_buckets(self) -> None:
        """See that both buckets are there; create the missing ones where `create_buckets` allows it.

        Raises what `check` raises.
        """
        config = self._store.config
        for bucket in dict.fromkeys((config.source_bucket, config.archive_bucket)):
            try:
                await self._check(bucket)
            except BucketMissing:
                if not config.create_buckets:
                    raise
                await self._create(bucket)

    async def _check(self, bucket: str) -> None:
        config = self._store.config
        url = self._store.files_url if bucket == config.source_bucket else self._store.archives_url
        try:
            async with (
                asyncio.timeout(config.connect_timeout),
                self._store.wire.send("HEAD", url, operation="HeadBucket"),
            ):
                pass
        except Refused as refusal:
            if refusal.status != 404:
                raise translate(refusal, _CHECKING) from refusal
            raise BucketMissing(
                f"the S3 store has no bucket {bucket!r}; create it, or set storage.create_buckets to true"
            ) from refusal
        except FAILURES as error:
            raise translate(error, _CHECKING) from error

    async def _create(self, bucket: str) -> None:
        request: CreateBucketRequestTypeDef = {"Bucket": bucket}
        config = self._store.config
        # AWS wants every region named but its first one: https://docs.aws.amazon.com/AmazonS3/latest/API/API_CreateBucket.html
        if not config.endpoint_url and config.region != "us-east-1":
            request["CreateBucketConfiguration"] = {"LocationConstraint": config.region}  # type: ignore[typeddict-item]
        try:
            await self._store.client.create_bucket(**request)
        except FAILURES as error:
            refusal = refusal_of(error)
            # Every process of a new installation comes here at once; all but the first are late.
            if refusal is None or refusal.code not in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
                raise translate(error, f"while the bucket {bucket!r} was created") from error
            await self._check(bucket)  # "exists" may mean that it is somebody else's
        log.info("bucket created", extra={"context": {"bucket": bucket}})
        if bucket == config.archive_bucket:
            await self.set_lifecycle()

    async def set_lifecycle(self) -> None:
        """Have the store remove what is old. Some stores cannot; then archives stay, and the log says so.

        Source: https://docs.aws.amazon.com/AmazonS3/latest/API/API_PutBucketLifecycleConfiguration.html
        """
        config = self._store.config
        try:
            await self._store.client.put_bucket_lifecycle_configuration(
                Bucket=config.archive_bucket,
                LifecycleConfiguration={
                    "Rules": [
                        {
                            "ID": "delineate-archives",
                            "Status": "Enabled",
                            "Filter": {"Prefix": config.archive_prefix},
                            "Expiration": {"Days": config.archive_days},
                            "AbortIncompleteMultipartUpload": {"DaysAfterInitiation": config.archive_days},
                        }
                    ]
                },
            )
        except FAILURES as error:
            log.warning(
                "the S3 store takes no lifecycle rule: old archives stay until you remove them",
                extra={"context": {"bucket": config.archive_bucket, "cause": str(error)}},
            )


async def wait_for_storage(storage: Buckets, stop: asyncio.Event | None = None) -> bool:
    """Wait, for ever if need be, until the store is up and its buckets are there; False if `stop` was set first.

    Waits 1 s, 2 s, 4 s and so on up to 10 s between tries, and logs one warning for each.

    Raises OperatorError at once for what waiting does not cure: refused credentials, a missing bucket.
    """
    stop = stop or asyncio.Event()
    wait = 1.0
    while not stop.is_set():
        try:
            await storage.prepare_buckets()
            return True
        except AccessRefused as error:
            raise StartupError(str(error)) from error
        except (StorageUnavailable, StorageTimeout) as error:
            config = storage._store.config
            log.warning(
                "the S3 store is not available; trying again",
                extra={
                    "context": {
                        "store": urlsplit(config.endpoint_url).netloc.rpartition("@")[2] or f"AWS {config.region}",
                        "cause": f"{error} {error.__cause__ or ''}".strip(),
                        "wait_seconds": wait,
                    }
                },
            )
        try:
            await asyncio.wait_for(stop.wait(), wait)
        except TimeoutError:
            wait = min(wait * 2, _LONGEST_WAIT)
    return False
