"""NIST as mteval-v13a computes it, case-insensitive: n-grams weighted by their information in the references.

Owns the score (Doddington 2002, in the form of ``mteval-v13a.pl``); the tokenization is sacreBLEU's ``13a``, from the
same script. The script does not define the reference length if inputs differ in their number of references. Like E2E's
scorer, this module takes the mean over each input's references: both give 7.7889 on that scorer's example pair. nltk's
``corpus_nist`` is another measure and gives 6.22 there.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Final

from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

from trainer.evaluation.scores.base import Corpus, Score

ORDER: Final = 5
_BETA: Final = -math.log(0.5) / math.log(1.5) ** 2  # the penalty is 0.5 at two thirds of the references' length

Ngram = tuple[str, ...]


def nist(corpus: Corpus) -> Score:
    """NIST-5, 0 and up. It has no interval: an n-gram's weight comes from all references together."""
    tokenize = Tokenizer13a()
    outputs = [tokenize(text.lower()).split() for text in corpus.outputs]
    references = [[tokenize(text.lower()).split() for text in texts] for texts in corpus.references]
    counts = [[_ngrams(words) for words in texts] for texts in references]
    weights = _information(counts)
    gained, made = [0.0] * ORDER, [0] * ORDER
    for words, texts in zip(outputs, counts, strict=True):
        most: Counter[Ngram] = Counter()
        for reference in texts:
            most |= reference
        for ngram, count in _ngrams(words).items():
            gained[len(ngram) - 1] += weights.get(ngram, 0.0) * min(count, most[ngram])
        for order in range(ORDER):
            made[order] += max(0, len(words) - order)
    precision = sum(gain / max(1, total) for gain, total in zip(gained, made, strict=True))
    length = sum(sum(map(len, texts)) / len(texts) for texts in references)
    return Score("nist", precision * _penalty(made[0] / length if length else 1.0))


def _ngrams(words: list[str]) -> Counter[Ngram]:
    return Counter(
        tuple(words[start : start + order])
        for order in range(1, ORDER + 1)
        for start in range(len(words) - order + 1)
    )


def _information(references: list[list[Counter[Ngram]]]) -> dict[Ngram, float]:
    """Bits of an n-gram's last word given the words before it: log2(count of those words / count of the n-gram)."""
    total: Counter[Ngram] = Counter()
    for texts in references:
        for counts in texts:
            total.update(counts)
    words = sum(count for ngram, count in total.items() if len(ngram) == 1)
    return {
        ngram: math.log2((total[ngram[:-1]] if len(ngram) > 1 else words) / count) for ngram, count in total.items()
    }


def _penalty(ratio: float) -> float:
    """The factor for outputs that are shorter than the references; ``ratio`` is output length to reference length."""
    if ratio >= 1:
        return 1.0
    return math.exp(-_BETA * math.log(ratio) ** 2) if ratio > 0 else 0.0
