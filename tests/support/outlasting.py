"""A registry that is away for longer than keys work, of a service in this process, and who then asks for its metrics.

Owns the keys, the clock and what each key is told. Knows neither server nor trainer, and no test.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import httpx
import pytest

from prefixes.tenancy import keyring
from prefixes.tenancy.directory import Directory, later, utc_now
from prefixes.tenancy.keyring import Keyring
from prefixes.tenancy.secret import new_id, new_secret
from prefixes.tenancy.store import TenancyStore
from server.web import authentication
from tests.support.callers import bearer
from tests.support.clock import Ahead

DAY_S: Final = 86400.0
HOUR_S: Final = 3600.0
TOLD: Final = {
    "metrics": 200, "operator": 200, "other scope": 403, "blocked": 403,
    "revoked": 401, "expired meanwhile": 401, "rotated away": 503, "made-up secret": 503, "unknown": 503, "none": 401,
}  # fmt: skip
"""What ``GET /metrics`` answers while the registry is away, however long, to each kind of key."""


@dataclass
class Outage:
    """The registry in ``folder`` is away from ``begin`` to ``end``, for ``clock``, which tests put forward."""

    folder: Path
    ring: Keyring
    clock: Ahead
    headers: dict[str, dict[str, str]]

    @classmethod
    def of(cls, folder: Path, store: TenancyStore, ring: Keyring, monkeypatch: pytest.MonkeyPatch) -> Self:
        """With keys of every kind, which ``ring`` knows."""
        clock = Ahead()
        for module in (keyring, authentication):
            monkeypatch.setattr(module, "time", clock)
        headers = make_keys(store)
        ring.look()
        monkeypatch.setattr(keyring, "utc_now", lambda: later(utc_now(), HOUR_S))
        return cls(folder, ring, clock, headers)

    def begin(self) -> None:
        """The registry goes, and the service has seen it."""
        self.folder.rename(self.folder.with_name("away"))
        self.ring.look()

    def end(self) -> None:
        """The registry comes back, and the service has seen it."""
        self.folder.with_name("away").rename(self.folder)
        self.ring.look()

    async def metrics(self, admin: httpx.AsyncClient) -> dict[str, int]:
        """What each key is told of ``GET /metrics``."""
        return {
            name: (await admin.get("/metrics", headers=headers)).status_code for name, headers in self.headers.items()
        }


def make_keys(store: TenancyStore) -> dict[str, dict[str, str]]:
    """The header of each kind in ``TOLD``."""
    directory = Directory(store)

    def made(scope: str, tenant: str = "acme", expires_at: str | None = None) -> tuple[str, str]:
        new = directory.create_key(tenant, "x", [scope], actor="t", expires_at=expires_at)
        return new.key.id, new.secret

    secrets: dict[str, tuple[str, str]] = {
        "metrics": made("metrics"), "operator": made("operator"), "other scope": made("generate"),
        "blocked": made("metrics", "initech"), "revoked": made("metrics"), "rotated away": made("metrics"),
        "expired meanwhile": made("metrics", expires_at=later(utc_now(), HOUR_S / 2)),
    }  # fmt: skip
    directory.block("initech", True, actor="t")
    directory.revoke(secrets["revoked"][0], actor="t")
    directory.rotate(secrets["rotated away"][0], grace_s=0, actor="t")
    headers = {name: bearer(secret) for name, (_, secret) in secrets.items()}
    made_up = bearer(new_secret(secrets["metrics"][0]))
    return {**headers, "made-up secret": made_up, "unknown": bearer(new_secret(new_id())), "none": {}}


def check_refused(answer: httpx.Response, words: str) -> None:
    """``answer`` is a 503 that says why and when to come back."""
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "registry_unavailable"), answer.text
    assert words in answer.json()["error"]["message"]
    assert int(answer.headers["retry-after"]) >= 1
