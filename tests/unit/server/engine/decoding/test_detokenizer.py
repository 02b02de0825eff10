"""Incremental text: the pieces joined are the final text, no piece shows half a character or the start of a stop."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.decoding.detokenizer import Detokenizer
from tests.support.prefixes import save_tiny_tokenizer

CHARACTERS = [*"ab xy.\n", "é", "☕", "👩‍🍳", "👍🏽", "漢", "\u0301", "\ufffd"]
TEXTS = st.lists(st.sampled_from(CHARACTERS), max_size=12).map("".join)
QUICK = settings(max_examples=150, deadline=None, derandomize=True)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return save_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")).backend_tokenizer


class Output:
    """A detokenizer driven as the engine drives it."""

    def __init__(self, tokenizer: Any, stop: tuple[str, ...] = ()) -> None:
        self.detokenizer = Detokenizer(tokenizer, stop)
        self.pieces: list[str] = []
        self.stopped = False

    def run(self, token_ids: list[int]) -> str:
        """Push until a stop string is complete, then finish; the final text."""
        for token_id in token_ids:
            self.stopped = self.detokenizer.push(token_id)
            if self.stopped:
                break
            self.pieces.append(self.detokenizer.take())
        self.stopped = self.stopped or self.detokenizer.finish()
        self.pieces.append(self.detokenizer.take(final=True))
        return self.detokenizer.text


def spell(tokenizer: Any, text: str) -> list[int]:
    """One token per byte: every character of several bytes is split across tokens."""
    alphabet = tokenizer.get_vocab()
    mapped = "".join(piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text))
    return [alphabet[byte] for byte in mapped]


@QUICK
@given(text=TEXTS)
def test_pieces_join_to_the_text_though_characters_are_split_across_tokens(tokenizer: Any, text: str) -> None:
    output = Output(tokenizer)
    assert output.run(spell(tokenizer, text)) == text
    assert "".join(output.pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in output.pieces)


@QUICK
@given(token_ids=st.lists(st.integers(0, 310), max_size=40))
def test_any_tokens_at_all_give_the_text_of_a_plain_decode(tokenizer: Any, token_ids: list[int]) -> None:
    output = Output(tokenizer)
    expected = tokenizer.decode(token_ids, skip_special_tokens=True)
    assert output.run(token_ids) == expected
    assert "".join(output.pieces) == expected


@QUICK
@given(text=TEXTS, stop=st.lists(TEXTS.filter(bool), min_size=1, max_size=3))
def test_the_text_ends_before_the_first_stop_string_and_no_piece_runs_past_it(
    tokenizer: Any, text: str, stop: list[str]
) -> None:
    output = Output(tokenizer, tuple(stop))
    ends = [(end, text.find(word)) for word in stop for end in [text.find(word) + len(word)] if word in text]
    got = output.run(spell(tokenizer, text))
    assert "".join(output.pieces) == got
    assert output.stopped == bool(ends)
    assert not any(word in got for word in stop)
    if ends:
        first = min(end for end, _ in ends)
        assert got == text[: min(begin for end, begin in ends if end == first)]
    else:
        assert got == text


def test_a_character_is_shown_when_its_last_byte_has_come(tokenizer: Any) -> None:
    output = Output(tokenizer)
    assert output.run(spell(tokenizer, "a☕b")) == "a☕b"
    assert output.pieces == ["a", "", "", "☕", "b", ""]


def test_an_open_character_becomes_a_replacement_at_the_end(tokenizer: Any) -> None:
    output = Output(tokenizer)
    assert output.run(spell(tokenizer, "a☕")[:-1]) == "a\ufffd"
    assert output.pieces == ["a", "", "", "\ufffd"]


def test_what_may_become_a_stop_string_is_held_back_until_it_cannot(tokenizer: Any) -> None:
    output = Output(tokenizer, ("xyz",))
    assert output.run(spell(tokenizer, "axyxyx")) == "axyxyx"
    assert output.pieces == ["a", "", "", "xy", "", "xy", "x"]
    assert not output.stopped


def test_a_stop_string_across_tokens_is_not_part_of_the_text(tokenizer: Any) -> None:
    output = Output(tokenizer, ("xyz",))
    assert output.run(spell(tokenizer, "ab xyz more")) == "ab "
    assert output.stopped
    assert "".join(output.pieces) == "ab "


def test_a_stop_string_inside_one_token_cuts_the_token(tokenizer: Any) -> None:
    token = tokenizer.token_to_id("coffee") or tokenizer.token_to_id("Ġcoffee")
    output = Output(tokenizer, ("ffe",))
    assert output.run([token]).strip() == "co"
    assert output.stopped


def test_special_tokens_are_not_text(tokenizer: Any) -> None:
    end = tokenizer.token_to_id("<|endoftext|>")
    output = Output(tokenizer)
    assert output.run([*spell(tokenizer, "a"), end, *spell(tokenizer, "b")]) == "ab"
