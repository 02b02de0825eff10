"""Texts from a prefix, or from a bare backbone, through the engine that will serve it.

Owns the batch of requests and how they decode; knows no score and no server.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Final

from prefixes.artifact import Prefix, version_of
from prefixes.backbone import Backbone
from prefixes.errors import InputTooLong, InvalidParameter
from prefixes.spec import DEFAULT_TENANT, check_compatible
from server.engine.config import EngineConfig
from server.engine.engine import Engine
from server.engine.kernels import select_kernels
from server.engine.kernels.base import Kernels
from server.engine.types import Failed, Finished, GenerationRequest, Output, PrefixKey, SamplingParams
from server.parameters import SAMPLING, ParameterLimits, merge_parameters

KV_CACHE_BYTES: Final = 1 << 29
"""For rows and the prefix: two long inputs of a large BART with beams. More rows run at once where they are smaller."""
UNLIMITED: Final = sys.maxsize
LIMITS: Final = ParameterLimits(128, UNLIMITED, UNLIMITED, UNLIMITED)
"""A server's default length, and no limit of its own: a score is of the prefix, not of a server's settings."""
SCORED: Final = (
    "max_new_tokens", "min_new_tokens", "repetition_penalty", "no_repeat_ngram_size", "num_beams", "length_penalty",
    "early_stopping", "stop",
)  # fmt: skip
"""How an evaluation may be told to decode; nothing here samples."""

Report = Callable[[int, int], None]
"""Told after every step of the engine: inputs done, inputs in all."""


@dataclass(frozen=True)
class Generated:
    """The best output of one input. ``truncated``: the input lost its end to the window."""

    output: Output
    truncated: bool


def generate(
    backbone: Backbone,
    prefix: Prefix | None,
    inputs: Sequence[str],
    params: SamplingParams,
    *,
    template: str | None = None,
    truncate: bool = False,
    kv_cache_bytes: int = KV_CACHE_BYTES,
    threads: int | None = None,
    report: Report = lambda done, total: None,
) -> list[Generated]:
    """The best output per input, in batches, inputs in the prefix's template.

    Without a prefix it is what the backbone does by itself, or by words in ``template`` (None: the backbone's usual
    one). ``threads`` bounds the kernels' own (None: all cores). An input past the window raises InputTooLong, or with
    ``truncate`` loses its end, as in a request. Raises a request's own error, IncompatiblePrefix, and whatever
    ``report`` raises, which ends the work.
    """
    key, spec = None, None
    if prefix is not None:
        check_compatible(prefix.spec, backbone.spec)
        key, spec, template = PrefixKey(DEFAULT_TENANT, version_of(prefix)), prefix.spec, prefix.spec.template
    wrapped, room = template or backbone.input_template, backbone.spec.input_room(spec)
    prompts = [_prompt(backbone, wrapped, text, room, truncate, index) for index, text in enumerate(inputs)]

    def load(_: PrefixKey) -> Prefix:
        assert prefix is not None, "only rows with a prefix load one"
        return prefix

    config = EngineConfig(kv_cache_bytes=kv_cache_bytes)
    kernels = select_kernels(backbone.model.device, backbone.model.dtype, threads=threads)
    outputs: dict[int, Output] = {}
    with closing(_engine(backbone, kernels, config, load)) as engine:
        for index, (ids, _) in enumerate(prompts):
            request = GenerationRequest(str(index), DEFAULT_TENANT, ids, params, key, spec)
            engine.check(request)
            engine.add(request)
        while engine.requests:
            for event in engine.step():
                if isinstance(event, Failed):
                    raise event.error
                if isinstance(event, Finished):
                    outputs[int(event.request_id)] = event.outputs[0]
            report(len(outputs), len(inputs))
    return [Generated(outputs[index], cut) for index, (_, cut) in enumerate(prompts)]


def _engine(
    backbone: Backbone, kernels: Kernels, config: EngineConfig, load: Callable[[PrefixKey], Prefix]
) -> Engine:
    try:
        return Engine(backbone, kernels, config, load)
    except ValueError as error:  # too little memory for this backbone: it says how much it wants
        raise InvalidParameter(str(error), got=config.kv_cache_bytes) from None


def _prompt(
    backbone: Backbone, template: str, text: str, room: int, truncate: bool, index: int
) -> tuple[tuple[int, ...], bool]:
    """Token ids, and whether some were cut."""
    ids = backbone.prompt_encoder.encode(template, text)
    if len(ids) <= room:
        return tuple(ids), False
    kept = backbone.prompt_encoder.cut(template, ids, room) if truncate else None
    if kept is None:
        raise InputTooLong(
            f"input {index + 1}: expected at most {room} tokens, got {len(ids)}"
            + ("" if truncate else "; --truncate cuts it"),
            expected=room,
            got=len(ids),
        )
    return tuple(kept), True


def decoding(backbone: Backbone, prefix: Prefix, given: Mapping[str, Any]) -> tuple[SamplingParams, bool]:
    """How the server would decode a request of ``given``, and whether it would cut long inputs.

    Where ``given`` says nothing of sampling, it is a request with ``do_sample`` false. Raises InvalidParameter.
    """
    request = dict(given) if SAMPLING & given.keys() else {**given, "do_sample": False}
    return merge_parameters(request, prefix.spec.defaults, backbone.generation_defaults, LIMITS)


def check_scored(given: Mapping[str, Any]) -> None:
    """Raise InvalidParameter for a decoding parameter that an evaluation does not take."""
    foreign = sorted(given.keys() - set(SCORED))
    if foreign:
        raise InvalidParameter(f"parameter: expected some of {', '.join(SCORED)}, got {foreign[0]}", got=foreign[0])
