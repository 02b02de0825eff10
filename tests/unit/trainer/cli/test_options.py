"""What the trainer's options take and refuse."""

from __future__ import annotations

import pytest

from prefixes.errors import InvalidParameter
from trainer.cli.options import decoding_parameters


def test_decoding_parameters_are_pairs_of_a_name_and_json() -> None:
    assert decoding_parameters("--default", ["num_beams=3", 'stop=["a", "b"]', "do_sample=false"]) == {
        "num_beams": 3, "stop": ["a", "b"], "do_sample": False
    }  # fmt: skip


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        (["num_beams=3", "num_beams=3"], "--default: expected each name once, got 'num_beams' twice"),
        (["temperature=NaN"], "--default: expected name=JSON value, got 'temperature=NaN'"),
        (["temperature"], "--default: expected name=JSON value, got 'temperature'"),
        (["temperature=" + "9" * 600], "temperature: expected number, got int of more than 64 bits"),
        (["stop=" + "[" * 100_000], "--default: expected name=JSON value"),
        (["temprature=1"], "expected one of"),
    ],
)
def test_other_pairs_are_refused_in_few_words(pairs: list[str], said: str) -> None:
    with pytest.raises(InvalidParameter, match=said) as caught:
        decoding_parameters("--default", pairs)
    assert len(caught.value.message) < 600
