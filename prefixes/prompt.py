"""Turns a template and a user's text into token ids. The trainer and the server share this one rule.

Three pieces are tokenised separately and joined: the template's text before the input, the input, and the text after
it. In one string, merges could cross the seams: the input would change the template's tokens, and could even complete
a special token with them. Only the template's text may contain special tokens. In the user's text they are plain text
and are split.

Around all stand the tokens that the model's own tokenizer begins and ends a text with, where it does (Llama's ``<s>``,
T5's ``</s>``), unless the template begins or ends with them itself.

A prompt that is too long loses tokens from the end of the input, never from the template.

Owns these rules, and how little of a text need be tokenised to know its prompt; knows no window.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from typing import Any, Final

from tokenizers import Tokenizer

from prefixes.byte_level import byte_level_rules
from prefixes.errors import InputTooLong, InvalidParameter
from prefixes.spec import INPUT_SLOT, split_template

HEAD_PER_TOKEN: Final = 8
"""Characters of the first head that is tried for each token that is wanted. Ordinary text has three to five."""


@dataclass(frozen=True)
class AddedTokens:
    """The tokens that every prompt begins with, and those that it ends with."""

    first: tuple[int, ...] = ()
    last: tuple[int, ...] = ()


NO_TOKENS: Final = AddedTokens()


@dataclass(frozen=True)
class Fitted:
    """What ``fit`` made of a prompt. ``token_ids`` is None if it does not fit; ``truncated``: the input lost its end.

    ``got`` counts the tokens of the whole prompt; with ``at_least`` it has as many or more.
    """

    token_ids: tuple[int, ...] | None
    got: int
    truncated: bool = False
    at_least: bool = False

    @property
    def shown(self) -> str:
        """``got`` for a message."""
        return f"at least {self.got}" if self.at_least else str(self.got)


class PromptEncoder:
    """Encodes prompts for one tokenizer. Thread-safe. Other threads run while a text is tokenised.

    It keeps two copies of the backend, because splitting special tokens is a mutable switch there. A thread that
    flipped a shared switch would let another thread's user text through as special tokens.
    """

    def __init__(self, tokenizer: Any, added: AddedTokens = NO_TOKENS) -> None:
        self._first, self._last = list(added.first), list(added.last)
        described = tokenizer.backend_tokenizer.to_str()
        self._literal, self._plain = _made(described), _made(_without_special_pieces(described))
        self._literal.encode_special_tokens = False
        self._plain.encode_special_tokens = True
        self._rules = byte_level_rules(self._plain)

    def encode(self, template: str, text: str) -> list[int]:
        """Token ids of ``template`` with ``text`` for its ``{input}``.

        Raises InvalidArtifact unless the template has exactly one ``{input}``, and InvalidParameter for text that is
        not valid Unicode.
        """
        before, after = self.around(template)
        return before + self.encode_text(text) + after

    def fit(
        self, template: str, text: str, room: int, *, truncate: bool = False, max_bytes: int | None = None
    ) -> Fitted:
        """The prompt in at most ``room`` tokens. With ``truncate`` the input loses its end; the template stays whole.

        A text that cannot fit by its length alone is not tokenised. With ``truncate`` a head of it is. Raises as
        ``encode`` does, and InputTooLong where more than ``max_bytes`` of the text would have to be tokenised.
        """
        before, after = self.around(template)
        around, least = len(before) + len(after), self._least(text)
        if not truncate and around + least > room:
            return Fitted(None, around + least, at_least=True)
        left = max(0, room - around)
        ids, whole = self._head(text, left, max_bytes) if truncate else (self._within(text, max_bytes), True)
        got = around + len(ids)
        if whole and got <= room:
            return Fitted((*before, *ids, *after), got)
        if not truncate or not left:
            return Fitted(None, got, at_least=not whole)
        return Fitted((*before, *ids[:left], *after), got, truncated=True, at_least=not whole)

    def refused(self, template: str, text: str, room: int) -> Fitted | None:
        """What ``fit`` says of a text that cannot fit by its length alone, without tokenising it. None of any other.

        Raises as ``encode`` does.
        """
        least = self._least(text) + sum(map(len, self.around(template)))
        return Fitted(None, least, at_least=True) if least > room else None

    def encode_literal(self, text: str) -> list[int]:
        """Token ids of trusted text. Special tokens are recognised."""
        return _encode(self._literal, text)

    def encode_text(self, text: str) -> list[int]:
        """Token ids of untrusted text. Special tokens are split into plain ones."""
        _utf8_size(text)
        return _encode(self._plain, text)

    def around(self, template: str) -> tuple[list[int], list[int]]:
        """The tokens before and after the input. Raises InvalidArtifact as ``encode`` does."""
        before, after = (self.encode_literal(part) for part in split_template(template))
        begun = before[: len(self._first)] == self._first
        ended = after[len(after) - len(self._last) :] == self._last
        return before if begun else self._first + before, after if ended else after + self._last

    def _least(self, text: str) -> int:
        size = _utf8_size(text)
        return self._rules.least_tokens(size) if self._rules else 0

    def _head(self, text: str, wanted: int, max_bytes: int | None) -> tuple[list[int], bool]:
        """More than ``wanted`` of the tokens that ``text`` begins with, or all of them, and whether it is all."""
        length = HEAD_PER_TOKEN * (wanted + 1)
        most = len(text) if max_bytes is None else max_bytes
        while self._rules and length < len(text):
            place = self._rules.cut_from(text, length, min(len(text), most + 1))
            if place is None:
                break
            ids = self._within(text[:place], max_bytes)
            if len(ids) > wanted:
                return ids, False
            length = 2 * place
        return self._within(text, max_bytes), True

    def _within(self, text: str, max_bytes: int | None) -> list[int]:
        """Token ids of a text of at most ``max_bytes``."""
        size = _utf8_size(text)
        if max_bytes is not None and size > max_bytes:
            raise InputTooLong(
                f"input: expected at most {max_bytes} bytes to tokenise, or a sure place to cut it before that, "
                f"got {size} bytes",
                expected=max_bytes,
                got=size,
            )
        return _encode(self._plain, text)


def _made(described: str) -> Any:
    backend = Tokenizer.from_str(described)
    backend.no_truncation()
    backend.no_padding()
    return backend


def _without_special_pieces(described: str) -> str:
    """A tokenizer of kind Unigram without its special tokens among the pieces of a text; any other as it is.

    Such a vocabulary (T5's) lists special tokens as pieces, the likeliest of all. A text that names one would get it,
    whatever ``encode_special_tokens`` says. Ids stay: each special piece gets a name that no text can have.
    """
    state = json.loads(described)
    if state["model"]["type"] != "Unigram":
        return described
    special = {token["id"] for token in state["added_tokens"] if token["special"]}
    state["added_tokens"] = [token for token in state["added_tokens"] if not token["special"]]
    vocabulary = state["model"]["vocab"]
    for token in special & set(range(len(vocabulary))):
        vocabulary[token][0] = f"{token} {secrets.token_hex(16)}"
    return json.dumps(state)


def _utf8_size(text: str) -> int:
    try:
        return len(text.encode())
    except UnicodeEncodeError:
        raise InvalidParameter("input: expected valid Unicode, got a lone surrogate", parameter=INPUT_SLOT) from None


def _encode(backend: Any, text: str) -> list[int]:
    """Token ids. Of the backend's calls only those for a batch let other Python threads run meanwhile."""
    ids: list[int] = backend.encode_batch_fast([text], add_special_tokens=False)[0].ids if text else []
    return ids
