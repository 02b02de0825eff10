"""The training loop: trains a prefix on a frozen backbone, and resumes after a kill.

Owns optimisation, validation, the best prefix and the checkpoint; knows neither command line nor registry. All
randomness comes from the seed, so a resumed run ends in the same prefix, bit for bit, as an uninterrupted one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from prefixes.backbone import Backbone
from prefixes.errors import PrefixdError
from prefixes.spec import PrefixSpec
from server.engine.models import Model
from trainer.data.errors import TrainingStopped
from trainer.data.sequences import TokenExample, collate, epoch_batches, split_batch
from trainer.training.checkpoint import CheckpointError, load_state, pack_optimizer, save_state, unpack_optimizer
from trainer.training.config import EXAMPLES, RANDOM, TrainConfig, linear_schedule, steps_of, steps_per_epoch
from trainer.training.forward import Compute
from trainer.training.initial import Initial, InitialExamples
from trainer.training.loss import batch_loss, denominator, token_loss
from trainer.training.plan import dtype_of
from trainer.training.reparam import DirectPrefix, MlpPrefix, PrefixKV
from trainer.training.words import word_activations

LOG_EVERY = 10  # steps per line of the metrics, which has their mean loss


class TrainingDiverged(PrefixdError):
    """The loss is no longer finite."""

    code = "training_diverged"


@dataclass(frozen=True)
class Progress:
    """The loop's report after each step. ``validation_loss`` is per learnt token; None if this step measured none.

    ``tokens`` counts the tokens through the model since the run began, across resumes, without padding and validation.
    ``learnt`` counts the learnt tokens. A search's progress counts on over its trials, and names the one at work.
    """

    step: int
    total: int
    epoch: int
    loss: float
    learning_rate: float
    validation_loss: float | None
    tokens: int
    learnt: int
    trial: str | None = None


@dataclass
class State:
    """The state of a run besides parameters and optimizer, all JSON values."""

    step: int = 0
    losses: list[float] = field(default_factory=list)  # since the last line of the metrics
    metrics: list[dict[str, Any]] = field(default_factory=list)
    best_loss: float | None = None
    best_step: int = 0
    stale: int = 0  # validations since the best one
    initial_error: float | None = None
    tokens: int = 0
    learnt: int = 0
    seconds: float = 0.0  # of all processes that trained the run, up to the last checkpoint
    closed: bool = True  # whether what follows the last step, such as its validation, is done


def build_prefix(config: TrainConfig, plan: PrefixSpec) -> MlpPrefix | DirectPrefix:
    """Make the randomly initialised parameters that ``config`` asks for, separate ones for every site of ``plan``."""
    sites = {site: planned.geometry for site, planned in plan.sites.items()}
    if config.method == "mlp":
        return MlpPrefix(sites, config.prefix_length, middle=config.middle)
    return DirectPrefix(sites, config.prefix_length, frozen=config.frozen_positions)


class Trainer:
    """One run. ``run`` trains to the end, from ``checkpoint`` if that file exists."""

    def __init__(
        self,
        config: TrainConfig,
        plan: PrefixSpec,
        backbone: Backbone,
        model: Model,
        train: Sequence[TokenExample],
        validation: Sequence[TokenExample],
        *,
        identity: str,
        checkpoint: Path | None = None,
        initial: Initial | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        """``plan`` comes from ``plan_prefix``. ``identity`` names backbone and data; ``run`` refuses a checkpoint with
        another identity or configuration. ``initial`` replaces ``config.init``. ``autocast`` is the dtype of matrix
        products, see ``Compute``; None is the model's.
        """
        self.config, self.state, self._plan = config, State(), plan
        self._backbone, self._model, self._train, self._validation = backbone, model, train, validation
        self._identity, self._checkpoint = identity, checkpoint
        self.initial: Initial | InitialExamples | None = initial
        if initial is None and config.init == EXAMPLES:
            self.initial = InitialExamples.draw(train, plan, config.seed)
        self._compute = Compute(autocast, config.checkpoint_activations)
        self._report: Callable[[Progress], None] = lambda _: None
        self._should_stop: Callable[[], bool] = lambda: False
        self._device = next(backbone.model.parameters()).device
        self.total = steps_of(config, len(train))
        self._per_epoch = steps_per_epoch(config, len(train))
        with torch.random.fork_rng(devices=[]):  # keeps the caller's random state
            torch.manual_seed(config.seed)
            self.prefix = build_prefix(config, plan)
        self.prefix.to(self._device, getattr(torch, dtype_of(backbone)))
        self._optimizer = torch.optim.AdamW(
            self.prefix.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        self.best: PrefixKV | None = None  # that validated best so far
        self._began = time.monotonic()

    def run(
        self, report: Callable[[Progress], None] = lambda _: None, should_stop: Callable[[], bool] = lambda: False
    ) -> PrefixKV:
        """Train, and return the keys and values that validated best, or the last ones without validation data.

        Asks ``should_stop`` before every step of training, initialisation and validation. Raises TrainingStopped when
        it is true; where steps were made it first writes a checkpoint. Raises CheckpointError, TrainingDiverged.
        """
        self._report, self._should_stop, self._began = report, should_stop, time.monotonic()
        if not self.restore():
            self._initialise()
        try:
            self._run()
        except TrainingStopped:
            if self._checkpoint is not None and self.state.step:
                self._save(self._checkpoint)
            raise
        if self._checkpoint is None:
            self._count_time()
        return self.best if self.best is not None else self._folded()

    @property
    def ended(self) -> bool:
        """Whether all steps are done, or as many validations in a row as ``patience`` were no better."""
        return self.state.step >= self.total or 0 < self.config.patience <= self.state.stale

    def restore(self) -> bool:
        """Go back to the checkpoint; False if there is none. Raises CheckpointError."""
        if self._checkpoint is None or not self._checkpoint.exists():
            return False
        self._restore(self._checkpoint)
        return True

    def _run(self) -> None:
        if not self.state.closed:
            self._close_step()
        while not self.ended:
            epoch, index = divmod(self.state.step, self._per_epoch)
            order = epoch_batches(self._train, self.config.batch_size, self.config.seed, epoch)
            for indices in order[index:]:
                self._ask()
                self._step([self._train[i] for i in indices])
                self._close_step()
                if self.ended:
                    break

    def _count_time(self) -> None:
        now = time.monotonic()
        self.state.seconds, self._began = self.state.seconds + now - self._began, now

    def _ask(self) -> None:
        if self._should_stop():
            raise TrainingStopped(f"stopped before step {self.state.step + 1} of {self.total}", step=self.state.step)

    def _initialise(self) -> None:
        plan, config = self._plan, self.config
        if self.initial is not None:
            activations = self.initial.activations(self._model, self._backbone, plan)
        elif config.init != RANDOM:
            activations = word_activations(self._model, self._backbone, config.init, config.prefix_length, plan.sites)
        else:
            return
        self.state.initial_error = self.prefix.initialise(activations, self._ask)

    def _step(self, examples: Sequence[TokenExample]) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate(self.state.step)
        self._optimizer.zero_grad(set_to_none=True)
        value = self._accumulate_gradients(examples)
        torch.nn.utils.clip_grad_norm_(self.prefix.parameters(), self.config.gradient_clip)
        if not math.isfinite(value):
            raise TrainingDiverged(
                f"step {self.state.step}: expected a finite loss, got {value}; try a lower learning rate"
            )
        self._optimizer.step()
        self.state.step, self.state.closed = self.state.step + 1, False
        self.state.losses.append(value)
        self.state.tokens += sum(example.tokens for example in examples)
        self.state.learnt += sum(example.learnt for example in examples)

    def _close_step(self) -> None:
        """What follows the last step: its validation and checkpoint where they are due, its line, its report."""
        state, done = self.state, self.state.step
        epoch, rate, loss = (done - 1) // self._per_epoch, self._rate(done - 1), state.losses[-1]
        due = done % (self.config.validate_every or self._per_epoch) == 0 or done == self.total
        measured = self._validate() if due else None
        self._log(epoch, rate, measured)
        state.closed = True
        self._report(Progress(done, self.total, epoch, loss, rate, measured, state.tokens, state.learnt))
        if self._checkpoint is not None and (done % self.config.checkpoint_every == 0 or self.ended):
            self._save(self._checkpoint)

    def _rate(self, step: int) -> float:
        return self.config.learning_rate * linear_schedule(step, self.total, self.config.warmup_steps)

    def _accumulate_gradients(self, examples: Sequence[TokenExample]) -> float:
        """Return the loss of a batch, and leave its gradient in the parameters.

        The prefix is computed once. Its gradient is summed over the micro-batches and then propagated into the MLP.
        """
        made = self.prefix()
        leaves = {
            site: (key.detach().requires_grad_(), value.detach().requires_grad_())
            for site, (key, value) in made.items()
        }
        divisor, losses = denominator(examples, self.config.reduction), []
        for part in split_batch(examples, self.config.accumulate):
            batch = collate(part, self._device)
            loss = batch_loss(self._model, batch, leaves, self._plan, self._compute) / divisor
            loss.backward()
            losses.append(loss.detach())
        tensors = [tensor for pair in made.values() for tensor in pair]
        torch.autograd.backward(tensors, [leaf.grad for pair in leaves.values() for leaf in pair])
        return float(torch.stack(losses).sum())

    def _validate(self) -> float | None:
        if not self._validation:
            return None
        folded = self._folded()
        loss = token_loss(self._model, self._validation, folded, self._plan, self._compute, self._ask)
        if not math.isfinite(loss):
            raise TrainingDiverged(
                f"step {self.state.step}: expected a finite validation loss, got {loss}; try a lower learning rate"
            )
        if self.state.best_loss is None or loss < self.state.best_loss:
            self.state.best_loss, self.state.best_step, self.state.stale, self.best = loss, self.state.step, 0, folded
        else:
            self.state.stale += 1
        return loss

    def _log(self, epoch: int, rate: float, measured: float | None) -> None:
        if self.state.step % LOG_EVERY and self.state.step != self.total and measured is None:
            return
        mean = sum(self.state.losses) / len(self.state.losses)
        line: dict[str, Any] = {"step": self.state.step, "epoch": epoch, "loss": mean, "learning_rate": rate}
        self.state.metrics.append(line if measured is None else line | {"validation_loss": measured})
        self.state.losses.clear()

    @torch.no_grad()
    def _folded(self) -> PrefixKV:
        return {site: (key.clone(), value.clone()) for site, (key, value) in self.prefix().items()}

    def _save(self, path: Path) -> None:
        self._count_time()
        tensors = {f"prefix.{name}": tensor for name, tensor in self.prefix.state_dict().items()}
        for site, (key, value) in (self.best or {}).items():
            tensors |= {f"best.{site}.key": key, f"best.{site}.value": value}
        packed, optimizer = pack_optimizer(self._optimizer)
        meta = {"identity": self._identity, "config": self.config.as_dict(), "optimizer": optimizer}
        save_state(path, tensors | packed, meta | {"state": vars(self.state)})

    def _restore(self, path: Path) -> None:
        tensors, meta = load_state(path)
        for name, expected in (("identity", self._identity), ("config", self.config.as_dict())):
            if meta.get(name) != expected:
                raise CheckpointError(
                    f"{path}: cannot resume: expected {name} {expected}, got {meta.get(name)}; "
                    "another run needs a folder of its own"
                )
        self.state = State(**meta["state"])
        moved = {name: tensor.to(self._device) for name, tensor in tensors.items()}
        self.prefix.load_state_dict(
            {name.removeprefix("prefix."): tensor for name, tensor in moved.items() if name.startswith("prefix.")}
        )
        unpack_optimizer(self._optimizer, moved, meta["optimizer"])
        if any(name.startswith("best.") for name in moved):
            self.best = {site: (moved[f"best.{site}.key"], moved[f"best.{site}.value"]) for site in self._plan.sites}
