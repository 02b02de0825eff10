"""Bodies and queries of the trainer's routes. Unknown fields are errors. Knows no job and no store."""

from __future__ import annotations

import json
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from prefixes.errors import InvalidArtifact
from prefixes.spec import DEFAULT_ALIAS
from prefixes.spec_json import check_json
from trainer.data.texts import checked, is_blank
from trainer.jobs.job import State

DIGEST = r"^sha256:[0-9a-f]{64}$"
Digest = Annotated[str, Field(pattern=DIGEST)]
MAX_DEFAULTS: Final = 10_000
"""Most characters of the decoding parameters as JSON: they are part of the record, which is read often."""
MAX_TEXT: Final = 10_000
"""Most characters of a text to start from, for the same reason; a prefix uses only its first tokens."""


def _storable(values: dict[str, Any]) -> dict[str, Any]:
    try:
        check_json("defaults", values)
    except InvalidArtifact as error:
        raise ValueError(error.message) from None
    text = json.dumps(values, ensure_ascii=False)
    if len(text) > MAX_DEFAULTS:
        raise ValueError(f"expected at most {MAX_DEFAULTS} characters as JSON, got {len(text)}")
    return values


def _text(text: str) -> str:
    if is_blank(text):
        raise ValueError("expected a text, got an empty one")
    try:
        return checked(text)
    except ValueError as error:
        raise ValueError(f"expected a text, got {error}") from None


class Closed(BaseModel):
    """A frozen model that refuses unknown fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Hyperparameters(Closed):
    """TrainConfig's options; what is not given is the preset's, the paper's settings for such a task."""

    prefix_length: int | None = Field(None, ge=1, le=4096)
    sites: tuple[Literal["encoder", "decoder", "cross"], ...] | None = None
    positions: Literal["shifted", "unshifted"] | None = None
    method: Literal["mlp", "direct"] | None = None
    middle: int | None = Field(None, ge=1, le=65536)
    frozen_positions: int | None = Field(None, ge=0, le=4096)
    init: Annotated[str, Field(min_length=1, max_length=10_000), AfterValidator(_text)] | None = None
    epochs: int | None = Field(None, ge=1, le=10_000)
    batch_size: int | None = Field(None, ge=1, le=4096)
    accumulate: int | None = Field(None, ge=1, le=4096)
    checkpoint_activations: bool | None = None
    learning_rate: float | None = Field(None, gt=0, le=10, allow_inf_nan=False)
    warmup_steps: int | None = Field(None, ge=0)
    weight_decay: float | None = Field(None, ge=0, le=10, allow_inf_nan=False)
    gradient_clip: float | None = Field(None, gt=0, allow_inf_nan=False)
    reduction: Literal["sequence", "token"] | None = None
    validate_every: int | None = Field(None, ge=0)
    checkpoint_every: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=0, lt=1 << 63)

    def given(self) -> dict[str, Any]:
        """Those that were given."""
        return self.model_dump(exclude_none=True)


class Evaluation(Closed):
    """How the finished prefix is scored on the held-out inputs.

    ``metrics``: the preset's where none are named, but for those that need Java on a machine without it.
    """

    preset: str = Field("plain", max_length=40)
    metrics: tuple[str, ...] = Field((), max_length=20)
    limit: int | None = Field(500, ge=1, le=100_000)


class JobBody(Closed):
    """``POST /jobs``."""

    task: str = Field(max_length=300)
    dataset: Digest
    backbone: str | None = Field(None, max_length=64)
    preset: str | None = Field(None, max_length=40)
    hyperparameters: Hyperparameters = Field(default_factory=lambda: Hyperparameters.model_validate({}))
    validation_dataset: Digest | None = None
    hold_out: int = Field(5, ge=0, le=50)
    template: str | None = Field(None, max_length=100_000)
    defaults: Annotated[dict[str, Any], AfterValidator(_storable)] = Field(default_factory=dict)
    truncate: bool = False
    drop_long: bool = False
    alias: str | None = Field(DEFAULT_ALIAS, max_length=100)
    start_from: str | None = Field(None, max_length=300)
    start_text: Annotated[str, Field(min_length=1, max_length=MAX_TEXT), AfterValidator(_text)] | None = None
    evaluation: Evaluation | None = Field(default_factory=lambda: Evaluation.model_validate({}))


class JobsQuery(Closed):
    """``GET /jobs``."""

    state: State | None = None
    limit: int = Field(100, ge=1, le=1000)
    before: str | None = Field(None, max_length=64)
