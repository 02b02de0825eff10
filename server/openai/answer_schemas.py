"""The types of OpenAI's answers as ``answers`` makes them, for the OpenAPI document. Knows no route."""

from __future__ import annotations

from typing import Literal

from typing_extensions import TypedDict

from server.web.answer_types import CLOSED


class ChoiceLogprobs(TypedDict):
    __pydantic_config__ = CLOSED  # type: ignore[misc]
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class Choice(TypedDict):
    __pydantic_config__ = CLOSED  # type: ignore[misc]
    index: int
    text: str
    logprobs: ChoiceLogprobs | None
    finish_reason: Literal["stop", "length"]


class CompletionUsage(TypedDict):
    __pydantic_config__ = CLOSED  # type: ignore[misc]
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TextCompletion(TypedDict):
    __pydantic_config__ = CLOSED  # type: ignore[misc]
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: CompletionUsage


class Model(TypedDict):
    """``root`` is the version behind a task, or the backbone's fingerprint."""

    __pydantic_config__ = CLOSED  # type: ignore[misc]
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str


class ModelList(TypedDict):
    __pydantic_config__ = CLOSED  # type: ignore[misc]
    object: Literal["list"]
    data: list[Model]
