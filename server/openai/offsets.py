"""Where each token begins in its output's text, and the texts of single tokens.

Owns the offsets of OpenAI's log-probabilities. Special tokens add nothing to a text, and a character may take several
tokens: so an offset is no sum of the tokens' own texts. Knows no bodies. Torch-free.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from server.engine.decoding.text_stream import TextStream, text_stream, token_text


class TokenTexts:
    """Texts of the token ids behind a prompt. ``backend`` is the fast tokenizer's (``tokenizers.Tokenizer``)."""

    def __init__(self, backend: Any, prompt_ids: Sequence[int] = ()) -> None:
        self._backend, self._prompt_ids = backend, prompt_ids

    def token(self, token_id: int) -> str:
        """The text of one token, also of a special one."""
        return token_text(self._backend, token_id)

    def stream(self) -> TextStream:
        """What the tokens of one output add to its text."""
        return text_stream(self._backend, self._prompt_ids)


class TextOffsets:
    """The offsets of one output's tokens, one after the other. A token costs the same wherever it stands."""

    def __init__(self, texts: TokenTexts) -> None:
        self._stream = texts.stream()
        self._certain = 0  # characters that no later token changes

    def add(self, token_id: int) -> int:
        """Characters of the text before the one in which the token begins."""
        held, piece = self._stream.held, self._stream.push(token_id)
        text = piece + self._stream.held
        begin = min(_common(held, text), len(text) - self._stream.incomplete)
        offset = self._certain + begin
        self._certain += len(piece)
        return offset


def _common(first: str, second: str) -> int:
    """Characters with which both begin."""
    pairs = zip(first, second, strict=False)
    return next((at for at, (one, other) in enumerate(pairs) if one != other), min(len(first), len(second)))
