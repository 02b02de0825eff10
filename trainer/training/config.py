"""The options of a training run, and the paper's defaults per task.

Owns the options' meaning and validation; knows no tensors. The result folder stores them; a resumed run must match.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal, get_args

from prefixes.errors import InvalidParameter
from prefixes.spec import SITES, Positions, Site

Method = Literal["mlp", "direct"]
Reduction = Literal["sequence", "token"]

GPT2_TEMPLATE: Final = "{input} <|endoftext|>"  # the paper's; `convert --paper-spaces` adds the paper's other spaces
LINE_TEMPLATE: Final = "{input}\n"  # for any other decoder
DEMO_TEMPLATE: Final = "{input}<|endoftext|>"  # the demo backbone was pretrained with it

RANDOM: Final = "random"
EXAMPLES: Final = "examples"


@dataclass(frozen=True)
class TrainConfig:
    """The options of one run.

    ``init``: ``random``, or what the prefix starts from as the frozen model's keys and values: ``examples``, training
    pairs drawn by the seed, or any other words.

    ``reduction``: ``sequence`` sums the loss over a sequence's tokens and averages over the batch (the paper's GPT-2
    code); ``token`` averages over all learnt tokens (its BART code).
    """

    prefix_length: int = 5  # at every site
    sites: tuple[Site, ...] = ()  # empty: all of the backbone's
    positions: Positions | None = None  # of self-attention; None: the paper's choice for this kind of backbone
    method: Method = "mlp"
    middle: int = 512  # the MLP's hidden size, the paper's k
    frozen_positions: int = 0  # direct only: leading positions that keep their initial values
    init: str = RANDOM
    epochs: int = 5
    steps: int = 0  # in place of epochs; 0: none
    batch_size: int = 10
    accumulate: int = 1  # micro-batches per batch, computed in turn: less memory, the same sum
    checkpoint_activations: bool = False  # keep only each layer's input, and compute the layer again for the gradient
    learning_rate: float = 8e-5
    warmup_steps: int = 0
    weight_decay: float = 0.0
    gradient_clip: float = 1.0
    reduction: Reduction = "sequence"
    validate_every: int = 0  # steps; 0: at the end of each epoch
    patience: int = 0  # validations in a row without a lower loss that end the run; 0: none do
    checkpoint_every: int = 500  # steps
    seed: int = 1

    def __post_init__(self) -> None:
        for site in self.sites:
            if site not in SITES:
                raise InvalidParameter(f"sites: expected some of {', '.join(SITES)}, got {site!r}", got=site)
        object.__setattr__(self, "sites", tuple(site for site in SITES if site in self.sites))  # fixed order, unique
        for name, value in vars(self).items():  # the artifact's origin keeps them
            if isinstance(value, float) and not math.isfinite(value):
                raise InvalidParameter(f"{name}: expected a finite number, got {value}", parameter=name)
            if isinstance(value, int) and abs(value) >= 1 << 63:
                raise InvalidParameter(f"{name}: expected less than 2**63, got a larger number", parameter=name)
        positive = (
            "prefix_length",
            "middle",
            "epochs",
            "batch_size",
            "accumulate",
            "checkpoint_every",
            "learning_rate",
        )
        for name in (*positive, "gradient_clip"):
            if not getattr(self, name) > 0:
                raise InvalidParameter(f"{name}: expected more than 0, got {getattr(self, name)}", parameter=name)
        for name in ("frozen_positions", "steps", "warmup_steps", "weight_decay", "validate_every", "patience"):
            if not getattr(self, name) >= 0:
                raise InvalidParameter(f"{name}: expected at least 0, got {getattr(self, name)}", parameter=name)
        if self.accumulate > self.batch_size:
            raise InvalidParameter(
                f"accumulate: expected at most the batch size {self.batch_size}, got {self.accumulate}",
                parameter="accumulate",
            )
        if self.method == "mlp" and self.frozen_positions:
            raise InvalidParameter("frozen_positions: expected 0 with the method 'mlp'; only 'direct' can freeze some")
        if self.frozen_positions >= self.prefix_length:
            raise InvalidParameter(
                f"frozen_positions: expected less than the prefix length {self.prefix_length}, "
                f"got {self.frozen_positions}"
            )
        allowed = {"method": get_args(Method), "reduction": get_args(Reduction), "positions": get_args(Positions)}
        for name, values in allowed.items():
            if getattr(self, name) not in values and (name, self.positions) != ("positions", None):
                raise InvalidParameter(f"{name}: expected {' or '.join(values)}, got {getattr(self, name)!r}")

    @classmethod
    def of(cls, preset: str, options: Mapping[str, Any], *, from_text: bool = False) -> TrainConfig:
        """Return the paper's settings for ``preset``, overridden by ``options``.

        ``from_text``: the prefix starts from the activations of a text. Unless ``options`` say otherwise, it is then
        trained directly with its first position frozen. So it is from examples.
        """
        settings = {**PRESETS[preset].options, **options}
        if from_text or settings.get("init") == EXAMPLES:
            settings.setdefault("method", "direct")
            if settings["method"] == "direct":
                settings.setdefault("frozen_positions", 1)
        return cls(**settings)

    def as_dict(self) -> dict[str, Any]:
        """JSON values; ``TrainConfig(**…)`` takes them back."""
        values = asdict(self) | {"sites": list(self.sites)}
        for name in ("steps", "patience"):
            if not values[name]:
                del values[name]  # as in the runs of a time without them, which can be resumed
        return values


@dataclass(frozen=True)
class Preset:
    """The paper's settings for one task: how to train, and the prefix's default decoding parameters."""

    options: Mapping[str, Any]
    decoding: Mapping[str, Any]


TABLE_DECODING: Final[Mapping[str, Any]] = {"num_beams": 5, "max_new_tokens": 100}

XSUM_DECODING: Final[Mapping[str, Any]] = {
    "num_beams": 6, "length_penalty": 0.8, "min_new_tokens": 10, "max_new_tokens": 61
}  # fmt: skip
"""The published code has min_length 11 and max_length 62: in transformers these count the decoder's start token."""

