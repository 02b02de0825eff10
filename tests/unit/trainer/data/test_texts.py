"""What a text of training data is: whole characters, no byte order mark, something to see."""

from __future__ import annotations

import pytest

from trainer.data.texts import checked, is_blank

UNSEEN = (
    "", " \t\r\n", "\u200b", "\u200c\u200d\u2060", "\ufeff", "\xad", "\u3000\u2028\x85", "\u3164", "\u2800", "\u034f",
    "\ufe0f", "\u115f", "\u180e", "\u202e", "\U000e0020", " \u200b \ufeff",
)  # fmt: skip


@pytest.mark.parametrize("text", UNSEEN, ids=ascii)
def test_a_text_without_a_visible_character_is_blank(text: str) -> None:
    assert is_blank(text)
    assert not is_blank(f"{text}.")


@pytest.mark.parametrize("text", ["a", "0", "é", "é", "概要", "😀", "👨‍👩‍👧", "क्‍ष", "-"], ids=ascii)
def test_a_text_with_one_is_not(text: str) -> None:
    assert not is_blank(text)
    assert checked(text) == text


@pytest.mark.parametrize(("text", "said"), [("\ufeffa", "a byte order mark"), ("a\ud800", "surrogate, .* at 1")])
def test_a_byte_order_mark_and_half_a_character_are_refused(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        checked(text)
