"""Tokens to text, one after the other, by the rule of the tokenizer's decoder. Torch-free.

Owns the one rule for an output's text: streamed, whole, or of beams. What was given out never changes, and no tokens
raise. Knows no stop strings.

- **Byte-level** (GPT-2's kind): tokens are held back while their text ends in U+FFFD, which an incomplete character
  looks like.
- **All others** (SentencePiece's kind): such a decoder drops the space that a whole text begins with and nothing else.
  So a token adds behind any text what it adds behind itself. An output continues its prompt: it keeps the space that it
  begins with, unless the prompt has no text. Byte-fallback tokens (``<0xE2>``) are collected into characters. A byte
  that belongs to none becomes one U+FFFD, as in SentencePiece; the ``decode`` of ``tokenizers`` gives up the whole
  characters beside it too, after a stream has shown them.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Sequence
from typing import Any, Final, Protocol

_REPLACEMENT: Final = "\ufffd"
_PART_OF_CHARACTER: Final = re.compile("<0x([89A-Fa-f][0-9A-Fa-f])>")
_ESCAPED: Final = re.compile("[\udc80-\udcff]")


class TextStream(Protocol):
    """The text of one output. ``copy.copy`` gives one that goes on by itself."""

    def push(self, token_id: int) -> str:
        """The text that is certain with this token; empty while a character is incomplete."""

    @property
    def held(self) -> str:
        """What was held back: the text's end if no more tokens come."""

    @property
    def incomplete(self) -> int:
        """How much of ``held``, at its end, stands for the one character that may yet be completed."""


def text_stream(tokenizer: Any, prompt_ids: Sequence[int] = ()) -> TextStream:
    """The stream of an output behind ``prompt_ids``. ``tokenizer`` is the backend (``tokenizers.Tokenizer``)."""
    if _is_byte_level(tokenizer):
        return _ByteLevelStream(tokenizer)
    return _PieceStream(tokenizer, prompt_ids)


def text_of(tokenizer: Any, prompt_ids: Sequence[int], token_ids: Iterable[int]) -> str:
    """The whole text of an output behind ``prompt_ids``: what its stream gives."""
    stream = text_stream(tokenizer, prompt_ids)
    return "".join([*map(stream.push, token_ids), stream.held])


def token_text(tokenizer: Any, token_id: int) -> str:
    """What a token adds behind a text, so with the space that it begins with; of a special token its name."""
    alone: str = tokenizer.decode((token_id,), skip_special_tokens=False)
    if _is_byte_level(tokenizer):
        return alone
    twice: str = tokenizer.decode((token_id, token_id), skip_special_tokens=False)
    return twice[len(alone) :]


def _is_byte_level(tokenizer: Any) -> bool:
    return _decodes(tokenizer, ["Ġ"], " ")


def _decodes(tokenizer: Any, pieces: list[str], text: str) -> bool:
    return tokenizer.decoder is not None and tokenizer.decoder.decode(pieces) == text


class _ByteLevelStream:
    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._tokens: tuple[int, ...] = ()
        self.held = ""

    def push(self, token_id: int) -> str:
        tokens = (*self._tokens, token_id)
        text = _decoded(self._tokenizer, *tokens)
        if text.endswith(_REPLACEMENT):
            self._tokens, self.held = tokens, text
            return ""
        self._tokens, self.held = (), ""
        return text

    @property
    def incomplete(self) -> int:
        return int(bool(self.held))


class _PieceStream:
    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._has_bytes = _decodes(tokenizer, ["<0xC3>", "<0xA9>"], "é")
        self._bytes = b""  # of an incomplete character
        self._begun = any(map(self._behind, reversed(prompt_ids)))

    def push(self, token_id: int) -> str:
        if byte := self._part_of_character(token_id):
            self._begun = True
            return self._collect(byte)
        piece = self._behind(token_id)
        if piece and not self._begun:
            piece, self._begun = _decoded(self._tokenizer, token_id), True
            return piece
        if not piece:
            return ""  # a special token within a character changes nothing
        held, self._bytes = self.held, b""
        return held + piece

    @property
    def held(self) -> str:
        return _REPLACEMENT * len(self._bytes)

    @property
    def incomplete(self) -> int:
        return len(self._bytes)

    def _behind(self, token_id: int) -> str:
        """What the token adds to a text that has begun. Special tokens add nothing."""
        return _decoded(self._tokenizer, token_id, token_id)[len(_decoded(self._tokenizer, token_id)) :]

    def _part_of_character(self, token_id: int) -> bytes:
        """The token's byte, if it is part of a character of several; else none."""
        if not self._has_bytes:
            return b""
        found = _PART_OF_CHARACTER.fullmatch(self._tokenizer.id_to_token(token_id) or "")
        return bytes.fromhex(found[1]) if found else b""

    def _collect(self, byte: bytes) -> str:
        collected = self._bytes + byte
        text, used = codecs.utf_8_decode(collected, "surrogateescape", False)  # an escape for each byte of no character
        self._bytes = collected[used:]
        return _ESCAPED.sub(_REPLACEMENT, text)


def _decoded(tokenizer: Any, *token_ids: int) -> str:
    text: str = tokenizer.decode(token_ids, skip_special_tokens=True)
    return text
