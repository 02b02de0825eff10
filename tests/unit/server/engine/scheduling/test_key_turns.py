"""A tenant's keys take turns inside its queue, one admission each; the requests of one key stay in order."""

from __future__ import annotations

import queue
from functools import partial

import pytest

from server.engine.row import Group
from server.engine.types import PrefixKey
from tests.support.fairness import served
from tests.support.scheduling import Machine, Make

A, B = (PrefixKey("owner", name) for name in "ab")


@pytest.fixture
def make(make: Make) -> Make:
    return partial(make, 400, max_rows=1)


def add(machine: Machine, name: str, key: str | None, tokens: int = 1, caller: str = "t", at: float | None = 0.0,
        prefix: PrefixKey | None = None) -> Group:
    request = machine.request(name, [1, 2], prefix, caller=caller, caller_key=key, max_new_tokens=tokens)
    return machine.add(request, at=at)


def test_a_thousand_requests_of_one_key_hold_another_keys_one_up_for_a_single_turn(make: Make) -> None:
    """They were one queue in order of arrival: the other key's waited for all of them."""
    machine = make()
    for index in range(1_000):
        add(machine, f"many{index}", "many")
    machine.step()
    add(machine, "one", "one", at=1.0)
    for _ in range(2):
        machine.step()
    assert list(machine.ended) == ["many0", "many1", "one"]


def test_keys_take_turns_and_each_keeps_its_order(make: Make) -> None:
    machine = make()
    for name in ("a0", "a1", "a2", "b0", "c0", "c1", "c2", "c3"):
        add(machine, name, name[0])
    machine.run()
    assert list(machine.ended) == ["a0", "b0", "c0", "a1", "c1", "a2", "c2", "c3"]


def test_who_asks_without_keys_is_served_in_order_of_arrival(make: Make) -> None:
    machine = make()
    for index in range(5):
        add(machine, f"r{index}", None)
    machine.run()
    assert list(machine.ended) == [f"r{index}" for index in range(5)]


def test_a_hundred_keys_buy_no_hundred_shares(make: Make) -> None:
    machine = make(max_rows=4)
    groups = [add(machine, f"many{index}", f"key{index}", tokens=5, caller="many") for index in range(100)]
    groups += [add(machine, f"one{index}", "its own", tokens=5, caller="one") for index in range(100)]
    for _ in range(60):
        machine.step()
    tokens = served(machine, groups)
    assert abs(tokens["many"] - tokens["one"]) <= 2 * (2 + 2 * 4 * 5)


def test_a_preempted_group_waits_for_its_keys_turn_and_not_for_what_came_before_it(make: Make) -> None:
    machine = make(max_rows=1)
    for index in range(50):
        add(machine, f"many{index}", "many")
    young = add(machine, "young", "other", tokens=3, at=1.0)
    for _ in range(2):
        machine.step()
    assert machine.scheduler.running == [young]
    machine.scheduler.preempt(young)
    for _ in range(2):
        machine.step()
    assert machine.scheduler.running == [young]
    assert list(machine.ended) == ["many0", "many1"]


def test_a_key_whose_prefix_loads_holds_up_no_other_key(make: Make) -> None:
    machine = make(lengths={A: 4})
    machine.gates[A] = queue.Queue()
    add(machine, "loads", "a", prefix=A)
    for index in range(3):
        add(machine, f"b{index}", "b")
    for _ in range(3):
        machine.step()
    assert list(machine.ended) == ["b0", "b1", "b2"]
    machine.gates[A].put(None)
    machine.run()
    assert machine.ended["loads"] == "finished"


def test_a_key_whose_requests_have_all_ended_begins_anew_behind_the_others(make: Make) -> None:
    """Else a key with one request at a time would be first again each time."""
    machine = make()
    for index in range(4):
        add(machine, f"a{index}", "a")
        add(machine, f"b{index}", "b")
    for index in range(4):
        add(machine, f"drip{index}", "drip", at=1.0)
        while f"drip{index}" not in machine.ended:
            machine.step()
    assert list(machine.ended)[:9] == ["a0", "b0", "drip0", "a1", "b1", "drip1", "a2", "b2", "drip2"]
