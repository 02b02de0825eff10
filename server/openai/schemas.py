"""The body of ``POST /v1/completions`` and the translation of its fields into our parameters.

Owns the mapping and the refusals. A field of OpenAI's that we do not support must have its neutral value; it is never
ignored. Knows no routes.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, WithJsonSchema

from prefixes.errors import InvalidParameter
from prefixes.spec import REFERENCE_PATTERN
from server.engine.types import MAX_TEMPERATURE
from server.schemas import (
    Beams,
    LengthPenalty,
    Logprobs,
    MaxNewTokens,
    MinNewTokens,
    NgramSize,
    Number,
    Outputs,
    Parameters,
    RepetitionPenalty,
    Stop,
    TopK,
    TopP,
    Whole,
)
from server.web.openapi import SETTING
from server.web.strict_body import Body

ModelName = Annotated[
    str,
    Field(max_length=300),
    WithJsonSchema({"type": "string", "anyOf": [{"pattern": REFERENCE_PATTERN}, {SETTING: "backbone_name"}]}),
]
Prompts = Annotated[
    Any,
    WithJsonSchema(
        {"anyOf": [
            {"type": "string"},
            {"type": "array", "items": {"type": "string"}, "minItems": 1, SETTING: "items"},
        ]}
    ),
]  # fmt: skip
FromGreedy = Annotated[Number, WithJsonSchema({"type": "number", "minimum": 0, "maximum": MAX_TEMPERATURE})]
NEUTRAL_FALSE = WithJsonSchema({"enum": [False, None]})
NEUTRAL_TEXT = WithJsonSchema({"enum": ["", None]})
NEUTRAL_ZERO = WithJsonSchema({"enum": [0, None]})
NEUTRAL_OBJECT = WithJsonSchema({"anyOf": [{"type": "object", "maxProperties": 0}, {"type": "null"}]})


class StreamOptions(Body):
    """``stream_options``."""

    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


class CompletionRequest(Body):
    """OpenAI's fields, then those of ours that OpenAI has not (the package sends them by ``extra_body``)."""

    model: ModelName = Field(description="A task, or the backbone's own name for the bare one.")
    prompt: Prompts = Field(description="A string or a list of strings: each fills the task's template.")
    n: Outputs | None = None
    temperature: FromGreedy | None = Field(
        default=None, description="0 is greedy; left out, the task's own defaults hold."
    )
    top_p: TopP | None = None
    max_tokens: MaxNewTokens | None = Field(
        default=None, description="Left out, the task's or the server's default holds."
    )
    stop: Stop = None
    seed: int | None = Field(default=None, ge=0, lt=1 << 63)
    logprobs: Logprobs | None = Field(default=None, description="0 to 20 alternatives per token.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(default=None, description="Accepted; it has no effect in OpenAI's answer either.")

    best_of: Whole | None = None
    echo: Annotated[bool | None, NEUTRAL_FALSE] = None
    suffix: Annotated[str | None, NEUTRAL_TEXT] = None
    presence_penalty: Annotated[Number | None, NEUTRAL_ZERO] = None
    frequency_penalty: Annotated[Number | None, NEUTRAL_ZERO] = None
    logit_bias: Annotated[dict[str, Any] | None, NEUTRAL_OBJECT] = None

    do_sample: bool | None = None
    top_k: TopK | None = None
    min_new_tokens: MinNewTokens | None = None
    repetition_penalty: RepetitionPenalty | None = None
    no_repeat_ngram_size: NgramSize | None = None
    num_beams: Beams | None = None
    length_penalty: LengthPenalty | None = None
    early_stopping: bool | Literal["never"] | None = None
    truncate: bool | None = None

    def prompts(self, most: int) -> list[str]:
        """The prompts as texts, at most ``most``. Raises InvalidParameter for token ids and anything else."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if not isinstance(self.prompt, list) or not all(isinstance(text, str) for text in self.prompt):
            raise InvalidParameter(
                "prompt: expected a string or a list of strings, got something else; token ids are not supported, "
                "since a task's template is text",
                parameter="prompt",
            )
        if not 1 <= len(self.prompt) <= most:
            raise InvalidParameter(
                f"prompt: expected 1 to {most} strings, got {len(self.prompt)}",
                parameter="prompt",
                expected=most,
                got=len(self.prompt),
            )
        return self.prompt

    def parameters(self) -> dict[str, Any]:
        """The parameters in the names of ``/generate``. Raises InvalidParameter for what cannot be honoured."""
        self._refuse_unsupported()
        given = {name: value for name in self.model_fields_set if (value := getattr(self, name)) is not None}
        ours = {name: value for name, value in given.items() if name in Parameters.model_fields}
        if "max_tokens" in given:
            ours["max_new_tokens"] = given["max_tokens"]
        if given.get("n", 1) != 1:
            ours["num_return_sequences"] = given["n"]
        if given.get("temperature") == 0:  # greedy; as with OpenAI, a seed or top_p then changes nothing
            del ours["temperature"]
            ours.pop("top_p", None)
            ours["do_sample"] = False
            ours.setdefault("num_beams", 1)
        elif given.get("n", 1) > 1 and not {"do_sample", "num_beams"} & given.keys():
            ours["do_sample"] = True  # OpenAI samples by default; several greedy outputs would all be equal
        return ours

    def _refuse_unsupported(self) -> None:
        neutral: dict[str, tuple[Any, ...]] = {
            "best_of": (None, self.n or 1),
            "echo": (None, False),
            "suffix": (None, ""),
            "presence_penalty": (None, 0),
            "frequency_penalty": (None, 0),
            "logit_bias": (None, {}),
        }
        for name, values in neutral.items():
            if getattr(self, name) not in values:
                raise InvalidParameter(
                    f"{name}: not supported; expected it left out or {values[1]!r}", parameter=name, expected=values[1]
                )
