"""The pure rules of jobs: ids, final states, and when a failed attempt is tried again."""

from __future__ import annotations

import pytest

from delineate.job import JOB_ID, ErrorClass, JobStatus, RetryPolicy, new_job_id

POLICY = RetryPolicy(attempts=3, backoff_seconds=5)


@pytest.mark.parametrize("error_class", [ErrorClass.VALIDATION, ErrorClass.NOT_FOUND, ErrorClass.PERMISSION])
def test_what_trying_again_cannot_cure_is_never_tried_again(error_class: ErrorClass) -> None:
    assert POLICY.delay_before_next(error_class, 1) is None


@pytest.mark.parametrize("error_class", [ErrorClass.TIMEOUT, ErrorClass.NETWORK])
def test_timeouts_and_network_errors_get_three_attempts_with_doubling_waits(error_class: ErrorClass) -> None:
    first = [POLICY.delay_before_next(error_class, 1) for _ in range(200)]
    second = [POLICY.delay_before_next(error_class, 2) for _ in range(200)]
    assert all(delay is not None and 4 <= delay <= 6 for delay in first)
    assert all(delay is not None and 8 <= delay <= 12 for delay in second)
    assert len(set(first)) > 100, "there is jitter"
    assert POLICY.delay_before_next(error_class, 3) is None


def test_an_error_of_our_own_is_tried_once_more() -> None:
    assert POLICY.delay_before_next(ErrorClass.INTERNAL, 1) is not None
    assert POLICY.delay_before_next(ErrorClass.INTERNAL, 2) is None


def test_an_error_class_that_is_added_must_say_how_often_it_is_tried() -> None:
    tried = {error_class: POLICY.delay_before_next(error_class, 1) is not None for error_class in ErrorClass}
    assert tried == {
        ErrorClass.VALIDATION: False,
        ErrorClass.NOT_FOUND: False,
        ErrorClass.PERMISSION: False,
        ErrorClass.TIMEOUT: True,
        ErrorClass.NETWORK: True,
        ErrorClass.INTERNAL: True,
        ErrorClass.CRASH: False,
    }


def test_ids_are_random_uuids() -> None:
    ids = {new_job_id() for _ in range(100)}
    assert len(ids) == 100
    assert all(JOB_ID.fullmatch(job_id) for job_id in ids)


def test_completed_failed_and_cancelled_are_final() -> None:
    assert {status for status in JobStatus if status.is_final} == {
        JobStatus.COMPLETED,
        JobStatus.FAILED,
        JobStatus.CANCELLED,
    }
