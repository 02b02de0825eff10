"""A search within a budget: counted by a clock of steps, killed, resumed, and what is said of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from prefixes.artifact import read_prefix
from prefixes.errors import InvalidParameter
from tests.support.prefixes import save_tiny_gpt2
from tests.support.trainer import TEMPLATE, toy_pairs, write_jsonl
from trainer.data.errors import TrainingStopped
from trainer.training import auto
from trainer.training import search as search_plan
from trainer.training.auto import BudgetExhausted
from trainer.training.budget import Auto
from trainer.training.config import TrainConfig
from trainer.training.loop import Progress
from trainer.training.request import RunRequest
from trainer.training.run import RunResult, run_training

FIXED = ("prefix_length", "batch_size", "middle")
BASE = TrainConfig(prefix_length=3, batch_size=4, middle=8, init="random")


class Killed(Exception):
    pass


@dataclass
class Clock:
    """A second for each look: before a step of training or validation, and after one of training."""

    now: float = 0.0
    seen: list[Progress] = field(default_factory=list)
    kill_at: int | None = None

    def __call__(self) -> float:
        self.now += 1
        return self.now

    def report(self, progress: Progress) -> None:
        self.seen.append(progress)
        if self.kill_at == len(self.seen):
            raise Killed


@pytest.fixture
def request_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., RunRequest]:
    monkeypatch.setattr(search_plan, "LEAST_STEPS", 2)  # short trials make short tests
    monkeypatch.setattr(auto, "SELECTION", 20)
    save_tiny_gpt2(tmp_path / "backbone")
    data = write_jsonl(tmp_path / "data.jsonl", toy_pairs(120))

    def made(output: str = "out", minutes: float = 5, fixed: tuple[str, ...] = FIXED, **more: Any) -> RunRequest:
        return RunRequest(
            data, str(tmp_path / "backbone"), TEMPLATE, tmp_path / output, more.pop("config", BASE), hold_out=30,
            auto=Auto(minutes, fixed), **more,
        )  # fmt: skip

    return made


def searched(request: RunRequest, clock: Clock, **more: Any) -> RunResult:
    return run_training(request, clock=clock, report=clock.report, **more)


def test_the_lowest_held_out_loss_of_all_trials_is_the_result_and_the_report_shows_them_all(
    request_of: Callable[..., RunRequest],
) -> None:
    request, clock = request_of(), Clock()
    result = searched(request, clock)
    report = json.loads((request.output / "report.json").read_text())
    search = report["search"]
    tried, rounds = search["trials"], search["rounds"]
    assert len(rounds) > 1 and len(tried) == sum(part["trials"] for part in rounds)
    assert clock.now <= 5 * 60, "never more than the budget"
    losses = {trial["loss"]: trial["choice"] for trial in tried}
    assert report["scores"]["validation_loss_per_token"] == min(losses)
    assert search["chosen"] == losses[min(losses)]
    made = read_prefix(result.artifact).spec.origin["hyperparameters"]
    assert {name: made[name] for name in search["chosen"]} == search["chosen"]
    assert {trial["choice"]["prefix_length"] for trial in tried} == {3}, "what is fixed is not searched"
    assert {trial["choice"]["init"] for trial in tried} == {"examples", "random"}
    for number, part in enumerate(rounds[1:], 2):
        before = sorted(trial["loss"] for trial in tried if trial["round"] == number - 1)
        kept = [t for t in tried if t["round"] == number - 1 and t["loss"] in before[: part["trials"]]]
        now = [trial["choice"] for trial in tried if trial["round"] == number]
        assert sorted(map(str, now)) == sorted(str(trial["choice"]) for trial in kept), "the best go on"
    steps = [progress.step for progress in clock.seen if progress.trial]
    assert steps == sorted(steps) and "round 1 of" in (clock.seen[0].trial or "")
    assert report["tokens"] == sum(trial["tokens"] for trial in tried)
    assert result.record["search"] == search
    assert sorted(path.name for path in request.output.iterdir()) == [
        "config.json", "loss.png", "metrics.jsonl", "prefix.safetensors", "report.json",
    ]  # fmt: skip
    assert searched(request, Clock(), resume=True).version == result.version, "a finished search is read back"


@pytest.mark.parametrize("kill_at", [15, 60])
def test_a_killed_search_goes_on_from_its_trials_and_makes_the_same_choice(
    request_of: Callable[..., RunRequest], kill_at: int
) -> None:
    expected, whole = searched(request_of("whole"), whole_clock := Clock()), whole_clock.seen
    request = request_of("cut")
    with pytest.raises(Killed):
        searched(request, Clock(kill_at=kill_at))
    again = Clock()
    got = searched(request, again, resume=True)
    one, other = expected.record["search"], got.record["search"]
    assert one["rounds"] == other["rounds"]
    assert [(t["choice"], t["loss"]) for t in one["trials"]] == [(t["choice"], t["loss"]) for t in other["trials"]]
    assert got.version == expected.version
    assert 0 < len(again.seen) < len(whole) - kill_at + 30, "what was done is not done again"
    assert other["seconds"] > again.now, "what was spent before the kill counts"


def test_the_budget_ends_a_search_wherever_it_is_with_the_best_so_far(
    request_of: Callable[..., RunRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps turn out slower than those that were timed."""

    class Slowing(Clock):
        def __call__(self) -> float:
            self.now += 3 if len(self.seen) > 30 else 1
            return self.now

    request, clock = request_of(), Slowing()
    result = searched(request, clock)
    assert clock.now <= 5 * 60
    search = result.record["search"]
    assert search["trials"][-1]["ended"] == "budget" and search["seconds"] <= 5 * 60
    told = [trial["loss"] for trial in search["trials"] if trial["loss"] is not None]
    assert result.record["scores"]["validation_loss_per_token"] == min(told)
    assert search["curve"] is None


