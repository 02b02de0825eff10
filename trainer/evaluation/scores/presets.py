"""How each corpus is scored: its metrics, their settings, and which inputs count as one.

Owns the presets, the metrics' names, and the order of work; other modules own the metrics' arithmetic.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from prefixes.errors import InvalidParameter
from trainer.evaluation.scores import coco, sacre
from trainer.evaluation.scores.base import Corpus, Score
from trainer.evaluation.scores.fields import fields
from trainer.evaluation.scores.nist import nist
from trainer.evaluation.scores.rouge import rouge
from trainer.evaluation.scores.sacre import BleuSettings

METRICS: Final = ("bleu", "ter", "chrf", "rouge", "nist", "meteor", "cider", "coco_rouge", "fields")
NEED_JAVA: Final = frozenset({"meteor", "cider", "coco_rouge"})


def same(text: str) -> str:
    return text


def same_fields(text: str) -> str:
    """E2E: sort the fields, so that inputs with the same meaning representation are equal."""
    return " | ".join(sorted(part.strip() for part in text.split("|")))


def split_words(text: str) -> str:
    """WebNLG: lower-case, with spaces around all but letters, digits and underscores, as in WebNLG's script."""
    return " ".join(re.split(r"(\W)", text)).lower()


@dataclass(frozen=True)
class ScorePreset:
    """How a corpus is scored.

    Inputs with equal ``meaning`` count as one, with all their targets as references. BLEU and TER get texts through
    ``prepare``; the other metrics have their own tokenization. ``references`` is the most per input; None is no limit.
    """

    about: str
    metrics: tuple[str, ...]
    bleu: BleuSettings = field(default_factory=BleuSettings)
    prepare: Callable[[str], str] = same
    references: int | None = None
    meaning: Callable[[str], str] = same


MULTI_BLEU: Final = BleuSettings(tokenize="none", smooth="none", pad_references=True)

PRESETS: Final[Mapping[str, ScorePreset]] = {
    "plain": ScorePreset(
        "BLEU after mteval-v13a (case-insensitive, all references), chrF, ROUGE-1/2/L with stemming",
        ("bleu", "chrf", "rouge"),
    ),
    "e2e": ScorePreset(
        "E2E's own scorer: BLEU and NIST after mteval-v13a, case-insensitive; METEOR 1.5, COCO's ROUGE-L and CIDEr "
        "over PTB tokens; references by meaning representation",
        ("bleu", "nist", "meteor", "coco_rouge", "cider"),
        meaning=same_fields,
    ),
    "webnlg": ScorePreset(
        r"multi-bleu -lc over texts split on \W, at most 3 references; METEOR 1.5; TER",
        ("bleu", "meteor", "ter"),
        bleu=MULTI_BLEU,
        prepare=split_words,
        references=3,
    ),
    "dart": ScorePreset(
        "multi-bleu over lower-cased texts split at spaces, all references; METEOR 1.5; TER",
        ("bleu", "meteor", "ter"),
        bleu=MULTI_BLEU,
        prepare=str.lower,
    ),
    "xsum": ScorePreset("ROUGE-1/2/L with stemming", ("rouge",)),
}


def preset_of(name: str) -> ScorePreset:
    """Return the preset. Raises InvalidParameter for an unknown name."""
    if name not in PRESETS:
        raise InvalidParameter(f"preset: expected one of {', '.join(PRESETS)}, got {name!r}", got=name)
    return PRESETS[name]


def metrics_of(preset: ScorePreset, chosen: Sequence[str]) -> tuple[str, ...]:
    """Return the ``chosen`` metrics, or the preset's if none are, without duplicates.

    Raises InvalidParameter for an unknown metric and ScorerMissing for a missing package or program, before hours of
    generation.
    """
    _check_names(chosen)
    metrics = tuple(dict.fromkeys(chosen or preset.metrics))
    if NEED_JAVA & set(metrics):
        coco.package("tokenizer")
        coco.java()
    return metrics


def check_metrics(preset: str, chosen: Sequence[str]) -> None:
    """Raise InvalidParameter for an unknown preset or metric. Does not check what this machine can compute."""
    preset_of(preset)
    _check_names(chosen)


def _check_names(chosen: Sequence[str]) -> None:
    for name in chosen:
        if name not in METRICS:
            raise InvalidParameter(f"metric: expected one of {', '.join(METRICS)}, got {name!r}", got=name)


def scores_of(corpus: Corpus, preset: ScorePreset, metrics: Sequence[str]) -> list[Score]:
    """Compute the scores of ``metrics``, in their order."""
    corpus = corpus.with_at_most(preset.references)
    words = corpus.mapped(preset.prepare)
    tokens = coco.tokenized(corpus) if NEED_JAVA & set(metrics) else corpus
    compute: Mapping[str, Callable[[], Sequence[Score]]] = {
        "bleu": lambda: [sacre.bleu(words, preset.bleu)],
        "ter": lambda: [sacre.ter(words)],
        "chrf": lambda: [sacre.chrf(corpus)],
        "rouge": lambda: rouge(corpus),
        "nist": lambda: [nist(corpus)],
        "meteor": lambda: [coco.meteor(tokens)],
        "cider": lambda: [coco.cider(tokens)],
        "coco_rouge": lambda: [coco.coco_rouge(tokens)],
        "fields": lambda: fields(corpus),
    }
    return [score for name in metrics for score in compute[name]()]
