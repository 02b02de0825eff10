"""From a template and a user's text to token ids: the one rule, for the trainer and the server alike.

The three pieces (the template's text before the input, the input, the text after it) are tokenised separately and
joined. Tokenised as one string, merges could reach across the seams: the input would change the template's tokens, and
could even complete a special token with it. Only the template's own text may contain special tokens; in the user's
they are plain text and come out split.

A prompt that is too long loses the end of the input's own tokens, never the template's.

Owns these rules; knows no window.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from tokenizers import Tokenizer

from prefixes.errors import InvalidParameter
from prefixes.spec import INPUT_SLOT, split_template


class PromptEncoder:
    """Encodes prompts for one tokenizer. Thread-safe.

    It has its own two copies of the backend: whether special tokens are split is a mutable switch there, and a thread
    that flipped it would let another thread's user text through as special tokens.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._literal, self._plain = _copy(tokenizer), _copy(tokenizer)
        self._literal.encode_special_tokens = False
        self._plain.encode_special_tokens = True

    def encode(self, template: str, text: str) -> list[int]:
        """Token ids of ``template`` with ``text`` for its ``{input}``.

        Raises InvalidArtifact for a template without exactly one ``{input}``, InvalidParameter for text that is no
        valid Unicode.
        """
        before, after = split_template(template)
        return self.encode_literal(before) + self.encode_text(text) + self.encode_literal(after)

    def cut(self, template: str, token_ids: Sequence[int], room: int) -> list[int] | None:
        """``encode``'s ``token_ids``, at most ``room`` of them: the input loses its end, the template stays whole.

        None where the template leaves no room for any of the input.
        """
        if len(token_ids) <= room:
            return list(token_ids)
        head, tail = (self.encode_literal(part) for part in split_template(template))
        kept = room - len(tail)
        return [*token_ids[:kept], *tail] if kept > len(head) else None

    def encode_literal(self, text: str) -> list[int]:
        """Token ids of trusted text, special tokens recognised."""
        return _encode(self._literal, text)

    def encode_text(self, text: str) -> list[int]:
        """Token ids of anybody's text, special tokens split into plain ones."""
        return _encode(self._plain, text)


def encode_prompt(tokenizer: Any, template: str, text: str) -> list[int]:
    """``PromptEncoder(tokenizer).encode(template, text)``, the encoder kept for the tokenizers used last."""
    return _encoder(tokenizer, len(tokenizer)).encode(template, text)


@lru_cache(maxsize=4)
def _encoder(tokenizer: Any, size: int) -> PromptEncoder:
    return PromptEncoder(tokenizer)  # `size`: tokens added meanwhile make another encoder


def _copy(tokenizer: Any) -> Any:
    copy = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    copy.no_truncation()
    copy.no_padding()
    return copy


def _encode(backend: Any, text: str) -> list[int]:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidParameter("input: expected valid Unicode, got a lone surrogate", parameter=INPUT_SLOT) from None
    ids: list[int] = backend.encode(text, add_special_tokens=False).ids if text else []
    return ids
