"""The automaton of stop strings against the plain definition, and what it costs."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.decoding.detokenizer import Detokenizer
from server.engine.decoding.stop_strings import START, StopStrings
from tests.support.prefixes import save_tiny_tokenizer

STRINGS = st.lists(st.text("ab☕", min_size=1, max_size=6), max_size=5)
PIECES = st.lists(st.text("ab☕", max_size=5), max_size=12)
QUICK = settings(max_examples=400, deadline=None, derandomize=True)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return save_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")).backend_tokenizer


def match(text: str, strings: list[str]) -> tuple[int, int] | None:
    """By definition: the first place where a string ends, and the longest that ends there."""
    for end in range(1, len(text) + 1):
        if lengths := [len(string) for string in strings if text[:end].endswith(string)]:
            return end - max(lengths), end
    return None


def undecided(text: str, strings: list[str]) -> int:
    """By definition: the longest end of the text that a string begins with and goes on from."""
    ends = [text[begin:] for begin in range(len(text) + 1)]
    return next(len(end) for end in ends if not end or any(string.startswith(end) for string in strings))


@QUICK
@given(strings=STRINGS, pieces=PIECES)
def test_matches_and_what_is_undecided_are_those_of_the_plain_definition(strings: list[str], pieces: list[str]) -> None:
    automaton, state, text = StopStrings(strings), START, ""
    for piece in pieces:
        state, found = automaton.read(state, piece)
        expected = match(text + piece, strings)
        assert (found and (len(text) + found[0], len(text) + found[1])) == expected
        if found:
            return
        text += piece
        assert automaton.undecided(state) == undecided(text, strings)


@QUICK
@given(strings=STRINGS, before=PIECES, one=PIECES, other=PIECES)
def test_two_outputs_that_share_the_automaton_go_on_apart(
    strings: list[str], before: list[str], one: list[str], other: list[str]
) -> None:
    automaton = StopStrings(strings)
    state, found = automaton.read(START, "".join(before))
    if not found:
        for text in ("".join(one), "".join(other), "".join(one)):
            _, found = automaton.read(state, text)
            whole = match("".join(before) + text, strings)
            assert (found and found[1]) == (whole and whole[1] - len("".join(before)))


@pytest.mark.parametrize("cut", range(6))
def test_a_fork_keeps_what_is_held_back_and_stops_by_itself(tokenizer: Any, cut: int) -> None:
    ids = [tokenizer.token_to_id(letter) for letter in "ababab"]
    detokenizer = Detokenizer(tokenizer, ("ababab", "abc"))
    shown = "".join(detokenizer.take() for token in ids[:cut] if not detokenizer.push(token))
    forked = detokenizer.fork()
    assert not any(detokenizer.push(tokenizer.token_to_id("x")) for _ in range(6))
    assert [forked.push(token) for token in ids[cut:]] == [False] * (5 - cut) + [True]
    assert shown + forked.take(final=True) == forked.text == ""
    assert detokenizer.text == "ababab"[:cut] + "xxxxxx"


def lines_run(detokenizer: Detokenizer, token: int, tokens: int) -> int:
    """Lines of Python that ``tokens`` tokens take."""
    count = 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        for _ in range(tokens):
            assert not detokenizer.push(token)
            detokenizer.take()
    finally:
        sys.settrace(before)
    return count


def test_holding_back_costs_the_same_however_long_and_many_the_stop_strings_are(tokenizer: Any) -> None:
    """The cost was the longest one's length times their number, for each token."""
    token, tokens = tokenizer.token_to_id("a"), 300
    short = lines_run(Detokenizer(tokenizer, ("ab",)), token, tokens)
    for beginning in ("a", "b"):
        stops = tuple(beginning * 254 + chr(ord("c") + number) for number in range(16))
        assert lines_run(Detokenizer(tokenizer, stops), token, tokens) <= short + 4 * tokens
