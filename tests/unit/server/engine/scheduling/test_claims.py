"""A group that was admitted never loads its prefix again; a full bound on such prefixes holds up no one for ever."""

from __future__ import annotations

import queue
import random
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import pytest

from prefixes.errors import InputTooLong, RegistryUnavailable
from server.engine.row import Group
from server.engine.scheduling.admission import Admission
from server.engine.types import PrefixKey
from tests.support.prefixes import make_backbone_spec
from tests.support.scheduling import Machine

A, B, C = (PrefixKey("default", name) for name in "abc")
AWAY = RegistryUnavailable("away")


@contextmanager
def made(blocks: int, **settings: Any) -> Iterator[Machine]:
    with closing(Machine(blocks, early_end=0.0, **settings)) as machine:
        yield machine


def admitted(machine: Machine, name: str, key: PrefixKey, at: float, tokens: int = 8) -> Group:
    group = machine.add(machine.request(name, range(4), key, max_new_tokens=tokens), at=at)
    machine.wait_for(key)
    machine.step()
    assert group.admitted
    return group


def running(machine: Machine) -> list[str]:
    return [group.request.request_id for group in machine.scheduler.running]


def waiting(machine: Machine) -> list[str]:
    return [group.request.request_id for group in machine.scheduler.waiting]


def test_a_preempted_group_ends_well_although_its_prefix_was_evicted_and_the_registry_is_away() -> None:
    """It used to load its prefix again, and failed in the middle of its stream."""
    with made(14, lengths={A: 16, B: 20}, reuse=False) as machine:
        admitted(machine, "old", B, at=1.0, tokens=24)
        admitted(machine, "young", A, at=2.0)
        machine.failures[A] = AWAY
        while A in machine.store.residents():  # until the older one's tokens need its blocks
            machine.step()
        assert machine.preempted == ["young"]
        assert machine.store.copy_bytes > 0
        machine.run()
        assert list(machine.ended.items()) == [("old", "finished"), ("young", "finished")]
        assert machine.copies == 1
        assert machine.store.copy_bytes == 0


def test_no_copy_is_made_while_all_prefixes_fit() -> None:
    with made(60, lengths={A: 16, B: 16, C: 16}) as machine:
        for round_ in range(5):
            for key in (A, B, C):
                machine.add(machine.request(f"{key.version}{round_}", range(4), key, max_new_tokens=6))
        machine.wait()
        machine.step()
        machine.scheduler.preempt(machine.scheduler.running[0])
        machine.run()
        assert set(machine.ended.values()) == {"finished"}
        assert machine.copies == 0


def test_a_full_bound_lets_groups_of_its_own_prefixes_in_and_others_wait() -> None:
    with made(60, lengths={A: 16, B: 16}, preempted_prefix_bytes=4) as machine:
        admitted(machine, "a", A, at=0.0)
        machine.add(machine.request("a too", range(4), A, max_new_tokens=2), at=1.0)
        machine.add(machine.request("b", range(4), B, max_new_tokens=2), at=2.0)
        machine.add(machine.request("behind", range(4), max_new_tokens=2), at=3.0)
        machine.wait_for(B)
        machine.step()
        assert running(machine) == ["a", "a too"], "order of arrival holds for what has never run"
        machine.run()
        assert list(machine.ended) == ["a too", "a", "b", "behind"]
        assert machine.preempted == []


def test_what_was_preempted_passes_a_head_that_waits_for_the_bound() -> None:
    """Neither would ever go on: the head waits for the claims of those behind it."""
    with made(60, lengths={A: 16, B: 16}, preempted_prefix_bytes=4) as machine:
        young = admitted(machine, "young", A, at=2.0)
        machine.add(machine.request("head", range(4), B, max_new_tokens=2), at=1.0)
        machine.add(machine.request("new", range(4), A, max_new_tokens=2), at=3.0)
        machine.wait_for(B)
        machine.scheduler.preempt(young)
        machine.step()
        assert running(machine) == ["young"], "nothing new goes before the head, which would wait for ever"
        machine.run()
        assert list(machine.ended) == ["young", "head", "new"]


