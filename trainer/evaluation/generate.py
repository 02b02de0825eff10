"""Generates texts with a prefix, or with the backbone alone, through the engine that will serve it.

Owns the batch of requests and how they decode; knows no score and no server.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Final, Literal

from prefixes.artifact import Prefix, version_of
from prefixes.backbone import Backbone
from prefixes.errors import InputTooLong, InvalidParameter
from prefixes.spec import DEFAULT_TENANT, check_compatible
from server.engine.config import EngineConfig
from server.engine.engine import Engine
from server.engine.kernels import chosen_quantization, select_kernels
from server.engine.kernels.base import Kernels, Quantization
from server.engine.types import Failed, Finished, GenerationRequest, Output, PrefixKey, SamplingParams
from server.parameters import SAMPLING, WITHOUT_LIMITS, merge_parameters

KV_CACHE_BYTES: Final = 1 << 29
"""Memory for rows and the prefix: enough for two long inputs of BART large with beams, or for more, smaller rows."""
SCORED: Final = (
    "max_new_tokens", "min_new_tokens", "repetition_penalty", "no_repeat_ngram_size", "num_beams", "length_penalty",
    "early_stopping", "stop",
)  # fmt: skip
"""The decoding parameters that an evaluation takes; none of them samples."""

Report = Callable[[int, int], None]
"""Called after every step of the engine with the inputs done and the total."""


@dataclass(frozen=True)
class Generated:
    """The best output of one input. ``truncated``: the input was cut to the window."""

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
    quantize: Literal["auto"] | Quantization = "auto",
    report: Report = lambda done, total: None,
) -> list[Generated]:
    """Return the best output of each input, put into the prefix's template.

    Without a prefix the backbone alone answers, in ``template`` (None: its usual one). ``threads`` bounds the kernels'
    threads (None: all cores), ``quantize`` is a server's. An input that exceeds the window raises InputTooLong; with
    ``truncate`` it loses its end, as in a request. Raises a request's error, IncompatiblePrefix, InvalidParameter for
    int8 where it cannot be, and what ``report`` raises, which ends the work.
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
    device, dtype = backbone.model.device, backbone.model.dtype
    chosen = chosen_quantization(quantize, device, dtype, stored=backbone.quantized)
    try:
        kernels = select_kernels(device, dtype, threads=threads, quantize=chosen)
    except ValueError as error:
        raise InvalidParameter(str(error), got=quantize) from None
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
    except ValueError as error:  # too little memory for this backbone; the message says how much it needs
        raise InvalidParameter(str(error), got=config.kv_cache_bytes) from None


def _prompt(
    backbone: Backbone, template: str, text: str, room: int, truncate: bool, index: int
) -> tuple[tuple[int, ...], bool]:
    """Return the prompt's token ids, and whether the input was cut."""
    fitted = backbone.prompt_encoder.fit(template, text, room, truncate=truncate)
    if fitted.token_ids is None:
        raise InputTooLong(
            f"input {index + 1}: expected at most {room} tokens, got {fitted.shown}"
            + ("" if truncate else "; --truncate cuts it"),
            expected=room,
            got=fitted.got,
        )
    return fitted.token_ids, fitted.truncated


def decoding(backbone: Backbone, prefix: Prefix, given: Mapping[str, Any]) -> tuple[SamplingParams, bool]:
    """Return how the server would decode a request with ``given``, and whether it would cut long inputs.

    ``do_sample`` is false unless ``given`` has a parameter of sampling. Raises InvalidParameter.
    """
    request = dict(given) if SAMPLING & given.keys() else {**given, "do_sample": False}
    return merge_parameters(request, prefix.spec.defaults, backbone.generation_defaults, WITHOUT_LIMITS)


def check_scored(given: Mapping[str, Any]) -> None:
    """Raise InvalidParameter for a decoding parameter that an evaluation does not take."""
    foreign = sorted(given.keys() - set(SCORED))
    if foreign:
        raise InvalidParameter(f"parameter: expected some of {', '.join(SCORED)}, got {foreign[0]}", got=foreign[0])
