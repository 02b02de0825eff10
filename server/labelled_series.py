"""Counters and histograms by task or by tenant, for Prometheus, with as many series as ``Labels`` has labels.

Owns the numbers, and what becomes of them when a name loses its label: its series are shown once more, so that what
they counted last is seen, and end. What it does from then on counts as ``(other)``. If it gets its label back its
series go on where they ended. So no series ever falls or leaps. Knows no metric by name.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from server.labels import REMEMBERED, Labels


@dataclass(frozen=True)
class CounterOf:
    """A counter's help text, and the names of its labels beside the chosen one."""

    text: str
    labels: tuple[str, ...] = ()
    values: dict[tuple[str, ...], float] = field(default_factory=dict)  # by the other labels, then the chosen one


@dataclass(frozen=True)
class HistogramOf:
    """A histogram's help text and buckets."""

    text: str
    bounds: Sequence[float]
    counts: dict[str, list[int]] = field(default_factory=dict)  # of each bucket, the last one without a bound
    sums: dict[str, float] = field(default_factory=dict)


class LabelledSeries(Collector):
    """Thread-safe."""

    def __init__(
        self, by: str, labels: Labels, counters: Mapping[str, CounterOf], histograms: Mapping[str, HistogramOf]
    ) -> None:
        """``by`` is the label's name; the keys are names as Prometheus shows them, a counter's without ``_total``."""
        self._by, self._labels, self._counters, self._histograms = by, labels, counters, histograms
        self._lock = threading.Lock()
        self._ended: dict[str, bool] = {}  # labels that have lost their place, and whether they were shown since

    def used(self, name: str | None) -> None:
        """Note a use of ``name``; it may take another's label."""
        with self._lock:
            given = self._labels.used(name)
            self._label(name)
            if given is not None:
                self._ended[given] = False
                if len(self._ended) > REMEMBERED * self._labels.most:
                    self._forget(next(iter(self._ended)))

    def label(self, name: str) -> str:
        """The label under which ``name`` counts now."""
        with self._lock:
            return self._label(name)

    def count(self, metric: str, name: str | None, amount: float = 1, *labels: str) -> None:
        """Add to a counter; ``labels`` are the values of its own labels."""
        with self._lock:
            values, key = self._counters[metric].values, (*labels, self._label(name))
            values[key] = values.get(key, 0.0) + amount

    def observe(self, metric: str, name: str | None, value: float) -> None:
        """Add a value to a histogram."""
        histogram = self._histograms[metric]
        with self._lock:
            label = self._label(name)
            counts = histogram.counts.setdefault(label, [0] * (len(histogram.bounds) + 1))
            counts[bisect_left(histogram.bounds, value)] += 1
            histogram.sums[label] = histogram.sums.get(label, 0.0) + value

    def collect(self) -> Iterable[Metric]:
        """See prometheus_client."""
        with self._lock:
            found: list[Metric] = []
            for metric, counter in self._counters.items():
                family = CounterMetricFamily(metric, counter.text, labels=(*counter.labels, self._by))
                for labels, value in counter.values.items():
                    if not self._ended.get(labels[-1]):
                        family.add_metric(labels, value)
                found.append(family)
            for metric, histogram in self._histograms.items():
                shown = HistogramMetricFamily(metric, histogram.text, labels=(self._by,))
                for label, counts in histogram.counts.items():
                    if not self._ended.get(label):
                        shown.add_metric((label,), _cumulated(histogram.bounds, counts), histogram.sums[label])
                found.append(shown)
            self._ended = dict.fromkeys(self._ended, True)
            return found

    def _label(self, name: str | None) -> str:
        label = self._labels.label(name)
        self._ended.pop(label, None)
        return label

    def _forget(self, label: str) -> None:
        del self._ended[label]
        for counter in self._counters.values():
            for key in [key for key in counter.values if key[-1] == label]:
                del counter.values[key]
        for histogram in self._histograms.values():
            histogram.counts.pop(label, None)
            histogram.sums.pop(label, None)


def _cumulated(bounds: Sequence[float], counts: list[int]) -> list[tuple[str, float]]:
    names, total, buckets = [*map(floatToGoString, bounds), "+Inf"], 0, list[tuple[str, float]]()
    for name, count in zip(names, counts, strict=True):
        total += count
        buckets.append((name, total))
    return buckets
