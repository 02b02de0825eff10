"""OpenAI's form: what its fields mean here, and how answers and chunks are built."""

from __future__ import annotations

from typing import Any

import pytest

from prefixes.errors import InvalidParameter
from server.engine.types import Finished, FinishReason, Output, Timing, TokenEvent, Usage
from server.openai.answers import ChunkWriter, completion
from server.openai.offsets import TokenTexts
from server.openai.schemas import CompletionRequest


def parameters(**fields: Any) -> dict[str, Any]:
    return CompletionRequest.model_validate({"model": "e2e", "prompt": "x", **fields}).parameters()


class NoTexts(TokenTexts):
    """For answers without log-probabilities."""

    def __init__(self) -> None:
        super().__init__(None)


def finished(*outputs: Output) -> Finished:
    return Finished("r", outputs, Usage(3, 5, sum(len(o.token_ids) for o in outputs)), Timing(0, 1, 2))


def test_left_out_fields_leave_the_tasks_defaults_alone() -> None:
    assert parameters() == {}


def test_fields_take_our_names() -> None:
    assert parameters(max_tokens=7, top_p=0.5, temperature=0.7, stop="x", seed=1, logprobs=0, n=2) == {
        "max_new_tokens": 7, "top_p": 0.5, "temperature": 0.7, "stop": ["x"], "seed": 1, "logprobs": 0,
        "num_return_sequences": 2, "do_sample": True,
    }


def test_temperature_zero_is_greedy() -> None:
    assert parameters(temperature=0, top_p=0.5) == {"do_sample": False, "num_beams": 1}


def test_our_own_parameters_pass() -> None:
    given = {"top_k": 3, "num_beams": 2, "truncate": True, "length_penalty": 0.5}
    assert parameters(**given) == given


@pytest.mark.parametrize(
    "field",
    [{"best_of": 2}, {"echo": True}, {"suffix": "x"}, {"presence_penalty": 0.5}, {"frequency_penalty": -1},
     {"logit_bias": {"50256": -100}}],
)
def test_what_cannot_be_honoured_is_refused_by_name(field: dict[str, Any]) -> None:
    with pytest.raises(InvalidParameter, match=f"{next(iter(field))}: not supported"):
        parameters(**field)


def test_neutral_values_of_unsupported_fields_are_accepted() -> None:
    neutral: dict[str, Any] = {
        "best_of": 1, "echo": False, "suffix": None, "presence_penalty": 0, "frequency_penalty": 0.0,
        "logit_bias": {}, "user": "someone",
    }  # fmt: skip
    assert parameters(**neutral) == {}


@pytest.mark.parametrize("prompt", [[1, 2, 3], [[1], [2]], [], ["x"] * 4, {"text": "x"}, 5, None, ["x", 1]])
def test_prompts_that_are_no_texts_are_refused(prompt: Any) -> None:
    with pytest.raises(InvalidParameter, match="prompt: expected"):
        CompletionRequest(model="e2e", prompt=prompt).prompts(most=3)


def test_choices_are_counted_through_all_prompts() -> None:
    outputs = [Output(text, (1, 2), FinishReason.STOP) for text in "abc"]
    body = completion("id", 0, "e2e", [finished(*outputs[:2]), finished(outputs[2])], [NoTexts()] * 2)
    assert [(choice["index"], choice["text"]) for choice in body["choices"]] == [(0, "a"), (1, "b"), (2, "c")]
    assert body["usage"] == {"prompt_tokens": 6, "completion_tokens": 6, "total_tokens": 12}


def test_chunks_joined_are_the_text_with_or_without_token_events() -> None:
    output = Output("hello", (1, 2), FinishReason.LENGTH)
    for sent in (["hel", "", "lo"], ["hel"], []):
        writer = ChunkWriter(4, NoTexts())
        choices = [choice for text in sent for choice in writer.token(TokenEvent("r", 0, text, (1,)))]
        choices += writer.end(finished(output))
        assert "".join(choice["text"] for choice in choices) == "hello"
        assert {choice["index"] for choice in choices} == {4}
        assert [choice["finish_reason"] for choice in choices][-1] == "length"
        assert all(choice["finish_reason"] is None for choice in choices[:-1])
