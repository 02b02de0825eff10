"""The closed set of decoding parameters: their names and basic types. Torch-free.

Owns names and types for an artifact's defaults, a backbone's generation config and a request. Does not know ranges,
contradictions or limits: the server checks those.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, Final

from prefixes.errors import InvalidParameter

DECODING_PARAMETERS: Final[Mapping[str, str]] = {
    "max_new_tokens": "integer",
    "min_new_tokens": "integer",
    "do_sample": "boolean",
    "temperature": "number",
    "top_k": "integer",
    "top_p": "number",
    "repetition_penalty": "number",
    "no_repeat_ngram_size": "integer",
    "num_beams": "integer",
    "length_penalty": "number",
    "early_stopping": 'boolean or "never"',
    "num_return_sequences": "integer",
    "stop": "list of strings",
    "seed": "integer",
    "logprobs": "integer",
    "truncate": "boolean",
}
"""Name -> type, in the words of the error message."""


def check_decoding_parameters(parameters: Mapping[str, Any]) -> None:
    """Raise InvalidParameter, saying expected and got, for an unknown name or a value of the wrong basic type."""
    for name, value in parameters.items():
        expected = DECODING_PARAMETERS.get(name)
        if expected is None:
            raise InvalidParameter(
                f"decoding parameter: expected one of {', '.join(DECODING_PARAMETERS)}; got {str(name)[:80]!r}",
                expected=list(DECODING_PARAMETERS),
                got=str(name)[:80],
            )
        if not _is(expected, value):
            raise InvalidParameter(
                f"decoding parameter {name}: expected {expected}, got {_shown(value)}",
                parameter=name,
                expected=expected,
                got=_shown(value),
            )


def _shown(value: Any) -> str:
    """The value's type, and the head of a value that is no container: others may be nested too deeply to be shown."""
    kind = type(value).__name__
    if isinstance(value, int) and abs(value) >= 1 << 64:
        return f"{kind} of more than 64 bits"
    return kind if isinstance(value, (dict, list, tuple)) else f"{kind} {str(value)[:80]!r}"


def _is(expected: str, value: Any) -> bool:
    if expected == "boolean":
        return isinstance(value, bool)
    if expected == 'boolean or "never"':
        return isinstance(value, bool) or value == "never"
    if expected == "list of strings":
        return isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value)
    if isinstance(value, bool):  # Python's bool is an int; here it is no number
        return False
    if expected == "integer":
        return isinstance(value, int)
    return isinstance(value, (int, float)) and abs(value) <= sys.float_info.max
