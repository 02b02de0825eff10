"""What goes into the engine and what comes out. Torch-free.

Owns the request, its parameters, its events, and the figures; knows neither tensors nor HTTP nor the registry.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

from prefixes.errors import InvalidParameter, PrefixdError
from prefixes.spec import PrefixSpec

MAX_ROWS_PER_REQUEST = 64
MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256  # characters
MAX_LOGPROBS = 20
MAX_LENGTH_PENALTY = 100.0
MAX_TEMPERATURE = 100.0
MIN_REPETITION_PENALTY = 0.01
MAX_REPETITION_PENALTY = 100.0


class FinishReason(StrEnum):
    """Why an output ended. ``stop``: end token or stop string; ``length``: the limit or the window."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


@dataclass(frozen=True)
class SamplingParams:
    """How one request decodes. Names and meanings are transformers' own; 0 or 1.0 switches a filter off.

    ``num_beams > 1`` is beam search; otherwise ``do_sample`` chooses sampling over greedy. ``stop`` strings end an
    output and are not part of its text. ``logprobs`` asks for each chosen token's log-probability under the raw
    distribution, and for that many alternatives. The engine draws a seed where ``seed`` is None. Raises
    InvalidParameter.
    """

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    num_return_sequences: int = 1
    stop: tuple[str, ...] = ()
    seed: int | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        self._check_ranges()
        self._check_contradictions()

    def _check_ranges(self) -> None:
        _require(self.max_new_tokens >= 1, "max_new_tokens", "at least 1", self.max_new_tokens)
        _require(self.min_new_tokens >= 0, "min_new_tokens", "at least 0", self.min_new_tokens)
        _require(0 < self.temperature <= MAX_TEMPERATURE, "temperature", f"above 0, at most {MAX_TEMPERATURE:g}",
                 self.temperature)
        _require(self.top_k >= 0, "top_k", "at least 0 (0 is off)", self.top_k)
        _require(0 < self.top_p <= 1, "top_p", "above 0, at most 1", self.top_p)
        _require(MIN_REPETITION_PENALTY <= self.repetition_penalty <= MAX_REPETITION_PENALTY, "repetition_penalty",
                 f"{MIN_REPETITION_PENALTY:g} to {MAX_REPETITION_PENALTY:g}", self.repetition_penalty)
        _require(self.no_repeat_ngram_size >= 0, "no_repeat_ngram_size", "at least 0 (0 is off)",
                 self.no_repeat_ngram_size)
        _require(1 <= self.num_beams <= MAX_ROWS_PER_REQUEST, "num_beams", f"1 to {MAX_ROWS_PER_REQUEST}",
                 self.num_beams)
        _require(abs(self.length_penalty) <= MAX_LENGTH_PENALTY, "length_penalty",
                 f"{-MAX_LENGTH_PENALTY:g} to {MAX_LENGTH_PENALTY:g}", self.length_penalty)
        _require(self.early_stopping in (True, False, "never"), "early_stopping", "true, false or 'never'",
                 self.early_stopping)
        _require(1 <= self.num_return_sequences <= MAX_ROWS_PER_REQUEST, "num_return_sequences",
                 f"1 to {MAX_ROWS_PER_REQUEST}", self.num_return_sequences)
        _require(len(self.stop) <= MAX_STOP_STRINGS, "stop", f"at most {MAX_STOP_STRINGS} strings", len(self.stop))
        shortest, longest = min(self.stop, key=len, default="x"), max(self.stop, key=len, default="x")
        _require(bool(shortest), "stop", "non-empty strings", "")
        _require(len(longest) <= MAX_STOP_LENGTH, "stop", f"strings of at most {MAX_STOP_LENGTH} characters",
                 f"one of {len(longest)}")
        _require(self.seed is None or 0 <= self.seed < 2**63, "seed", "0 to 2**63 - 1", self.seed)
        _require(self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS, "logprobs", f"0 to {MAX_LOGPROBS}",
                 self.logprobs)

    def _check_contradictions(self) -> None:
        _require(self.min_new_tokens <= self.max_new_tokens, "min_new_tokens",
                 f"at most max_new_tokens ({self.max_new_tokens})", self.min_new_tokens)
        if self.num_beams > 1:
            most = length_penalty_limit(self.max_new_tokens)
            _require(abs(self.length_penalty) <= most, "length_penalty",
                     f"{-most:g} to {most:g} with max_new_tokens {self.max_new_tokens}", self.length_penalty)
            _require(not self.do_sample, "do_sample", "false with num_beams above 1", self.do_sample)
            _require(self.num_return_sequences <= self.num_beams, "num_return_sequences",
                     f"at most num_beams ({self.num_beams})", self.num_return_sequences)
            _require(self.logprobs is None, "logprobs", "none with num_beams above 1", self.logprobs)
            _require(not self.stop, "stop", "none with num_beams above 1", list(self.stop))
        elif not self.do_sample:
            _require(self.num_return_sequences == 1, "num_return_sequences", "1 for greedy decoding",
                     self.num_return_sequences)

    @property
    def rows(self) -> int:
        """Rows that the request occupies while it decodes."""
        return max(self.num_beams, self.num_return_sequences)


