"""The limiter of a registry on disk goes on from the usage that an earlier process has left."""

from __future__ import annotations

from contextlib import closing
from datetime import date, timedelta
from pathlib import Path

import pytest

from prefixes.errors import RegistryUnavailable
from prefixes.limiter.base import Charge, Limiter, Window
from prefixes.registry import open_registry
from prefixes.registry.limiter import open_limiter
from prefixes.usage.model import Batch, Counts, Kind, Outcome, Subject
from prefixes.usage.model import today as today_in_utc
from prefixes.usage.store import UsageStore


def subject(kind: Kind, tenant: str, key: str | None) -> Subject:
    return Subject(kind, tenant, key, "acme/e2e", None, Outcome.FINISHED)


def remaining(limiter: Limiter, tenant: str, counter: str, window: Window, key: str | None = None) -> int:
    """What is left of a thousand, for one that takes nothing."""
    taken = limiter.take(tenant, "", [Charge(counter, window, 1000, 0, key)], 1)
    return taken.states[0].remaining


def test_days_and_months_go_on_where_the_process_before_has_stopped(tmp_path: Path) -> None:
    today = today_in_utc()
    earlier = today[:8] + "01"
    before = (date.fromisoformat(earlier) - timedelta(days=1)).isoformat()
    with closing(open_registry(str(tmp_path), create=True)) as registry:
        one, other = subject(Kind.GENERATION, "acme", "k1"), subject(Kind.GENERATION, "acme", "k2")
        used = Counts(requests=1, input_tokens=10, prefix_tokens=20, output_tokens=30)
        for number, day in enumerate((before, earlier, today), 1):
            mine = {one: used, other: used, subject(Kind.SHARED, "acme", None): used}
            mine[subject(Kind.TRAINING, "acme", "k1")] = Counts(jobs=1, training_steps=7, training_tokens=99)
            assert registry.usage.add(Batch(f"w{number}", 1, day, mine))
        limiter = open_limiter(str(tmp_path), registry.usage, service="server")
    days = 1 if earlier == today else 2  # of this month, on its first day both batches are today's
    of_today = 3 - days
    assert remaining(limiter, "acme", "tokens", Window.MONTH) == 1000 - 2 * 120
    assert remaining(limiter, "acme", "tokens", Window.DAY) == 1000 - of_today * 120
    assert remaining(limiter, "acme", "tokens", Window.DAY, "k1") == 1000 - of_today * 60
    assert remaining(limiter, "acme", "tokens", Window.MONTH, "k2") == 1000 - 2 * 60
    assert remaining(limiter, "acme", "training_steps", Window.DAY) == 1000 - of_today * 7
    assert remaining(limiter, "acme", "tokens", Window.MINUTE) == 1000
    assert remaining(limiter, "globex", "tokens", Window.MONTH) == 1000


def test_usage_that_cannot_be_read_is_told_and_counted_from_zero(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unreadable(self: UsageStore, first: str, last: str, tenant: str | None = None) -> None:
        raise RegistryUnavailable("registry: damaged")

    with closing(open_registry(str(tmp_path), create=True)) as registry:
        monkeypatch.setattr(type(registry.usage), "read", unreadable)
        limiter = open_limiter(str(tmp_path), registry.usage, service="server")
    assert remaining(limiter, "acme", "tokens", Window.MONTH) == 1000
    assert "usage cannot be read" in caplog.text