def test_a_head_that_waits_for_the_bound_alone_is_nothing_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it waits for loads again, since it could not be copied: steps would run in circles meanwhile."""
    with made(20, lengths={A: 16, B: 16}, preempted_prefix_bytes=4, reuse=False) as machine:
        young = admitted(machine, "young", A, at=2.0)
        monkeypatch.setattr(machine.store._placement, "_read", lambda spec, blocks: [][0])
        machine.gates[A] = queue.Queue()
        machine.scheduler.preempt(young)
        machine.ledger.release(machine.ledger.allocate(20))
        machine.add(machine.request("head", range(4), B, max_new_tokens=2), at=1.0)
        machine.wait_for(B)
        machine.step()
        assert waiting(machine) == ["head", "young"]
        assert not machine.scheduler.runnable()
        machine.gates[A].put(None)
        machine.run()
        assert list(machine.ended.items()) == [("young", "finished"), ("head", "finished")]


def test_a_prefix_above_the_bound_is_refused_with_expected_and_got() -> None:
    with made(60, lengths={A: 16, B: 17}, preempted_prefix_bytes=4) as machine:
        admission = Admission(make_backbone_spec(), (), machine.config, machine.scheduler.capacity)
        admission.check(machine.request("a", range(4), A))
        with pytest.raises(InputTooLong, match=r"at most 4 blocks \(preempted_prefix_bytes\), got 5") as caught:
            admission.check(machine.request("b", range(4), B))
        assert caught.value.detail == {"expected": 4, "got": 5}


@pytest.mark.parametrize("first_seed", range(0, 60, 10))
def test_whatever_was_admitted_ends_well_when_the_registry_goes(first_seed: int) -> None:
    """Small pools and bounds, preemption and aborts at any time; the registry comes and goes as well."""
    copies = failed = 0
    for seed in range(first_seed, first_seed + 10):
        rng = random.Random(seed)
        keys = [PrefixKey("default", f"p{index}") for index in range(5)]
        with made(
            rng.choice([14, 18, 24]), seed=seed, lengths={key: rng.choice([1, 4, 7, 12, 16]) for key in keys},
            reuse=rng.random() < 0.5, preempted_prefix_bytes=rng.choice([None, 4, 6, 9]),
            max_prefix_bytes=rng.choice([None, 5]), units=rng.choice([0, 0, 3]), max_rows=rng.choice([2, 4, 16]),
            max_staged_bytes=rng.choice([1, 1 << 20]),
        ) as machine:  # fmt: skip
            groups: list[Group] = []
            for number in range(60):
                machine.failures = dict.fromkeys(keys, AWAY) if rng.random() < 0.3 else {}
                request = machine.request(f"r{number}", [number] * rng.randint(1, 9), rng.choice([None, *keys]),
                                          max_new_tokens=rng.choice([1, 5, 16]))  # fmt: skip
                needed, room = machine.fits_alone(request)
                assert needed <= room
                groups.append(machine.add(request, at=rng.choice([float(number), number - 5.0])))
                for _ in range(rng.choice([0, 1, 4])):
                    if machine.scheduler.running and rng.random() < 0.3:
                        machine.scheduler.preempt(rng.choice(machine.scheduler.running))
                    if rng.random() < 0.3:
                        machine.ledger.release(machine.ledger.allocate(machine.ledger.available))
                    machine.step()
                    claimed = sum(entry.block_count for entry in machine.store._claimed.entries.values())
                    assert claimed == machine.store._claimed.blocks <= machine.store.max_claimed_blocks
                alive = [group for group in groups if group.request.request_id not in machine.ended]
                if alive and rng.random() < 0.05:
                    machine.abort(rng.choice(alive))
            machine.run()
            for group in groups:
                how = machine.ended[group.request.request_id]
                assert how in ("finished", "aborted") or not group.admitted, "it needed the registry again"
                failed += how == "registry_unavailable"
            assert machine.store.copy_bytes == machine.store._claimed.blocks == 0
            copies += machine.copies
    assert copies and failed
