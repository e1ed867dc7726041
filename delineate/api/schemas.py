"""What clients may send: the request bodies, checked to the letter, with a path for everything that is wrong.

Checked by hand on raw JSON types, because a decoder that means well takes
1.0 for 1 and true for 1. The same constants feed /openapi.json.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from typing import Annotated, Any, get_args

import msgspec
from tornado.httputil import HTTPHeaders

from delineate.errors import Detail, InvalidRequest, WrongContentType
from delineate.job import OnMissing

MIN_FILE_ID, MAX_FILE_ID = 10_000, 100_000_000
MAX_FILE_IDS = 1_000
MAX_DETAILS = 20
ID_RULE = f"must be an integer from {MIN_FILE_ID:,} to {MAX_FILE_ID:,}"
ON_MISSING = get_args(OnMissing)
IDEMPOTENCY_KEY = re.compile(r"[\x20-\x7e]{1,255}")

FileId = Annotated[int, msgspec.Meta(ge=MIN_FILE_ID, le=MAX_FILE_ID, examples=[70000])]


class ExportRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The files wanted, in the order they get in the archive; an id given twice counts once."""

    file_ids: Annotated[tuple[FileId, ...], msgspec.Meta(min_length=1, max_length=MAX_FILE_IDS)]
    on_missing: OnMissing = "fail"

    def fingerprint(self) -> str:
        """The same for requests that ask for the same, however they were spelled."""
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()


class FileRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    file_id: FileId


def parse_export(body: bytes) -> ExportRequest:
    """Raises InvalidRequest with up to 20 details."""
    fields = _parse_object(body)
    problems = _unknown(fields, ("file_ids", "on_missing"))
    file_ids = fields.get("file_ids")
    ids_are_wrong = False
    if not isinstance(file_ids, list):
        what = "is missing" if "file_ids" not in fields else "must be a list of integers"
        problems.append(Detail("$.file_ids", what))
    elif not 1 <= len(file_ids) <= MAX_FILE_IDS:
        problems.append(Detail("$.file_ids", f"must have 1 to {MAX_FILE_IDS:,} items, has {len(file_ids):,}"))
    else:
        wrong = [Detail(f"$.file_ids[{at}]", ID_RULE) for at, value in enumerate(file_ids) if not _is_file_id(value)]
        ids_are_wrong = bool(wrong)
        problems += wrong
    on_missing = fields.get("on_missing", "fail")
    if on_missing not in ON_MISSING:
        problems.append(Detail("$.on_missing", f"must be {' or '.join(map(json.dumps, ON_MISSING))}"))
    _refuse(problems, "invalid_file_id" if ids_are_wrong else "invalid_request")
    # dict.fromkeys keeps the first of each, in order.
    return ExportRequest(tuple(dict.fromkeys(file_ids or ())), on_missing)


def parse_file(body: bytes) -> FileRequest:
    """Raises InvalidRequest."""
    fields = _parse_object(body)
    problems = _unknown(fields, ("file_id",))
    if "file_id" not in fields:
        problems.append(Detail("$.file_id", "is missing"))
        _refuse(problems, "invalid_request")
    if not _is_file_id(fields["file_id"]):
        problems.append(Detail("$.file_id", ID_RULE))
        _refuse(problems, "invalid_file_id")
    _refuse(problems, "invalid_request")
    return FileRequest(fields["file_id"])


def parse_idempotency_key(headers: HTTPHeaders) -> str | None:
    key = headers.get("Idempotency-Key")
    if key is not None and not IDEMPOTENCY_KEY.fullmatch(key):
        problem = "must be 1 to 255 printable ASCII characters"
        raise InvalidRequest(
            f"the header Idempotency-Key {problem}",
            code="invalid_idempotency_key",
            details=[Detail("Idempotency-Key", problem)],
        )
    return key


def require_json(headers: HTTPHeaders) -> None:
    """Raises WrongContentType for everything but JSON in UTF-8, also for a body without a type.

    Strictness is a protection: a page elsewhere can make a browser post any
    other type, but for this one the browser asks first (CORS preflight).
    """
    kind, _, parameters = headers.get("Content-Type", "").partition(";")
    charset = parameters.strip().lower()
    if kind.strip().lower() != "application/json" or charset not in ("", "charset=utf-8", 'charset="utf-8"'):
        raise WrongContentType("the body must be sent as Content-Type: application/json, in UTF-8")
    if headers.get("Content-Encoding", "identity").lower() not in ("identity", ""):
        raise WrongContentType("the body must be sent without Content-Encoding")


def _is_file_id(value: object) -> bool:
    # `type(...) is int` and not isinstance: bool is an int to Python.
    return type(value) is int and MIN_FILE_ID <= value <= MAX_FILE_ID


def _unknown(fields: dict[str, Any], known: Iterable[str]) -> list[Detail]:
    # Refused, not ignored: a misspelt "on_mising" would otherwise silently mean "fail".
    return [Detail(f"$.{name[:64]}", "is not a known field") for name in fields if name not in known]


def _refuse(problems: list[Detail], code: str) -> None:
    if not problems:
        return
    first = problems[0]
    more = f" (and {len(problems) - 1:,} more)" if len(problems) > 1 else ""
    raise InvalidRequest(f"{first.path} {first.message}{more}", code=code, details=problems[:MAX_DETAILS])


def _parse_object(body: bytes) -> dict[str, Any]:
    try:
        value = _DECODER.decode(body.decode())
    except UnicodeDecodeError:
        raise _not_json("the body is not UTF-8") from None
    except RecursionError:
        raise _not_json("the body is nested too deeply") from None
    except _Refused as error:
        raise _not_json(str(error)) from None
    except json.JSONDecodeError as error:
        raise _not_json(f"the body is not JSON: {error.msg} at character {error.pos}") from None
    except ValueError:
        # Python refuses to read numbers of more than 4,300 digits.
        raise _not_json("the body has a number that is too long") from None
    if not isinstance(value, dict):
        raise InvalidRequest(
            "the body must be a JSON object", code="invalid_request", details=[Detail("$", "must be an object")]
        )
    return value


def _not_json(message: str) -> InvalidRequest:
    return InvalidRequest(message, code="invalid_json", details=[Detail("$", message)])


class _Refused(Exception):
    """JSON that Python would take and we do not."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _Refused("the body has a key twice")
    return found


def _constant(name: str) -> Any:
    raise _Refused(f"the body has {name}, which is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)
