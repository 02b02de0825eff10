"""What a step and a submission cost does not depend on how many prefixes are resident and how many requests wait."""

from __future__ import annotations

import queue
from contextlib import closing
from typing import Final

import pytest

from server.engine.types import PrefixKey
from tests.support.lines import Lines
from tests.support.prefixes import make_prefix
from tests.support.scheduling import Machine

FEW: Final = (10, 10)
MANY: Final = (10_000, 1_000)
STEPS: Final = 8


def make_resident(machine: Machine, keys: list[PrefixKey]) -> None:
    """Load all of ``keys``, and leave them idle in blocks; every tenth pinned."""
    for begin in range(0, len(keys), 100):
        chunk = keys[begin : begin + 100]
        for key in chunk:
            machine.store.want(key, machine.prefixes[key].spec)
        for key in chunk:
            machine.wait_for(key)
        machine.store.settle()
        for key in chunk:
            assert machine.store.try_acquire(key, 0) is not None
            machine.store.unwant(key)
            machine.store.release(key)
    for key in keys[::10]:
        machine.pin(key)


def costs(residents: int, waiting: int) -> tuple[list[int], int]:
    """Lines of each step, and of what a submission asks before it waits."""
    keys = [PrefixKey("default", f"resident {index}") for index in range(residents)]
    slow, prefix = PrefixKey("default", "slow"), make_prefix(length=4)
    with closing(Machine(residents + 200, max_rows=2, reuse=False)) as machine:
        machine.prefixes = dict.fromkeys([*keys, slow], prefix)
        machine.gates[slow] = queue.Queue()
        make_resident(machine, keys)
        for name in "ab":
            machine.add(machine.request(name, range(8), keys[-1], max_new_tokens=100))
        machine.step()
        for index in range(waiting):
            machine.add(machine.request(f"r{index}", [1, 2], [None, keys[1], slow][index % 3], max_new_tokens=4))
        request = machine.request("probe", range(8), keys[3], max_new_tokens=10)
        steps = []
        for _ in range(STEPS):
            lines = Lines().of(machine.scheduler.runnable)
            plans = []
            lines += Lines().of(lambda: plans.append(machine.scheduler.schedule()))  # noqa: B023
            assert len(plans[0].rows) == 2
            for scheduled in plans[0].rows:
                scheduled.row.token_ids.append(1)
            lines += Lines().of(lambda: machine.scheduler.update([], plans[0]))  # noqa: B023
            steps.append(lines)
        assert machine.store.resident_count == residents
        assert len(machine.scheduler.waiting) == waiting
        submission = Lines().of(lambda: (machine.fits_alone(request), len(machine.scheduler.waiting)))
        machine.gates[slow].put(None)
    return steps, submission


@pytest.fixture(scope="module")
def few_and_many() -> tuple[tuple[list[int], int], tuple[list[int], int]]:
    return costs(*FEW), costs(*MANY)


def test_a_step_costs_the_same_with_more_residents_and_more_waiting(
    few_and_many: tuple[tuple[list[int], int], tuple[list[int], int]],
) -> None:
    few, many = few_and_many
    assert few[0] == many[0]
    assert all(lines > 20 for lines in few[0])


def test_a_submission_costs_the_same_with_more_residents_and_more_waiting(
    few_and_many: tuple[tuple[list[int], int], tuple[list[int], int]],
) -> None:
    few, many = few_and_many
    assert few[1] == many[1]
    assert few[1] > 5


def test_admitting_the_first_of_many_costs_the_same() -> None:
    """The head alone is looked at, however many wait behind it."""
    lines = []
    for waiting in (10, 1_000):
        with closing(Machine(100, max_rows=1, reuse=False)) as machine:
            machine.add(machine.request("runs", range(4), max_new_tokens=1))
            machine.step()
            for index in range(waiting):
                machine.add(machine.request(f"r{index}", [1, 2], max_new_tokens=4), at=float(index))
            lines.append(Lines().of(machine.scheduler.schedule))
            assert [group.request.request_id for group in machine.scheduler.running] == ["r0"]
    assert lines[0] == lines[1]


def test_steps_and_admissions_cost_the_same_however_many_tenants_wait() -> None:
    """All tenants were sorted in each step, and again for each admission."""
    full, admitting = [], []
    for tenants in (10, 1_000):
        with closing(Machine(100, max_rows=2, reuse=False)) as machine:
            for index in range(tenants):
                for part in range(2):
                    request = machine.request(f"{index} {part}", [1, 2], caller=f"t{index}", max_new_tokens=4)
                    machine.add(request, at=float(index))
            for _ in range(4):
                machine.step()
            assert len(machine.ended) == 2
            admitting.append(Lines().of(machine.scheduler.schedule))
            full.append(Lines().of(machine.scheduler.schedule))
            assert sorted(group.request.request_id for group in machine.scheduler.running) == ["2 0", "3 0"]
    assert full[0] == full[1] < admitting[0] == admitting[1]
