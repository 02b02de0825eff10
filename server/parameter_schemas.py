"""What documents say of each decoding parameter: the ranges that ``SamplingParams`` checks, as JSON schemas.

Owns their form. Knows no route. A server's own limits come in through ``x-setting``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from server.engine.types import (
    MAX_LENGTH_PENALTY,
    MAX_LOGPROBS,
    MAX_REPETITION_PENALTY,
    MAX_ROWS_PER_REQUEST,
    MAX_STOP_LENGTH,
    MAX_STOP_STRINGS,
    MAX_TEMPERATURE,
    MIN_REPETITION_PENALTY,
)
from server.parameters import MAX_INTEGER, ParameterLimits
from server.web.openapi import SETTING

_FROM_ZERO: Final = {"type": "integer", "minimum": 0, "maximum": MAX_INTEGER}
STOP_STRING: Final = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_LENGTH}
PARAMETER_SCHEMAS: Final[Mapping[str, dict[str, Any]]] = {
    "max_new_tokens": {"type": "integer", "minimum": 1, SETTING: "max_new_tokens"},
    "min_new_tokens": {"type": "integer", "minimum": 0, SETTING: "min_new_tokens"},
    "do_sample": {"type": "boolean"},
    "temperature": {"type": "number", "exclusiveMinimum": 0, "maximum": MAX_TEMPERATURE},
    "top_k": _FROM_ZERO,
    "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    "repetition_penalty": {"type": "number", "minimum": MIN_REPETITION_PENALTY, "maximum": MAX_REPETITION_PENALTY},
    "no_repeat_ngram_size": _FROM_ZERO,
    "num_beams": {"type": "integer", "minimum": 1, SETTING: "num_beams"},
    "length_penalty": {"type": "number", "minimum": -MAX_LENGTH_PENALTY, "maximum": MAX_LENGTH_PENALTY},
    "early_stopping": {"enum": [True, False, "never"]},
    "num_return_sequences": {"type": "integer", "minimum": 1, SETTING: "num_return_sequences"},
    "stop": {"type": "array", "items": STOP_STRING, "maxItems": MAX_STOP_STRINGS},
    "seed": {"type": "integer", "minimum": 0, "exclusiveMaximum": 1 << 63},
    "logprobs": {"type": "integer", "minimum": 0, "maximum": MAX_LOGPROBS},
    "truncate": {"type": "boolean"},
}
"""Name -> schema of its value. Contradictions between parameters are not in it."""


def documented_limits(limits: ParameterLimits) -> dict[str, dict[str, Any]]:
    """The keywords of the parameters whose range is a setting."""
    rows = {"num_beams", "num_return_sequences"}
    return {
        name: {"maximum": min(most, MAX_ROWS_PER_REQUEST if name in rows else MAX_INTEGER)}
        for name, most in limits.most().items()
    }
