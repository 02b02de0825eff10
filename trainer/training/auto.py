"""The search for length, start and learning rate within a budget of time: runs the trials that ``search`` plans.

Each trial is a run of its own with a checkpoint; the ledger says which have ended. A search that was killed goes on
from both. The deadline is checked before every step. The result is the trial with the lowest loss on the held-out
inputs that were drawn for choosing. Owns the trials; knows no report.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from prefixes.errors import PrefixdError
from trainer.data.errors import TrainingStopped
from trainer.data.sequences import TokenExample
from trainer.training.budget import Auto, Budget
from trainer.training.config import TrainConfig
from trainer.training.curve import LEAST_EXAMPLES, LEAST_HELD_OUT, doubled, unsaid
from trainer.training.ledger import Ledger, Trial
from trainer.training.loop import Progress, Trainer, TrainingDiverged
from trainer.training.material import Material
from trainer.training.search import Choice, Cost, candidates, plan_rounds, survivors

LEDGER: Final = "auto.json"
TRIALS: Final = "trials"
SELECTION: Final = 100  # held-out examples that trials are compared on, at most
PROBE: Final = 4  # steps that are timed
PATIENCE: Final = 3  # of the last trial's validations
CHECKPOINTS: Final = 8  # of a trial
NOTE_S: Final = 5.0  # between two notes of the time spent


class BudgetExhausted(PrefixdError):
    """The budget ended before any trial had a result."""

    code = "budget_exhausted"


class Search:
    """One search. ``run`` goes to its end, from the ledger if there is one."""

    def __init__(
        self,
        material: Material,
        auto: Auto,
        budget: Budget,
        report: Callable[[Progress], None],
        should_stop: Callable[[], bool],
    ) -> None:
        """``budget`` began with the run."""
        self._material, self._auto, self._budget = material, auto, budget
        self._report, self._should_stop = report, should_stop
        self._folder, self._config = material.request.output, material.request.config
        fixed = auto.fixed if material.request.initial is None else (*auto.fixed, "init")
        self._choices = candidates(self._config, fixed, material.lengths)
        self._stopped = False
        self.ledger = Ledger.open(self._folder / LEDGER, material.identity)
        self._budget.before = self.ledger.seconds
        self._train, held_out = material.train.examples, material.validation.examples
        drawn = random.Random(f"{self._config.seed}/selection")
        self.selection = drawn.sample(held_out, min(SELECTION, len(held_out)))

    def run(self) -> Trainer:
        """Search, and return the best trial's run, which has ended. Raises BudgetExhausted, TrainingStopped."""
        (self._folder / TRIALS).mkdir(exist_ok=True)
        try:
            self._search()
        except TrainingStopped:
            self.ledger.write(self._budget.spent)
            if self._stopped:
                raise
        best = self.ledger.best
        if best is None:
            raise BudgetExhausted(
                f"budget_minutes: expected time for at least one short trial, got {self._auto.budget_minutes} "
                f"({self._budget.spent:.0f} s were spent); a smaller model, shorter inputs or more minutes",
                got=self._auto.budget_minutes,
            )
        trainer = self._trial(best.round, best.choice)
        trainer.restore()
        return trainer

    def summary(self) -> dict[str, Any]:
        """What was tried, for the report. JSON values."""
        best = self.ledger.best
        return {
            "budget_minutes": self._auto.budget_minutes,
            "selection_examples": len(self.selection),
            "chosen": None if best is None else best.choice.as_dict(),
            **self.ledger.as_dict(),
        }

    def _search(self) -> None:
        ledger = self.ledger
        if any(trial.ended == "budget" for trial in ledger.trials):
            return
        if ledger.cost is None:
            ledger.cost = self._probe(max(self._choices, key=lambda choice: choice.prefix_length))
            left = self._budget.seconds - self._budget.spent
            ledger.rounds = plan_rounds(left, ledger.cost, len(self._choices), self._auto.most_steps)
            ledger.write(self._budget.spent)
        standing = self._choices
        for number, part in enumerate(ledger.rounds, 1):
            standing = standing[: part.trials]
            for index, choice in enumerate(standing):
                if index >= len(ledger.of_round(number)):
                    self._run_trial(number, index, choice)
            losses = [trial.loss for trial in ledger.of_round(number)]
            standing = [standing[index] for index in survivors(losses, len(standing))]
            if not standing and ledger.best is None:
                raise TrainingDiverged("expected a finite loss of some trial, got none; try a lower learning rate")
        if ledger.curve is None:
            ledger.curve = self._curve()
            ledger.write(self._budget.spent)

    def _trial(self, number: int, choice: Choice) -> Trainer:
        part = self.ledger.rounds[number - 1]
        return self._trainer(choice, part.steps, part.checks, self._train, self._path(number, choice))

    def _run_trial(self, number: int, index: int, choice: Choice) -> None:
        """Run what is left of a trial. Raises TrainingStopped also at the end of the budget, once that is noted."""
        trainer, of = self._trial(number, choice), self.ledger.rounds[number - 1].trials
        name = (
            f"round {number} of {len(self.ledger.rounds)}, trial {index + 1} of {of}: length {choice.prefix_length}, "
            f"{choice.init if self._material.request.initial is None else 'given start'}, {choice.method}, "
            f"rate {choice.learning_rate:g}"
        )
        ended = "done"
        try:
            self._budget.begin_trial()
            trainer.run(self._watch(name), self._is_over)
            ended = "done" if trainer.state.step >= trainer.total else "early"
        except TrainingDiverged:
            ended = "diverged"
        except TrainingStopped:
            if self._stopped:
                raise
            ended = "budget"
        state = trainer.state
        loss = None if ended == "diverged" else state.best_loss
        self.ledger.trials.append(
            Trial(number, choice, trainer.total, state.step, loss, ended, state.tokens, state.learnt)
        )
        self.ledger.write(self._budget.spent)
        best = self.ledger.best
        for other in (self._folder / TRIALS).iterdir():
            if best is None or other != self._path(best.round, best.choice):
                other.unlink()
        if ended == "budget":
            raise TrainingStopped("the budget has ended")

    def _curve(self) -> Any:
        """Train the chosen on a quarter and a half of the examples, as long as in the last round that compared."""
        rounds, count = self.ledger.rounds, len(self._train)
        if len(rounds) < 2:
            return unsaid("the budget was too small for a search")
        if count < LEAST_EXAMPLES or len(self.selection) < LEAST_HELD_OUT:
            return unsaid(f"it takes {LEAST_EXAMPLES} examples and {LEAST_HELD_OUT} held-out ones")
        number, cost = len(rounds) - 1, self.ledger.cost
        whole = min(self.ledger.of_round(number), key=lambda trial: (trial.loss is None, trial.loss))
        assert cost is not None
        made = sum(trial.made for trial in self.ledger.trials)
        left = self._budget.seconds - self._budget.spent
        if whole.loss is None or cost.steps(left / 2, 1) < whole.steps:
            return unsaid("the budget had no time left for it")
        if made + 2 * whole.steps > self._auto.most_steps:
            return unsaid("the budget had no steps left for it")
        nested = random.Random(f"{self._config.seed}/curve").sample(self._train, count)
        points = []
        for part in (count // 4, count // 2):
            trainer = self._trainer(whole.choice, whole.steps, 1, nested[:part], None)
            self._budget.begin_trial()
            try:
                trainer.run(self._watch(f"learning curve, {part} examples", made), self._is_over)
            except (TrainingStopped, TrainingDiverged):
                if self._stopped:
                    raise
                return unsaid("the budget had no time left for it")
            made += trainer.state.step
            points.append((part, trainer.state.best_loss or 0.0))
        return doubled([*points, (count, whole.loss)])

    def _probe(self, choice: Choice) -> Cost:
        """Time a few steps and a validation of a trial that is thrown away."""
        began, times = self._budget.spent, list[float]()
        trainer = self._trainer(choice, PROBE, 1, self._train, None)
        trainer.run(lambda _: times.append(self._budget.spent), self._is_over)
        step = max((times[-2] - times[0]) / (len(times) - 2), 1e-6)
        return Cost(max(0.0, times[0] - began - step), step, max(0.0, times[-1] - times[-2] - step))

    def _trainer(
        self, choice: Choice, steps: int, checks: int, train: Sequence[TokenExample], path: Path | None
    ) -> Trainer:
        """A trial's run. One that validates on the way may end early; what the user says of either comes first."""
        options: dict[str, Any] = {"steps": steps, "checkpoint_every": max(1, steps // CHECKPOINTS)}
        if "validate_every" not in self._auto.fixed:
            options["validate_every"] = -(-steps // checks)
        if "patience" not in self._auto.fixed:
            options["patience"] = PATIENCE if checks > 1 else 0
        config = TrainConfig(**{**vars(self._config), **choice.as_dict(), **options})
        return self._material.trainer(config, path, train, self.selection)

    def _path(self, number: int, choice: Choice) -> Path:
        return self._folder / TRIALS / f"{number}-{self._choices.index(choice)}.safetensors"

    def _is_over(self) -> bool:
        self._stopped = self._stopped or self._should_stop()
        return self._stopped or self._budget.is_exhausted()

    def _watch(self, name: str, made: int | None = None) -> Callable[[Progress], None]:
        """A trial's progress as the search's: steps and tokens count on from those of earlier trials."""
        trials, rounds = self.ledger.trials, self.ledger.rounds
        before = sum(trial.made for trial in trials) if made is None else made
        tokens, learnt = sum(trial.tokens for trial in trials), sum(trial.learnt for trial in trials)
        total = sum(part.trials * part.steps for part in rounds)

        def watch(progress: Progress) -> None:
            if (spent := self._budget.spent) - self.ledger.seconds > NOTE_S:
                self.ledger.write(spent)
            step = before + progress.step
            self._report(
                replace(
                    progress, step=step, total=max(total, step), tokens=tokens + progress.tokens,
                    learnt=learnt + progress.learnt, trial=name,
                )
            )  # fmt: skip

        return watch
