"""The meter counts every end once, whatever the store does meanwhile, and holds nobody up."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prefixes.errors import EngineFailure, RegistryUnavailable
from prefixes.registry import open_registry
from prefixes.registry.base import Store
from prefixes.usage.model import OTHER, Batch, Counts, Kind, Outcome, Subject, today
from server import metering
from server.engine.types import (
    Failed,
    Finished,
    FinishReason,
    GenerationRequest,
    Output,
    PrefixKey,
    SamplingParams,
    Timing,
    Usage,
)
from server.metering import UsageMeter
from tests.support.usage import kept

VERSION = "sha256:" + "a" * 64


@pytest.fixture
def registry(tmp_path: Path) -> Store:
    return open_registry(f"disk://{tmp_path}/registry")


class Shaky:
    """A store that fails now and then: before it has added a batch, or after, so that nobody knows."""

    def __init__(self, store: Any, noise: random.Random) -> None:
        self._store, self._noise, self.failed = store, noise, {"before": 0, "after": 0}

    def add(self, batch: Batch) -> bool:
        fate = self._noise.random()
        if fate < 0.3:
            self.failed["before"] += 1
            raise RegistryUnavailable("away")
        added = self._store.add(batch)
        if fate < 0.6:
            self.failed["after"] += 1
            raise RegistryUnavailable("did not answer in time")
        return bool(added)


def request(caller: str = "acme", key: str | None = "k", owner: str | None = "acme") -> GenerationRequest:
    prefix = PrefixKey(owner, VERSION) if owner else None
    task = f"{owner}/e2e" if owner else None
    return GenerationRequest("r", caller, (1,), SamplingParams(), prefix, task=task, key=key)


def finished(usage: Usage, reason: FinishReason = FinishReason.STOP) -> Finished:
    return Finished("r", (Output("", (), reason),), usage, Timing(0, None, 0))


def meter_on(store: Any) -> UsageMeter:
    return UsageMeter(store, 3600)


def test_each_end_is_counted_to_its_caller_with_its_outcome(registry: Store) -> None:
    meter = meter_on(registry.usage)
    meter.ended(request(), finished(Usage(3, 5, 7)))
    meter.ended(request(), finished(Usage(30, 50, 70)))
    meter.ended(request(), finished(Usage(1, 0, 2), FinishReason.ABORT))
    meter.ended(request(), Failed("r", EngineFailure("x"), Usage(4, 5, 0)))
    meter.ended(request(), Failed("r", EngineFailure("x")))
    meter.ended(request("default", None, None), finished(Usage(2, 0, 1)))
    assert kept(registry.usage) == {}, "nothing is handed over before its time"
    assert meter._outbox.flush()
    done = Subject(Kind.GENERATION, "acme", "k", "acme/e2e", VERSION, Outcome.FINISHED)
    assert kept(registry.usage) == {
        (today(), done): Counts(2, 33, 55, 77),
        (today(), replace(done, outcome=Outcome.ABORTED)): Counts(1, 1, 0, 2),
        (today(), replace(done, outcome=Outcome.FAILED)): Counts(2, 4, 5, 0),
        (today(), Subject(Kind.GENERATION, "default", None, None, None, Outcome.FINISHED)): Counts(1, 2, 0, 1),
    }


def test_the_owner_of_a_shared_task_sees_its_use_and_not_by_whom(registry: Store) -> None:
    meter = meter_on(registry.usage)
    meter.ended(request("globex", "theirs"), finished(Usage(3, 5, 7)))
    meter.ended(request("hooli", "others"), finished(Usage(1, 5, 1)))
    meter.ended(request("acme", "own"), finished(Usage(9, 9, 9)))
    meter._outbox.flush()
    shared = [row for row in registry.usage.read(today(), today(), "acme") if row.subject.kind is Kind.SHARED]
    assert [row.counts for row in shared] == [Counts(2, 4, 10, 8)]
    assert shared[0].subject == Subject(Kind.SHARED, "acme", None, "acme/e2e", VERSION, Outcome.FINISHED)


@pytest.mark.parametrize("seed", range(5))
def test_sums_are_exact_when_batches_fail_and_nobody_knows_whether_they_were_added(
    registry: Store, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(metering, "BATCH", 3)
    noise = random.Random(seed)
    shaky = Shaky(registry.usage, noise)
    meters, expected = [meter_on(shaky), meter_on(shaky)], dict[str, Counts]()
    for _ in range(400):
        caller, usage = noise.choice("abcdefgh"), Usage(*(noise.randrange(1000) for _ in range(3)))
        noise.choice(meters).ended(request(caller, None, None), finished(usage))
        one = Counts(1, usage.input_tokens, usage.prefix_tokens, usage.output_tokens)
        expected[caller] = expected.get(caller, Counts()) + one
        if noise.random() < 0.1:
            noise.choice(meters)._outbox.flush()
    for meter in meters:
        while not meter._outbox.flush():
            pass
    assert {subject.tenant: counts for (_, subject), counts in kept(registry.usage).items()} == expected
    assert shaky.failed["before"] and shaky.failed["after"]


def test_an_end_waits_for_no_store(registry: Store) -> None:
    """The store hangs; ends go on being counted, and are there once it answers."""
    entered, answer = threading.Event(), threading.Event()

    class Hanging:
        def add(self, batch: Batch) -> bool:
            entered.set()
            assert answer.wait(60)
            return registry.usage.add(batch)

    meter = meter_on(Hanging())
    meter.start()
    meter.ended(request(), finished(Usage(1, 1, 1)))
    meter._outbox.wake()
    assert entered.wait(60)
    for _ in range(100):
        meter.ended(request(), finished(Usage(1, 1, 1)))
    assert kept(registry.usage) == {}
    answer.set()
    assert meter.close()
    assert list(kept(registry.usage).values()) == [Counts(101, 101, 101, 101)]


def test_closing_ends_in_time_where_the_store_does_not_answer(caplog: pytest.LogCaptureFixture) -> None:
    answer = threading.Event()

    class Hanging:
        def add(self, batch: Batch) -> bool:
            answer.wait(60)
            raise RegistryUnavailable("away")

    meter = meter_on(Hanging())
    meter.start()
    meter.ended(request(), finished(Usage(1, 1, 1)))
    assert not meter.close(timeout_s=0.05)
    assert "is lost" in caplog.text
    answer.set()


def test_the_meters_memory_is_bounded_and_no_count_is_lost(registry: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metering, "MAX_HELD", 10)
    meter = meter_on(registry.usage)
    for number in range(1000):
        meter.ended(request(key=f"k{number}"), finished(Usage(1, 0, 0)))
    assert len(meter._sums) == 11
    meter._outbox.flush()
    found = kept(registry.usage)
    assert found[today(), Subject(Kind.GENERATION, "acme", None, OTHER, None, Outcome.FINISHED)].requests == 990
    assert sum(counts.requests for counts in found.values()) == 1000


def test_a_batch_is_of_one_day(registry: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    days: Callable[[], str] = iter(["2999-01-01", "2999-01-02", "2999-01-02"]).__next__
    monkeypatch.setattr(metering, "today", days)
    meter = meter_on(registry.usage)
    for _ in range(3):
        meter.ended(request(), finished(Usage(1, 0, 0)))
    meter._outbox.flush()
    assert {day: counts.requests for (day, _), counts in kept(registry.usage).items()} == {
        "2999-01-01": 1, "2999-01-02": 2
    }  # fmt: skip
