"""Keyring: what a running service knows of tenants and keys, all of it in memory, and how old that is.

Owns the thread that looks for changes, and the answer to "whose secret is this". A secret costs no look-up in the
registry: a key that the document does not have is unknown. Only one that may be too new for it makes the service look
again, once for all who wait. While the registry is away, what is known goes on for ``max_stale_s``. Knows no request.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass, replace
from typing import Final

from prefixes.errors import PrefixdError, RegistryUnavailable
from prefixes.tenancy.directory import utc_now
from prefixes.tenancy.limits import NO_LIMITS, Limits, effective
from prefixes.tenancy.model import Key, Tenancy
from prefixes.tenancy.records import tenancy_from_json
from prefixes.tenancy.secret import Presented
from prefixes.tenancy.store import Stored, TenancyStore

LOOK_S: Final = 0.5
"""Between two looks: a revoked key is refused by then."""
FRESH_S: Final = 3.0
"""What is older than this no longer says that a key is unknown."""
NOTE_S: Final = 30.0
"""Between two notes of when keys were used."""

_log = logging.getLogger("prefixd.keys")


@dataclass(frozen=True)
class Known:
    """What was in the registry when it was last asked; ``at`` is time.monotonic() of the question.

    ``closed`` says whether a key is needed. Once it is, it stays so: an older copy of the registry opens no service.
    """

    stored: Stored
    tenancy: Tenancy
    at: float
    closed: bool


class Keyring:
    """The keys of one registry. Thread-safe. The first look is made at once and raises what goes wrong."""

    def __init__(self, store: TenancyStore, max_stale_s: float) -> None:
        self._store, self._max_stale_s = store, max_stale_s
        self._looking = threading.Lock()
        self._asked_at = 0.0
        self._known = self._look(None)
        self._error: PrefixdError | None = None
        self._used: dict[str, str] = {}
        self._noted_at = time.monotonic()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Look again and again from now on."""
        self._thread = threading.Thread(target=self._run, name="keyring", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop looking, and note what was used."""
        self._closing.set()
        if self._thread:
            self._thread.join(timeout=FRESH_S)
        self._note_used()

    @property
    def known(self) -> Known:
        """What is known now. Raises RegistryUnavailable where that is too old to go by."""
        known = self._known
        if not self.fresh and self.age_s > self._max_stale_s:
            raise RegistryUnavailable(
                f"keys cannot be checked: the registry has been away for more than {self._max_stale_s:g} s"
            )
        return known

    @property
    def last_known(self) -> Known:
        """What was in the registry when it last answered, however long ago."""
        return self._known

    def check(self) -> None:
        """Raise RegistryUnavailable where keys are needed and what is known is too old to judge one."""
        if self.closed:
            _ = self.known

    @property
    def closed(self) -> bool:
        """Whether a key is needed, as far as is known: an open registry stays open while it is away."""
        return self._known.closed

    def weight_of(self, tenant: str) -> float:
        """The tenant's weight, 1 for one that nobody made. Any thread may ask."""
        found = self._known.tenancy.tenants.get(tenant)
        return found.weight if found is not None else 1.0

    def limits_of(self, tenant: str, key_id: str | None = None) -> Limits:
        """Those of the tenant, defaults included, or those of one of its keys; none while nobody needs a key.

        Any thread may ask.
        """
        if not self._known.closed:
            return NO_LIMITS
        tenancy = self._known.tenancy
        if key_id is not None:
            return tenancy.keys[key_id].limits if key_id in tenancy.keys else NO_LIMITS
        return effective(tenancy.tenants[tenant].limits if tenant in tenancy.tenants else NO_LIMITS)

    def both_limits_of(self, tenant: str, key_id: str) -> tuple[Limits, Limits]:
        """Those of the tenant, defaults included, and those of its key: both hold."""
        return self.limits_of(tenant), self.limits_of(tenant, key_id)

    def registry_quota(self, tenant: str, key_id: str | None) -> Limits | None:
        """What the tenant may have in the registry for the key to add to it; None where nobody needs a key."""
        if key_id is None:
            return None
        of_tenant, of_key = self.both_limits_of(tenant, key_id)
        return of_key.within(of_tenant)

    @property
    def asked_at(self) -> float:
        """When the registry was last asked, in time.monotonic() seconds, whatever it answered."""
        return self._asked_at

    def ended(self, presented: Presented) -> bool:
        """Whether the key is known as one that is revoked or has expired."""
        key = self._known.tenancy.keys.get(presented.key_id)
        return key is not None and not key.works(utc_now())

    def holder(self, presented: Presented) -> Key | None:
        """The key whose secret this is, whether it still works or not, as far as is known here. For logs alone."""
        key = self._known.tenancy.keys.get(presented.key_id)
        return key if key is not None and key.has(presented.digest) else None

    @property
    def age_s(self) -> float:
        """Seconds since the registry was last asked with success."""
        return time.monotonic() - self._known.at

    @property
    def fresh(self) -> bool:
        """Whether a key that is not known does not exist, as far as one can say."""
        return self._error is None and self.age_s < FRESH_S

    def find(self, presented: Presented, known: Known | None = None) -> Key | None:
        """The working key behind a secret, None where there is none: by ``known``, else by what is known now.

        Without ``known`` raises RegistryUnavailable as ``self.known`` does.
        """
        key, at = (known or self.known).tenancy.keys.get(presented.key_id), utc_now()
        if key is None or not key.accepts(presented.digest, at):
            return None
        self._used[key.id] = at[:17] + "00.000Z"  # to the minute
        return key

    def look(self) -> None:
        """Ask the registry. Raises nothing."""
        with self._looking:
            try:
                self._known, self._error = self._look(self._known), None
            except PrefixdError as error:
                self._told(error)
            except Exception as error:  # on any error the service goes on with what it knows
                _log.exception("looking for changed keys failed")
                self._told(RegistryUnavailable(f"registry: {type(error).__name__}"))

    def _look(self, known: Known | None) -> Known:
        at = self._asked_at = time.monotonic()
        stored = self._store.read(known.stored if known else None)
        if known and stored is known.stored:
            return replace(known, at=at)
        tenancy = tenancy_from_json(stored.data)
        closed = stored.closed or bool(tenancy.keys) or (known is not None and known.closed)
        return Known(stored, tenancy, at, closed)

    def _told(self, error: PrefixdError) -> None:
        if self._error is None:
            _log.warning("keys cannot be looked up", extra={"facts": {"reason": error.message}})
        self._error = error

    def _run(self) -> None:
        while not self._closing.wait(LOOK_S):
            self.look()
            if time.monotonic() - self._noted_at > NOTE_S:
                self._note_used()

    def _note_used(self) -> None:
        used, self._used, self._noted_at = self._used, {}, time.monotonic()
        try:
            if used:
                self._store.note_used(dict(used))  # ``find`` may still write into it
            return
        except PrefixdError as error:
            _log.warning("when keys were used was not noted", extra={"facts": {"reason": error.message}})
        except Exception:  # the thread goes on looking: it is what ends keys
            _log.exception("noting when keys were used failed")
        for key_id, at in dict(used).items():
            self._used.setdefault(key_id, at)  # for the next note
