"""What holds of every text under a byte-level BPE tokenizer: how few tokens it can have, and where it can be cut.

Owns the proof, for the kinds of tokenizer that GPT-2, BART, SmolLM2, Llama 3, Qwen2 and Qwen3 have, and the closed list
of what belongs to them. Knows no template and no window. Torch-free.

- **Length.** Each byte becomes one character, and no character is dropped. So a token stands for at most as many bytes
  as the vocabulary's longest entry. Qwen's tokenizers compose characters first (NFC), which leaves at least a quarter
  of the bytes: no composed character has more than four times its own bytes in any text that it comes from.
- **Cuts.** The pre-tokenizer's patterns never take a letter together with the punctuation, space or digit behind it, no
  digit together with what is none behind it, and no punctuation together with the space behind it. Llama 3's and Qwen's
  take punctuation together with the line break behind it, GPT-2's does not. None of the alternatives looks further. So
  the text before such a place has the same tokens whatever follows. NFC composes nothing across it either: both
  characters begin anew and stay as they are. The lists are of characters whose class is the same in every Unicode.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Final

from tokenizers.pre_tokenizers import ByteLevel

NFC_SHRINKS: Final = 4
"""At most so many bytes of a text become one by NFC."""

_LETTER: Final = "A-Za-zÀ-ÖØ-öø-ɏα-ωА-яぁ-ゖァ-ヺ一-龥가-힣"
_MARK: Final = r"!-/:-@\[-`{-~、。，！？：；「」（）"
_WORDS: Final = rf"(?<=[{_LETTER}])(?=[0-9 \n{_MARK}])|(?<=[0-9])(?=[A-Za-z \n{_MARK}])|(?<=[{_MARK}])(?= )"
_CUT_BEFORE_LINES: Final = re.compile(rf"{_WORDS}|(?<=[{_MARK}])(?=\n)")
_CUT: Final = re.compile(_WORDS)
_PATTERN: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LATER_PATTERNS: Final = (_PATTERN % "{1,3}", _PATTERN % "")
"""Of Llama 3 and SmolLM3, and of Qwen2 and Qwen3: they differ in how many digits a token may have."""


@dataclass(frozen=True)
class ByteLevelRules:
    """``longest``: the most bytes of a text that one token stands for. ``added``: texts that become tokens before the
    pattern is looked for. ``cut``: between which characters a text can be cut.
    """

    longest: int
    added: tuple[str, ...]
    cut: re.Pattern[str]

    def least_tokens(self, size: int) -> int:
        """The fewest tokens that a text of ``size`` bytes can have."""
        return -(-size // self.longest)

    def cut_from(self, text: str, start: int, end: int) -> int | None:
        """The first place of ``text`` from ``start`` to ``end`` where it can be cut, None if there is none.

        The tokens before it are those that the whole text begins with.
        """
        for match in self.cut.finditer(text, start, end):
            if not any(self._crosses(added, text, match.start()) for added in self.added):
                return match.start()
        return None

    @staticmethod
    def _crosses(added: str, text: str, place: int) -> bool:
        return added in text[max(0, place - len(added) + 1) : place + len(added) - 1]


def byte_level_rules(backend: Any) -> ByteLevelRules | None:
    """The rules of ``backend`` (``tokenizers.Tokenizer``) for text in which special tokens are split.

    None unless all that it does to a text is known here: no normaliser but NFC, one of the known pre-tokenizers, plain
    BPE over all bytes, and no added token that takes the spaces beside it or looks at them, or that NFC may make.
    """
    described = json.loads(backend.to_str())
    normalizer, model, added = described["normalizer"], described["model"], described["added_tokens"]
    cut = _cut_of(described["pre_tokenizer"] or {})
    known = (
        normalizer in (None, {"type": "NFC"})
        and model["type"] == "BPE"
        and not any(model.get(name) for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"))
        and model["vocab"].keys() >= set(ByteLevel.alphabet())
    )
    plain = [token for token in added if not token["special"]]
    unknown = ("lstrip", "rstrip", "single_word", *(["normalized"] if normalizer else []))
    if cut is None or not known or any(token[name] for token in plain for name in unknown):
        return None
    texts = tuple(str(token["content"]) for token in added) if plain else ()
    longest = max(*map(len, model["vocab"]), *(len(text.encode()) for text in texts), 1)
    return ByteLevelRules(longest * NFC_SHRINKS if normalizer else longest, texts, cut)


def _cut_of(pre_tokenizer: dict[str, Any]) -> re.Pattern[str] | None:
    """Where texts can be cut under a known pre-tokenizer: GPT-2's, SmolLM2's (digits apart), or a later pattern."""
    *before, last = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    if last.get("type") != "ByteLevel":
        return None
    if last.get("use_regex", True):
        return _CUT_BEFORE_LINES if [step["type"] for step in before] in ([], ["Digits"]) else None
    splits = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in _LATER_PATTERNS
    ]
    return _CUT if before in [[split] for split in splits] else None
