"""Turns a template and a user's text into token ids. The trainer and the server share this one rule.

Three pieces are tokenised separately and joined: the template's text before the input, the input, and the text after
it. In one string, merges could cross the seams: the input would change the template's tokens, and could even complete
a special token with them. Only the template's text may contain special tokens. In the user's text they are plain text
and are split.

The pieces' texts stand side by side, too: nothing is put between them. A tokenizer that puts a space before a text, as
SentencePiece does, puts it before the prompt's first words alone: those of the template, or of the input where only
special tokens stand before it. It puts none before an input, a template's text or a target that goes on in a text, nor
behind a special token. So ``Summary: {input}`` has one space there and ``Summary:{input}`` has none.

Around all stand the tokens that the model's own tokenizer begins and ends a text with, where it does (Llama's ``<s>``,
T5's ``</s>``), unless the template begins or ends with them itself.

A prompt that is too long loses tokens from the end of the input, never from the template.

Owns these rules, and how little of a text need be tokenised to know its prompt; knows no window.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from prefixes.byte_level import byte_level_rules
from prefixes.errors import InputTooLong, InvalidParameter
from prefixes.leading_space import without_leading_space
from prefixes.spec import INPUT_SLOT, split_template
from prefixes.tokenizer_backends import Backends

_MARK: Final = re.compile(r"<\|[^<>|\s]{1,60}\|>")  # how most tokenizers write special tokens
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

    It keeps copies of the backend, because splitting special tokens is a mutable switch there. A thread that flipped a
    shared switch would let another thread's user text through as special tokens.
    """

    def __init__(self, tokenizer: Any, added: AddedTokens = NO_TOKENS) -> None:
        self._first, self._last = list(added.first), list(added.last)
        described = json.loads(tokenizer.backend_tokenizer.to_str())
        self._special = frozenset(token["id"] for token in described["added_tokens"] if token["special"])
        unspaced = without_leading_space(described)
        self._beginning = Backends.of(described)
        self._continuing = self._beginning if unspaced == described else Backends.of(unspaced)
        self._rules = byte_level_rules(self._continuing.plain)

    @property
    def first(self) -> tuple[int, ...]:
        """The tokens that every prompt begins with."""
        return tuple(self._first)

    def encode(self, template: str, text: str) -> list[int]:
        """Token ids of ``template`` with ``text`` for its ``{input}``.

        Raises InvalidArtifact unless the template has exactly one ``{input}``, and InvalidParameter for text that is
        not valid Unicode.
        """
        before, after, continues = self.around(template)
        return before + self.encode_text(text, continues=continues) + after

    def fit(
        self, template: str, text: str, room: int, *, truncate: bool = False, max_bytes: int | None = None
    ) -> Fitted:
        """The prompt in at most ``room`` tokens. With ``truncate`` the input loses its end; the template stays whole.

        A text that cannot fit by its length alone is not tokenised. With ``truncate`` a head of it is. Raises as
        ``encode`` does, and InputTooLong where more than ``max_bytes`` of the text would have to be tokenised.
        """
        before, after, continues = self.around(template)
        backend = self._backend(continues).plain
        around, least = len(before) + len(after), self._least(text)
        if not truncate and around + least > room:
            return Fitted(None, around + least, at_least=True)
        left = max(0, room - around)
        if truncate:
            ids, whole = self._head(backend, text, left, max_bytes)
        else:
            ids, whole = _within(backend, text, max_bytes), True
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
        before, after, _ = self.around(template)
        least = self._least(text) + len(before) + len(after)
        return Fitted(None, least, at_least=True) if least > room else None

    def encode_literal(self, text: str) -> list[int]:
        """Token ids of a trusted text by itself. Special tokens are recognised."""
        return self._opening(text)[0]

    def encode_text(self, text: str, *, continues: bool = False) -> list[int]:
        """Token ids of untrusted text, which ``continues`` another or stands by itself. Special tokens are split."""
        _utf8_size(text)
        return _encode(self._backend(continues).plain, text)

    def unknown_marks(self, template: str) -> list[str]:
        """What is written as a special token in ``template``, ``<|…|>``, and is not one token of the tokenizer's."""
        marks = dict.fromkeys(_MARK.findall(template))
        return [mark for mark in marks if self.encode_literal(mark) != [self._beginning.literal.token_to_id(mark)]]

    def check_marks(self, template: str) -> None:
        """Raise InvalidParameter for ``unknown_marks``, InvalidArtifact unless there is exactly one ``{input}``."""
        split_template(template)
        if unknown := self.unknown_marks(template):
            raise InvalidParameter(
                "template: expected special tokens that this backbone's tokenizer has, got "
                f"{', '.join(unknown[:4])}, which it takes for plain text",
                parameter="template",
                got=unknown[:4],
            )

    def _backend(self, continues: bool) -> Backends:
        return self._continuing if continues else self._beginning

    def around(self, template: str) -> tuple[list[int], list[int], bool]:
        """The tokens before and after the input, and whether the input continues a text. Raises as ``encode`` does."""
        opening, closing = split_template(template)
        before, continues = self._opening(opening)
        after = _encode(self._continuing.literal, closing)
        begun = before[: len(self._first)] == self._first
        ended = after[len(after) - len(self._last) :] == self._last
        return before if begun else self._first + before, after if ended else after + self._last, continues

    def _opening(self, text: str) -> tuple[list[int], bool]:
        """Token ids of a trusted text that begins, and whether any of it is text. Only its first words have a space."""
        if self._continuing is self._beginning:
            ids = _encode(self._beginning.literal, text)
            return ids, not self._special.issuperset(ids)
        spaceless = self._continuing.literal.encode(text, add_special_tokens=False)
        ids = list(spaceless.ids)
        start = next((place for place, token in enumerate(ids) if token not in self._special), None)
        if start is None:
            return ids, False
        words = _encode(self._beginning.literal, text[spaceless.offsets[start][0] :])
        return ids[:start] + words[: self._words(words)] + ids[start + self._words(ids[start:]) :], True

    def _words(self, ids: Sequence[int]) -> int:
        """How many of ``ids`` stand before the first special token."""
        return next((place for place, token in enumerate(ids) if token in self._special), len(ids))

    def _least(self, text: str) -> int:
        size = _utf8_size(text)
        return self._rules.least_tokens(size) if self._rules else 0

    def _head(self, backend: Any, text: str, wanted: int, max_bytes: int | None) -> tuple[list[int], bool]:
        """More than ``wanted`` of the tokens that ``text`` begins with, or all of them, and whether it is all."""
        length = HEAD_PER_TOKEN * (wanted + 1)
        most = len(text) if max_bytes is None else max_bytes
        while self._rules and length < len(text):
            place = self._rules.cut_from(text, length, min(len(text), most + 1))
            if place is None:
                break
            ids = _within(backend, text[:place], max_bytes)
            if len(ids) > wanted:
                return ids, False
            length = 2 * place
        return _within(backend, text, max_bytes), True


def _within(backend: Any, text: str, max_bytes: int | None) -> list[int]:
    """Token ids of a text of at most ``max_bytes``."""
    size = _utf8_size(text)
    if max_bytes is not None and size > max_bytes:
        raise InputTooLong(
            f"input: expected at most {max_bytes} bytes to tokenise, or a sure place to cut it before that, got {size} "
            "bytes",
            expected=max_bytes,
            got=size,
        )
    return _encode(backend, text)


def _utf8_size(text: str) -> int:
    try:
        return len(text.encode())
    except UnicodeEncodeError:
        raise InvalidParameter("input: expected valid Unicode, got a lone surrogate", parameter=INPUT_SLOT) from None


def _encode(backend: Any, text: str) -> list[int]:
    """Token ids. Of the backend's calls only those for a batch let other Python threads run meanwhile."""
    ids: list[int] = backend.encode_batch_fast([text], add_special_tokens=False)[0].ids if text else []
    return ids
