"""Turns a template and a user's text into token ids. The trainer and the server share this one rule.

Three pieces are tokenised separately and joined: the template's text before the input, the input, and the text after
it. In one string, merges could cross the seams: the input would change the template's tokens, and could even complete
a special token with them. Only the template's text may contain special tokens. In the user's text they are plain text
and are split.

A prompt that is too long loses tokens from the end of the input, never from the template.

Owns these rules; knows no window.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer

from prefixes.errors import InvalidParameter
from prefixes.spec import INPUT_SLOT, split_template


class PromptEncoder:
    """Encodes prompts for one tokenizer. Thread-safe.

    It keeps two copies of the backend, because splitting special tokens is a mutable switch there. A thread that
    flipped a shared switch would let another thread's user text through as special tokens.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._literal, self._plain = _copy(tokenizer), _copy(tokenizer)
        self._literal.encode_special_tokens = False
        self._plain.encode_special_tokens = True

    def encode(self, template: str, text: str) -> list[int]:
        """Token ids of ``template`` with ``text`` for its ``{input}``.

        Raises InvalidArtifact unless the template has exactly one ``{input}``, and InvalidParameter for text that is
        not valid Unicode.
        """
        before, after = split_template(template)
        return self.encode_literal(before) + self.encode_text(text) + self.encode_literal(after)

    def cut(self, template: str, token_ids: Sequence[int], room: int) -> list[int] | None:
        """Cut ``token_ids`` from ``encode`` to at most ``room``. The input loses its end; the template stays whole.

        None if the template leaves no room for any of the input.
        """
        if len(token_ids) <= room:
            return list(token_ids)
        head, tail = (self.encode_literal(part) for part in split_template(template))
        kept = room - len(tail)
        return [*token_ids[:kept], *tail] if kept > len(head) else None

    def encode_literal(self, text: str) -> list[int]:
        """Token ids of trusted text. Special tokens are recognised."""
        return _encode(self._literal, text)

    def encode_text(self, text: str) -> list[int]:
        """Token ids of untrusted text. Special tokens are split into plain ones."""
        return _encode(self._plain, text)


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
