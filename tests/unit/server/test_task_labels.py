"""Which tasks have a label in the metrics, whoever came first and however many they are; by a clock of the test's."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, generate_latest

from server.engine.types import FinishReason, Usage
from server.metrics import EngineMetrics
from server.task_labels import BARE, HALF_LIFE_S, OTHER, REMEMBERED, TaskLabels


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def use(labels: TaskLabels, *tasks: str, times: int = 1) -> None:
    for task in tasks * times:
        labels.used(task)


def test_who_came_first_loses_its_label_to_who_is_used() -> None:
    """The first 100 tasks had the labels for ever."""
    clock = Clock()
    labels = TaskLabels(3, clock)
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
    labels = TaskLabels(6, Clock())
    use(labels, *(f"flood/{n}" for n in range(100)), times=50)
    assert labels.used("acme/e2e") is not None and labels.label("acme/e2e") == "acme/e2e"
    use(labels, "acme/two", "acme/three")
    use(labels, *(f"flood/{n}" for n in range(100)), times=50)
    assert [labels.label(f"acme/{name}") for name in ("e2e", "two", "three")] == ["acme/e2e", "acme/two", "acme/three"]
    assert sum(labels.label(f"flood/{n}") != OTHER for n in range(100)) == 3


def test_a_tenant_that_is_gone_leaves_its_labels_to_who_is_there() -> None:
    clock = Clock()
    labels = TaskLabels(4, clock)
    use(labels, "gone/a", "gone/b", "acme/a", "acme/b", times=30)
    clock.now += 20 * HALF_LIFE_S
    use(labels, "acme/a", "acme/b", "acme/c", "acme/d")
    assert {labels.label(f"acme/{name}") for name in "abcd"} == {f"acme/{name}" for name in "abcd"}


def test_a_walk_through_many_tasks_takes_no_label_from_one_that_is_used() -> None:
    labels = TaskLabels(2, Clock())
    use(labels, "acme/a", "acme/b", times=10)
    given = [labels.used(f"acme/{n}") for n in range(1000)]
    assert given == [None] * 1000
    assert (labels.label("acme/a"), labels.label("acme/b")) == ("acme/a", "acme/b")
    assert len(labels._uses) <= REMEMBERED * 2 + 2


def test_two_tasks_that_are_used_alike_do_not_take_turns() -> None:
    labels = TaskLabels(1, Clock())
    given = [labels.used(f"acme/{n % 2}") for n in range(1000)]
    assert given == [None] * 1000


def test_a_long_idle_time_breaks_nothing() -> None:
    clock = Clock()
    labels = TaskLabels(1, clock)
    use(labels, "acme/a", times=10)
    for _ in range(3):
        clock.now += 10_000 * HALF_LIFE_S
        use(labels, "acme/b", times=3)
        use(labels, "acme/a", times=1)
    assert labels.label("acme/b") == "acme/b"


def test_no_series_falls_or_leaps_and_they_are_bounded_whoever_takes_the_labels() -> None:
    registry, metrics = CollectorRegistry(), EngineMetrics(max_task_labels=4)
    metrics.begin(registry)
    before: dict[str, float] = {}
    for turn in range(60):
        requests = [f"acme/{turn // 10}", f"other/{turn // 15}", "acme/once"] * (turn // 10 + 1)
        for task in requests:
            metrics.on_first_token(task, 0.1)
            metrics.on_inter_token(task, 0.1)
            metrics.on_finish(task, FinishReason.STOP, Usage(1, 1, 1), 0.3)
        lines = generate_latest(registry).decode().splitlines()
        now = {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}
        steps = {name: now[name] - value for name, value in before.items() if name in now}
        assert all(0 <= step <= len(requests) for step in steps.values()), steps
        shown = {name.partition('task="')[2].partition('"')[0] for name in now if 'task="' in name}
        assert len(shown - {OTHER, BARE}) <= 4
        before = now
    assert {"acme/5", "other/3"} <= shown, "those of now"
