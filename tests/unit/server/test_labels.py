"""Which tasks and tenants have a label in the metrics, whoever came first and however many they are."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, generate_latest

from server.engine.types import FinishReason, Usage
from server.labels import BARE, HALF_LIFE_S, OTHER, REMEMBERED, Labels
from server.metrics import EngineMetrics


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def use(labels: Labels, *tasks: str, times: int = 1) -> None:
    for task in tasks * times:
        labels.used(task)


def test_who_came_first_loses_its_label_to_who_is_used() -> None:
    """The first 100 tasks had the labels for ever."""
    clock = Clock()
    labels = Labels(3, clock)
    use(labels, "acme/a", "acme/b", "acme/c", times=50)
    use(labels, "acme/new", times=5)
    assert labels.label("acme/new") == OTHER
    clock.now += 10 * HALF_LIFE_S
    use(labels, "acme/b", "acme/c", times=5)
    use(labels, "acme/new", times=5)
    assert {task: labels.label(f"acme/{task}") for task in ("a", "b", "c", "new")} == {
        "a": OTHER, "b": "acme/b", "c": "acme/c", "new": "acme/new"
    }  # fmt: skip
    assert labels.label(None) == BARE


def test_one_tenants_many_tasks_do_not_keep_another_without_labels() -> None:
    labels = Labels(6, Clock())
    use(labels, *(f"flood/{n}" for n in range(100)), times=50)
    assert labels.used("acme/e2e") is not None and labels.label("acme/e2e") == "acme/e2e"
    use(labels, "acme/two", "acme/three")
    use(labels, *(f"flood/{n}" for n in range(100)), times=50)
    assert [labels.label(f"acme/{name}") for name in ("e2e", "two", "three")] == ["acme/e2e", "acme/two", "acme/three"]
    assert sum(labels.label(f"flood/{n}") != OTHER for n in range(100)) == 3


def test_a_tenant_that_is_gone_leaves_its_labels_to_who_is_there() -> None:
    clock = Clock()
    labels = Labels(4, clock)
    use(labels, "gone/a", "gone/b", "acme/a", "acme/b", times=30)
    clock.now += 20 * HALF_LIFE_S
    use(labels, "acme/a", "acme/b", "acme/c", "acme/d")
    assert {labels.label(f"acme/{name}") for name in "abcd"} == {f"acme/{name}" for name in "abcd"}


def test_a_walk_through_many_tasks_takes_no_label_from_one_that_is_used() -> None:
    labels = Labels(2, Clock())
    use(labels, "acme/a", "acme/b", times=10)
    given = [labels.used(f"acme/{n}") for n in range(1000)]
    assert given == [None] * 1000
    assert (labels.label("acme/a"), labels.label("acme/b")) == ("acme/a", "acme/b")
    assert len(labels._uses) <= REMEMBERED * 2 + 2


def test_two_tasks_that_are_used_alike_do_not_take_turns() -> None:
    labels = Labels(1, Clock())
    given = [labels.used(f"acme/{n % 2}") for n in range(1000)]
    assert given == [None] * 1000


def test_a_long_idle_time_breaks_nothing() -> None:
    clock = Clock()
    labels = Labels(1, clock)
    use(labels, "acme/a", times=10)
    for _ in range(3):
        clock.now += 10_000 * HALF_LIFE_S
        use(labels, "acme/b", times=3)
        use(labels, "acme/a", times=1)
    assert labels.label("acme/b") == "acme/b"


def test_no_series_falls_or_leaps_and_they_are_bounded_whoever_takes_the_labels() -> None:
    registry, metrics = CollectorRegistry(), EngineMetrics(max_task_labels=4, max_tenant_labels=4)
    metrics.begin(registry)
    before: dict[str, float] = {}
    for turn in range(60):
        requests = [f"acme/{turn // 10}", f"other/{turn // 15}", "acme/once"] * (turn // 10 + 1)
        for task in requests:
            metrics.on_first_token(task, 0.1)
            metrics.on_inter_token(task, 0.1)
            metrics.on_finish(task, "acme", FinishReason.STOP, Usage(1, 1, 1), 0.3)
        lines = generate_latest(registry).decode().splitlines()
        now = {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}
        steps = {name: now[name] - value for name, value in before.items() if name in now}
        assert all(0 <= step <= len(requests) for step in steps.values()), steps
        shown = {name.partition('task="')[2].partition('"')[0] for name in now if 'task="' in name}
        assert len(shown - {OTHER, BARE}) <= 4 + 4, "those that have their labels, and those that just lost them"
        before = now
    assert {"acme/5", "other/3"} <= shown, "those of now"


class Scraper:
    """What Prometheus makes of a counter: it sees values, and adds up by how much each series grew."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self.seen: dict[str, dict[str, float]] = {}
        self.grew: dict[str, float] = {}

    def scrape(self) -> set[str]:
        """Read all series of tenants. Fails if one has fallen. Returns the tenants shown."""
        shown = set()
        for family in self._registry.collect():
            for sample in family.samples if family.name.startswith("prefixd_tenant_") else ():
                key = " ".join(sorted(sample.labels.values()))
                before = self.seen.setdefault(sample.name, {})
                assert sample.value >= before.get(key, 0.0), f"{sample.name} of {key} fell"
                self.grew[sample.name] = self.grew.get(sample.name, 0.0) + sample.value - before.get(key, 0.0)
                before[key] = sample.value
                shown.add(sample.labels["tenant"])
        return shown


