"""Metrics for Prometheus: the engine's reports and its state, in one registry of our own.

Owns names, labels and buckets. Where vLLM has a name, ours is the same with our prefix. Knows neither HTTP (that is
``http_metrics``) nor where the numbers come from.
"""

from __future__ import annotations

from collections import Counter as TenantCounts
from collections.abc import Callable, Iterable, Mapping
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.engine.types import EngineStats, FinishReason, Usage
from server.labelled_series import CounterOf, HistogramOf, LabelledSeries
from server.labels import Labels

_FIRST_TOKEN: Final = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160,
)
_INTER_TOKEN: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5)
_REQUEST: Final = (0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
_COUNTS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_TOKENS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


class EngineMetrics:
    """Implements ``EngineObserver`` with prometheus-client. Thread-safe.

    So many tasks and tenants have labels of their own, see ``Labels``. So they cannot grow the output without bound.
    """

    def __init__(self, *, max_task_labels: int, max_tenant_labels: int) -> None:
        self._max_task_labels, self._max_tenant_labels = max_task_labels, max_tenant_labels
        self._create(None)

    def begin(self, registry: CollectorRegistry) -> None:
        """Count from zero again and show the counts in ``registry``. The reports so far were the warm-up."""
        self._create(registry)

    def _create(self, registry: CollectorRegistry | None) -> None:
        self._by_task = LabelledSeries(
            "task",
            Labels(self._max_task_labels),
            {
                "prefixd_prompt_tokens": CounterOf("Input tokens of ended requests, prefixes apart."),
                "prefixd_generation_tokens": CounterOf("Output tokens of ended requests."),
                "prefixd_request_success": CounterOf(
                    "Requests that ended otherwise than by an error.", ("finished_reason",)
                ),
                "prefixd_request_failure": CounterOf("Admitted requests that ended in an error."),
            },
            {
                "prefixd_time_to_first_token_seconds": HistogramOf("From submission to the first token.", _FIRST_TOKEN),
                "prefixd_inter_token_latency_seconds": HistogramOf("Between two tokens of an output.", _INTER_TOKEN),
                "prefixd_e2e_request_latency_seconds": HistogramOf("From submission to the end.", _REQUEST),
            },
        )
        self._by_tenant = LabelledSeries(
            "tenant",
            Labels(self._max_tenant_labels),
            {
                "prefixd_tenant_requests": CounterOf("Ended requests, by who asked.", ("outcome",)),
                "prefixd_tenant_input_tokens": CounterOf("Input tokens of ended requests, by who asked."),
                "prefixd_tenant_prefix_tokens": CounterOf("Positions of their prefixes, by who asked."),
                "prefixd_tenant_output_tokens": CounterOf("Output tokens of ended requests, by who asked."),
            },
            {},
        )
        if registry is not None:
            registry.register(self._by_task)
            registry.register(self._by_tenant)
        self._preemptions = Counter(
            "prefixd_num_preemptions_total", "Running requests that gave up their memory for a while.",
            registry=registry,
        )
        self._forwards = Counter(
            "prefixd_forward_total", "Calls of the model, by stage.", ("stage",), registry=registry
        )
        self._step_seconds = Histogram(
            "prefixd_step_seconds", "Time of a step.", buckets=_INTER_TOKEN, registry=registry
        )
        self._step_rows = Histogram("prefixd_step_rows", "Rows in a step.", buckets=_COUNTS, registry=registry)
        self._step_tasks = Histogram(
            "prefixd_step_tasks", "Distinct tasks in a step; the bare backbone is one.", buckets=_COUNTS,
            registry=registry,
        )
        self._step_tokens = Histogram("prefixd_step_tokens", "Tokens in a step.", buckets=_TOKENS, registry=registry)
        self._loads = Histogram(
            "prefixd_prefix_load_seconds", "Fetching and verifying a prefix.", ("ok",),
            buckets=_FIRST_TOKEN, registry=registry,
        )
        self._loaded_bytes = Counter(
            "prefixd_prefix_loaded_bytes_total", "Bytes of prefixes loaded.", registry=registry
        )
        self._evictions = Counter(
            "prefixd_prefix_evictions_total", "Idle prefixes that gave up their memory.", registry=registry
        )

    def on_step(self, rows: int, tasks: int, tokens: int, seconds: float, forwards: Mapping[str, int]) -> None:
        """See EngineObserver."""
        self._step_seconds.observe(seconds)
        self._step_rows.observe(rows)
        self._step_tasks.observe(tasks)
        self._step_tokens.observe(tokens)
        for stage, calls in forwards.items():
            self._forwards.labels(stage).inc(calls)

    def on_first_token(self, task: str | None, seconds: float) -> None:
        """See EngineObserver."""
        self._by_task.observe("prefixd_time_to_first_token_seconds", task, seconds)

    def on_inter_token(self, task: str | None, seconds: float) -> None:
        """See EngineObserver."""
        self._by_task.observe("prefixd_inter_token_latency_seconds", task, seconds)

    def on_finish(
        self, task: str | None, caller: str, reason: FinishReason | None, usage: Usage, seconds: float
    ) -> None:
        """See EngineObserver."""
        self._count_tenant(caller, "error" if reason is None else reason.value, usage)
        self._by_task.used(task)
        self._by_task.observe("prefixd_e2e_request_latency_seconds", task, seconds)
        self._by_task.count("prefixd_prompt_tokens", task, usage.input_tokens)
        self._by_task.count("prefixd_generation_tokens", task, usage.output_tokens)
        if reason is None:
            self._by_task.count("prefixd_request_failure", task)
        else:
            self._by_task.count("prefixd_request_success", task, 1, reason.value)

    def _count_tenant(self, tenant: str, outcome: str, usage: Usage) -> None:
        self._by_tenant.used(tenant)
        self._by_tenant.count("prefixd_tenant_requests", tenant, 1, outcome)
        self._by_tenant.count("prefixd_tenant_input_tokens", tenant, usage.input_tokens)
        self._by_tenant.count("prefixd_tenant_prefix_tokens", tenant, usage.prefix_tokens)
        self._by_tenant.count("prefixd_tenant_output_tokens", tenant, usage.output_tokens)

    def tenant_label(self, tenant: str) -> str:
        """The label under which the tenant counts now."""
        return self._by_tenant.label(tenant)

    def on_prefix_load(self, seconds: float, nbytes: int, ok: bool) -> None:
        """See EngineObserver."""
        self._loads.labels(str(ok).lower()).observe(seconds)
        self._loaded_bytes.inc(nbytes)

    def on_prefix_evicted(self, nbytes: int) -> None:
        """See EngineObserver."""
        self._evictions.inc()

    def on_preemption(self) -> None:
        """See EngineObserver."""
        self._preemptions.inc()


class EngineStateCollector(Collector):
    """Gauges of the engine's state, read when Prometheus asks. ``tenant_label`` is a tenant's name in them."""

    def __init__(
        self, stats: Callable[[], EngineStats], step_running_s: Callable[[], float], tenant_label: Callable[[str], str]
    ) -> None:
        self._stats, self._step_running_s, self._tenant_label = stats, step_running_s, tenant_label

    def describe(self) -> Iterable[Metric]:
        """Nothing in advance: there may be no engine yet."""
        return []

    def collect(self) -> Iterable[Metric]:
        """One gauge per number of ``EngineStats``, those of tenants by their labels, and one for the step under way."""
        stats = self._stats()
        for name, text, value in (
            ("num_requests_running", "Requests that run.", stats.running),
            ("num_requests_waiting", "Requests that wait for memory, rows or their prefix.", stats.waiting),
            ("kv_cache_usage_perc", "Part of the memory pool in use, 1 is all.", stats.kv_usage),
            ("resident_prefixes", "Prefixes in memory.", stats.resident_prefixes),
            ("resident_prefix_bytes", "Their bytes.", stats.resident_prefix_bytes),
            ("staged_prefix_bytes", "Bytes of loaded prefixes that wait for room.", stats.staged_prefix_bytes),
            (
                "preempted_prefix_bytes", "Bytes of preempted requests' prefixes, out of the pool.",
                stats.preempted_prefix_bytes,
            ),
            ("step_running_seconds", "How long the step under way has run; 0 if none.", self._step_running_s()),
        ):
            yield GaugeMetricFamily(f"prefixd_{name}", text, value=value)
        for name, text, by_caller in (
            ("requests_running", "Requests that run, by who asked.", stats.running_by_caller),
            ("requests_waiting", "Requests that wait, by who asked.", stats.waiting_by_caller),
        ):
            by_label = TenantCounts[str]()
            for caller, number in by_caller.items():
                by_label[self._tenant_label(caller)] += number
            family = GaugeMetricFamily(f"prefixd_tenant_{name}", text, labels=("tenant",))
            for label, number in by_label.items():
                family.add_metric((label,), number)
            yield family
