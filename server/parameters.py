"""Merges four layers of decoding parameters into one SamplingParams: request, artifact, backbone, server.

Owns precedence, implication and the server's limits. Knows no HTTP. SamplingParams checks ranges and contradictions.

- If a layer says how to decode (beams, sampling, greedy), it drops the lower layers' parameters for another way. So a
  lower layer never makes a request contradictory. A request that contradicts itself is an error.
- In a request or an artifact, temperature, top_k or top_p without do_sample mean sampling. In a backbone's generation
  config they do not: there they wait for do_sample, as in transformers.
- A request beyond a limit is an error. An artifact's or a backbone's default beyond it is cut to the limit.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from prefixes.errors import InvalidArtifact, InvalidParameter
from prefixes.parameters import DECODING_PARAMETERS, check_decoding_parameters
from prefixes.spec_json import check_json
from server.engine.types import SamplingParams, length_penalty_limit

MAX_INTEGER: Final = (1 << 31) - 1
"""Of every integer but a seed, in requests and defaults."""
FILTERS: Final = ("temperature", "top_k", "top_p")
SAMPLING: Final = frozenset({"do_sample", *FILTERS})
BEAMS: Final = frozenset({"num_beams", "length_penalty", "early_stopping"})
NOT_WITH_BEAMS: Final = frozenset({"stop", "logprobs"})


@dataclass(frozen=True)
class ParameterLimits:
    """The server's default output length, and the most that any request gets.

    ``of_caller`` are those of them that the caller's own limits have lowered.
    """

    default_max_new_tokens: int
    max_new_tokens: int
    num_beams: int
    num_return_sequences: int
    of_caller: frozenset[str] = frozenset()

    def within(self, max_new_tokens: int | None, num_beams: int | None) -> ParameterLimits:
        """These, lowered to a caller's; None is no limit of its own."""
        tokens = self.max_new_tokens if max_new_tokens is None else min(self.max_new_tokens, max_new_tokens)
        beams = self.num_beams if num_beams is None else min(self.num_beams, num_beams)
        lowered = set(self.of_caller)
        if tokens < self.max_new_tokens:
            lowered |= {"max_new_tokens", "min_new_tokens"}
        if beams < self.num_beams:
            lowered.add("num_beams")
        return replace(
            self,
            default_max_new_tokens=min(self.default_max_new_tokens, tokens),
            max_new_tokens=tokens,
            num_beams=beams,
            of_caller=frozenset(lowered),
        )

    def most(self) -> Mapping[str, int]:
        return {
            "max_new_tokens": self.max_new_tokens,
            "min_new_tokens": self.max_new_tokens,
            "num_beams": self.num_beams,
            "num_return_sequences": self.num_return_sequences,
        }


WITHOUT_LIMITS: Final = ParameterLimits(128, sys.maxsize, sys.maxsize, sys.maxsize)
"""A server's default length and no other limit, so that a trainer's verdict does not depend on a server's settings."""


def merge_parameters(
    request: Mapping[str, Any], artifact: Mapping[str, Any], backbone: Mapping[str, Any], limits: ParameterLimits
) -> tuple[SamplingParams, bool]:
    """The parameters to decode with, and whether a long input is to be truncated. Raises InvalidParameter.

    ``request`` holds only the parameters that were given, with types already checked.
    """
    _check_request(request, limits)
    above = _with_implied_sampling(request)
    for lower in (_with_implied_sampling(artifact), backbone):
        above = _over(above, _clamped(lower, limits))
    if "max_new_tokens" not in above:
        above["max_new_tokens"] = max(limits.default_max_new_tokens, request.get("min_new_tokens", 0))
    if "min_new_tokens" not in request:
        above["min_new_tokens"] = min(above.get("min_new_tokens", 0), above["max_new_tokens"])
    if "length_penalty" in above and "length_penalty" not in request and "max_new_tokens" in request:
        most = length_penalty_limit(max(1, above["max_new_tokens"]))
        above["length_penalty"] = min(max(above["length_penalty"], -most), most)
    if "num_return_sequences" in above and "num_return_sequences" not in request:
        if above.get("num_beams", 1) > 1:
            above["num_return_sequences"] = min(above["num_return_sequences"], above["num_beams"])
        elif not above.get("do_sample"):
            del above["num_return_sequences"]
    if above.get("num_beams", 1) == 1 and not above.get("do_sample"):
        above = {name: value for name, value in above.items() if name not in FILTERS}  # greedy ignores them
    truncate = bool(above.pop("truncate", False))
    if "stop" in above:
        above["stop"] = tuple(above["stop"])
    return SamplingParams(**above), truncate


