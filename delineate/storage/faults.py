"""When a request to the store fails: whether to try it again, and what it is called in delineate's own words.

S3 answers with a status and an XML body with a code; aiohttp and botocore add
errors of their own for connections, timeouts and credentials. `repeat` takes
all of them, tries again what may pass, and raises the rest as a JobError.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

import aiohttp
from botocore import exceptions as botocore

from delineate.errors import AccessRefused, JobError, StorageTimeout, StorageUnavailable

log = logging.getLogger(__name__)
T = TypeVar("T")

# https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html; RequestTimeout comes with status 400.
_PASSING_STATUS = frozenset({408, 429, 500, 502, 503, 504})
_PASSING_CODES = frozenset({"SlowDown", "InternalError", "RequestTimeout", "ServiceUnavailable", "OperationAborted"})
_REFUSALS = {
    "InvalidAccessKeyId": "the store does not know storage.access_key_id",
    "SignatureDoesNotMatch": "check storage.secret_access_key and storage.region",
    "RequestTimeTooSkewed": "the clock of this machine, or of the store, is wrong",
    "ExpiredToken": "the credentials have expired",
    "InvalidToken": "the session token of the credentials is not valid",
    "AuthorizationHeaderMalformed": "check storage.region: the bucket may be in another one",
    "PermanentRedirect": "check storage.region: the bucket may be in another one",
}
_NEEDED = "the key pair must be allowed to list and read the files' bucket, and to read and write the archives' bucket"


class Refused(Exception):
    """The store answered with an error: HTTP `status` and S3's `code`, "" where the answer has no body."""

    def __init__(self, status: int, code: str) -> None:
        super().__init__(f"HTTP {status} {code}".rstrip())
        self.status = status
        self.code = code


class Garbled(Exception):
    """An answer that cannot be used: cut short, or not the bytes that were asked for."""


#: Everything a request may raise that `translate` understands.
FAILURES = (Refused, Garbled, botocore.ClientError, botocore.BotoCoreError, aiohttp.ClientError, OSError, TimeoutError)


async def repeat(attempt: Callable[[], Awaitable[T]], doing: str, retries: int) -> T:
    """Await `attempt()`, and up to `retries` times again while its failure may pass; then raise it as a JobError.

    `doing` completes the sentence "The file store ... while ..." for the user.
    """
    tries = 0
    while True:
        try:
            return await attempt()
        except FAILURES as error:
            if tries >= retries or not may_pass(error):
                raise translate(error, doing) from error
            await pause(tries, doing, error)
            tries += 1


async def pause(tries: int, doing: str, error: Exception) -> None:
    """Wait before the next try: a random part of 0.2 s x 2^tries, 5 s at the most.

    The whole span is random ("full jitter"), so that the requests which one outage
    stopped do not come back together.
    Source: https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/
    """
    log.info("storage request failed and is tried again", extra={"context": {"doing": doing, "cause": _brief(error)}})
    await asyncio.sleep(random.uniform(0, min(5.0, 0.2 * 2**tries)))


def may_pass(error: Exception) -> bool:
    """True if the same request may succeed a moment later."""
    refusal = refusal_of(error)
    if refusal is not None:
        return refusal.status in _PASSING_STATUS or refusal.code in _PASSING_CODES
    if isinstance(error, (aiohttp.ClientConnectorCertificateError, aiohttp.InvalidURL)):
        return False
    if isinstance(error, botocore.BotoCoreError):
        return isinstance(error, (botocore.HTTPClientError, botocore.ConnectionError))
    return True


def refusal_of(error: Exception) -> Refused | None:
    """The store's own error answer in `error`, whichever of the two clients got it; None for any other failure."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, botocore.ClientError):
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        code = str(error.response.get("Error", {}).get("Code", ""))
        return Refused(status, "" if code.isdigit() else code)  # after HEAD botocore puts the status there
    return None


def translate(error: Exception, doing: str) -> JobError:
    """`error` as the JobError that it means, in words for the user; raise it `from error`, which has the details."""
    refusal = refusal_of(error)
    if refusal is not None:
        if refusal.code == "NoSuchBucket":
            return StorageUnavailable(f"A bucket of the file store was missing {doing}; the operator must create it.")
        if refusal.status in (301, 401, 403) or refusal.code in _REFUSALS:
            advice = _REFUSALS.get(refusal.code, _NEEDED)
            return AccessRefused(f"The file store refused access {doing}. For its operator: {advice} ({refusal}).")
        if refusal.code == "RequestTimeout":
            return StorageTimeout(f"The file store did not receive everything in time {doing}.")
        return StorageUnavailable(f"The file store answered with an error {doing} ({refusal}).")
    if isinstance(error, (botocore.NoCredentialsError, botocore.PartialCredentialsError)):
        return AccessRefused(f"There were no credentials for the file store {doing}; its operator must set them.")
    if isinstance(error, botocore.CredentialRetrievalError):
        return StorageUnavailable(f"The credentials for the file store could not be renewed {doing}.")
    if isinstance(error, (TimeoutError, botocore.ReadTimeoutError, botocore.ConnectTimeoutError)):
        return StorageTimeout(f"The file store did not answer in time {doing}.")
    if isinstance(error, Garbled):
        return StorageUnavailable(f"The file store sent an incomplete or wrong answer {doing} ({error}).")
    return StorageUnavailable(f"The file store could not be reached, or broke the connection, {doing}.")


def _brief(error: Exception) -> str:
    refusal = refusal_of(error)
    return str(refusal) if refusal is not None else f"{type(error).__name__}: {error}"[:200]