def test_ten_thousand_tenants_take_no_label_from_a_heavy_one_that_comes_late_and_no_token_is_lost() -> None:
    """Neither in what is shown nor in what a Prometheus adds up, which saw no series fall."""
    registry, metrics = CollectorRegistry(), EngineMetrics(max_task_labels=1, max_tenant_labels=8)
    metrics.begin(registry)
    scraper, requests = Scraper(registry), 0
    for turn in range(500):
        callers = [f"made-up-{20 * turn + n}" for n in range(20)] + ["heavy"] * (10 if turn >= 250 else 0)
        for caller in callers:
            metrics.on_finish(None, caller, FinishReason.STOP, Usage(3, 5, 7), 0.1)
        requests += len(callers)
        shown = scraper.scrape()
        assert len(shown - {OTHER}) <= 8 + 8, "those that have their labels, and those that just lost them"
    assert "heavy" in shown
    assert scraper.seen["prefixd_tenant_requests_total"]["heavy stop"] >= 10 * 250 - 20
    assert scraper.grew == {
        "prefixd_tenant_requests_total": requests,
        "prefixd_tenant_input_tokens_total": 3 * requests,
        "prefixd_tenant_prefix_tokens_total": 5 * requests,
        "prefixd_tenant_output_tokens_total": 7 * requests,
    }


def test_a_label_that_comes_back_goes_on_where_its_series_ended() -> None:
    """It began at 0 again, and what came between a scrape and the end of its series was never seen."""
    registry, metrics = CollectorRegistry(), EngineMetrics(max_task_labels=1, max_tenant_labels=1)
    metrics.begin(registry)
    scraper = Scraper(registry)
    for turn in range(6):
        for _ in range(4**turn):
            metrics.on_finish(None, ("acme", "globex")[turn % 2], FinishReason.STOP, Usage(1, 0, 0), 0.1)
        scraper.scrape()
    seen = scraper.seen["prefixd_tenant_requests_total"]
    assert min(seen["acme stop"], seen["globex stop"]) > 20, "both had the label in turns"
    assert scraper.grew["prefixd_tenant_requests_total"] == sum(4**turn for turn in range(6))


def test_what_is_kept_of_those_that_lost_their_labels_is_bounded() -> None:
    registry, metrics = CollectorRegistry(), EngineMetrics(max_task_labels=1, max_tenant_labels=2)
    metrics.begin(registry)
    for tenant in range(60):
        for _ in range(8 * (tenant + 1)):
            metrics.on_finish(None, f"t{tenant}", FinishReason.STOP, Usage(1, 0, 0), 0.1)
    series = metrics._by_tenant
    assert len(series._ended) == REMEMBERED * 2
    assert len(series._counters["prefixd_tenant_input_tokens"].values) == REMEMBERED * 2 + 2 + 1
