"""A prompt's token ids, for tests that have a tokenizer and no encoder."""

from __future__ import annotations

from typing import Any

from prefixes.prompt import PromptEncoder


def encode_prompt(tokenizer: Any, template: str, text: str) -> list[int]:
    """Encode ``text`` in ``template`` as a backbone with ``tokenizer`` does."""
    return PromptEncoder(tokenizer).encode(template, text)
