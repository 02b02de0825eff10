"""The counters of tenants: what counts, who is lifted to what, and that they stay bounded."""

from __future__ import annotations

import pytest

from server.engine.scheduling.fairness import KEPT, TokenCounters


def counters(**weights: float) -> TokenCounters:
    return TokenCounters(lambda tenant: weights.get(tenant, 1.0))


def test_an_input_token_counts_once_and_an_output_token_twice_over_the_weight() -> None:
    made = counters(heavy=4.0)
    for tenant in ("heavy", "light"):
        made.lift(tenant, ())
        made.admitted(tenant, 10)
        made.chosen(tenant, 3)
        made.admitted(tenant, 2)
    assert made.of("light") == 10 + 2 * 3 + 2 + made.of("heavy"), "it came when the other one was the last"
    assert made.of("heavy") == 18 / 4


def test_who_begins_to_wait_is_lifted_to_the_least_of_those_that_wait() -> None:
    made = counters()
    for tenant, tokens in (("a", 30), ("b", 20), ("idle", 5)):
        made.admitted(tenant, tokens)
    made.lift("new", ["a", "b"])
    assert made.of("new") == 20, "one that is not held up does not count"
    made.lift("idle", ["a", "b", "new"])
    assert made.of("idle") == 20, "what it did not use is not saved"


def test_who_is_ahead_of_the_others_comes_back_with_all_that_it_had() -> None:
    made = counters()
    made.lift("much", ())
    made.admitted("much", 1000)
    made.admitted("little", 10)
    made.lift("much", ["little"])
    assert made.of("much") == 1000


def test_where_nobody_waits_the_tenant_that_was_admitted_last_is_the_measure() -> None:
    """With all that it was charged since: what it used while nobody waited is held against nobody."""
    made = counters()
    made.lift("first", ())
    made.admitted("first", 7)
    made.admitted("last", 5)
    made.chosen("last", 50)
    made.lift("new", ())
    assert made.of("new") == 105


def test_a_tenant_alone_is_never_lifted_above_itself() -> None:
    made = counters()
    for _ in range(3):
        before = made.of("a")
        made.lift("a", ["a"])
        assert made.of("a") == before
        made.admitted("a", 4)


def test_counters_of_tenants_that_are_gone_stay_bounded() -> None:
    made = counters()
    made.lift("stays", ())
    for index in range(5 * KEPT):
        made.lift(f"t{index}", ["stays"])
        made.admitted(f"t{index}", 1 + index % 7)
        assert len(made) <= KEPT + 3
    made.lift("much", ["stays"])
    made.admitted("much", 10_000)
    made.admitted("stays", 50)
    for index in range(2 * KEPT):
        made.lift(f"u{index}", ["stays"])
    assert made.of("stays") == 50, "who waits keeps its own"
    assert made.of("much") == 10_000, "of those that are gone the least are forgotten first"
    assert made.of("t0") == 50, "and a forgotten one is as one that is new"


@pytest.mark.parametrize("weight", [0.5, 3.0])
def test_a_weight_that_changes_counts_from_then_on(weight: float) -> None:
    weights = {"a": 1.0}
    made = TokenCounters(weights.__getitem__)
    made.admitted("a", 6)
    weights["a"] = weight
    made.admitted("a", 6)
    assert made.of("a") == 6 + 6 / weight
