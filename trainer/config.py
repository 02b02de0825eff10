"""What a training run is asked to do, and the paper's defaults per task.

Owns the options' meaning and validation; knows no tensors. Stored in the result folder; a resumed run must match it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal, get_args

from prefixes.errors import InvalidParameter

Method = Literal["mlp", "direct"]
Reduction = Literal["sequence", "token"]

GPT2_TEMPLATE: Final = "{input} <|endoftext|>"  # the paper's; its other spaces are `convert --paper-spaces`
DEMO_TEMPLATE: Final = "{input}<|endoftext|>"  # what the demo backbone was pretrained with


@dataclass(frozen=True)
class TrainConfig:
    """One run. ``reduction``: ``sequence`` sums over a sequence's tokens and means over the batch (the paper's GPT-2
    code), ``token`` means over all learnt tokens (its BART code). ``init`` is ``random`` or words for the frozen model.
    """

    prefix_length: int = 5
    method: Method = "mlp"
    middle: int = 512  # the MLP's hidden size, the paper's k
    frozen_positions: int = 0  # direct only: leading positions that keep their initial values
    init: str = "random"
    epochs: int = 5
    batch_size: int = 10
    learning_rate: float = 8e-5
    warmup_steps: int = 0
    weight_decay: float = 0.0
    gradient_clip: float = 1.0
    reduction: Reduction = "sequence"
    validate_every: int = 0  # steps; 0: at the end of each epoch
    checkpoint_every: int = 500  # steps
    seed: int = 1

    def __post_init__(self) -> None:
        positive = ("prefix_length", "middle", "epochs", "batch_size", "checkpoint_every", "learning_rate")
        for name in (*positive, "gradient_clip"):
            if not getattr(self, name) > 0:
                raise InvalidParameter(f"{name}: expected more than 0, got {getattr(self, name)}", parameter=name)
        for name in ("frozen_positions", "warmup_steps", "weight_decay", "validate_every"):
            if not getattr(self, name) >= 0:
                raise InvalidParameter(f"{name}: expected at least 0, got {getattr(self, name)}", parameter=name)
        if self.method == "mlp" and self.frozen_positions:
            raise InvalidParameter("frozen_positions: expected 0 with the method 'mlp'; only 'direct' can freeze some")
        if self.frozen_positions >= self.prefix_length:
            raise InvalidParameter(
                f"frozen_positions: expected less than the prefix length {self.prefix_length}, "
                f"got {self.frozen_positions}"
            )

        for name, allowed in (("method", get_args(Method)), ("reduction", get_args(Reduction))):
            if getattr(self, name) not in allowed:
                raise InvalidParameter(f"{name}: expected {' or '.join(allowed)}, got {getattr(self, name)!r}")

    @classmethod
    def of(cls, preset: str, options: Mapping[str, Any]) -> TrainConfig:
        """The paper's settings under ``preset``, with ``options`` over them."""
        return cls(**{**PRESETS[preset], **options})

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


PRESETS: Final[Mapping[str, Mapping[str, Any]]] = {
    "e2e": {"learning_rate": 8e-5, "epochs": 5, "batch_size": 10, "prefix_length": 5},
    "webnlg": {"learning_rate": 5e-5, "epochs": 5, "batch_size": 5, "prefix_length": 5},
    "dart": {"learning_rate": 5e-5, "epochs": 10, "batch_size": 5, "prefix_length": 10},
}
"""The paper's table, for GPT-2 medium and large with the MLP."""

PAPER_DECODING: Final[Mapping[str, Any]] = {"num_beams": 5, "max_new_tokens": 100}


def default_template(backbone: str) -> str:
    """The template for a backbone's name where none is asked for."""
    return DEMO_TEMPLATE if backbone == "demo" else GPT2_TEMPLATE


def linear_schedule(step: int, total: int, warmup: int) -> float:
    """Factor on the learning rate at ``step`` (0-based): up over ``warmup`` steps, then linearly down to 0."""
    if step < warmup:
        return step / max(1, warmup)
    return max(0.0, (total - step) / max(1, total - warmup))
