"""OpenAI's bodies: completions, their chunks, models. Makes plain dictionaries from the engine's outputs.

Owns the form and what a stream has sent so far. Knows no routes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from server.engine.types import Finished, FinishReason, Output, TokenEvent, TokenLogprob, Usage
from server.openai.offsets import TextOffsets, TokenTexts

Placed = tuple[int, TokenLogprob]
"""A token's log-probabilities, and where its text begins in its output."""


def completion(
    id: str, created: int, model: str, finished: Sequence[Finished], texts: Sequence[TokenTexts]
) -> dict[str, Any]:
    """The answer to all prompts of a request, each with its ``texts``. Choices are numbered across all, in order."""
    outputs = [(output, own) for one, own in zip(finished, texts, strict=True) for output in one.outputs]
    choices = [
        choice(index, output.text, output.finish_reason, _logprobs_of(output, own))
        for index, (output, own) in enumerate(outputs)
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


def logprobs_body(placed: Iterable[Placed], texts: TokenTexts) -> dict[str, Any]:
    """OpenAI's four lists. The chosen token is in ``top_logprobs``, be it among the likeliest or not."""
    body: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for offset, chosen in placed:
        token, top = texts.token(chosen.token_id), dict[str, float]()
        for token_id, logprob in chosen.top:
            top.setdefault(texts.token(token_id), logprob)  # of tokens with one text, the likeliest
        top[token] = chosen.logprob
        body["tokens"].append(token)
        body["token_logprobs"].append(chosen.logprob)
        body["top_logprobs"].append(top)
        body["text_offset"].append(offset)
    return body


def _logprobs_of(output: Output, texts: TokenTexts) -> dict[str, Any] | None:
    if output.logprobs is None:
        return None
    offsets = TextOffsets(texts)
    placed = [(offsets.add(one.token_id), one) for one in output.logprobs]
    return logprobs_body(_within(placed, output), texts)


def _within(placed: Iterable[Placed], output: Output) -> list[Placed]:
    """A stop string's tokens begin where the text ends, because the text leaves it out."""
    return [(min(offset, len(output.text)), one) for offset, one in placed]


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

    A token's log-probabilities go out with its text. Joined, text and log-probabilities are those of ``completion``.
    """

    first: int
    texts: TokenTexts
    _sent: dict[int, int] = field(default_factory=dict)  # output -> characters sent
    _offsets: dict[int, TextOffsets] = field(default_factory=dict)  # output -> of its tokens
    _waiting: dict[int, list[Placed]] = field(default_factory=dict)  # output -> tokens whose text was not sent

    def token(self, event: TokenEvent) -> list[dict[str, Any]]:
        """The choice for a token event; none for an event without text."""
        if event.logprobs:
            offsets = self._offsets.setdefault(event.index, TextOffsets(self.texts))
            waiting = self._waiting.setdefault(event.index, [])
            waiting += [(offsets.add(one.token_id), one) for one in event.logprobs]
        if not event.text:
            return []
        sent = self._sent[event.index] = self._sent.get(event.index, 0) + len(event.text)
        waiting = self._waiting.pop(event.index, [])
        shown = [one for one in waiting if one[0] < sent]
        self._waiting[event.index] = waiting[len(shown) :]
        return [choice(self.first + event.index, event.text, None, self._body(shown))]

    def end(self, finished: Finished) -> list[dict[str, Any]]:
        """The last choice of every output: what was not sent yet (all of it with beams) and why it ended."""
        return [
            choice(
                self.first + index,
                output.text[self._sent.get(index, 0) :],
                output.finish_reason,
                self._body(_within(self._waiting.get(index, []), output)),
            )
            for index, output in enumerate(finished.outputs)
        ]

    def _body(self, placed: list[Placed]) -> dict[str, Any] | None:
        return logprobs_body(placed, self.texts) if placed else None
