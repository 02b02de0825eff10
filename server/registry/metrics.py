"""The registry's metrics: whether it answers and takes what is counted, and how long its calls take.

Owns names and labels. Operations are the registry's methods, a closed set. Knows neither the registry nor HTTP.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.registry.link import LinkState

_SECONDS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


class RegistryMetrics:
    """Implements ``LinkObserver``. Thread-safe."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._seconds = Histogram(
            "prefixd_registry_operation_seconds", "Calls of the registry, by operation, those that failed among them.",
            ("operation",), buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self._errors = Counter(
            "prefixd_registry_errors_total", "Calls that the registry could not do; its noes are none.",
            ("operation",), registry=registry,
        )  # fmt: skip
        for operation in ("publish", "promote", "rollback", "delete", "delete_version", "undelete", "gc"):
            self._errors.labels(operation)  # starts at 0: an alert counts these one by one and must see the first

    def on_registry_call(self, operation: str, seconds: float, failed: bool) -> None:
        """See LinkObserver."""
        self._seconds.labels(operation).observe(seconds)
        errors = self._errors.labels(operation)  # shows a 0 before the first error
        if failed:
            errors.inc()


class LinkCollector(Collector):
    """Gauges of the link's state, and of usage and limits beside it, read when Prometheus asks."""

    def __init__(
        self, state: Callable[[], LinkState], usage_recorded: Callable[[], bool], limits_shared: Callable[[], bool]
    ) -> None:
        self._state, self._usage_recorded, self._limits_shared = state, usage_recorded, limits_shared

    def describe(self) -> Iterable[Metric]:
        """Nothing in advance."""
        return []

    def collect(self) -> Iterable[Metric]:
        """One gauge per fact."""
        state = self._state()
        for name, text, value in (
            ("up", "1 while the registry answers as itself.", state.up),
            ("age_seconds", "Since it last did; known tasks are served up to max_stale_s.", state.age_s),
            ("wrong_id", "1 while what answers is another registry, or an emptied one.", state.wrong),
            ("subscribed", "1 while it announces its changes; else they are polled.", state.subscribed),
            ("usage_recorded", "0 from when usage could not be recorded until it is.", self._usage_recorded()),
            ("limits_shared", "0 while each replica allows its part of the limits.", self._limits_shared()),
        ):
            yield GaugeMetricFamily(f"prefixd_registry_{name}", text, value=value)
