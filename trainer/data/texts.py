"""What every reader of training data asks of a text: whole characters, no byte order mark, something to see.

Knows neither files nor formats: a reader names the place.
"""

from __future__ import annotations

import unicodedata
from typing import Final

BYTE_ORDER_MARK: Final = "\ufeff"
_UNSEEN_RANGES: Final = (  # of other categories, but drawn as nothing
    (0x034F, 0x034F), (0x115F, 0x1160), (0x17B4, 0x17B5), (0x180B, 0x180F), (0x2065, 0x2065), (0x2800, 0x2800),
    (0x3164, 0x3164), (0xFE00, 0xFE0F), (0xFFA0, 0xFFA0), (0xFFF0, 0xFFF8), (0xE0000, 0xE0FFF),
)  # fmt: skip


def is_blank(text: str) -> bool:
    """Whether ``text`` shows nothing: no characters, or only spaces, zero-width and other invisible ones."""
    return not any(map(_seen, text))


def checked(text: str) -> str:
    """Return ``text``. Raises ValueError for a byte order mark at its beginning or half a character.

    A file's byte order mark belongs to no text. JSON's escapes can write half a character (a lone surrogate), which
    UTF-8 cannot hold.
    """
    if text.startswith(BYTE_ORDER_MARK):
        raise ValueError("a byte order mark at its beginning")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"half a character (a lone surrogate, {text[error.start]!r}) at {error.start}") from None
    return text


def _seen(character: str) -> bool:
    if character.isspace() or unicodedata.category(character) == "Cf":  # Cf: format, zero-width ones among them
        return False
    return not any(first <= ord(character) <= last for first, last in _UNSEEN_RANGES)
