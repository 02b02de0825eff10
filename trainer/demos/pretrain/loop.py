"""The pretraining loop of every demo backbone.

Owns the budget, the optimizer, the checkpoint and the progress; knows no family: a ``Recipe`` has model and data. The
budget is wall-clock time and the learning rate follows its elapsed fraction, so that a slower machine makes fewer steps
but always a finished model. A killed run resumes from its last checkpoint. Because the schedule follows the clock, two
runs do not give the same weights.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from trainer.demos.pretrain.backbone import export_backbone, load_tokenizer, weights_of
from trainer.training.checkpoint import CheckpointError, load_state, pack_optimizer, save_state, unpack_optimizer

FINAL_FRACTION = 0.03  # final learning rate as a fraction of the peak
STATE = ("family", "seed", "step", "chunk", "elapsed", "optimizer")  # the facts in a checkpoint beside the tensors

Example = TypeVar("Example")


class Recipe(Protocol[Example]):
    """One family's model, data and loss."""

    @property
    def family(self) -> str:
        """The ``model_type`` of its configuration."""
        ...

    @property
    def peak_rate(self) -> float:
        """The highest learning rate."""
        ...

    @property
    def warmup_steps(self) -> int:
        """Steps until the peak rate."""
        ...

    @property
    def published(self) -> Mapping[str, Any]:
        """Configuration values that differ in the export from the training."""
        ...

    def describe(self) -> str:
        """Describe the data in one line."""
        ...

    def train_tokenizer(self, folder: Path) -> Any:
        """Train the tokenizer, save it to ``folder``, and load it as a server will."""
        ...

    def build_model(self, tokenizer: Any) -> Any:
        """Make the untrained model from torch's global random state."""
        ...

    def chunk(self, tokenizer: Any, rng: random.Random, fraction: float) -> list[list[Example]]:
        """Make the next batches, a few dozen or more, at ``fraction`` of the budget."""
        ...

    def loss(self, model: Any, batch: Sequence[Example]) -> tuple[Tensor, int]:
        """Return the summed cross-entropy of the learnt tokens and their number."""
        ...

    def validate(self, model: Any, tokenizer: Any) -> dict[str, float]:
        """Return mean losses per learnt token on held-out data, by the measure's name."""
        ...


def learning_rate(peak: float, warmup_steps: int, step: int, fraction: float) -> float:
    """Linear warm-up by steps, then a cosine over the elapsed fraction of the budget."""
    cosine = FINAL_FRACTION + (1 - FINAL_FRACTION) * 0.5 * (1 + math.cos(math.pi * min(fraction, 1.0)))
    return peak * cosine * min(1.0, (step + 1) / warmup_steps)


class Pretraining(Generic[Example]):
    """Model, optimizer and position of a run, and the checkpoint's file."""

    def __init__(self, recipe: Recipe[Example], folder: Path, seed: int) -> None:
        """Start a run in ``folder``, or resume the one in it. Raises CheckpointError for another run's checkpoint."""
        self.recipe, self.seed, self._file = recipe, seed, folder / "state.safetensors"
        torch.manual_seed(seed)
        resumed = self._file.exists()
        tokens = folder / "tokenizer"
        self.tokenizer = load_tokenizer(tokens) if resumed else recipe.train_tokenizer(tokens)
        self.model = recipe.build_model(self.tokenizer)
        parameters = list(self.model.parameters())
        self._optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.01},
                {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
            ],
            lr=recipe.peak_rate,
            betas=(0.9, 0.98),
            fused=True,
        )
        self.step, self.chunk, self.elapsed, self.loss = 0, 0, 0.0, 0.0
        if resumed:
            self._restore()

    def next_chunk(self, fraction: float = 0.0) -> list[list[Example]]:
        """Make the next chunk's batches, a function of seed, chunk number and ``fraction`` of the budget."""
        return self.recipe.chunk(self.tokenizer, random.Random(f"{self.seed}/{self.chunk}"), fraction)

    def train(self, batch: Sequence[Example], fraction: float) -> None:
        """Train one step, at ``fraction`` of the budget."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(self.recipe.peak_rate, self.recipe.warmup_steps, self.step, fraction)
        loss, count = self.recipe.loss(self.model, batch)
        (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.loss = 0.98 * self.loss + 0.02 * loss.item() / count if self.loss else loss.item() / count

    def save(self) -> None:
        """Write a checkpoint."""
        packed, optimizer = pack_optimizer(self._optimizer)
        weights = {f"model.{name}": tensor for name, tensor in weights_of(self.model).items()}
        position = {"seed": self.seed, "step": self.step, "chunk": self.chunk, "elapsed": self.elapsed}
        described = {"family": self.recipe.family, "optimizer": optimizer}
        save_state(self._file, weights | packed, position | described)

    def validate(self) -> dict[str, float]:
        """Return the held-out losses of the current model."""
        return self.recipe.validate(self.model, self.tokenizer)

    def _restore(self) -> None:
        tensors, meta = load_state(self._file)
        absent = [name for name in STATE if name not in meta]
        if absent:
            raise CheckpointError(
                f"{self._file}: expected a pretraining's {', '.join(STATE)}; missing {', '.join(absent)}"
            )
        for name, expected in (("family", self.recipe.family), ("seed", self.seed)):
            if meta[name] != expected:
                raise CheckpointError(f"{self._file}: expected {name} {expected}, got {meta[name]}")
        weights = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")}
        missing = sorted(weights_of(self.model).keys() - weights.keys())
        if missing:
            raise CheckpointError(f"{self._file}: expected the model's tensors, missing {', '.join(missing)}")
        self.model.load_state_dict(weights, strict=False)  # not strict: tied tensors are stored under one name
        try:
            unpack_optimizer(self._optimizer, tensors, meta["optimizer"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{self._file}: expected this model's optimizer, got {error!r}") from error
        self.step, self.chunk, self.elapsed = meta["step"], meta["chunk"], meta["elapsed"]


def pretrain(run: Pretraining[Any], output: Path, minutes: float, checkpoint_minutes: float) -> None:
    """Train until the budget is used up, then export to ``output``. A finished run is only exported."""
    console, budget = Console(), 60 * minutes
    count = sum(p.numel() for p in run.model.parameters())
    console.print(f"{run.recipe.describe()}; {count:,} parameters", soft_wrap=True)
    started, saved = time.monotonic() - run.elapsed, run.elapsed
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("pretraining", total=budget)
        while run.elapsed < budget:
            for batch in run.next_chunk(run.elapsed / budget):
                run.train(batch, run.elapsed / budget)
                run.elapsed = time.monotonic() - started
                progress.update(bar, completed=run.elapsed, description=f"step {run.step} loss {run.loss:.3f}")
                if run.elapsed >= budget:
                    break
            run.chunk += 1
            if run.elapsed - saved > 60 * checkpoint_minutes or run.elapsed >= budget:
                run.save()
                saved = run.elapsed
                held = " ".join(f"{name} {loss:.4f}" for name, loss in run.validate().items())
                console.print(
                    f"{run.elapsed / 60:.1f} min, step {run.step}, loss {run.loss:.4f}; held out: {held}",
                    soft_wrap=True,
                )
    export_backbone(run.model, run.tokenizer, output, run.recipe.published)
    run.model.half().float()  # rounds the weights as the export did
    console.print({"seed": run.seed, "steps": run.step, "held out, in float16": run.validate()})
