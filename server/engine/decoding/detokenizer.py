"""Tokens to text, as they come: UTF-8 safe, with text that may become a stop string held back. Torch-free.

Owns one output's text and what of it may be shown; knows nothing of rows, nor how tokens become text. The pieces it
emits, joined, are exactly the final text.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from server.engine.decoding.stop_strings import START, StopStrings
from server.engine.decoding.text_stream import text_stream


class Detokenizer:
    """Incremental text of one output.

    ``tokenizer`` is the fast tokenizer's backend (``tokenizers.Tokenizer``). The output stands behind ``prompt_ids``.
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...] = (), prompt_ids: Sequence[int] = ()) -> None:
        self._stream = text_stream(tokenizer, prompt_ids)
        self._stop = StopStrings(stop)
        self._stop_state = START
        self._emitted = 0
        self.text = ""

    def push(self, token_id: int) -> bool:
        """Take one token; True when a stop string is complete (``text`` then ends before it)."""
        return self._extend(self._stream.push(token_id))

    def finish(self) -> bool:
        """No more tokens come: an incomplete character becomes U+FFFD. Returns as ``push``."""
        return self._extend(self._stream.held)

    def take(self, final: bool = False) -> str:
        """The text that may be shown now and was not shown yet; ``final`` holds nothing back."""
        end = len(self.text) if final else len(self.text) - self._stop.undecided(self._stop_state)
        piece, self._emitted = self.text[self._emitted : end], max(end, self._emitted)
        return piece

    def fork(self) -> Detokenizer:
        """A copy that goes on by itself."""
        forked = copy.copy(self)
        forked._stream = copy.copy(self._stream)
        return forked

    def _extend(self, piece: str) -> bool:
        before = len(self.text)
        self.text += piece
        self._stop_state, found = self._stop.read(self._stop_state, piece)
        if found:
            self.text = self.text[: before + found[0]]  # the one complete first, however the tokens cut the text
            self._stop_state = START
        return found is not None
