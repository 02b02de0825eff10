"""Which limits are counted, and for whom."""

from __future__ import annotations

from dataclasses import fields

from prefixes.limiter.base import Charge, Window
from prefixes.limiter.charges import COUNTED, charges_for, name_of
from prefixes.tenancy.limits import NO_LIMITS, Limits


def test_a_use_is_charged_to_every_limit_of_the_tenant_and_of_the_key() -> None:
    of_tenant = Limits(requests_per_minute=60, tokens_per_day=1000, max_new_tokens=10, training_steps_per_day=5)
    charges = charges_for({"requests": 1, "tokens": 30}, of_tenant, "k1", Limits(tokens_per_month=500))
    assert set(charges) == {
        Charge("requests", Window.MINUTE, 60, 1),
        Charge("tokens", Window.DAY, 1000, 30),
        Charge("tokens", Window.MONTH, 500, 30, "k1"),
    }
    assert len({charge.field for charge in charges}) == 3
    assert charges_for({"training_steps": 7}, of_tenant, "k1", NO_LIMITS) == (
        Charge("training_steps", Window.DAY, 5, 7),
    )
    assert charges_for({"tokens": 7}, NO_LIMITS, None, NO_LIMITS) == ()


def test_every_limit_of_a_time_is_counted_and_has_a_name() -> None:
    assert set(COUNTED) == {one.name for one in fields(Limits) if "_per_" in one.name}
    for name, (counter, window) in COUNTED.items():
        assert name_of(Charge(counter, window, 1, 1)) == name
