"""FailedTenants: a loop over tenants goes on past those that cannot be read, and remembers them.

Owns when the loop gives up: when the registry itself is away, or when failing tenants have taken too long in all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, Protocol

from prefixes.errors import RegistryUnavailable

PATIENCE_S: Final = 30.0
"""Seconds that failing tenants may take in all: each tenant of a dead node costs another time-out."""


class Checkable(Protocol):
    """A registry that can tell whether it is there at all."""

    def check(self) -> None:
        """As in ``base.Registry``."""


class FailedTenants:
    """``reasons`` says of each failed tenant why it could not be read."""

    def __init__(self, store: Checkable, clock: Callable[[], float] = time.monotonic) -> None:
        self.reasons: dict[str, str] = {}
        self._store, self._clock, self._lost_s = store, clock, 0.0

    @contextmanager
    def skip_failed(self, tenant: str) -> Iterator[None]:
        """Note RegistryUnavailable and go on. Raises it where the loop has to give up."""
        began = self._clock()
        try:
            yield
        except RegistryUnavailable as error:
            self._lost_s += self._clock() - began
            if self._lost_s > PATIENCE_S:
                raise
            self._store.check()
            self.reasons[tenant] = error.message