def check_defaults(defaults: Mapping[str, Any], backbone: Mapping[str, Any], limits: ParameterLimits) -> None:
    """Raise InvalidParameter for an artifact's defaults with which a good request would fail.

    The one rule for uploads and trainers. Each value has its range, also where other defaults put it aside, since a
    request may put those aside. A request with no parameters, and one that only chooses how to decode, can be served.
    """
    check_decoding_parameters(defaults)
    try:
        check_json("defaults", defaults)
    except InvalidArtifact as error:
        raise InvalidParameter(error.message, **error.detail) from None
    for name, value in _clamped_to_limits(defaults, limits).items():
        if isinstance(value, int) and name != "seed" and abs(value) > MAX_INTEGER:
            raise InvalidParameter(
                f"{name}: expected at most {MAX_INTEGER}, got {value}", parameter=name, expected=MAX_INTEGER, got=value
            )
        length = {key: defaults[key] for key in ("max_new_tokens",) if key in defaults}
        merge_parameters({}, {**length, name: value}, {}, limits)
    beams, outputs = defaults.get("num_beams", 1), defaults.get("num_return_sequences", 1)
    if 1 < beams < outputs:
        raise InvalidParameter(
            f"num_return_sequences: expected at most num_beams ({beams}), got {outputs}",
            parameter="num_return_sequences",
            expected=beams,
            got=outputs,
        )
    merge_parameters({}, defaults, backbone, limits)
    for way in ({"do_sample": True}, {"do_sample": False}, {"num_beams": min(2, limits.num_beams)}):
        merge_parameters(way, defaults, {}, limits)


def _check_request(request: Mapping[str, Any], limits: ParameterLimits) -> None:
    if request.get("do_sample") is False and (given := [name for name in FILTERS if name in request]):
        raise InvalidParameter(
            f"{given[0]}: expected none with do_sample false, got {request[given[0]]!r}; leave do_sample out to sample",
            parameter=given[0],
            expected=None,
            got=request[given[0]],
        )
    if request.get("num_beams", 1) > 1 and (given := [name for name in FILTERS if name in request]):
        raise InvalidParameter(
            f"{given[0]}: expected none with num_beams above 1, got {request[given[0]]!r}; beams do not sample",
            parameter=given[0],
            expected=None,
            got=request[given[0]],
        )
    for name, most in limits.most().items():
        if name in request and request[name] > most:
            whose = "the caller's" if name in limits.of_caller else "this server's"
            raise InvalidParameter(
                f"{name}: expected at most {most}, {whose} limit; got {request[name]}",
                parameter=name,
                expected=most,
                got=request[name],
            )


def _with_implied_sampling(layer: Mapping[str, Any]) -> dict[str, Any]:
    implied = "do_sample" not in layer and layer.get("num_beams", 1) == 1 and any(name in layer for name in FILTERS)
    return {**layer, "do_sample": True} if implied else dict(layer)


def _over(upper: Mapping[str, Any], lower: Mapping[str, Any]) -> dict[str, Any]:
    """``upper``, and those parameters of ``lower`` that it neither has nor contradicts."""
    dropped: set[str] = set()
    if upper.get("num_beams", 1) > 1:
        dropped |= SAMPLING | NOT_WITH_BEAMS
    if upper.get("do_sample") or upper.get("num_beams") == 1 or upper.get("stop") or "logprobs" in upper:
        dropped |= BEAMS
    if upper.get("do_sample") is False:
        dropped |= SAMPLING
    return {**{name: value for name, value in lower.items() if name not in dropped}, **upper}


def _clamped(layer: Mapping[str, Any], limits: ParameterLimits) -> dict[str, Any]:
    known = {name: value for name, value in layer.items() if name in DECODING_PARAMETERS}
    if known.get("num_beams", 1) > 1:  # transformers would sample within beams; here beams win
        known = {name: value for name, value in known.items() if name not in SAMPLING | NOT_WITH_BEAMS}
    return _clamped_to_limits(known, limits)


def _clamped_to_limits(layer: Mapping[str, Any], limits: ParameterLimits) -> dict[str, Any]:
    most = limits.most()
    return {name: min(value, most[name]) if name in most else value for name, value in layer.items()}
