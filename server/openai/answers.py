"""OpenAI's bodies: completions, their chunks, models. Makes plain dictionaries from the engine's outputs.

Owns the form and what a stream has sent so far. Knows no routes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from server.engine.types import Finished, FinishReason, TokenEvent, TokenLogprob, Usage

TokenText = Callable[[int], str]
"""The text of a single token id."""


def completion(
    id: str, created: int, model: str, finished: Sequence[Finished], token_text: TokenText
) -> dict[str, Any]:
    """The answer to all prompts of a request. Choices are numbered across all prompts, in their order."""
    outputs = [output for one in finished for output in one.outputs]
    choices = [
        choice(index, output.text, output.finish_reason, logprobs_body(output.logprobs, token_text))
        for index, output in enumerate(outputs)
    ]
    return {**chunk(id, created, model, choices), "usage": usage_body([one.usage for one in finished])}


def chunk(id: str, created: int, model: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
    """One piece of a stream. A whole answer has the same frame."""
    return {"id": id, "object": "text_completion", "created": created, "model": model, "choices": choices}


def choice(
    index: int, text: str, reason: FinishReason | None = None, logprobs: dict[str, Any] | None = None
) -> dict[str, Any]:
    """One choice, or a piece of it. An aborted output was cut short, so its reason is ``length``."""
    name = None if reason is None else "stop" if reason is FinishReason.STOP else "length"
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": name}


def logprobs_body(
    logprobs: Iterable[TokenLogprob] | None, token_text: TokenText, offset: int = 0
) -> dict[str, Any] | None:
    """OpenAI's four lists. ``offset`` is where the first token's text begins in its output."""
    if logprobs is None:
        return None
    body: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for chosen in logprobs:
        text = token_text(chosen.token_id)
        body["tokens"].append(text)
        body["token_logprobs"].append(chosen.logprob)
        body["top_logprobs"].append({token_text(token_id): logprob for token_id, logprob in reversed(chosen.top)})
        body["text_offset"].append(offset)
        offset += len(text)
    return body


def usage_body(usages: Iterable[Usage]) -> dict[str, int]:
    """The sum of ``usages``. Prefixes do not count as prompt tokens, because they cost nothing to read."""
    pairs = [(usage.input_tokens, usage.output_tokens) for usage in usages]
    prompt, output = sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)
    return {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}


def model_body(id: str, created: int, owner: str, root: str) -> dict[str, Any]:
    """One entry of ``/v1/models``. ``root`` is the version behind a task, or the backbone's fingerprint."""
    return {"id": id, "object": "model", "created": created, "owned_by": owner, "root": root}


@dataclass
class ChunkWriter:
    """Turns one prompt's events into choices, from index ``first`` on. The end brings the text that no event carried.
    """

    first: int
    token_text: TokenText
    _sent: dict[int, int] = field(default_factory=dict)  # output -> characters sent
    _offsets: dict[int, int] = field(default_factory=dict)  # output -> characters of its tokens so far

    def token(self, event: TokenEvent) -> list[dict[str, Any]]:
        """The choice for a token event; none for an event with neither text nor log-probabilities."""
        self._sent[event.index] = self._sent.get(event.index, 0) + len(event.text)
        if not event.text and event.logprobs is None:
            return []
        offset = self._offsets.get(event.index, 0)
        body = logprobs_body(event.logprobs, self.token_text, offset)
        self._offsets[event.index] = offset + sum(map(len, body["tokens"])) if body else offset
        return [choice(self.first + event.index, event.text, None, body)]

    def end(self, finished: Finished) -> list[dict[str, Any]]:
        """The last choice of every output: the text not sent yet (all of it with beams) and why it ended."""
        return [
            choice(self.first + index, output.text[self._sent.get(index, 0) :], output.finish_reason)
            for index, output in enumerate(finished.outputs)
        ]
