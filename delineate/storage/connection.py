"""What every part of the storage shares: the two clients, and where the buckets are."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from delineate.config import StorageConfig
from delineate.storage.answers import ObjectInfo, info_of
from delineate.storage.faults import Refused, repeat
from delineate.storage.signing import Signer
from delineate.storage.wire import Wire

if TYPE_CHECKING:
    from types_aiobotocore_s3.client import S3Client

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Connection:
    """Both ways to the store: `wire` for bytes, `client` for what is rare and answers in XML.

    `files_url` and `archives_url` are the buckets as we reach them, `links_url` is
    the archives' bucket as the clients of our clients reach it. Links are signed
    for `signed_url`: the same, unless a proxy in between takes a path off.
    """

    config: StorageConfig
    client: S3Client
    wire: Wire
    signer: Signer
    files_url: str
    archives_url: str
    links_url: str
    signed_url: str


class Connected:
    """Base of the parts of `Storage`."""

    def __init__(self, connection: Connection) -> None:
        self._store = connection

    async def _repeat(self, attempt: Callable[[], Awaitable[T]], doing: str) -> T:
        return await repeat(attempt, doing, self._store.config.retries)

    async def _stat(self, url: str, doing: str) -> ObjectInfo | None:
        """Describe the object at `url`; None if there is none. Raises JobError."""

        async def head() -> ObjectInfo | None:
            try:
                async with self._store.wire.send("HEAD", url) as response:
                    return info_of(response.headers)
            except Refused as refusal:
                if refusal.status == 404:
                    return None
                raise

        return await self._repeat(head, doing)
