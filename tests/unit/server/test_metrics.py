"""Engine metrics: names, values, bounded labels."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, generate_latest

from server.engine.observer import EngineObserver
from server.engine.types import EngineStats, FinishReason, Usage
from server.labels import OTHER
from server.metrics import EngineMetrics, EngineStateCollector


def scrape(registry: CollectorRegistry) -> dict[str, float]:
    lines = generate_latest(registry).decode().splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}


def report(observer: EngineObserver, task: str | None) -> None:
    observer.on_step(rows=3, tasks=2, tokens=9, seconds=0.01, forwards={"decoder": 1})
    observer.on_first_token(task, 0.1)
    observer.on_inter_token(task, 0.1)
    observer.on_finish(task, "acme", FinishReason.STOP, Usage(4, 5, 6), 0.3)
    observer.on_finish(task, "acme", None, Usage(1, 0, 0), 0.3)
    observer.on_prefix_load(0.1, 100, True)
    observer.on_prefix_evicted(100)
    observer.on_preemption()


def test_every_report_shows_under_its_name() -> None:
    registry, metrics = CollectorRegistry(), EngineMetrics(max_task_labels=10, max_tenant_labels=10)
    metrics.begin(registry)
    report(metrics, "default/e2e")
    seen = scrape(registry)
    label = '{task="default/e2e"}'
    assert {
        f"prefixd_time_to_first_token_seconds_count{label}": 1,
        f"prefixd_inter_token_latency_seconds_count{label}": 1,
        f"prefixd_e2e_request_latency_seconds_count{label}": 2,
        f"prefixd_prompt_tokens_total{label}": 5,
        f"prefixd_generation_tokens_total{label}": 6,
        'prefixd_request_success_total{finished_reason="stop",task="default/e2e"}': 1,
        f"prefixd_request_failure_total{label}": 1,
        'prefixd_tenant_requests_total{outcome="stop",tenant="acme"}': 1,
        'prefixd_tenant_requests_total{outcome="error",tenant="acme"}': 1,
        'prefixd_tenant_input_tokens_total{tenant="acme"}': 5,
        'prefixd_tenant_prefix_tokens_total{tenant="acme"}': 5,
        'prefixd_tenant_output_tokens_total{tenant="acme"}': 6,
        "prefixd_num_preemptions_total": 1,
        'prefixd_forward_total{stage="decoder"}': 1,
        "prefixd_step_rows_sum": 3,
        "prefixd_step_tasks_sum": 2,
        "prefixd_step_tokens_sum": 9,
        'prefixd_prefix_load_seconds_count{ok="true"}': 1,
        "prefixd_prefix_loaded_bytes_total": 100,
        "prefixd_prefix_evictions_total": 1,
    }.items() <= seen.items()


def test_what_was_reported_before_the_beginning_does_not_count() -> None:
    registry, metrics = CollectorRegistry(), EngineMetrics(max_task_labels=10, max_tenant_labels=10)
    report(metrics, None)
    metrics.begin(registry)
    assert "prefixd_step_rows_count" in scrape(registry)
    assert sum(value for name, value in scrape(registry).items() if "_created" not in name) == 0


def test_task_labels_are_bounded_and_the_rest_is_one() -> None:
    registry, metrics = CollectorRegistry(), EngineMetrics(max_task_labels=2, max_tenant_labels=10)
    metrics.begin(registry)
    for task in (None, "default/a", "default/b", "default/c", "default/d", "default/a"):
        metrics.on_first_token(task, 0.1)
    counts = {name: value for name, value in scrape(registry).items() if name.endswith("}") and "_count" in name}
    assert counts == {
        f'prefixd_time_to_first_token_seconds_count{{task="{task}"}}': count
        for task, count in {"(bare)": 1, "default/a": 2, "default/b": 1, "(other)": 2}.items()
    }


def test_the_engines_state_is_read_when_asked() -> None:
    registry = CollectorRegistry()
    stats = EngineStats(
        1, 2, 0.5, 3, 400, 500, 60, 70, {"acme": 1}, {"acme": 1, "globex": 2, "initech": 3}
    )
    registry.register(
        EngineStateCollector(lambda: stats, lambda: 7.5, lambda tenant: tenant if tenant == "acme" else OTHER)
    )
    assert scrape(registry) == {
        "prefixd_num_requests_running": 1,
        "prefixd_num_requests_waiting": 2,
        "prefixd_kv_cache_usage_perc": 0.5,
        "prefixd_resident_prefixes": 3,
        "prefixd_resident_prefix_bytes": 400,
        "prefixd_staged_prefix_bytes": 60,
        "prefixd_preempted_prefix_bytes": 70,
        "prefixd_step_running_seconds": 7.5,
        'prefixd_tenant_requests_running{tenant="acme"}': 1,
        'prefixd_tenant_requests_waiting{tenant="acme"}': 1,
        'prefixd_tenant_requests_waiting{tenant="(other)"}': 5,
    }
