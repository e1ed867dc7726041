"""Opens the way to the S3 store: one aiobotocore client, one aiohttp session, one signer for both."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

import aiohttp
import msgspec
from aiobotocore.config import AioConfig
from aiobotocore.session import AioSession, get_session
from botocore.exceptions import BotoCoreError
from botocore.httpsession import get_cert_path
from botocore.utils import get_environ_proxies

import delineate
from delineate.config import StorageConfig
from delineate.errors import StartupError
from delineate.storage.address import bucket_url
from delineate.storage.archives import Archives
from delineate.storage.buckets import Buckets
from delineate.storage.connection import Connection
from delineate.storage.metering import meter
from delineate.storage.signing import Signer
from delineate.storage.sources import Sources
from delineate.storage.wire import Wire

if TYPE_CHECKING:
    from types_aiobotocore_s3.client import S3Client

_READ_BUFFER_BYTES = 256 * 1024


class Storage(Sources, Archives, Buckets):
    """The S3 store: the files in it, the archives in it, and its buckets. One for a process; `open_storage` makes it.

    Every method raises a JobError whose message is fit for the user, with the
    store's own words as its `__cause__`; nothing is raised for a failure that a
    few tries (`storage.retries`) could cure.
    """


@asynccontextmanager
async def open_storage(config: StorageConfig, *, service: str = "") -> AsyncIterator[Storage]:
    """A `Storage` for as long as the block lasts; nothing is sent yet (`wait_for_storage` does that).

    `service` tells apart the processes in the store's access log. Raises StartupError if there are no credentials.
    """
    session = get_session()
    if config.access_key_id:
        session.set_credentials(config.access_key_id, config.secret_access_key)
    agent = f"delineate/{delineate.__version__}" + (f" ({service})" if service else "")
    ca_file = _ca_file(session)
    proxied = bool(urlsplit(config.public_endpoint_url).path.strip("/"))
    async with AsyncExitStack() as stack:
        try:
            credentials = await session.get_credentials()
            client = await stack.enter_async_context(_client(session, config, agent, ca_file))
            files_url = await bucket_url(client, config.source_bucket)
            archives_url = await bucket_url(client, config.archive_bucket)
            meter(client)
            if proxied:
                links_url, signed_url = config.public_endpoint_url.rstrip("/"), archives_url
            else:
                endpoint_url = config.public_endpoint_url or config.endpoint_url
                links_url = signed_url = await _archives_url(
                    session, msgspec.structs.replace(config, endpoint_url=endpoint_url)
                )
        except (BotoCoreError, ValueError) as error:
            raise StartupError(f"the S3 client cannot be set up: {error}") from error
        if credentials is None:
            raise StartupError(
                "there are no credentials for the S3 store: set storage.access_key_id and "
                "storage.secret_access_key, or give the machine a role"
            )
        http = await stack.enter_async_context(_http_session(config, agent, ca_file))
        proxy = get_environ_proxies(files_url).get(urlsplit(files_url).scheme)
        signer = Signer(credentials, config.region)
        yield Storage(
            Connection(
                config=config,
                client=client,
                wire=Wire(
                    http,
                    signer,
                    proxy,
                    config.operation_timeout,
                    {files_url: config.source_bucket, archives_url: config.archive_bucket},
                ),
                signer=signer,
                files_url=files_url,
                archives_url=archives_url,
                links_url=links_url,
                signed_url=signed_url,
            )
        )


class StoreAddress(NamedTuple):
    """The archives' bucket as this machine reaches it, and the certificates that the store's is checked with."""

    archives_url: str
    ca_file: str


async def store_address(config: StorageConfig) -> StoreAddress:
    """Where a proxy finds the archives that links lead to; nothing is sent. Raises StartupError."""
    session = get_session()
    try:
        return StoreAddress(await _archives_url(session, config), _ca_file(session))
    except (BotoCoreError, ValueError) as error:
        raise StartupError(f"the S3 client cannot be set up: {error}") from error


async def _archives_url(session: AioSession, config: StorageConfig) -> str:
    async with _client(session, config, "", _ca_file(session)) as client:
        return await bucket_url(client, config.archive_bucket)


def _client(
    session: AioSession, config: StorageConfig, agent: str, ca_file: str
) -> AbstractAsyncContextManager[S3Client]:
    return session.create_client(
        "s3",
        region_name=config.region,
        endpoint_url=config.endpoint_url or None,
        verify=ca_file,
        config=AioConfig(
            signature_version="s3v4",
            s3={"addressing_style": config.addressing_style, "payload_signing_enabled": False},
            # Botocore's newer checksums, on by default, break several stores that are not AWS.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            connect_timeout=config.connect_timeout,
            read_timeout=config.operation_timeout,
            max_pool_connections=config.connections,
            retries={"total_max_attempts": 1, "mode": "standard"},  # faults.repeat is the one that retries
            user_agent_extra=agent,
        ),
    )


def _http_session(config: StorageConfig, agent: str, ca_file: str) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=config.connections, ssl=ssl.create_default_context(cafile=ca_file)),
        # No total: a part may take minutes on a slow line, as long as bytes come.
        timeout=aiohttp.ClientTimeout(
            total=None, sock_connect=config.connect_timeout, sock_read=config.operation_timeout
        ),
        # A store must send the object's own bytes: ranges, sizes and CRCs are of those.
        headers={"Accept-Encoding": "identity", "User-Agent": agent},
        auto_decompress=False,
        read_bufsize=_READ_BUFFER_BYTES,
        cookie_jar=aiohttp.DummyCookieJar(),
    )


def _ca_file(session: AioSession) -> str:
    """The certificates that both clients trust: AWS_CA_BUNDLE's, else SSL_CERT_FILE's, else botocore's own list."""
    return str(session.get_config_variable("ca_bundle") or ssl.get_default_verify_paths().cafile or get_cert_path(True))
