"""Our URLs and signatures are compared with those that botocore makes for the same requests."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import botocore.auth
import pytest
from aiobotocore.config import AioConfig
from aiobotocore.session import get_session
from msgspec.structs import replace

from delineate.config import StorageConfig
from delineate.errors import StartupError
from delineate.storage import open_storage
from delineate.storage.address import object_url

KEYS = ["plain", "a b/+%25&=?#", "ü/日本/😂~_-.", "/lead//double/../dot/./", "'()*!:@$,;[]{}|\\^`\"<>"]
PLACES = [
    ("", "us-east-1", "path"),
    ("", "us-east-1", "virtual"),
    ("", "eu-central-1", "path"),
    ("", "eu-central-1", "virtual"),
    ("", "eu-central-1", "auto"),
    ("", "cn-north-1", "auto"),
    ("http://127.0.0.1:9000", "us-east-1", "path"),
    ("http://127.0.0.1:9000", "us-east-1", "auto"),
    ("https://s3.example.org", "eu-west-3", "virtual"),
    ("https://S3.Example.org:443/base", "eu-west-3", "path"),
    ("http://minio:9000/", "us-east-1", "path"),
]


@pytest.mark.parametrize(("endpoint", "region", "style"), PLACES)
async def test_urls_are_the_ones_that_botocore_sends(
    rclone: StorageConfig, endpoint: str, region: str, style: Any
) -> None:
    config = replace(rclone, endpoint_url=endpoint, region=region, addressing_style=style)
    async with open_storage(config) as storage:
        client = storage._store.client
        sent: list[str] = []

        def stop(params: Mapping[str, Any], **_: object) -> Any:
            sent.append(params["url"])
            return SimpleNamespace(status_code=200), {}

        client.meta.events.register_first("before-call.s3.UploadPart", stop)
        for key in KEYS:
            await client.upload_part(Bucket=config.source_bucket, Key=key, PartNumber=7, UploadId="a+/=ü~", Body=b"")
            ours = object_url(storage._store.files_url, key, {"partNumber": "7", "uploadId": "a+/=ü~"})
            theirs = sent.pop().replace("S3.Example.org", "s3.example.org")
            assert sorted(ours.partition("?")[2].split("&")) == sorted(theirs.partition("?")[2].split("&"))
            assert ours.partition("?")[0] == theirs.partition("?")[0]


@pytest.mark.parametrize(("endpoint", "region", "style"), [place for place in PLACES if place[0].islower()])
async def test_links_are_the_ones_that_botocore_makes(
    rclone: StorageConfig, monkeypatch: pytest.MonkeyPatch, endpoint: str, region: str, style: Any
) -> None:
    now = datetime.datetime(2026, 11, 23, 12, 0, 0)
    monkeypatch.setattr(botocore.auth, "get_current_datetime", lambda *_: now)
    config = replace(rclone, public_endpoint_url=endpoint, region=region, addressing_style=style)
    session = get_session()
    async with (
        open_storage(config) as storage,
        session.create_client(
            "s3",
            region_name=region,
            endpoint_url=endpoint,
            aws_access_key_id=config.access_key_id,
            aws_secret_access_key=config.secret_access_key,
            config=AioConfig(signature_version="s3v4", s3={"addressing_style": style}),
        ) as client,
    ):
        for key in KEYS:
            theirs = await client.generate_presigned_url(
                "get_object",
                Params={
                    "Bucket": config.archive_bucket,
                    "Key": key,
                    "ResponseContentDisposition": "attachment; filename=\"a.zip\"; filename*=UTF-8''a.zip",
                    "ResponseContentType": "application/zip",
                },
                ExpiresIn=77,
            )
            assert await storage.presign(key, "a.zip", 77) == theirs


async def test_no_credentials_are_an_operator_error(
    rclone: StorageConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(StartupError, match=r"storage\.access_key_id"):
        async with open_storage(replace(rclone, access_key_id="", secret_access_key="")):
            pass


async def test_credentials_of_the_environment_serve(rclone: StorageConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", rclone.access_key_id)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", rclone.secret_access_key)
    async with open_storage(replace(rclone, access_key_id="", secret_access_key="")) as storage:
        await storage.prepare_buckets()
        assert await storage.probe(70000, 10) is None


async def test_bad_endpoint_is_an_operator_error(rclone: StorageConfig) -> None:
    with pytest.raises(StartupError, match="cannot be set up"):
        async with open_storage(replace(rclone, endpoint_url="not a url")):
            pass
