"""A finished request as JSON: plain dictionaries.

Owns the answer of ``/generate`` and its token events. Knows neither routes nor how an answer is sent.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from server.engine.types import Finished, Output, TokenEvent, TokenLogprob


@dataclass(frozen=True)
class Identity:
    """What an answer says about its request. ``task`` is ``tenant/name``; it and ``version`` are None for bare rows."""

    id: str
    task: str | None
    version: str | None
    truncated: bool = False


def answer(identity: Identity, finished: Finished) -> dict[str, Any]:
    """The answer of ``/generate`` and the data of a stream's ``done``."""
    body: dict[str, Any] = {
        "id": identity.id,
        "task": identity.task,
        "version": identity.version,
        "outputs": [output_body(output) for output in finished.outputs],
        "usage": {
            "input_tokens": finished.usage.input_tokens,
            "prefix_tokens": finished.usage.prefix_tokens,
            "output_tokens": finished.usage.output_tokens,
        },
        "timing": {
            "queue_ms": round(finished.timing.queue_ms, 3),
            "time_to_first_token_ms": _rounded(finished.timing.time_to_first_token_ms),
            "total_ms": round(finished.timing.total_ms, 3),
        },
    }
    if identity.truncated:
        body["truncated"] = True
    return body


def output_body(output: Output) -> dict[str, Any]:
    """One output, with ``score`` for beams and ``logprobs`` if requested."""
    body: dict[str, Any] = {
        "text": output.text,
        "token_ids": list(output.token_ids),
        "finish_reason": output.finish_reason.value,
    }
    if output.score is not None:
        body["score"] = output.score
    if output.logprobs is not None:
        body["logprobs"] = logprobs_body(output.logprobs)
    return body


def token_body(event: TokenEvent) -> dict[str, Any]:
    """The data of a stream's ``token`` event."""
    body: dict[str, Any] = {"index": event.index, "text": event.text, "token_ids": event.token_ids}
    if event.logprobs is not None:
        body["logprobs"] = logprobs_body(event.logprobs)
    return body


def logprobs_body(logprobs: Iterable[TokenLogprob]) -> list[dict[str, Any]]:
    """For each token, its log-probability and the likeliest alternatives, best first."""
    return [
        {
            "token_id": chosen.token_id,
            "logprob": chosen.logprob,
            "top": [{"token_id": token_id, "logprob": logprob} for token_id, logprob in chosen.top],
        }
        for chosen in logprobs
    ]


def _rounded(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else round(milliseconds, 3)
