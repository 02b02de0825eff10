"""Whose job a worker takes next: one of the tenant that has had the least of the trainer. Torch-free.

Each tenant has a counter. When a job starts, what it is expected to take is added to its tenant's, over the weight;
when it has ended, what it did not take is given back. A worker takes the oldest job of the tenant with the least
counter among those that wait. What a job takes are the examples that it learns from, steps times batch. A step counts
once, however often it is computed again because a worker was lost.

A tenant that was not waiting has not been held up, so it may save up nothing: when it begins to wait it is lifted to
the least counter of the others that wait; if nobody else waits, to that of the tenant that was served last. Two tenants
that wait all the time are then never further apart than one job. (Virtual token counters, as in the engine: Sheng et
al. 2024, "Fairness in Serving Large Language Models".)

Owns this rule, its counters and their JSON. Knows no queue, and no tenant but its name.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from trainer.jobs.record import Job

_log = logging.getLogger("prefixd.trainer")

WeightOf = Callable[[str], float]
"""A tenant's weight, above 0."""


@dataclass(frozen=True)
class Work:
    """What a delivery asks of a worker: the steps from ``begins`` to ``ends``, each of ``batch`` examples."""

    tenant: str
    job_id: str
    begins: int = 0
    ends: int = 1
    batch: int = 1

    def examples(self, step: int) -> int:
        """Those that the job has learnt from in this work when it has reached ``step``."""
        return max(0, step - self.begins) * self.batch

    @property
    def expected(self) -> int:
        """Examples of all of it."""
        return self.examples(self.ends)


def work_of(job: Job) -> Work:
    """What is left of ``job``; one step of a job of which nothing is known, or that was trained and not published."""
    batch = job.spec.get("config", {}).get("batch_size", 1)
    return Work(job.tenant, job.id, job.steps, max(job.planned_steps, job.steps + 1), batch)


@dataclass(frozen=True)
class Charge:
    """A job that was taken and is not settled: its tenant was charged for all of ``work``, under ``weight``."""

    work: Work
    weight: float


@dataclass(frozen=True)
class Turns:
    """The counters at one moment; a change gives new ones."""

    counters: Mapping[str, float] = field(default_factory=dict)
    charges: Mapping[str, Charge] = field(default_factory=dict)  # by job id
    waiting: frozenset[str] = frozenset()  # the tenants that had more work waiting at the latest turn
    last: str | None = None  # the tenant whose turn that was

    def next(self, waiting: Sequence[Work], weight_of: WeightOf) -> tuple[int, Turns]:
        """Return the index of the work to take, and the counters then. ``waiting`` is not empty, the oldest first."""
        oldest: dict[str, int] = {}
        for index, work in enumerate(waiting):
            oldest.setdefault(work.tenant, index)
        stayed = self.waiting & oldest.keys()
        least = min(map(self.of, stayed), default=0.0 if self.last is None else self.of(self.last))
        begun = {tenant: max(self.of(tenant), least) for tenant in oldest.keys() - stayed}
        counters = {**self.counters, **begun}
        tenant = min(oldest, key=lambda tenant: counters.get(tenant, 0.0))  # of equal ones that with the oldest work
        taken = oldest[tenant]
        charges = dict(self.charges)
        if waiting[taken].job_id not in charges:  # it was charged, where a worker was lost or has handed it back
            charge = charges[waiting[taken].job_id] = Charge(waiting[taken], weight_of(tenant))
            counters[tenant] = counters.get(tenant, 0.0) + charge.work.expected / charge.weight
        left = frozenset(work.tenant for index, work in enumerate(waiting) if index != taken)
        return taken, Turns(counters, charges, left, tenant)

    def settled(self, job_id: str, step: int) -> Turns:
        """The job has ended at ``step``. Nothing changes for one that was not taken, or that was settled before."""
        charge = self.charges.get(job_id)
        if charge is None:
            return self
        work, tenant = charge.work, charge.work.tenant
        counter = self.of(tenant) - (work.expected - work.examples(step)) / charge.weight
        charges = {other: found for other, found in self.charges.items() if other != job_id}
        return replace(self, counters={**self.counters, tenant: counter}, charges=charges)

    def of(self, tenant: str) -> float:
        """The tenant's counter."""
        return self.counters.get(tenant, 0.0)

    def as_dict(self) -> dict[str, Any]:
        """JSON values; ``turns_from`` takes them back."""
        return {**asdict(self), "waiting": sorted(self.waiting)}


def turns_from(text: bytes | str) -> Turns:
    """Read the JSON of what ``as_dict`` gave. Anything else counts as none: turns are forgotten, and jobs go on."""
    try:
        values = json.loads(text)
        charges = {
            job_id: Charge(Work(**charge["work"]), charge["weight"]) for job_id, charge in values["charges"].items()
        }
        return Turns(values["counters"], charges, frozenset(values["waiting"]), values["last"])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        _log.warning("whose turn it is cannot be read", extra={"facts": {"error": str(error)[:200]}})
        return Turns()