def length_penalty_limit(max_new_tokens: int) -> float:
    """The most, above and below 0, that ``length_penalty`` may be for outputs of up to ``max_new_tokens``.

    Up to there ``length ** length_penalty`` and the score of a log-probability of -1 are normal numbers in float32
    (2**-126 is the smallest). Beyond, scores become equal or infinite.
    """
    if max_new_tokens == 1:
        return MAX_LENGTH_PENALTY
    return min(MAX_LENGTH_PENALTY, math.floor(100 * 126 / math.log2(max_new_tokens)) / 100)


def _require(condition: bool, name: str, expected: str, got: Any) -> None:
    if not condition:
        raise InvalidParameter(f"{name}: expected {expected}, got {got!r}", parameter=name, expected=expected, got=got)


@dataclass(frozen=True)
class PrefixKey:
    """Identifies a prefix everywhere in the engine: never a reusable number, never a bare digest."""

    tenant: str
    version: str


@dataclass(frozen=True)
class GenerationRequest:
    """One request: everything is resolved, validated and tokenised.

    ``prefix`` None is the bare backbone. ``prefix_spec`` goes with ``prefix``: lengths and positions are needed before
    the tensors are loaded. ``task`` only labels metrics. ``caller`` is the tenant that asks: it shares reused prompts
    with nobody else. ``key`` is the id of the key that it asks with, if any. ``owner`` is the tenant whose task it is.
    """

    request_id: str
    caller: str
    token_ids: tuple[int, ...]
    params: SamplingParams
    prefix: PrefixKey | None = None
    prefix_spec: PrefixSpec | None = None
    task: str | None = None
    key: str | None = None

    @property
    def owner(self) -> str | None:
        """The owner of the prefix; None for the bare backbone."""
        return self.prefix.tenant if self.prefix else None


@dataclass(frozen=True)
class TokenLogprob:
    """A chosen token's log-probability and the ``logprobs`` most likely alternatives, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Output:
    """One finished output. ``score`` is a beam's: its sum of log-probabilities over ``length ** length_penalty``."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    score: float | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None


@dataclass(frozen=True)
class Usage:
    """What a request has taken, and what is billed.

    ``input_tokens`` were computed, or reused of an earlier prompt: all of them, of a request that finished.
    ``prefix_tokens`` counts virtual positions, all sites together, once it ran. ``output_tokens`` are those of the
    outputs; beams that were given up do not count.
    """

    input_tokens: int
    prefix_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class Timing:
    """Milliseconds from the request's submission to its first step, its first token and its end."""

    queue_ms: float
    time_to_first_token_ms: float | None
    total_ms: float


@dataclass(frozen=True)
class TokenEvent:
    """New tokens of output ``index``. ``text`` may be empty while a character or a possible stop string is incomplete.

    All of an output's ``text``, joined, is exactly its final text.
    """

    request_id: str
    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None


@dataclass(frozen=True)
class Finished:
    """The terminal event of a request that did not fail: all its outputs (an abort's are partial, and so its usage)."""

    request_id: str
    outputs: tuple[Output, ...]
    usage: Usage
    timing: Timing


@dataclass(frozen=True)
class Failed:
    """The terminal event of a request that could not run, or failed while it ran; ``usage`` None: it never ran."""

    request_id: str
    error: PrefixdError
    usage: Usage | None = None


Event = TokenEvent | Finished | Failed


@dataclass(frozen=True)
class EngineStats:
    """A snapshot for gauges. ``kv_usage`` is the share of blocks that rows and resident prefixes hold, 0 to 1.

    Staged prefixes are loaded and wait in host memory for their blocks. Preempted ones have left their blocks for host
    memory, because requests that were preempted need them again. Callers without a request are in neither mapping.
    """

    running: int
    waiting: int
    kv_usage: float
    resident_prefixes: int
    resident_prefix_bytes: int
    resident_prefix_limit_bytes: int
    staged_prefix_bytes: int
    preempted_prefix_bytes: int
    running_by_caller: Mapping[str, int] = field(default_factory=dict)
    waiting_by_caller: Mapping[str, int] = field(default_factory=dict)
