"""Between a job's Redis hash and a `Job`: the only place that knows the fields' names and forms.

Times are whole milliseconds in Redis and seconds in Python; structures are JSON.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, cast

import msgspec

from delineate.errors import DelineateError
from delineate.job import ArchiveResult, ErrorClass, Failure, Job, JobStatus, Progress, SavedPart, Stage, Upload

_FILE_IDS = msgspec.json.Decoder(tuple[int, ...])
_RESULT = msgspec.json.Decoder(ArchiveResult)
_FAILURE = msgspec.json.Decoder(Failure)
_UPLOAD = msgspec.json.Decoder(Upload)
_PART = msgspec.json.Decoder(SavedPart)


class CorruptRecord(DelineateError):
    """A job's hash is not what delineate wrote: the message names the job and the field's problem."""

    def __init__(self, job_id: str, problem: str) -> None:
        super().__init__(f"the record of job {job_id} is damaged: {problem}")
        self.job_id = job_id


def parse_job(fields: Mapping[str, str], job_id: str) -> Job | None:
    """The job in `fields`; None when there is none, or only the tombstone of a withdrawn one.

    Raises CorruptRecord if a field is missing or has a value that delineate never writes.
    """
    if not fields or fields.get("status") == "withdrawn":
        return None
    try:
        error, result, upload = fields.get("error"), fields.get("result"), fields.get("upload")
        return Job(
            id=fields["id"],
            user=fields["user"],
            status=JobStatus(fields["status"]),
            file_ids=_FILE_IDS.decode(fields["file_ids"]),
            on_missing=cast(Literal["fail", "skip"], fields["on_missing"]),
            progress=Progress(
                percent=int(fields["progress"]),
                current_file=int(fields["current_file"]),
                stage=Stage(fields["stage"]),
                message=fields["message"],
                bytes_done=int(fields["bytes_done"]),
                bytes_total=int(fields["bytes_total"]),
            ),
            attempts=int(fields["attempts"]),
            crashes=int(fields["crashes"]),
            version=int(fields["version"]),
            token=int(fields["token"]),
            created_at=int(fields["created_at"]) / 1000,
            updated_at=int(fields["updated_at"]) / 1000,
            started_at=_seconds(fields.get("started_at")),
            attempt_started_at=_seconds(fields.get("attempt_started_at")),
            completed_at=_seconds(fields.get("completed_at")),
            due_at=_seconds(fields.get("due_at")),
            worker=fields["worker"] or None,
            upload=_UPLOAD.decode(upload) if upload else None,
            result=_RESULT.decode(result) if result else None,
            failure=_FAILURE.decode(error) if error else None,
            traceparent=fields["traceparent"],
            request_id=fields["request_id"],
            # Of this very lease: a worker that records nothing leaves the one of the lease before.
            span=fields.get("span", "") if fields.get("span_token") == fields["token"] else "",
            previous_span=fields.get("previous_span", ""),
        )
    except KeyError as error:
        raise CorruptRecord(job_id, f"no field {error}") from error
    except (ValueError, msgspec.MsgspecError) as error:
        raise CorruptRecord(job_id, str(error)) from error


def encode(value: Failure | ArchiveResult | Upload | SavedPart) -> str:
    """The JSON of a structure that stands in one field."""
    return msgspec.json.encode(value).decode()


def parse_part(text: str) -> SavedPart | None:
    """None if it is not what delineate wrote: the part is then made again."""
    try:
        return _PART.decode(text)
    except msgspec.MsgspecError:
        return None


def parse_upload(text: str) -> Upload | None:
    """None if it is not what delineate wrote."""
    try:
        return _UPLOAD.decode(text)
    except msgspec.MsgspecError:
        return None


POISON = Failure(
    code="worker_lost",
    error_class=ErrorClass.CRASH,
    message="Every worker that packed this archive was lost. Ask for fewer or smaller files, or retry later.",
)


def _seconds(milliseconds: str | None) -> float | None:
    return int(milliseconds) / 1000 if milliseconds else None
