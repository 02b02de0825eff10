"""Whose kept content yields: the most for its weight first, and before all that of tenants that are not active."""

from __future__ import annotations

import pytest

from server.engine.memory.shares import ACTIVE_S, Kept, Shares

PROMPTS, PREFIXES = Kept.PROMPTS, Kept.PREFIXES


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def shares(clock: Clock, **weights: float) -> Shares:
    return Shares(lambda tenant: weights.get(tenant, 1.0), clock)


def test_who_keeps_the_most_yields_first_prompts_and_prefixes_together(clock: Clock) -> None:
    made = shares(clock)
    made.used(PREFIXES, "a", 4, 4)
    made.used(PREFIXES, "b", 3, 3)
    made.used(PROMPTS, "b", 2, 2)
    assert made.first_to_yield() == "b"
    made.gone(PROMPTS, "b", 2)
    assert made.first_to_yield() == "a"


def test_what_is_in_use_counts_but_cannot_yield(clock: Clock) -> None:
    made = shares(clock)
    made.used(PREFIXES, "a", 9, 0)
    made.used(PREFIXES, "b", 1, 1)
    assert made.first_to_yield() == "b"
    made.used(PREFIXES, "a", 0, 1)
    assert made.first_to_yield() == "a"
    assert made.in_use(PREFIXES, "a") == 8


def test_a_weight_is_a_right_to_keep_more(clock: Clock) -> None:
    made = shares(clock, a=3.0)
    made.used(PREFIXES, "a", 5, 5)
    made.used(PREFIXES, "b", 2, 2)
    assert made.first_to_yield() == "b"
    made.used(PREFIXES, "a", 2, 2)
    assert made.first_to_yield() == "a"


def test_those_who_are_not_active_yield_before_all_others_the_longest_inactive_first(clock: Clock) -> None:
    made = shares(clock)
    made.used(PREFIXES, "gone", 1, 1)
    made.used(PREFIXES, "longer gone", 1, 1)
    clock.now = 5.0
    made.used(PREFIXES, "gone", 0, 0)
    clock.now += ACTIVE_S
    made.used(PREFIXES, "active", 50, 50)
    assert made.first_to_yield() == "longer gone"
    made.gone(PREFIXES, "longer gone", 1)
    assert made.first_to_yield() == "active", "the other was used just long enough ago"
    clock.now += 1.0
    assert made.first_to_yield() == "gone"
    made.gone(PREFIXES, "gone", 1)
    assert made.first_to_yield() == "active"


def test_to_lose_content_is_no_use_of_it(clock: Clock) -> None:
    made = shares(clock)
    made.used(PREFIXES, "a", 2, 2)
    clock.now = ACTIVE_S + 1
    made.gone(PREFIXES, "a", 1)
    made.used(PREFIXES, "b", 3, 3)
    assert made.first_to_yield() == "a"


def test_room_for_more_is_what_others_keep_above_what_one_would_keep_then(clock: Clock) -> None:
    made = shares(clock, heavy=2.0)
    made.used(PREFIXES, "flood", 4, 1)
    made.used(PREFIXES, "heavy", 12, 12)
    made.used(PREFIXES, "small", 3, 3)
    assert made.yielding_to("flood", 1) == 12 - 2 * 5
    assert made.yielding_to("small", 1) == 12 - 2 * 4
    assert made.yielding_to("new", 2) == 1 + (12 - 2 * 2) + (3 - 2)
    made.used(PROMPTS, "small", 10, 10)
    assert made.yielding_to("flood", 1) == 2 + 8
    assert made.yielding_to("flood", 1, (PREFIXES,)) == 2 + 3
    clock.now = ACTIVE_S + 1
    made.used(PREFIXES, "flood", 0, 0)
    assert made.yielding_to("flood", 1) == 12 + 13, "who is not active gives all"


def test_who_keeps_less_is_outdone_by_those_who_use_what_they_keep_more(clock: Clock) -> None:
    made = shares(clock, heavy=2.0)
    made.used(PREFIXES, "heavy", 8, 0)
    made.used(PREFIXES, "idle", 9, 9)
    assert made.outdone("small", 3)
    assert not made.outdone("small", 4), "by its weight it keeps no more"
    made.used(PREFIXES, "heavy", 0, 8)
    assert not made.outdone("small", 3), "what is idle can yield"


def test_what_is_forgotten_is_kept_by_nobody(clock: Clock) -> None:
    made = shares(clock)
    made.used(PREFIXES, "a", 4, 2)
    made.used(PROMPTS, "a", 3, 3)
    made.used(PROMPTS, "b", 4, 4)
    made.forget(PROMPTS)
    assert made.first_to_yield() == "a"
    assert made.in_use(PREFIXES, "a") == 2
    made.forget(PREFIXES)
    made.used(PROMPTS, "b", 1, 1)
    assert made.first_to_yield() == "b"
