"""The bodies of our own routes: names and types.

Owns the shape of requests. Ranges and contradictions belong to ``SamplingParams``, limits and precedence to
``parameters``; the document states them (``stated``). Types are strict (no string for a number) and unknown fields are
errors.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, GetJsonSchemaHandler, WithJsonSchema
from pydantic_core import CoreSchema

from prefixes.registry.base import CONFIRMED_BELOW_S, RETENTION_S
from prefixes.spec import DEFAULT_ALIAS, NAME_PATTERN, REFERENCE_PATTERN, VERSION_PATTERN
from server.parameter_schemas import PARAMETER_SCHEMAS, STOP_STRING
from server.parameters import MAX_INTEGER
from server.web.openapi import SETTING
from server.web.strict_body import Body


def _one_as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def stated(name: str) -> WithJsonSchema:
    """What the document says of a decoding parameter, whose range is checked elsewhere, with an error of its own."""
    return WithJsonSchema(PARAMETER_SCHEMAS[name])


Whole = Annotated[int, Field(ge=-MAX_INTEGER, le=MAX_INTEGER)]
Number = Annotated[float, Field(allow_inf_nan=False)]
MaxNewTokens = Annotated[Whole, stated("max_new_tokens")]
MinNewTokens = Annotated[Whole, stated("min_new_tokens")]
Temperature = Annotated[Number, stated("temperature")]
TopK = Annotated[Whole, stated("top_k")]
TopP = Annotated[Number, stated("top_p")]
RepetitionPenalty = Annotated[Number, stated("repetition_penalty")]
NgramSize = Annotated[Whole, stated("no_repeat_ngram_size")]
Beams = Annotated[Whole, stated("num_beams")]
LengthPenalty = Annotated[Number, stated("length_penalty")]
Outputs = Annotated[Whole, stated("num_return_sequences")]
Stop = Annotated[
    list[str] | None,
    BeforeValidator(_one_as_list),
    WithJsonSchema({"anyOf": [STOP_STRING, PARAMETER_SCHEMAS["stop"], {"type": "null"}]}),
]
Logprobs = Annotated[Whole, stated("logprobs")]
Name = Annotated[str, Field(max_length=100), WithJsonSchema({"type": "string", "pattern": NAME_PATTERN})]
Version = Annotated[str, Field(max_length=100), WithJsonSchema({"type": "string", "pattern": VERSION_PATTERN})]
Reference = Annotated[str, Field(max_length=300), WithJsonSchema({"type": "string", "pattern": REFERENCE_PATTERN})]


class Parameters(Body):
    """The closed set of decoding parameters, transformers' names and meanings; null is the same as leaving it out."""

    max_new_tokens: MaxNewTokens | None = Field(default=None, description="At most this many new tokens.")
    min_new_tokens: MinNewTokens | None = Field(
        default=None, description="No end token before this many new tokens; a stop string ends all the same."
    )
    do_sample: bool | None = Field(default=None, description="Sample; temperature, top_k or top_p alone mean it too.")
    temperature: Temperature | None = Field(default=None, description="Above 0; below 1 is sharper.")
    top_k: TopK | None = Field(default=None, description="Sample among the k likeliest tokens; 0 is off.")
    top_p: TopP | None = Field(default=None, description="Sample among the likeliest tokens of this mass; 1 is off.")
    repetition_penalty: RepetitionPenalty | None = Field(
        default=None, description="Above 1 discourages tokens seen before."
    )
    no_repeat_ngram_size: NgramSize | None = Field(default=None, description="No n-gram of this size twice; 0 is off.")
    num_beams: Beams | None = Field(default=None, description="Beam search with this many beams; 1 is none.")
    length_penalty: LengthPenalty | None = Field(default=None, description="Beam scores are divided by length ** this.")
    early_stopping: bool | Literal["never"] | None = Field(default=None, description="When a beam search may stop.")
    num_return_sequences: Outputs | None = Field(default=None, description="Outputs: samples, or the best beams.")
    stop: Stop = Field(default=None, description="Strings that end an output; not part of its text.")
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] | None = Field(default=None, description="Same seed, same samples.")
    logprobs: Logprobs | None = Field(default=None, description="Log-probabilities, with this many alternatives.")
    truncate: bool | None = Field(default=None, description="Cut an input that is too long, from its end, and say so.")

    def given(self) -> dict[str, Any]:
        """The parameters that are set, by name."""
        return {name: value for name in self.model_fields_set if (value := getattr(self, name)) is not None}


class GenerateItem(Body):
    """What to generate from: ``task`` is ``[tenant/]name[@alias or @sha256:…]``, null the bare backbone."""

    task: Reference | None = Field(default=None, description="[tenant/]name[@alias]; null is bare.")
    input: str = Field(description="The text that fills the task's template.")
    parameters: Parameters = Parameters()


class GenerateRequest(GenerateItem):
    """``POST /generate``."""

    stream: bool = Field(default=False, description="Answer with server-sent events.")


class _Item:
    """Documents an item that is checked by itself, later."""

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [handler(GenerateItem.__pydantic_core_schema__), {}]}


class BatchRequest(Body):
    """``POST /generate/batch``: items are validated one by one, so that a bad one fails alone."""

    items: list[Annotated[Any, _Item()]] = Field(
        min_length=1,
        description="Each {task, input, parameters}; one of another form gets its error in the answer.",
        json_schema_extra={SETTING: "items"},
    )


class PromoteRequest(Body):
    """``POST /prefixes/…/promote``."""

    version: Version = Field(description="sha256:... of this task.")
    alias: Name = DEFAULT_ALIAS
    expected_current: Version | None = Field(default=None, description="Refuse unless it points here.")


class RollbackRequest(Body):
    """``POST /prefixes/…/rollback``."""

    alias: Name = DEFAULT_ALIAS
    expected_current: Version | None = Field(
        default=None, description="Refuse unless it points here; makes it safe to repeat."
    )


class AuditQuery(BaseModel):
    """``GET /audit?…``: text, therefore not strict."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tenant: Name | None = None
    unknown: bool = Field(default=False, description="Denials of callers without a known key alone, for operators.")
    limit: Annotated[int, Field(ge=1, le=10_000)] = 100


class GcRequest(Body):
    """``POST /admin/gc``."""

    retention_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        default=RETENTION_S, description="Deleted tasks younger than this stay."
    )
    dry_run: bool = Field(default=False, description="Only say what would go.")
    confirm: bool = Field(
        default=False,
        description=f"Needed for a retention_s below {CONFIRMED_BELOW_S:g}, which takes what was deleted just now.",
    )
