"""URLs of buckets and objects, as botocore would write them."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit, urlunsplit

if TYPE_CHECKING:
    from types_aiobotocore_s3.client import S3Client


async def bucket_url(client: S3Client, bucket: str) -> str:
    """URL of `bucket` without a trailing slash, by botocore's own rules for endpoint, region and addressing style.

    Botocore is asked to serialize a request, which is stopped before it is signed
    or sent. Its presigned URLs would not do: outside us-east-1 they name AWS'
    global endpoint, which redirects requests to young buckets.
    """
    seen: list[str] = []

    def stop(params: Mapping[str, Any], **_: object) -> Any:
        seen.append(params["url"])
        return SimpleNamespace(status_code=200), {}

    client.meta.events.register_first("before-call.s3.HeadObject", stop)
    try:
        await client.head_object(Bucket=bucket, Key="x")
    finally:
        client.meta.events.unregister("before-call.s3.HeadObject", stop)
    parts = urlsplit(seen[0])
    # The host is signed in lower case; a store compares it with the Host header as sent.
    return urlunsplit(parts._replace(netloc=parts.netloc.lower())).removesuffix("/x")


def object_url(bucket: str, key: str, query: Mapping[str, str] | None = None) -> str:
    """URL of `key` in the bucket at URL `bucket`, escaped the one way that Signature Version 4 accepts."""
    url = f"{bucket}/{quote(key, safe='/~')}"
    if not query:
        return url
    return url + "?" + "&".join(f"{name}={quote(value, safe='-_.~')}" for name, value in query.items())
