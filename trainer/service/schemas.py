"""Bodies and queries of the trainer's routes. Unknown fields are errors. Knows no job and no store."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema

from prefixes.errors import InvalidArtifact
from prefixes.spec import DEFAULT_ALIAS, INPUT_SLOT, NAME_PATTERN, REFERENCE_PATTERN, TASK_PATTERN
from prefixes.spec_json import check_json
from server.parameter_schemas import PARAMETER_SCHEMAS
from server.web.openapi import SETTING
from server.web.strict_body import Body
from trainer.data.texts import checked, is_blank
from trainer.evaluation.gate_rule import METRIC_OF, MOST_MARGIN
from trainer.evaluation.scores.presets import METRICS
from trainer.evaluation.scores.presets import PRESETS as SCORE_PRESETS
from trainer.jobs.record import State
from trainer.training.budget import MAX_MINUTES
from trainer.training.config import PRESETS

DIGEST = r"^sha256:[0-9a-f]{64}$"
Digest = Annotated[str, Field(pattern=DIGEST)]
MAX_DEFAULTS: Final = 10_000
"""Most characters of the decoding parameters as JSON: they are part of the record, which is read often."""
MAX_SPEC_BYTES: Final = 1 << 16
"""Most bytes of a job's spec as JSON. Its worker reads the record every two seconds and writes it with its progress."""
MAX_TEXT: Final = 10_000
"""Most characters of a text to start from, for the same reason; a prefix uses only its first tokens."""

OTHERS: Final = "Of one's own, or for an operator any."


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


def _stated(**keywords: Any) -> WithJsonSchema:
    """What the document says of a value that is checked elsewhere, with an error of its own."""
    return WithJsonSchema(keywords)


Task = Annotated[str, Field(max_length=300), _stated(type="string", pattern=TASK_PATTERN)]
Reference = Annotated[str, Field(max_length=300), _stated(type="string", pattern=REFERENCE_PATTERN)]
Name = Annotated[str, Field(max_length=100), _stated(type="string", pattern=NAME_PATTERN)]
Backbone = Annotated[str, Field(max_length=64), _stated(type="string", **{SETTING: "backbones"})]
Preset = Annotated[str, Field(max_length=40), _stated(type="string", enum=list(PRESETS))]
ScorePreset = Annotated[str, Field(max_length=40), _stated(type="string", enum=list(SCORE_PRESETS))]
Metric = Annotated[str, _stated(type="string", enum=list(METRICS))]
_BESIDE = "[^{]|[{](?!input[}])"
Template = Annotated[
    str,
    Field(max_length=MAX_SPEC_BYTES),
    _stated(type="string", maxLength=MAX_SPEC_BYTES, pattern=f"^(?:{_BESIDE})*{re.escape(INPUT_SLOT)}(?:{_BESIDE})*$"),
]
Defaults = Annotated[
    dict[str, Any],
    AfterValidator(_storable),
    _stated(type="object", properties=dict(PARAMETER_SCHEMAS), additionalProperties=False),
]
Text = Annotated[
    str, Field(min_length=1, max_length=MAX_TEXT, json_schema_extra={"pattern": r"\S"}), AfterValidator(_text)
]


class Hyperparameters(Body):
    """TrainConfig's options; what is not given is the preset's, the paper's settings for such a task."""

    prefix_length: int | None = Field(None, ge=1, le=4096)
    sites: Annotated[tuple[Literal["encoder", "decoder", "cross"], ...], Field(strict=False)] | None = None
    positions: Literal["shifted", "unshifted"] | None = None
    method: Literal["mlp", "direct"] | None = None
    middle: int | None = Field(None, ge=1, le=65536)
    frozen_positions: int | None = Field(None, ge=0, le=4096)
    init: Text | None = None
    epochs: int | None = Field(None, ge=1, le=10_000)
    steps: int | None = Field(None, ge=0, lt=1 << 63)
    batch_size: int | None = Field(None, ge=1, le=4096)
    accumulate: int | None = Field(None, ge=1, le=4096)
    checkpoint_activations: bool | None = None
    learning_rate: float | None = Field(None, gt=0, le=10, allow_inf_nan=False)
    warmup_steps: int | None = Field(None, ge=0, lt=1 << 63)
    weight_decay: float | None = Field(None, ge=0, le=10, allow_inf_nan=False)
    gradient_clip: float | None = Field(None, gt=0, allow_inf_nan=False)
    reduction: Literal["sequence", "token"] | None = None
    validate_every: int | None = Field(None, ge=0, lt=1 << 63)
    patience: int | None = Field(None, ge=0, lt=1 << 63)
    checkpoint_every: int | None = Field(None, ge=1, lt=1 << 63)
    seed: int | None = Field(None, ge=0, lt=1 << 63)

    def given(self) -> dict[str, Any]:
        """Those that were given."""
        return self.model_dump(exclude_none=True)


class Evaluation(Body):
    """How the finished prefix is scored on the held-out inputs.

    ``metrics``: the preset's where none are named, but for those that need Java on a machine without it.
    """

    preset: ScorePreset = "plain"
    metrics: tuple[Metric, ...] = Field((), max_length=20, strict=False)
    limit: int | None = Field(500, ge=1, le=100_000)


class PromoteIf(Body):
    """The gate's rule: when the alias moves. ``preset``: how texts are scored, by default as the evaluation's are."""

    metric: Annotated[str, Field(max_length=40), _stated(type="string", enum=list(METRIC_OF))]
    margin: float = Field(0.0, ge=-MOST_MARGIN, le=MOST_MARGIN, allow_inf_nan=False)
    preset: ScorePreset | None = None


class JobBody(Body):
    """``POST /jobs``."""

    task: Task
    dataset: Digest
    backbone: Backbone | None = None
    preset: Preset | None = None
    auto: bool = False
    budget_minutes: float | None = Field(None, gt=0, le=MAX_MINUTES, allow_inf_nan=False)
    hyperparameters: Hyperparameters = Field(default_factory=lambda: Hyperparameters.model_validate({}))
    validation_dataset: Digest | None = None
    hold_out: int = Field(5, ge=0, le=50)
    template: Template | None = None
    defaults: Defaults = Field(default_factory=dict)
    truncate: bool = False
    drop_long: bool = False
    alias: Name | None = DEFAULT_ALIAS
    start_from: Reference | None = None
    start_text: Text | None = None
    evaluation: Evaluation | None = Field(default_factory=lambda: Evaluation.model_validate({}))
    promote_if: PromoteIf | None = None
    gate_dataset: Digest | None = None
    gate_hold_out: int = Field(0, ge=0, le=50)


class JobsQuery(BaseModel):
    """``GET /jobs?…``: text, therefore not strict."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    state: State | None = None
    limit: int = Field(100, ge=1, le=1000)
    before: str | None = Field(None, max_length=64)
    tenant: Name | None = Field(None, description=OTHERS)


class DatasetsQuery(BaseModel):
    """``/datasets?…``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tenant: Name | None = Field(None, description=OTHERS)
