"""The state of an output: a fork has all of it, and the two go on apart."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from server.engine.decoding.detokenizer import Detokenizer
from server.engine.decoding.state import DecodingState
from server.engine.types import TokenLogprob
from tests.support.paths import ROOT

TEXT = "Die Königin – 概要 – naïve"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return Tokenizer.from_file(str(Path(ROOT, "prefixes", "demo", "gpt2", "tokenizer.json")))


def push(state: DecodingState, token: int) -> None:
    assert state.detokenizer is not None
    state.token_ids.append(token)
    state.logprobs.append(TokenLogprob(token, -1.0))
    state.detokenizer.push(token)


def test_a_fork_continues_as_the_original_would_from_any_token(tokenizer: Any) -> None:
    ids = tokenizer.encode(TEXT).ids
    for cut in range(len(ids) + 1):  # also within a character
        state = DecodingState(0, [1, 2], 2, Detokenizer(tokenizer, ("never",)))
        for token in ids[:cut]:
            push(state, token)
        forked = state.fork(3)
        for token in reversed(ids):  # the original goes another way
            push(state, token)
        for token in ids[cut:]:
            push(forked, token)
        assert forked.detokenizer is not None
        forked.detokenizer.finish()
        assert (forked.index, forked.output_ids, forked.detokenizer.text) == (3, ids, TEXT)
        assert [found.token_id for found in forked.logprobs] == ids


def test_a_fork_shares_nothing_that_changes(tokenizer: Any) -> None:
    """Beams were built anew by hand, which dropped whatever was added to a row later."""
    state = DecodingState(0, [1], 1, Detokenizer(tokenizer))
    push(state, tokenizer.encode("a").ids[0])
    forked = state.fork(0)
    for field in fields(DecodingState):
        mine, theirs = getattr(state, field.name), getattr(forked, field.name)
        if isinstance(mine, int | None):
            assert mine == theirs, field.name
        else:
            assert mine is not theirs, f"{field.name} is shared: say in fork() how it is copied"
