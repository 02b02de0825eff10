"""Going on past tenants that cannot be read: one that is damaged keeps no other from being listed or cleaned.

Owns when to give up: where the registry itself is away, and where waiting for tenants of a dead node takes too long.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, Protocol

from prefixes.errors import RegistryUnavailable

PATIENCE_S: Final = 30.0
"""As long is lost on such tenants in all: each tenant of a dead node costs another time-out."""


class Checked(Protocol):
    """What tells a tenant's trouble from everybody's."""

    def check(self) -> None:
        """As in ``base.Registry``."""


class Endurance:
    """``failed`` are the tenants that could not be read, and why."""

    def __init__(self, store: Checked, clock: Callable[[], float] = time.monotonic) -> None:
        self.failed: dict[str, str] = {}
        self._store, self._clock, self._lost_s = store, clock, 0.0

    @contextmanager
    def past(self, tenant: str) -> Iterator[None]:
        """Note RegistryUnavailable and go on, unless it is time to give up."""
        began = self._clock()
        try:
            yield
        except RegistryUnavailable as error:
            self._lost_s += self._clock() - began
            if self._lost_s > PATIENCE_S:
                raise
            self._store.check()
            self.failed[tenant] = error.message
