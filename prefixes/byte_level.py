"""What holds of every text under a byte-level BPE tokenizer: how few tokens it can have, and where it can be cut.

Owns the proof, for the kind of tokenizer that GPT-2 and BART have, and the closed list of what belongs to that kind.
Knows no template and no window. Torch-free.

- **Length.** Nothing normalises the text, each byte becomes one character, and no character is dropped. So a token
  stands for at most as many bytes as the vocabulary's longest entry.
- **Cuts.** The pre-tokenizer's pattern never takes a letter together with the punctuation, space or digit behind it,
  and no punctuation together with the space behind it. None of its alternatives looks further. So the text before such
  a place has the same tokens whatever follows. The lists are of characters whose class is the same in every Unicode.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Final

from tokenizers.pre_tokenizers import ByteLevel

_LETTER: Final = "A-Za-zÀ-ÖØ-öø-ɏα-ωА-яぁ-ゖァ-ヺ一-龥가-힣"
_MARK: Final = r"!-/:-@\[-`{-~、。，！？：；「」（）"
_CUT: Final = re.compile(
    rf"(?<=[{_LETTER}])(?=[0-9 \n{_MARK}])|(?<=[0-9])(?=[A-Za-z \n{_MARK}])|(?<=[{_MARK}])(?=[ \n])"
)


@dataclass(frozen=True)
class ByteLevelRules:
    """``longest``: bytes of the longest token. ``added``: texts that become tokens before the pattern is looked for."""

    longest: int
    added: tuple[str, ...]

    def least_tokens(self, size: int) -> int:
        """The fewest tokens that a text of ``size`` bytes can have."""
        return -(-size // self.longest)

    def cut_from(self, text: str, start: int, end: int) -> int | None:
        """The first place of ``text`` from ``start`` to ``end`` where it can be cut, None if there is none.

        The tokens before it are those that the whole text begins with.
        """
        for match in _CUT.finditer(text, start, end):
            if not any(self._crosses(added, text, match.start()) for added in self.added):
                return match.start()
        return None

    @staticmethod
    def _crosses(added: str, text: str, place: int) -> bool:
        return added in text[max(0, place - len(added) + 1) : place + len(added) - 1]


def byte_level_rules(backend: Any) -> ByteLevelRules | None:
    """The rules of ``backend`` (``tokenizers.Tokenizer``) for text in which special tokens are split.

    None unless all that it does to a text is known here: no normaliser, GPT-2's pre-tokenizer, plain BPE over all
    bytes, and no added token that takes the spaces beside it or looks at them.
    """
    described = json.loads(backend.to_str())
    splitter, model = described["pre_tokenizer"] or {}, described["model"]
    added = described["added_tokens"]
    known = (
        described["normalizer"] is None
        and splitter.get("type") == "ByteLevel"
        and splitter.get("use_regex", True)
        and model["type"] == "BPE"
        and not any(model.get(name) for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"))
        and model["vocab"].keys() >= set(ByteLevel.alphabet())
    )
    plain = [token for token in added if not token["special"]]
    if not known or any(token[name] for token in plain for name in ("lstrip", "rstrip", "single_word")):
        return None
    texts = tuple(str(token["content"]) for token in added) if plain else ()
    longest = max(*map(len, model["vocab"]), *(len(text.encode()) for text in texts), 1)
    return ByteLevelRules(longest, texts)