_SUMMARY: Final[Mapping[str, Any]] = {"learning_rate": 5e-5, "middle": 800, "reduction": "token"}

PRESETS: Final[Mapping[str, Preset]] = {
    "e2e": Preset({"learning_rate": 8e-5, "epochs": 5, "batch_size": 10, "prefix_length": 5}, TABLE_DECODING),
    "webnlg": Preset({"learning_rate": 5e-5, "epochs": 5, "batch_size": 5, "prefix_length": 5}, TABLE_DECODING),
    "dart": Preset({"learning_rate": 5e-5, "epochs": 10, "batch_size": 5, "prefix_length": 10}, TABLE_DECODING),
    # The prefix length is 100 in the paper's table, but 200 in its figure over lengths and in the code's README.
    "xsum": Preset({**_SUMMARY, "epochs": 30, "batch_size": 14, "prefix_length": 100}, XSUM_DECODING),
    "xsum-news": Preset({**_SUMMARY, "epochs": 30, "batch_size": 36, "prefix_length": 80}, XSUM_DECODING),
    "xsum-news-to-sports": Preset({**_SUMMARY, "epochs": 15, "batch_size": 36, "prefix_length": 40}, XSUM_DECODING),
}
"""The paper's table of hyperparameters: GPT-2 medium and large for table-to-text, BART-large for summaries, by MLP."""


def steps_of(config: TrainConfig, examples: int) -> int:
    """The steps of a run over so many examples."""
    return config.steps or config.epochs * steps_per_epoch(config, examples)


def steps_per_epoch(config: TrainConfig, examples: int) -> int:
    """The steps of a pass over so many examples."""
    return -(-examples // config.batch_size)


def linear_schedule(step: int, total: int, warmup: int) -> float:
    """Factor on the learning rate at ``step`` (0-based): rises over ``warmup`` steps, then falls linearly to 0."""
    if step < warmup:
        return step / max(1, warmup)
    return max(0.0, (total - step) / max(1, total - warmup))
