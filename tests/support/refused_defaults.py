"""Default parameters that no server takes, as JSON texts: contradictory, out of range, too deep, no text."""

from __future__ import annotations

import json

DEEP = "[" * 950 + "1" + "]" * 950

REFUSED_DEFAULTS: tuple[str, ...] = (
    '{"num_beams": 1, "do_sample": true, "temperature": -1}',
    f'{{"num_beams": 1, "stop": {json.dumps(["a"] * 17)}}}',
    f'{{"stop": {json.dumps(["a"] * 17)}}}',
    f'{{"seed": {10**30}}}',
    '{"seed": -1}',
    f'{{"temperature": {10**600}}}',
    f'{{"temperature": {10**4000}}}',
    '{"temperature": 1e999}',
    '{"temperature": NaN}',
    f'{{"max_new_tokens": {10**30}}}',
    '{"num_beams": 100}',
    f'{{"top_k": {1 << 40}}}',
    f'{{"stop": {"[" * 31}{"]" * 31}}}',
    f'{{"stop": {DEEP}}}',
    f'{{"temperature": {DEEP}}}',
    f'{{"x": {DEEP}}}',
    f'{{"temperature": {{"a": {DEEP}}}}}',
    r'{"stop": ["\ud800"]}',
    r'{"\ud800": 1}',
    '{"": 1}',
    DEEP,
)
