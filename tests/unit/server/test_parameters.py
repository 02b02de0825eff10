"""Decoding parameters: precedence, implication, limits."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefixes.errors import InvalidParameter
from server.engine.types import SamplingParams
from server.parameters import WITHOUT_LIMITS, ParameterLimits, check_defaults, merge_parameters

LIMITS = ParameterLimits(default_max_new_tokens=128, max_new_tokens=1000, num_beams=8, num_return_sequences=4)


def merge(
    request: dict[str, Any] | None = None,
    artifact: dict[str, Any] | None = None,
    backbone: dict[str, Any] | None = None,
) -> SamplingParams:
    return merge_parameters(request or {}, artifact or {}, backbone or {}, LIMITS)[0]


def test_without_a_word_from_anyone_decoding_is_greedy_with_the_servers_length() -> None:
    assert merge() == SamplingParams(max_new_tokens=128)


def test_request_wins_over_artifact_over_backbone_over_server() -> None:
    params = merge(
        {"max_new_tokens": 1},
        {"max_new_tokens": 2, "repetition_penalty": 2.0},
        {"max_new_tokens": 3, "repetition_penalty": 3.0, "no_repeat_ngram_size": 3},
    )
    assert (params.max_new_tokens, params.repetition_penalty, params.no_repeat_ngram_size) == (1, 2.0, 3)


@pytest.mark.parametrize("name", ["temperature", "top_p", "top_k"])
def test_a_filter_alone_means_sampling_in_request_and_artifact(name: str) -> None:
    assert merge({name: 1}).do_sample
    assert merge({}, {name: 1}).do_sample


def test_a_filter_alone_in_the_generation_config_waits_for_do_sample() -> None:
    assert not merge({}, {}, {"top_k": 50}).do_sample
    sampled = merge({"do_sample": True}, {}, {"top_k": 50, "temperature": 0.7})
    assert (sampled.do_sample, sampled.top_k, sampled.temperature) == (True, 50, 0.7)


@pytest.mark.parametrize("name", ["temperature", "top_p", "top_k"])
def test_a_request_that_contradicts_itself_is_refused(name: str) -> None:
    with pytest.raises(InvalidParameter, match=f"{name}: expected none with do_sample false"):
        merge({"do_sample": False, name: 1})
    with pytest.raises(InvalidParameter, match=f"{name}: expected none with num_beams above 1"):
        merge({"num_beams": 2, name: 1})


def test_sampling_in_the_request_puts_the_artifacts_beams_aside() -> None:
    params = merge({"temperature": 0.5}, {"num_beams": 5, "length_penalty": 0.9, "max_new_tokens": 9})
    assert (params.do_sample, params.num_beams, params.length_penalty, params.max_new_tokens) == (True, 1, 1.0, 9)


def test_beams_in_the_request_put_the_artifacts_sampling_and_stops_aside() -> None:
    params = merge({"num_beams": 3}, {"temperature": 0.5, "top_p": 0.9, "stop": ["\n"]})
    assert params == SamplingParams(max_new_tokens=128, num_beams=3)


def test_an_inherited_length_penalty_is_cut_to_what_the_requests_length_allows_and_a_given_one_is_refused() -> None:
    artifact = {"num_beams": 5, "length_penalty": 30.0, "max_new_tokens": 9}
    assert merge({}, artifact).length_penalty == 30.0
    assert merge({"max_new_tokens": 64}, artifact).length_penalty == 21.0
    assert merge({"max_new_tokens": 64}, artifact | {"length_penalty": -30.0}).length_penalty == -21.0
    with pytest.raises(InvalidParameter, match=r"length_penalty: expected -21 to 21 with max_new_tokens 64, got 30\.0"):
        merge({"max_new_tokens": 64, "length_penalty": 30.0}, artifact)
    with pytest.raises(InvalidParameter, match="length_penalty: expected -21 to 21"):
        merge({}, artifact | {"max_new_tokens": 64})


def test_another_number_of_beams_keeps_the_artifacts_length_penalty() -> None:
    params = merge({"num_beams": 2}, {"num_beams": 5, "length_penalty": 0.9})
    assert (params.num_beams, params.length_penalty) == (2, 0.9)


@pytest.mark.parametrize("asked", [{"stop": ["x"]}, {"logprobs": 0}, {"num_beams": 1}])
def test_what_beams_cannot_do_puts_the_artifacts_beams_aside(asked: dict[str, Any]) -> None:
    assert merge(asked, {"num_beams": 5, "length_penalty": 0.9}).num_beams == 1


def test_do_sample_false_turns_the_artifacts_sampling_off() -> None:
    assert merge({"do_sample": False}, {"temperature": 0.5, "num_return_sequences": 3}) == merge()


def test_defaults_are_cut_to_the_limits_and_requests_are_refused() -> None:
    assert merge({}, {"max_new_tokens": 5000}).max_new_tokens == 1000
    assert merge({}, {}, {"num_beams": 50}).num_beams == 8
    for name, value in {"max_new_tokens": 1001, "num_beams": 9, "num_return_sequences": 5}.items():
        with pytest.raises(InvalidParameter, match=rf"{name}: expected at most {value - 1}.*got {value}"):
            merge({name: value})


def test_an_inherited_minimum_yields_to_the_requests_maximum() -> None:
    assert merge({"max_new_tokens": 3}, {"min_new_tokens": 10}).min_new_tokens == 3


def test_a_minimum_above_the_default_length_raises_the_length() -> None:
    assert merge({"min_new_tokens": 200}).max_new_tokens == 200


def test_truncate_is_not_a_parameter_of_the_engine() -> None:
    assert merge_parameters({"truncate": True}, {}, {}, LIMITS) == (SamplingParams(max_new_tokens=128), True)
    assert merge_parameters({"truncate": False}, {"truncate": True}, {}, LIMITS)[1] is False


LAYER = st.fixed_dictionaries(
    {},
    optional={
        "max_new_tokens": st.integers(1, 2000),
        "min_new_tokens": st.integers(0, 2000),
        "do_sample": st.booleans(),
        "temperature": st.floats(0.1, 2),
        "top_k": st.integers(0, 10),
        "top_p": st.floats(0.1, 1),
        "num_beams": st.integers(1, 20),
        "length_penalty": st.floats(-2, 2),
        "early_stopping": st.sampled_from([True, False, "never"]),
        "stop": st.lists(st.text(min_size=1, max_size=3), max_size=3),
        "logprobs": st.integers(0, 5),
    },
)


@given(LAYER, LAYER)
def test_lower_layers_never_make_a_plain_request_contradictory(
    artifact: dict[str, Any], backbone: dict[str, Any]
) -> None:
    merge({}, artifact, backbone)
    merge({"temperature": 0.7}, artifact, backbone)
    merge({"do_sample": False, "num_beams": 1}, artifact, backbone)
    merge({"num_beams": 4, "num_return_sequences": 4}, artifact, backbone)


@pytest.mark.parametrize(
    "lower", [{"num_beams": 4, "num_return_sequences": 4}, {"do_sample": True, "num_return_sequences": 3}], ids=str
)
def test_beams_in_the_request_cut_the_outputs_that_a_lower_layer_asks_for(lower: dict[str, Any]) -> None:
    assert merge({"num_beams": 2}, lower).num_return_sequences == 2
    with pytest.raises(InvalidParameter, match="num_return_sequences: expected at most num_beams"):
        merge({"num_beams": 2, "num_return_sequences": 3}, lower)


GOOD_DEFAULTS: tuple[dict[str, Any], ...] = (
    {}, {"num_beams": 5, "num_return_sequences": 5}, {"do_sample": True, "num_return_sequences": 3}, {"truncate": True},
    {"num_beams": 5, "stop": ["a"]}, {"logprobs": 3}, {"temperature": 0.5, "top_k": 5}, {"seed": 2**63 - 1},
    {"do_sample": False, "temperature": 0.5}, {"min_new_tokens": 300}, {"num_return_sequences": 3},
)  # fmt: skip
BAD_DEFAULTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("temperature", {"num_beams": 1, "do_sample": True, "temperature": -1}),
    ("temperature", {"num_beams": 5, "temperature": -1}),
    ("temperature", {"do_sample": False, "temperature": 1e300}),
    ("temperature", {"temperature": 10**600}),
    ("top_p", {"do_sample": False, "top_p": 2}),
    ("top_k", {"num_beams": 2, "do_sample": True, "top_k": -1}),
    ("top_k", {"top_k": 1 << 40}),
    ("no_repeat_ngram_size", {"no_repeat_ngram_size": 10**18}),
    ("stop", {"stop": ["a"] * 17}),
    ("stop", {"num_beams": 5, "stop": ["a"] * 17}),
    ("stop", {"stop": [""]}),
    ("stop", {"stop": ["\ud800"]}),
    ("seed", {"seed": 10**30}),
    ("seed", {"num_beams": 3, "seed": -1}),
    ("num_beams", {"num_beams": 0}),
    ("max_new_tokens", {"max_new_tokens": 0}),
    ("max_new_tokens", {"max_new_tokens": 10**30}),
    ("min_new_tokens", {"min_new_tokens": -1}),
    ("num_return_sequences", {"num_return_sequences": 0}),
    ("num_return_sequences", {"num_beams": 1, "num_return_sequences": -3}),
    ("num_return_sequences", {"num_beams": 2, "num_return_sequences": 3}),
    ("length_penalty", {"length_penalty": 1e5}),
    ("repetition_penalty", {"repetition_penalty": 0}),
    ("logprobs", {"num_beams": 3, "logprobs": 21}),
    ("early_stopping", {"early_stopping": "sometimes"}),
    ("temprature", {"temprature": 1}),
)


@pytest.mark.parametrize("limits", [LIMITS, WITHOUT_LIMITS], ids=["server", "trainer"])
def test_defaults_are_refused_if_a_request_could_fail_with_them(limits: ParameterLimits) -> None:
    for name, bad in BAD_DEFAULTS:
        with pytest.raises(InvalidParameter, match=name):
            check_defaults(bad, {}, limits)


@pytest.mark.parametrize("limits", [LIMITS, WITHOUT_LIMITS], ids=["server", "trainer"])
@pytest.mark.parametrize("defaults", GOOD_DEFAULTS, ids=str)
@pytest.mark.parametrize(
    "request_",
    [{}, {"do_sample": True}, {"do_sample": False}, {"temperature": 0.5}, {"num_beams": 2}, {"num_beams": 1}],
    ids=str,
)
def test_no_request_fails_with_defaults_that_were_accepted(
    request_: dict[str, Any], defaults: dict[str, Any], limits: ParameterLimits
) -> None:
    check_defaults(defaults, {}, limits)
    merge_parameters(request_, defaults, {}, limits)


def test_a_default_beyond_the_servers_limit_is_cut_and_without_a_limit_refused() -> None:
    check_defaults({"num_beams": 100, "max_new_tokens": 1 << 40}, {}, LIMITS)
    for name, value in (("num_beams", 100), ("max_new_tokens", 1 << 40)):
        with pytest.raises(InvalidParameter, match=name):
            check_defaults({name: value}, {}, WITHOUT_LIMITS)


def test_deep_defaults_are_refused_in_few_words() -> None:
    deep: Any = []
    for _ in range(950):
        deep = [deep]
    for defaults in ({"stop": deep}, {"early_stopping": deep}, {"temperature": deep}):
        with pytest.raises(InvalidParameter) as caught:
            check_defaults(defaults, {}, LIMITS)
        assert len(caught.value.message) < 300
