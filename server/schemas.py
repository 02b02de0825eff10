"""The bodies of our own routes: names and types.

Owns the shape of requests. Ranges and contradictions belong to ``SamplingParams``, limits and precedence to
``parameters``. Types are strict (no string for a number) and unknown fields are errors.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from prefixes.registry.base import RETENTION_S
from prefixes.spec import DEFAULT_ALIAS, DEFAULT_TENANT
from server.parameters import MAX_INTEGER


def _one_as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Whole = Annotated[int, Field(ge=-MAX_INTEGER, le=MAX_INTEGER)]
Number = Annotated[float, Field(allow_inf_nan=False)]


class Body(BaseModel):
    """Base of every request body."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Parameters(Body):
    """The closed set of decoding parameters, transformers' names and meanings; null is the same as leaving it out."""

    max_new_tokens: Whole | None = Field(default=None, description="At most this many new tokens.")
    min_new_tokens: Whole | None = Field(
        default=None, description="No end token before this many new tokens; a stop string ends all the same."
    )
    do_sample: bool | None = Field(default=None, description="Sample; temperature, top_k or top_p alone mean it too.")
    temperature: Number | None = Field(default=None, description="Above 0; below 1 is sharper.")
    top_k: Whole | None = Field(default=None, description="Sample among the k likeliest tokens; 0 is off.")
    top_p: Number | None = Field(default=None, description="Sample among the likeliest tokens of this mass; 1 is off.")
    repetition_penalty: Number | None = Field(default=None, description="Above 1 discourages tokens seen before.")
    no_repeat_ngram_size: Whole | None = Field(default=None, description="No n-gram of this size twice; 0 is off.")
    num_beams: Whole | None = Field(default=None, description="Beam search with this many beams; 1 is none.")
    length_penalty: Number | None = Field(default=None, description="Beam scores are divided by length ** this.")
    early_stopping: bool | Literal["never"] | None = Field(default=None, description="When a beam search may stop.")
    num_return_sequences: Whole | None = Field(default=None, description="Outputs: samples, or the best beams.")
    stop: Annotated[list[str] | None, BeforeValidator(_one_as_list)] = Field(
        default=None, description="Strings that end an output; not part of its text."
    )
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] | None = Field(default=None, description="Same seed, same samples.")
    logprobs: Whole | None = Field(default=None, description="Log-probabilities, with this many alternatives.")
    truncate: bool | None = Field(default=None, description="Cut an input that is too long, from its end, and say so.")

    def given(self) -> dict[str, Any]:
        """The parameters that are set, by name."""
        return {name: value for name in self.model_fields_set if (value := getattr(self, name)) is not None}


class GenerateItem(Body):
    """What to generate from: ``task`` is ``[tenant/]name[@alias or @sha256:…]``, null the bare backbone."""

    task: str | None = Field(default=None, max_length=300, description="[tenant/]name[@alias]; null is bare.")
    input: str = Field(description="The text that fills the task's template.")
    parameters: Parameters = Parameters()


class GenerateRequest(GenerateItem):
    """``POST /generate``."""

    stream: bool = Field(default=False, description="Answer with server-sent events.")


class BatchRequest(Body):
    """``POST /generate/batch``: items are validated one by one, so that a bad one fails alone."""

    items: list[Any] = Field(min_length=1, description="Each {task, input, parameters}.")


class PromoteRequest(Body):
    """``POST /prefixes/…/promote``."""

    version: str = Field(max_length=100, description="sha256:... of this task.")
    alias: str = Field(default=DEFAULT_ALIAS, max_length=100)
    expected_current: str | None = Field(default=None, max_length=100, description="Refuse unless it points here.")


class RollbackRequest(Body):
    """``POST /prefixes/…/rollback``."""

    alias: str = Field(default=DEFAULT_ALIAS, max_length=100)


class AuditQuery(BaseModel):
    """``GET /admin/audit?…``: text, therefore not strict."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tenant: str = Field(default=DEFAULT_TENANT, max_length=100)
    limit: Annotated[int, Field(ge=1, le=10_000)] = 100


class GcRequest(Body):
    """``POST /admin/gc``."""

    retention_s: Annotated[float, Field(ge=0, allow_inf_nan=False, strict=False)] = Field(
        default=RETENTION_S, description="Deleted tasks younger than this stay."
    )
    dry_run: bool = Field(default=False, description="Only say what would go.")
