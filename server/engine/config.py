"""The engine's limits, fixed at start. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineConfig:
    """Limits of one engine.

    ``kv_cache_bytes`` is the one pool that rows, resident prefixes and reused prompts compete in.
    ``max_prefix_bytes`` bounds what resident prefixes take of it (None: all of it). ``max_rows`` counts every beam.
    ``max_step_tokens`` bounds the tokens of one forward call; long prompts are prefilled in chunks of what decode rows
    leave of it.
    """

    kv_cache_bytes: int = 1 << 30
    max_prefix_bytes: int | None = None
    block_size: int = 16
    max_rows: int = 64
    max_step_tokens: int = 512
    max_waiting: int = 1024
    load_workers: int = 2
    reuse_prompts: bool = True

    def __post_init__(self) -> None:
        for name in ("kv_cache_bytes", "block_size", "max_rows", "max_step_tokens", "max_waiting", "load_workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.max_step_tokens < self.max_rows:
            raise ValueError(
                f"max_step_tokens: expected at least max_rows ({self.max_rows}), one token for each, "
                f"got {self.max_step_tokens}"
            )
