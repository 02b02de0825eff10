"""Parameters out of range, or that contradict each other, are refused by name with expected and got."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from prefixes.errors import InvalidParameter
from server.engine.config import EngineConfig
from server.engine.types import SamplingParams, length_penalty_limit

OUT_OF_RANGE: list[tuple[str, Any, str]] = [
    ("max_new_tokens", 0, "at least 1"),
    ("min_new_tokens", -1, "at least 0"),
    ("temperature", 0.0, "above 0, at most 100"),
    ("temperature", -1.0, "above 0, at most 100"),
    ("temperature", math.nan, "above 0, at most 100"),
    ("temperature", math.inf, "above 0, at most 100"),
    ("top_k", -1, "at least 0"),
    ("top_p", 0.0, "above 0, at most 1"),
    ("top_p", 1.01, "above 0, at most 1"),
    ("top_p", math.nan, "above 0, at most 1"),
    ("repetition_penalty", 0.0, "0.01 to 100"),
    ("repetition_penalty", 1e-320, "0.01 to 100"),
    ("repetition_penalty", 0.0099, "0.01 to 100"),
    ("repetition_penalty", 100.1, "0.01 to 100"),
    ("repetition_penalty", math.nan, "0.01 to 100"),
    ("no_repeat_ngram_size", -1, "at least 0"),
    ("num_beams", 0, "1 to 64"),
    ("num_beams", 65, "1 to 64"),
    ("length_penalty", 101.0, "-100 to 100"),
    ("length_penalty", math.nan, "-100 to 100"),
    ("early_stopping", "sometimes", "true, false or 'never'"),
    ("num_return_sequences", 0, "1 to 64"),
    ("num_return_sequences", 65, "1 to 64"),
    ("stop", ("x",) * 17, "at most 16 strings"),
    ("stop", ("",), "non-empty strings"),
    ("stop", ("x", "y" * 257), "strings of at most 256 characters"),
    ("seed", -1, "0 to 2**63 - 1"),
    ("seed", 2**63, "0 to 2**63 - 1"),
    ("logprobs", -1, "0 to 20"),
    ("logprobs", 21, "0 to 20"),
]

CONTRADICTIONS: list[tuple[str, dict[str, Any], str]] = [
    ("min_new_tokens", {"min_new_tokens": 9, "max_new_tokens": 8}, r"at most max_new_tokens \(8\), got 9"),
    ("do_sample", {"num_beams": 2, "do_sample": True}, "false with num_beams above 1"),
    ("num_return_sequences", {"num_beams": 2, "num_return_sequences": 3}, r"at most num_beams \(2\), got 3"),
    ("logprobs", {"num_beams": 2, "logprobs": 1}, "none with num_beams above 1"),
    ("length_penalty", {"num_beams": 2, "max_new_tokens": 3, "length_penalty": -100.0},
     r"expected -79.49 to 79.49 with max_new_tokens 3, got -100.0"),
    ("length_penalty", {"num_beams": 2, "max_new_tokens": 64, "length_penalty": 21.1},
     r"expected -21 to 21 with max_new_tokens 64, got 21.1"),
    ("length_penalty", {"num_beams": 2, "max_new_tokens": 64, "length_penalty": -22}, "expected -21 to 21"),
    ("length_penalty", {"num_beams": 2, "max_new_tokens": 2**40, "length_penalty": 3.2}, "expected -3.15 to 3.15"),
    ("stop", {"num_beams": 2, "stop": ("x",)}, "none with num_beams above 1"),
    ("num_return_sequences", {"num_return_sequences": 2}, "1 for greedy decoding, got 2"),
]


@pytest.mark.parametrize(("name", "value", "expected"), OUT_OF_RANGE)
def test_a_parameter_out_of_range_is_refused_by_name(name: str, value: object, expected: str) -> None:
    with pytest.raises(InvalidParameter) as caught:
        SamplingParams(**{name: value})  # type: ignore[arg-type]
    assert caught.value.message.startswith(f"{name}: expected {expected}")
    assert caught.value.detail["parameter"] == name
    assert "got" in caught.value.detail


@pytest.mark.parametrize(("name", "value"), [
    ("stop", ("x" * 256,) * 16),
    ("temperature", 5e-324), ("temperature", 100.0), ("top_p", 5e-324), ("top_k", 2**31 - 1),
    ("repetition_penalty", 0.01), ("repetition_penalty", 100.0), ("no_repeat_ngram_size", 2**31 - 1),
])
def test_the_ends_of_a_range_are_accepted(name: str, value: object) -> None:
    assert getattr(SamplingParams(**{name: value}), name) == value  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "params", "message"), CONTRADICTIONS)
def test_a_contradiction_is_refused_by_name(name: str, params: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidParameter, match=message) as caught:
        SamplingParams(**params)
    assert caught.value.detail["parameter"] == name


@pytest.mark.parametrize("max_new_tokens", [1, 2, 3, 7, 64, 1000, 2**31 - 1])
def test_up_to_the_limit_a_length_penalty_divides_by_a_normal_number(max_new_tokens: int) -> None:
    most = length_penalty_limit(max_new_tokens)
    for penalty in (-most, most):
        assert SamplingParams(num_beams=2, max_new_tokens=max_new_tokens, length_penalty=penalty).rows == 2
        divisor = np.float32(float(max_new_tokens) ** penalty)
        for number in (divisor, np.float32(1) / divisor):
            assert np.finfo(np.float32).tiny <= number <= np.finfo(np.float32).max


def test_without_beams_a_length_penalty_divides_nothing() -> None:
    assert SamplingParams(max_new_tokens=64, length_penalty=-100).num_beams == 1


@pytest.mark.parametrize(
    ("params", "rows"),
    [({}, 1), ({"num_beams": 4, "num_return_sequences": 2}, 4), ({"do_sample": True, "num_return_sequences": 3}, 3)],
)
def test_rows_are_those_that_the_request_occupies(params: dict[str, Any], rows: int) -> None:
    assert SamplingParams(**params).rows == rows


@pytest.mark.parametrize(
    "name", ["kv_cache_bytes", "block_size", "max_rows", "max_step_tokens", "max_encoder_tokens", "load_workers"]
)
def test_an_engine_limit_below_one_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
        EngineConfig(**{name: 0})  # type: ignore[arg-type]


def test_a_step_must_hold_one_token_of_every_row() -> None:
    with pytest.raises(ValueError, match=r"max_step_tokens: expected at least max_rows \(65\)"):
        EngineConfig(max_rows=65, max_step_tokens=64)
