"""A training job's record: its fields, the events about it, and its JSON. Owns no rule; ``job`` has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal, get_args

State = Literal["queued", "running", "succeeded", "failed", "cancelled"]
STATES: Final[tuple[State, ...]] = get_args(State)
ENDED: Final = frozenset[State]({"succeeded", "failed", "cancelled"})


@dataclass(frozen=True)
class Failure:
    """Why a job failed: a stable code and a message for people."""

    code: str
    message: str


@dataclass(frozen=True)
class Job:
    """A job's record, JSON values only. Times are UTC in ISO 8601."""

    id: str
    tenant: str
    actor: str  # who submitted it
    spec: Mapping[str, Any]  # what was asked for, see JobService
    state: State
    token: int  # number of the newest delivery
    attempt: int  # 1, and one more with each retry by its owner
    created_at: str
    queued_at: str
    started_at: str | None = None
    finished_at: str | None = None
    worker: str | None = None  # the worker that has it, or had it last
    claimed_at: str | None = None  # by that worker
    ran_s: float = 0.0  # with the attempt's workers before that one
    lost: int = 0  # workers lost in this attempt
    cancel_requested: bool = False
    stage: str | None = None  # while it runs: loading, training, evaluating, gating, reporting, publishing
    progress: Mapping[str, Any] = field(default_factory=dict)  # the newest that its worker sent
    failure: Failure | None = None
    version: str | None = None  # of the finished prefix; set before it is published
    result: Mapping[str, Any] = field(default_factory=dict)  # once succeeded: task, version, alias, scores
    key_id: str | None = None  # of the key with whose rights it publishes
    planned_steps: int = 0  # the most that it can take; 0 where nobody counted
    steps: int = 0  # the highest step that any of its workers reached, over all attempts
    steps_before: int = 0  # the same when this attempt began
    tokens: int = 0  # trained on up to the highest step
    tokens_before: int = 0  # the same when this attempt began
    reservation: str | None = None  # of this attempt's steps, with the limiter

    @property
    def delivery(self) -> str:
        """The unique name of the newest delivery."""
        return f"{self.id}.{self.token}"

    @property
    def ended(self) -> bool:
        """Whether the job is in an end state; only a retry or a delete changes it then."""
        return self.state in ENDED

    @property
    def to_be_cancelled(self) -> bool:
        """Whether a cancel was requested and is not too late."""
        return self.cancel_requested and self.version is None

    def as_dict(self) -> dict[str, Any]:
        """JSON values; ``job_from`` takes them back."""
        values = asdict(self)
        for name in ("key_id", "planned_steps", "steps", "steps_before", "tokens", "tokens_before", "reservation"):
            if not values[name]:
                del values[name]  # as in the records of a time without them
        return values


@dataclass(frozen=True)
class Event:
    """A ``state`` or ``progress`` event of a job. The store gives the ``id``, in rising order."""

    name: str
    data: Mapping[str, Any]
    id: str = ""


@dataclass(frozen=True)
class Change:
    """The result of a move: the new record, and the events for its watchers."""

    job: Job
    events: tuple[Event, ...] = ()


def job_from(values: Mapping[str, Any]) -> Job:
    """Read what ``as_dict`` wrote. Unknown fields are dropped."""
    known = {name: value for name, value in values.items() if name in Job.__dataclass_fields__}
    failure = known.get("failure")
    return Job(**{**known, "failure": Failure(**failure) if failure else None})
