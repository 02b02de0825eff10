"""The engine's limits, fixed at start. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from prefixes.tenancy.limits import NO_LIMITS, Limits


def equal_weight(tenant: str) -> float:
    """Every tenant weighs the same."""
    return 1.0


def no_limits(tenant: str, key: str | None) -> Limits:
    """Every tenant and key may take what there is."""
    return NO_LIMITS


@dataclass(frozen=True)
class EngineConfig:
    """Limits of one engine.

    ``kv_cache_bytes`` is the one pool that rows, resident prefixes and reused prompts compete for. ``max_prefix_bytes``
    bounds what resident prefixes take of it (None: all of it). ``max_rows`` counts every beam and sample.
    ``max_step_tokens`` bounds the tokens of one decoder call: decode rows come first, and prompts are prefilled in
    chunks of what is left. ``max_encoder_tokens`` bounds the inputs that go through the encoder together (always at
    least one). ``max_step_ms`` bounds how long prompts and inputs hold up the rows that run, in each step: as many
    encoder layers as fit, at least one, and as many of the prompts' tokens, at least a block. What fits is measured;
    with ``deterministic`` it is a guess that stays. ``max_staged_bytes``: no further load begins while loaded prefixes
    that wait for blocks take so much host memory (prefixes that only a pin wants count apart).
    ``preempted_prefix_bytes`` bounds the prefixes, in whole blocks, of the requests that were admitted and have not
    ended (None: as much as ``max_prefix_bytes``). Those of preempted requests may leave the pool for host memory, and
    take no more than that there. ``weight_of`` gives the weight of a tenant that asks, above 0: of the tokens that are
    computed while several wait, each gets a share by its weight. ``limits_of`` gives the limits of a tenant, and with a
    key's id those of that key; the engine keeps to ``rows_running``. Any thread calls them, the engine's often.
    """

    kv_cache_bytes: int = 1 << 30
    max_prefix_bytes: int | None = None
    block_size: int = 16
    max_rows: int = 64
    max_step_tokens: int = 512
    max_encoder_tokens: int = 4096
    max_step_ms: float = 500.0
    deterministic: bool = False
    load_workers: int = 2
    max_staged_bytes: int = 256 << 20
    preempted_prefix_bytes: int | None = None
    reuse_prompts: bool = True
    weight_of: Callable[[str], float] = equal_weight
    limits_of: Callable[[str, str | None], Limits] = no_limits

    def __post_init__(self) -> None:
        counts = ("kv_cache_bytes", "block_size", "max_rows", "max_step_tokens", "max_encoder_tokens")
        for name in (*counts, "load_workers", "max_staged_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not 0 < self.max_step_ms < math.inf:
            raise ValueError(f"max_step_ms: expected a number above 0, got {self.max_step_ms}")
        if self.max_step_tokens < self.max_rows:
            raise ValueError(
                f"max_step_tokens: expected at least max_rows ({self.max_rows}), one token for each, "
                f"got {self.max_step_tokens}"
            )
