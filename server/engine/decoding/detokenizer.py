"""Tokens to text, as they come: UTF-8 safe, with text that may become a stop string held back. Torch-free.

Owns one output's text; knows nothing of rows. The pieces it emits, joined, are exactly the final text.
"""

from __future__ import annotations

import copy
from typing import Any

from tokenizers.decoders import DecodeStream

from server.engine.decoding.stop_strings import START, StopStrings


class Detokenizer:
    """Incremental text of one output. ``tokenizer`` is the fast tokenizer's backend (``tokenizers.Tokenizer``)."""

    def __init__(self, tokenizer: Any, stop: tuple[str, ...] = ()) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._stop = StopStrings(stop)
        self._stop_state = START
        self._ids: list[int] = []
        self._emitted = 0
        self.text = ""

    def push(self, token_id: int) -> bool:
        """Take one token; True when a stop string is complete (``text`` then ends before it)."""
        self._ids.append(token_id)
        piece = self._stream.step(self._tokenizer, token_id)
        return self._extend(piece) if piece else False

    def finish(self) -> bool:
        """No more tokens come: an incomplete character becomes U+FFFD, as in a plain decode. Returns as ``push``."""
        whole: str = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        return self._extend(whole[len(self.text) :]) if whole.startswith(self.text) else False

    def take(self, final: bool = False) -> str:
        """The text that may be shown now and was not shown yet; ``final`` holds nothing back."""
        end = len(self.text) if final else len(self.text) - self._stop.undecided(self._stop_state)
        piece, self._emitted = self.text[self._emitted : end], max(end, self._emitted)
        return piece

    def fork(self) -> Detokenizer:
        """A copy that goes on by itself."""
        forked = copy.copy(self)
        forked._stream, forked._ids = copy.copy(self._stream), list(self._ids)
        return forked

    def _extend(self, piece: str) -> bool:
        before = len(self.text)
        self.text += piece
        self._stop_state, found = self._stop.read(self._stop_state, piece)
        if found:
            self.text = self.text[: before + found[0]]  # the one complete first, however the tokens cut the text
            self._stop_state = START
        return found is not None
