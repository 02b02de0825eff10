"""An alias's history is cut without changing where rollbacks go, whatever the moves before were."""

from __future__ import annotations

import random

import pytest

from prefixes.registry import history
from prefixes.registry.base import HistoryEntry
from prefixes.registry.history import effective_versions, rollback_entries, trimmed


@pytest.mark.parametrize("seed", range(20))
def test_a_trimmed_history_rolls_back_as_the_whole_one_does(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "HISTORY_KEPT", 12)
    rng = random.Random(seed)
    whole: tuple[HistoryEntry, ...] = (HistoryEntry("v0", "t0", "publish"),)
    kept = whole
    for step in range(1, 200):
        left = effective_versions(kept)
        if len(left) > 1 and rng.random() < (0.2, 0.5, 0.7)[seed % 3]:
            entry = HistoryEntry(left[-2], f"t{step}", "rollback")
        else:
            version = rng.choice([name for name in ("v0", "v1", "v2", "v3") if name != left[-1]])
            entry = HistoryEntry(version, f"t{step}", "promote")
        whole, kept = (*whole, entry), trimmed((*kept, entry))
        left = effective_versions(kept)
        assert effective_versions(whole)[-len(left) :] == left
        assert len(kept) <= 12
        assert kept[-1] == entry
        if entry.action == "promote":
            assert len(left) > 1


def test_a_rollback_has_an_entry_for_each_version_that_it_passes() -> None:
    pushed = [HistoryEntry(name, "t", "publish") for name in ("a", "b", "c", "d")]
    assert [entry.version for entry in rollback_entries(pushed, {"a", "d"}, "now")] == ["c", "b", "a"]
    moved = [*pushed, *rollback_entries(pushed, {"a", "d"}, "now")]
    assert effective_versions(moved) == ["a"]
    assert rollback_entries(moved, {"a", "d"}, "now") == []
