"""Metrics of the tiers: where prefixes are, and which tier answered loads. Owns names and labels; knows no cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.engine.types import EngineStats
from server.tiers.tiers import TiersStats, TierStats

DEVICE: Final = "device"


class TierCollector(Collector):
    """Prefixes by tier, from the engine's pool to the disk, read when Prometheus asks."""

    def __init__(self, tiers: Callable[[], TiersStats], engine: Callable[[], EngineStats]) -> None:
        self._tiers, self._engine = tiers, engine

    def describe(self) -> Iterable[Metric]:
        """Nothing in advance."""
        return []

    def collect(self) -> Iterable[Metric]:
        """Gauges per tier, then counters."""
        stats, engine = self._tiers(), self._engine()
        device = TierStats(
            DEVICE, engine.resident_prefixes, engine.resident_prefix_bytes, engine.resident_prefix_limit_bytes
        )
        size = GaugeMetricFamily("prefixd_prefix_tier_bytes", "Bytes of prefixes, by tier.", labels=["tier"])
        limit = GaugeMetricFamily("prefixd_prefix_tier_limit_bytes", "What they stay within.", labels=["tier"])
        entries = GaugeMetricFamily("prefixd_prefix_tier_entries", "Prefixes, by tier.", labels=["tier"])
        for tier in (device, *stats.tiers):
            size.add_metric([tier.tier], tier.nbytes)
            limit.add_metric([tier.tier], tier.limit_bytes)
            entries.add_metric([tier.tier], tier.entries)
        yield from (size, limit, entries)
        for name, text, counts in (
            ("reads", "Loads of a prefix, by the tier that answered.", stats.reads),
            ("tier_damaged", "Kept copies that were not what was published, and were thrown away.", stats.damaged),
            ("tier_failures", "Reads and writes that a tier could not do.", stats.failures),
        ):
            counter = CounterMetricFamily(f"prefixd_prefix_{name}", text, labels=["tier"])
            for label, count in counts.items():
                counter.add_metric([label], count)
            yield counter
