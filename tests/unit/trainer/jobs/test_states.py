"""A job's states: every move that there is, and every one that there is not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Final

import pytest

from trainer.jobs.clock import seconds_since
from trainer.jobs.errors import Fenced, JobConflict
from trainer.jobs.job import (
    MAX_LOST,
    MAX_LOST_TRAINED,
    cancelled,
    claimed,
    failed,
    handed_back,
    lost,
    new_job,
    progressed,
    require_deletable,
    retried,
    stopped,
    succeeded,
    trained,
)
from trainer.jobs.record import ENDED, STATES, Change, Failure, Job, State, job_from

WORKER: Final = "machine-1"
FAILURE: Final = Failure("out_of_memory", "expected more, got less")

MOVES: Final[dict[str, Callable[[Job], Change]]] = {
    "claim": lambda job: claimed(job, job.token, WORKER),
    "progress": lambda job: progressed(job, job.token, {"step": 3}, "training"),
    "train": lambda job: trained(job, job.token, "sha256:1"),
    "succeed": lambda job: succeeded(job, job.token, {"version": "sha256:1"}),
    "fail": lambda job: failed(job, job.token, FAILURE),
    "stop": lambda job: stopped(job, job.token),
    "hand back": lambda job: handed_back(job, job.token),
    "lose": lambda job: lost(job, job.token),
    "cancel": cancelled,
    "retry": retried,
}
EXPECTED: Final[dict[tuple[State, str], State]] = {
    ("queued", "claim"): "running",
    ("queued", "cancel"): "cancelled",
    ("running", "progress"): "running",
    ("running", "train"): "running",
    ("running", "succeed"): "succeeded",
    ("running", "fail"): "failed",
    ("running", "stop"): "cancelled",
    ("running", "hand back"): "queued",
    ("running", "lose"): "queued",
    ("running", "cancel"): "running",
    ("failed", "retry"): "queued",
    ("cancelled", "retry"): "queued",
}
REPEATED: Final[dict[tuple[State, str], State]] = {
    ("running", "claim"): "running",
    ("succeeded", "succeed"): "succeeded",
    ("failed", "fail"): "failed",
    ("failed", "stop"): "failed",
    ("cancelled", "cancel"): "cancelled",
    ("cancelled", "stop"): "cancelled",
    ("cancelled", "fail"): "cancelled",
    ("succeeded", "fail"): "succeeded",
    ("succeeded", "stop"): "succeeded",
    ("cancelled", "train"): "cancelled",
}
"""Asked for again by the same worker, or too late: nothing changes, and nobody is told."""


def job_in(state: State) -> Job:
    job = new_job("acme", "tenant:acme", {"task": "acme/e2e"}).job
    if state == "queued":
        return job
    if state == "cancelled":
        return cancelled(job).job
    running = claimed(job, 1, WORKER).job
    ends: dict[State, Callable[[Job], Change]] = {
        "running": Change,
        "succeeded": MOVES["succeed"],
        "failed": MOVES["fail"],
    }
    return ends[state](running).job


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("move", MOVES)
def test_a_job_moves_as_documented_and_in_no_other_way(state: State, move: str) -> None:
    job = job_in(state)
    assert job.state == state
    if (state, move) in EXPECTED:
        change = MOVES[move](job)
        assert change.job.state == EXPECTED[state, move]
        assert change.job != job
        assert change.events
    elif (state, move) in REPEATED:
        assert MOVES[move](job) == Change(job)
    else:
        with pytest.raises((Fenced, JobConflict)):
            MOVES[move](job)


@pytest.mark.parametrize("move", [name for name in MOVES if name not in ("cancel", "retry")])
def test_a_worker_with_an_old_token_moves_nothing(move: str) -> None:
    running = job_in("running")
    taken_over = claimed(lost(running, running.token).job, running.token + 1, "machine-2").job
    stale = replace(taken_over, token=running.token)  # what the old worker believes

    plans = {
        "claim": lambda job: claimed(job, stale.token, WORKER),
        "progress": lambda job: progressed(job, stale.token, {"step": 3}, "training"),
        "train": lambda job: trained(job, stale.token, "sha256:1"),
        "succeed": lambda job: succeeded(job, stale.token, {}),
        "fail": lambda job: failed(job, stale.token, FAILURE),
        "stop": lambda job: stopped(job, stale.token),
        "hand back": lambda job: handed_back(job, stale.token),
        "lose": lambda job: lost(job, stale.token),
    }
    with pytest.raises(Fenced):
        plans[move](taken_over)


def test_every_delivery_has_a_name_of_its_own() -> None:
    job, seen = new_job("acme", "me", {}).job, set[str]()
    for number in range(MAX_LOST - 1):
        seen.add(job.delivery)
        job = lost(claimed(job, job.token, f"machine-{number}").job, job.token).job
    seen.add(job.delivery)
    job = retried(failed(claimed(job, job.token, WORKER).job, job.token, FAILURE).job).job
    seen.add(job.delivery)
    job = handed_back(claimed(job, job.token, WORKER).job, job.token).job
    seen.add(job.delivery)
    assert len(seen) == MAX_LOST + 2
    assert job.attempt == 2


def test_a_job_that_loses_every_worker_fails_and_says_where() -> None:
    job = new_job("acme", "me", {}).job
    for number in range(MAX_LOST):
        assert job.state == "queued"
        job = claimed(job, job.token, f"machine-{number}").job
        job = progressed(job, job.token, {"step": 7}, "training").job
        job = lost(job, job.token).job
    assert job.state == "failed"
    assert job.failure is not None
    assert job.failure.code == "worker_lost"
    assert "step 7" in job.failure.message
    again = retried(job).job
    assert (again.lost, again.failure, again.attempt) == (0, None, 2)


@pytest.mark.parametrize("move", ["stop", "hand back", "lose", "fail", "train"])
def test_a_job_that_was_to_be_cancelled_is_whatever_ends_it(move: str) -> None:
    job = cancelled(job_in("running")).job
    assert job.cancel_requested
    assert cancelled(job) == Change(job)
    assert MOVES[move](job).job.state == "cancelled"


def test_a_cancel_that_comes_too_late_does_not_undo_what_was_published() -> None:
    job = cancelled(trained(job_in("running"), 1, "sha256:1").job).job
    assert succeeded(job, 1, {"version": "sha256:1"}).job.state == "succeeded"


@pytest.mark.parametrize("move", ["hand back", "lose"])
def test_a_trained_job_is_finished_by_another_since_it_may_be_published_already(move: str) -> None:
    """With a cancel pending it ended as cancelled, and after three lost workers as failed, its version being served."""
    job = trained(job_in("running"), 1, "sha256:1").job
    for _ in range(MAX_LOST + 1):
        job = MOVES[move](cancelled(job).job).job
        assert (job.state, job.cancel_requested) == ("queued", True)
        assert cancelled(job) == Change(job)
        job = claimed(job, job.token, "machine-2").job
        job = trained(job, job.token, "sha256:1").job
    assert succeeded(job, job.token, {"version": "sha256:1"}).job.state == "succeeded"


def test_a_trained_job_that_costs_every_worker_its_life_fails_in_the_end() -> None:
    job = trained(job_in("running"), 1, "sha256:1").job
    for _ in range(MAX_LOST_TRAINED - 1):
        job = claimed(lost(job, job.token).job, job.token + 1, "machine-2").job
    assert lost(job, job.token).job.state == "failed"


def test_a_retry_may_be_cancelled_again() -> None:
    job = failed(trained(job_in("running"), 1, "sha256:1").job, 1, FAILURE).job
    job = claimed(retried(job).job, 2, WORKER).job
    assert trained(cancelled(job).job, 2, "sha256:1").job.state == "cancelled"


def test_a_retried_job_forgets_why_it_ended_and_that_it_was_cancelled() -> None:
    job = retried(stopped(cancelled(job_in("running")).job, 1).job).job
    assert (job.cancel_requested, job.failure, job.finished_at, job.stage) == (False, None, None, None)
    assert claimed(job, 2, WORKER).job.state == "running"


def test_only_what_has_ended_can_be_deleted() -> None:
    for state in STATES:
        if state in ENDED:
            require_deletable(job_in(state))
        else:
            with pytest.raises(JobConflict):
                require_deletable(job_in(state))


@pytest.mark.parametrize("state", STATES)
def test_a_record_survives_json_and_a_field_of_a_later_release(state: State) -> None:
    job = job_in(state)
    assert job_from(job.as_dict() | {"of_a_later_release": 1}) == job


def test_those_who_watch_hear_of_the_stage_once_and_of_progress_each_time() -> None:
    job = job_in("running")
    first = progressed(job, 1, {"step": 1}, "training")
    second = progressed(first.job, 1, {"step": 2}, "training")
    same = progressed(second.job, 1, {"step": 2}, "training")
    assert [event.name for event in first.events] == ["state", "progress"]
    assert [event.name for event in second.events] == ["progress"]
    assert same.events == ()


def test_the_time_that_a_job_ran_is_that_of_all_workers_of_an_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit that began anew with every worker would not end a job in a deployment that restarts daily."""
    monkeypatch.setattr("trainer.jobs.job.seconds_since", lambda text: 0.0 if text is None else 100.0)
    job = claimed(new_job("acme", "me", {}).job, 1, "one").job
    assert job.ran_s == 0
    job = handed_back(job, 1).job
    assert job.ran_s == 100
    job = lost(claimed(job, 2, "two").job, 2).job
    assert job.ran_s == 200
    job = retried(failed(claimed(job, 3, "three").job, 3, Failure("time_limit", "")).job).job
    assert job.ran_s == 0
    stored = {name: value for name, value in job.as_dict().items() if name not in ("claimed_at", "ran_s")}
    assert job_from(stored).ran_s == 0, "a job of an earlier release"


def test_a_clock_that_is_ahead_takes_no_time_from_a_job() -> None:
    assert seconds_since("2999-01-01T00:00:00.000Z") == 0
    assert seconds_since(None) == 0
    assert seconds_since("2020-01-01T00:00:00.000Z") > 1e8
