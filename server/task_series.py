"""Counters and histograms by task, for Prometheus, with as many series as ``TaskLabels`` has labels.

Owns the numbers, and what becomes of them when a task loses its label: its series end, and what it does from then on
counts as ``(other)``. No series ever falls or leaps. Knows no metric by name.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from server.task_labels import TaskLabels


@dataclass(frozen=True)
class CounterOf:
    """A counter's help text, and the names of its labels beside the task."""

    text: str
    labels: tuple[str, ...] = ()
    values: dict[tuple[str, ...], float] = field(default_factory=dict)  # by the other labels, then the task's


@dataclass(frozen=True)
class HistogramOf:
    """A histogram's help text and buckets."""

    text: str
    bounds: Sequence[float]
    counts: dict[str, list[int]] = field(default_factory=dict)  # of each bucket, the last one without a bound
    sums: dict[str, float] = field(default_factory=dict)


class TaskSeries(Collector):
    """Thread-safe."""

    def __init__(
        self, labels: TaskLabels, counters: Mapping[str, CounterOf], histograms: Mapping[str, HistogramOf]
    ) -> None:
        """The keys are names as Prometheus shows them, a counter's without ``_total``."""
        self._labels, self._counters, self._histograms = labels, counters, histograms
        self._lock = threading.Lock()

    def used(self, task: str | None) -> None:
        """Note a use of ``task``; it may take another's label."""
        with self._lock:
            given = self._labels.used(task)
            if given is not None:
                self._end(given)

    def count(self, name: str, task: str | None, amount: float = 1, *labels: str) -> None:
        """Add to a counter; ``labels`` are the values of its own labels."""
        with self._lock:
            values, key = self._counters[name].values, (*labels, self._labels.label(task))
            values[key] = values.get(key, 0.0) + amount

    def observe(self, name: str, task: str | None, value: float) -> None:
        """Add a value to a histogram."""
        histogram = self._histograms[name]
        with self._lock:
            label = self._labels.label(task)
            counts = histogram.counts.setdefault(label, [0] * (len(histogram.bounds) + 1))
            counts[bisect_left(histogram.bounds, value)] += 1
            histogram.sums[label] = histogram.sums.get(label, 0.0) + value

    def collect(self) -> Iterable[Metric]:
        """See prometheus_client."""
        with self._lock:
            found: list[Metric] = []
            for name, counter in self._counters.items():
                family = CounterMetricFamily(name, counter.text, labels=(*counter.labels, "task"))
                for labels, value in counter.values.items():
                    family.add_metric(labels, value)
                found.append(family)
            for name, histogram in self._histograms.items():
                shown = HistogramMetricFamily(name, histogram.text, labels=("task",))
                for label, counts in histogram.counts.items():
                    shown.add_metric((label,), _cumulated(histogram.bounds, counts), histogram.sums[label])
                found.append(shown)
            return found

    def _end(self, label: str) -> None:
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
