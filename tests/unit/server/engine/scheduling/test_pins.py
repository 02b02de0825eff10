"""Pins count from the moment of asking: whatever is pinned and unpinned, nothing that was accepted lacks memory."""

from __future__ import annotations

import queue
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any

import pytest

from prefixes.errors import InputTooLong, InvalidArtifact, InvalidParameter
from server.engine.row import Group
from server.engine.scheduling.admission import Admission
from server.engine.types import GenerationRequest, PrefixKey
from tests.support.prefixes import make_backbone_spec
from tests.support.scheduling import Machine

A, B = (PrefixKey("default", name) for name in "ab")


class Door:
    """A machine behind its admission, as the engine has it."""

    def __init__(self, machine: Machine) -> None:
        self.machine, self.groups = machine, list[Group]()
        spec = replace(make_backbone_spec(), max_positions=10_000)
        self.admission = Admission(spec, machine.decoder_prompt, machine.config, machine.scheduler.capacity)

    def accept(self, request: GenerationRequest) -> bool:
        try:
            self.admission.check(request)
        except InputTooLong:
            return False
        self.groups.append(self.machine.add(request))
        return True

    def pin(self, key: PrefixKey) -> bool:
        accepted = [group.request for group in self.groups if group.request.request_id not in self.machine.ended]
        try:
            self.admission.check_pin(key, self.machine.prefixes[key].spec, accepted)
        except InvalidParameter:
            return False
        self.machine.pin(key)
        return True


@contextmanager
def door(blocks: int, **settings: Any) -> Iterator[Door]:
    with closing(Machine(blocks, **settings)) as machine:
        yield Door(machine)


def test_a_pin_counts_before_it_is_loaded_and_until_it_is_unpinned() -> None:
    with door(10, lengths={A: 24}) as made:
        request = made.machine.request("r", range(12), max_new_tokens=8)
        made.machine.gates[A] = queue.Queue()
        assert made.pin(A)
        assert made.machine.store.pinned_blocks == 6
        with pytest.raises(InputTooLong, match="may need 5 blocks of 4 tokens, there are 4"):
            made.admission.check(request)
        made.machine.store.unpin(A)
        made.admission.check(request)
        made.machine.gates[A].put(None)


def test_a_pin_is_refused_beside_a_request_whose_room_it_would_take() -> None:
    with door(10, lengths={A: 24, B: 4}) as made:
        assert made.accept(made.machine.request("r", range(12), B, max_new_tokens=4))
        with pytest.raises(InvalidParameter, match="the request may need 5 blocks of 4 tokens, there are 4"):
            made.admission.check_pin(A, made.machine.prefixes[A].spec, [made.groups[0].request])
        assert made.pin(B), "its own prefix is in what it may need"
        made.machine.run()
        assert made.pin(A)


def test_pins_that_do_not_fit_together_are_refused_with_expected_and_got() -> None:
    with door(10, lengths={A: 24, B: 16}) as made:
        assert made.pin(A)
        assert made.pin(A), "asked again it is the same pin"
        with pytest.raises(InvalidParameter, match=r"at most 9 blocks together .* got 10") as caught:
            made.admission.check_pin(B, made.machine.prefixes[B].spec, [])
        assert caught.value.detail == {"expected": 9, "got": 10}
    with door(100, lengths={A: 24, B: 16}, max_prefix_bytes=8) as made:
        assert made.pin(A)
        assert not made.pin(B)


def test_what_a_published_prefix_may_take_does_not_depend_on_pins() -> None:
    """A pin may go. Requests with that prefix are refused until then."""
    with door(10, lengths={A: 24, B: 16}) as made:
        assert made.pin(A)
        made.admission.check_prefix(made.machine.prefixes[B].spec, (0,))
        with pytest.raises(InputTooLong, match="less pinned prefixes"):
            made.admission.check(made.machine.request("r", (0,), B, max_new_tokens=1))


def test_a_pin_that_cannot_be_written_is_told_to_those_behind_a_blocked_head() -> None:
    with door(12, lengths={A: 4}) as made:
        machine = made.machine
        write = machine.store._placement._write
        machine.store._placement._write = lambda prefix, blocks: [][0]
        made.accept(machine.request("runs", range(16), max_new_tokens=12))
        machine.step()
        made.accept(machine.request("blocked", range(60, 92), max_new_tokens=1))
        made.accept(machine.request("pinned", range(4), A, max_new_tokens=1))
        assert made.pin(A)
        held = machine.ledger.allocate(machine.ledger.available)
        machine.wait_for(A)
        machine.scheduler._entrance.take_in_loads()  # loaded, without room
        assert len(machine.scheduler.waiting) == 2
        machine.ledger.release(held)
        machine.step()
        assert machine.ended == {"pinned": "engine_failure"}
        machine.store._placement._write = write
        made.accept(machine.request("again", range(4), A, max_new_tokens=1))
        machine.run()
        assert machine.ended["again"] == "finished"


@pytest.mark.parametrize("first_seed", range(0, 60, 10))
def test_nothing_that_was_accepted_dies_for_memory(first_seed: int) -> None:
    """Random requests, pins that load late or never, unpins, preemption, in pools that hold little more than one."""
    counts: Counter[str] = Counter()
    for seed in range(first_seed, first_seed + 10):
        run_a_mix(seed, counts)
    assert counts.keys() == {"accepted", "refused", "pinned", "not pinned"}


def run_a_mix(seed: int, counts: Counter[str]) -> None:
    rng = random.Random(seed)
    keys = [PrefixKey("default", f"p{index}") for index in range(5)]
    lengths = {key: rng.choice([1, 4, 7, 12, 20]) for key in keys}
    settings: dict[str, Any] = {
        "lengths": lengths, "reuse": rng.random() < 0.5, "max_prefix_bytes": rng.choice([None, 5, 8]),
        "units": rng.choice([0, 0, 3]), "max_rows": rng.choice([2, 4, 16]),
    }  # fmt: skip
    with door(rng.choice([12, 16, 24]), seed=seed, **settings) as made:
        machine = made.machine
        broken = rng.choice(keys)
        machine.failures[broken] = InvalidArtifact("broken")
        late = rng.choice([key for key in keys if key != broken])
        machine.gates[late] = queue.Queue()
        for number in range(60):
            kind: dict[str, Any] = rng.choice([{}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}])
            request = machine.request(
                f"r{number}", [number] * rng.randint(1, 12), rng.choice([None, *keys]),
                max_new_tokens=rng.choice([1, 5, 20]), **kind,
            )  # fmt: skip
            counts["accepted" if made.accept(request) else "refused"] += 1
            if rng.random() < 0.3:
                counts["pinned" if made.pin(rng.choice(keys)) else "not pinned"] += 1
            if rng.random() < 0.2:
                machine.store.unpin(rng.choice(keys))
            if rng.random() < 0.2:
                machine.gates[late].put(None)
            for _ in range(rng.choice([0, 1, 4])):
                if machine.scheduler.running and rng.random() < 0.1:
                    machine.scheduler.preempt(rng.choice(machine.scheduler.running))
                machine.step()
        for _ in range(100):
            machine.gates[late].put(None)
        machine.run()
        assert set(machine.ended) == {group.request.request_id for group in made.groups}
        for group in made.groups:
            wanted = "invalid_artifact" if group.request.prefix == broken else "finished"
            assert machine.ended[group.request.request_id] == wanted
        for key in keys:
            machine.store.unpin(key)
        assert machine.store.pinned_blocks == 0
