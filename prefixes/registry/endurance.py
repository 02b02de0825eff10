"""Going on past tenants that cannot be read: one that is damaged keeps no other from being listed or cleaned.

Owns when to give up: where the registry itself is away, and where waiting for tenants of a dead node takes too long.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, Protocol

from prefixes.errors import RegistryUnavailable

SLOW_S: Final = 0.5
SLOW_ONES: Final = 3
"""As many errors that came after a wait are endured; each further tenant of a dead node would cost another time-out."""


class Checked(Protocol):
    """What tells a tenant's trouble from everybody's."""

    def check(self) -> None:
        """As in ``base.Registry``."""


class Endurance:
    """``failed`` are the tenants that could not be read, and why."""

    def __init__(self, store: Checked) -> None:
        self.failed: dict[str, str] = {}
        self._store, self._slow = store, 0

    @contextmanager
    def past(self, tenant: str) -> Iterator[None]:
        """Note RegistryUnavailable and go on, unless it is time to give up."""
        began = time.monotonic()
        try:
            yield
        except RegistryUnavailable as error:
            self._slow += time.monotonic() - began >= SLOW_S
            if self._slow > SLOW_ONES:
                raise
            self._store.check()
            self.failed[tenant] = error.message
