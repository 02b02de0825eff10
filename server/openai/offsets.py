"""Where each token begins in its output's text, and the texts of single tokens.

Owns the offsets of OpenAI's log-probabilities. Special tokens add nothing to a text, and a character may take several
tokens: so an offset is no sum of the tokens' own texts. Knows no bodies. Torch-free.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

_INCOMPLETE: Final = "\ufffd"


class TokenTexts:
    """Texts of token ids. ``backend`` is the fast tokenizer's (``tokenizers.Tokenizer``)."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend

    def token(self, token_id: int) -> str:
        """The text of one token by itself, also of a special one."""
        return str(self._backend.decode([token_id], skip_special_tokens=False))

    def joined(self, token_ids: Sequence[int]) -> str:
        """What the tokens add to an output's text."""
        return str(self._backend.decode(token_ids, skip_special_tokens=True))


class TextOffsets:
    """The offsets of one output's tokens, one after the other.

    Decodes each token behind the last whole characters only, so that a token costs the same wherever it stands.
    """

    def __init__(self, texts: TokenTexts) -> None:
        self._texts = texts
        self._before = 0  # characters before those of ``_ids``
        self._ids: list[int] = []
        self._newest = 0  # where in ``_ids`` the tokens begin that came behind the last whole characters
        self._text = ""

    def add(self, token_id: int) -> int:
        """Characters of the text before the one in which the token begins."""
        self._ids.append(token_id)
        before, text = self._text, self._texts.joined(self._ids)
        begin = _common(before, text)
        if text == before and text.endswith(_INCOMPLETE) and self._texts.joined([token_id]):
            begin -= 1  # one more byte of a character that began before
        offset = self._before + begin
        self._text = text
        if text != before and not text.endswith(_INCOMPLETE):
            self._begin_anew()
        return offset

    def _begin_anew(self) -> None:
        """Forget all but the newest tokens: they are what the next one is decoded behind."""
        self._ids = self._ids[self._newest :]
        self._newest = len(self._ids)
        text = self._texts.joined(self._ids)
        self._before += len(self._text) - len(text)
        self._text = text


def _common(first: str, second: str) -> int:
    """Characters with which both begin."""
    pairs = zip(first, second, strict=False)
    return next((at for at, (one, other) in enumerate(pairs) if one != other), min(len(first), len(second)))