def test_a_budget_without_time_for_any_trial_is_a_named_error(request_of: Callable[..., RunRequest]) -> None:
    with pytest.raises(BudgetExhausted, match=r"expected time for at least one short trial, got 0\.1"):
        searched(request_of(minutes=0.1), Clock())


def test_a_stop_is_no_end_of_the_budget(request_of: Callable[..., RunRequest]) -> None:
    request, clock = request_of(), Clock()
    with pytest.raises(TrainingStopped):
        searched(request, clock, should_stop=lambda: len(clock.seen) >= 20)
    assert not (request.output / "report.json").exists()
    assert searched(request, Clock(), resume=True).record["search"]["trials"]


def test_trials_take_no_more_steps_than_were_reserved(
    request_of: Callable[..., RunRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer.training import budget

    monkeypatch.setattr(budget, "STEPS_PER_MINUTE", 8)
    clock = Clock()
    searched(request_of(), clock)
    assert clock.seen[-1].step <= 8 * 5 == Auto(5).most_steps


def test_a_trial_that_diverges_is_out_and_the_search_goes_on(
    request_of: Callable[..., RunRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search_plan, "RATES", {"direct": (5e-3, 1e30), "mlp": (1e-3,)})
    made = searched(request_of(), Clock()).record["search"]
    wild = [trial for trial in made["trials"] if trial["choice"]["learning_rate"] == 1e30]
    assert [(trial["ended"], trial["loss"], trial["round"]) for trial in wild] == [("diverged", None, 1)]
    assert made["chosen"]["learning_rate"] < 1


def test_a_learning_curve_is_told_with_its_bounds_or_why_not(
    request_of: Callable[..., RunRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    curve = searched(request_of(), Clock()).record["search"]["curve"]
    assert ("reason" in curve) == (curve["estimate"] is None)
    if curve["estimate"] is not None:
        assert curve["low"] <= curve["estimate"] <= curve["high"] < curve["points"][-1][1]
    monkeypatch.setattr(auto, "LEAST_HELD_OUT", 1000)
    curve = searched(request_of("few"), Clock()).record["search"]["curve"]
    assert curve["estimate"] is None and "1000 held-out" in curve["reason"]


def test_a_search_without_held_out_inputs_is_refused(request_of: Callable[..., RunRequest]) -> None:
    with pytest.raises(InvalidParameter, match="auto: expected held-out inputs"):
        replace(request_of(), hold_out=0)
    with pytest.raises(InvalidParameter, match="patience: expected held-out inputs"):
        replace(request_of(), auto=None, config=replace(BASE, patience=2), hold_out=0)
