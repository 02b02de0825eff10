"""Prompts: a user's text never becomes a special token, and never changes the template's tokens."""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefixes.errors import InvalidArtifact, InvalidParameter
from prefixes.prompt import Fitted, PromptEncoder
from tests.support.prefixes import save_tiny_tokenizer
from tests.support.prompt import encode_prompt

END = "<|endoftext|>"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return save_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_only_the_template_may_hold_special_tokens(tokenizer: Any) -> None:
    ids = encode_prompt(tokenizer, f" {{input}} {END}", f"a{END}b")
    assert ids.count(tokenizer.eos_token_id) == 1
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids) == f" a{END}b {END}"


def test_seams_cannot_complete_a_special_token(tokenizer: Any) -> None:
    assert tokenizer.eos_token_id not in encode_prompt(tokenizer, "<|endof{input}", "text|>")
    assert tokenizer.eos_token_id not in encode_prompt(tokenizer, "{input}text|>", "<|endof")


def test_a_mark_that_is_no_token_of_the_tokenizers_is_named(tokenizer: Any) -> None:
    encoder = PromptEncoder(tokenizer)
    for known in (f"{{input}} {END}", "{input}\n", "<in> {input} <out>", "a <| b |> {input} <|>"):
        encoder.check_marks(known)
    with pytest.raises(InvalidParameter, match=r"expected special .* got <\|user\|>, <\|end\|>, which .* plain text"):
        encoder.check_marks(f"<|user|>{{input}}<|end|>{END}<|user|>")
    with pytest.raises(InvalidArtifact, match="exactly one"):
        encoder.check_marks(END)


@settings(max_examples=100, deadline=None)
@given(before=st.text("ab {}<|", max_size=6), text=st.text(max_size=20), after=st.text("ab {}|>", max_size=6))
def test_the_pieces_stand_side_by_side_and_decode_to_the_whole(
    tokenizer: Any, before: str, text: str, after: str
) -> None:
    template = before + "{input}" + after
    if template.count("{input}") != 1:
        return
    encoder = PromptEncoder(tokenizer)
    ids = encoder.encode(template, text)
    assert ids == encoder.encode_literal(before) + encoder.encode_text(text) + encoder.encode_literal(after)
    assert ids == encode_prompt(tokenizer, template, text)
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == before + text + after


def test_ordinary_text_is_what_the_tokenizer_gives(tokenizer: Any) -> None:
    text = "Blue Spice is a café ☕."
    assert encode_prompt(tokenizer, "{input}", text) == tokenizer(text)["input_ids"]
    assert encode_prompt(tokenizer, "{input}", "") == []


def test_threads_do_not_let_each_others_text_through(tokenizer: Any) -> None:
    """Whether special tokens are split is a mutable switch of the backend: shared, it leaked between threads."""
    template, text = f"{END}{{input}}{END}", f"x{END}y"

    def encode(_: int) -> int:
        return encode_prompt(tokenizer, template, text).count(tokenizer.eos_token_id)

    def give_way() -> None:
        sys.setprofile(lambda *_: time.sleep(0))  # let another thread run at every call of a function

    with ThreadPoolExecutor(4, initializer=give_way) as pool:
        assert set(pool.map(encode, range(300))) == {2}


def test_the_callers_tokenizer_is_left_as_it_was(tokenizer: Any) -> None:
    before = tokenizer.backend_tokenizer.encode_special_tokens
    tokenizer.backend_tokenizer.enable_truncation(4)
    try:
        assert len(PromptEncoder(tokenizer).encode_text("x" * 50)) > 4
        assert tokenizer.backend_tokenizer.truncation is not None
    finally:
        tokenizer.backend_tokenizer.no_truncation()
    assert tokenizer.backend_tokenizer.encode_special_tokens == before


def test_tokens_added_later_are_seen(tmp_path: Path) -> None:
    tokenizer = save_tiny_tokenizer(tmp_path)
    assert len(encode_prompt(tokenizer, "<new>{input}", "")) > 1
    tokenizer.add_special_tokens({"additional_special_tokens": ["<new>"]})
    assert encode_prompt(tokenizer, "<new>{input}", "") == [tokenizer.convert_tokens_to_ids("<new>")]


@pytest.mark.parametrize("template", ["", "no slot", "{input} {input}"])
def test_a_template_without_exactly_one_input_is_refused(tokenizer: Any, template: str) -> None:
    with pytest.raises(InvalidArtifact, match="exactly one"):
        encode_prompt(tokenizer, template, "x")


def test_text_that_is_no_unicode_is_a_bad_parameter(tokenizer: Any) -> None:
    with pytest.raises(InvalidParameter, match="surrogate"):
        encode_prompt(tokenizer, "{input}", "\ud800")


def test_a_prompt_too_long_loses_the_inputs_end_and_never_the_templates(tokenizer: Any) -> None:
    encoder, template, text = PromptEncoder(tokenizer), f"a{{input}}{END}", "\x01\x02\x03\x04"
    ids = tuple(encoder.encode(template, text))
    assert encoder.fit(template, text, len(ids)) == Fitted(ids, len(ids))
    for room, kept in ((4, "\x01\x02"), (3, "\x01")):
        fitted = encoder.fit(template, text, room, truncate=True)
        assert fitted.token_ids == (ids[0], *encoder.encode_text(kept), tokenizer.eos_token_id)
        assert (fitted.got, fitted.truncated) == (len(ids), True)
        assert encoder.fit(template, text, room).token_ids is None
    assert encoder.fit(template, text, 2, truncate=True).token_ids is None, "nothing of the input would be left"
