"""Which limits are counted, and what one use of the service takes from them. Knows no limiter.

A tenant's limit and its key's are two counters: both hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from prefixes.limiter.base import Charge, Window
from prefixes.tenancy.limits import Limits

COUNTED: Final[Mapping[str, tuple[str, Window]]] = {
    "requests_per_minute": ("requests", Window.MINUTE),
    "tokens_per_minute": ("tokens", Window.MINUTE),
    "tokens_per_day": ("tokens", Window.DAY),
    "tokens_per_month": ("tokens", Window.MONTH),
    "training_steps_per_day": ("training_steps", Window.DAY),
}
"""Name of a limit -> its counter and window."""


def charges_for(
    amounts: Mapping[str, int], of_tenant: Limits, key: str | None, of_key: Limits
) -> tuple[Charge, ...]:
    """What a use of these ``amounts`` by counter takes from a tenant, and from one of its keys if there is one."""
    own = _charges(amounts, of_key, key) if key is not None else ()
    return (*_charges(amounts, of_tenant, None), *own)


def name_of(charge: Charge) -> str:
    """The name of the limit that ``charge`` is held against."""
    return next(name for name, counted in COUNTED.items() if counted == (charge.counter, charge.window))


def _charges(amounts: Mapping[str, int], limits: Limits, key: str | None) -> Iterator[Charge]:
    for name, limit in limits.given():
        counter, window = COUNTED.get(name, ("", Window.DAY))
        if counter in amounts:
            yield Charge(counter, window, limit, amounts[counter], key)
