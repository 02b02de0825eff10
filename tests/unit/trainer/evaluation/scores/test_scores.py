"""Scores of texts: what each metric counts, its settings by corpus, and the intervals."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from sacrebleu.metrics.ter import TER

from prefixes.errors import InvalidParameter
from tests.support.paths import SHARED
from trainer.data.corpora import read_e2e
from trainer.evaluation.bootstrap import intervals
from trainer.evaluation.scores.base import Corpus, Score, ScorerMissing, mean_score
from trainer.evaluation.scores.fields import fields
from trainer.evaluation.scores.nist import nist
from trainer.evaluation.scores.presets import METRICS, MULTI_BLEU, NEED_JAVA, PRESETS, metrics_of, preset_of, scores_of
from trainer.evaluation.scores.rouge import rouge
from trainer.evaluation.scores.sacre import BleuSettings, bleu, chrf, ter

EXAMPLE = SHARED / "e2e-metrics-example"
WORDS = ["the", "a", "Blue", "Spice", "shop", "in", "near", "city", ".", ",", "4.5", "£20", "is-not", "&amp;", "pub"]


def corpus(*pairs: tuple[str, list[str]]) -> Corpus:
    return Corpus.of([output for output, _ in pairs], [texts for _, texts in pairs])


def random_corpus(seed: int, inputs: int = 12) -> Corpus:
    draw = random.Random(seed)

    def text() -> str:
        return " ".join(draw.choice(WORDS) for _ in range(draw.randint(5, 14)))

    return corpus(*((text(), [text() for _ in range(draw.randint(1, 4))]) for _ in range(inputs)))


def of(name: str, scores: list[Score]) -> float:
    return next(score.value for score in scores if score.name == name)


def example() -> Corpus:
    """The pair that comes with E2E's official scorer: references in blocks, an empty line between two."""
    blocks = (EXAMPLE / "devel-conc.txt").read_text().strip("\n").split("\n\n")
    return Corpus.of((EXAMPLE / "baseline-output.txt").read_text().splitlines(), [b.splitlines() for b in blocks])


@pytest.mark.corpora
@pytest.mark.skipif(not EXAMPLE.is_dir(), reason="needs the corpora beside the checkout (../shared/data)")
def test_bleu_and_nist_of_e2es_example_are_the_official_scorers() -> None:
    scores = scores_of(example(), PRESETS["e2e"], ("bleu", "nist"))
    assert of("bleu", scores) == pytest.approx(72.03, abs=0.005)
    assert of("nist", scores) == pytest.approx(7.7889, abs=0.00005)
    cased = bleu(example(), BleuSettings(lowercase=False)).value
    assert abs(cased - 72.03) > 1, "the example tells the settings apart"


@pytest.mark.corpora
@pytest.mark.skipif(not (SHARED / "e2e").is_dir(), reason="needs the corpora beside the checkout (../shared/data)")
def test_e2es_test_set_has_its_630_meanings() -> None:
    meanings = {PRESETS["e2e"].meaning(pair.source) for pair in read_e2e(SHARED / "e2e/src1_test.txt")}
    assert len(meanings) == 630


def test_nist_by_hand() -> None:
    """Two references of two words each: `a` is 2 of 4 words, worth 1 bit; `b` and `c` 2 bits; `b` after `a` 1 bit."""
    score = nist(corpus(("A b", ["a b"]), ("a x", ["a c"])))
    unigrams = (1 + 2 + 1) / 4
    bigrams = math.log2(2 / 1) / 2
    assert score.value == pytest.approx(unigrams + bigrams)
    assert score.statistics is None, "no interval"


def test_nist_halves_the_score_of_outputs_of_two_thirds_the_length() -> None:
    long, short = corpus(("a b c", ["a b c"])), corpus(("a b", ["a b c"]))
    full = nist(long).value
    assert full == pytest.approx(math.log2(3)), "each word 1 of 3; what follows a word is certain and worth nothing"
    assert nist(short).value == pytest.approx(full / 2)
    assert nist(corpus(("", ["a b c"]))).value == 0.0


@pytest.mark.parametrize("seed", range(3))
def test_the_value_is_sacrebleus_own(seed: int) -> None:
    """The statistics behind value and interval are read from inside of the package: this notices when they change."""
    texts = random_corpus(seed)
    most = max(map(len, texts.references))
    streams = [[refs[i] if i < len(refs) else None for refs in texts.references] for i in range(most)]
    outputs = list(texts.outputs)
    for ours, theirs in (
        (bleu(texts, BleuSettings()), BLEU(lowercase=True)),
        (bleu(texts, BleuSettings(lowercase=False, smooth="none")), BLEU(smooth_method="none")),
        (ter(texts), TER()),
        (chrf(texts), CHRF()),
    ):
        assert ours.value == pytest.approx(theirs.corpus_score(outputs, streams).score)  # type: ignore[arg-type]
        assert ours.statistics is not None and ours.of_sums is not None and ours.per_input is not None
        again = ours.of_sums(ours.statistics.sum(axis=0, keepdims=True))
        assert again[0] == pytest.approx(ours.value)
        assert len(ours.per_input) == len(outputs)
    assert ter(texts).lower_is_better and not chrf(texts).lower_is_better


def test_bleu_takes_all_references_also_of_unequal_number() -> None:
    text = "Blue Spice is a coffee shop in the city centre."
    both = corpus((text, ["No such thing here at all.", text]), (text, [text]))
    assert bleu(both, BleuSettings()).value == pytest.approx(100.0)
    assert bleu(corpus((text, ["No such thing here at all."])), BleuSettings()).value < 10


def test_multi_bleu_counts_words_between_spaces_and_knows_no_smoothing() -> None:
    """By hand: 4 of 5 words, 3 of 4 pairs, 2 of 3 triples, 1 of 2 fours, no penalty."""
    text = corpus(("The cat sat down there.", ["the cat sat down there"]))
    expected = 100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25
    assert bleu(text, MULTI_BLEU).value == pytest.approx(expected)
    assert bleu(corpus(("a b c", ["a b x"])), MULTI_BLEU).value == 0.0, "no triple matches"


def test_multi_bleu_counts_a_missing_reference_as_an_empty_line() -> None:
    """An output of 5 words is nearer to an empty reference than to one of 11: multi-bleu then has no penalty for it."""
    long = "one two three four five six seven eight nine ten eleven"
    pair = corpus(("one two three four five", [long]), ("x y z a b", ["x y z a b", "x y z a b"]))
    assert bleu(pair, MULTI_BLEU).value == pytest.approx(100.0)
    plain = BleuSettings(tokenize="none", smooth="none")
    assert bleu(pair, plain).value == pytest.approx(100 * math.exp(1 - 16 / 10))


def test_webnlg_splits_at_everything_but_word_characters_and_takes_three_references() -> None:
    preset = PRESETS["webnlg"]
    text = "Alan_Bean's (1932) moon-walk."
    assert preset.prepare(text).split() == ["alan_bean", "'", "s", "(", "1932", ")", "moon", "-", "walk", "."]
    late = corpus((text, ["no", "none", "never", text]))
    assert of("bleu", scores_of(late, preset, ("bleu",))) == 0.0, "the fourth reference does not count"
    early = corpus((text.upper(), ["no", "none", text, "never"]))
    assert of("bleu", scores_of(early, preset, ("bleu",))) == pytest.approx(100.0)


def test_dart_is_scored_in_lower_case_over_all_references() -> None:
    text = "The Eagle is a Pub near Paris"
    pair = corpus((text, ["no", "none", "never", text.lower()]))
    assert of("bleu", scores_of(pair, PRESETS["dart"], ("bleu",))) == pytest.approx(100.0)


def test_rouge_is_the_packages_f1_with_stemming() -> None:
    """By hand: `the models learn` against `a model learned fast`: 2 stems of 3 and of 4 in common, no bigram less."""
    scores = rouge(corpus(("the models learn", ["a model learned fast"])))
    assert of("rouge1", scores) == pytest.approx(100 * 2 * 2 / (3 + 4))
    assert of("rouge2", scores) == pytest.approx(100 * 2 * 1 / (2 + 3))
    assert of("rougeL", scores) == pytest.approx(100 * 2 * 2 / (3 + 4))


def test_rouge_takes_all_three_scores_from_the_reference_with_the_best_rouge_1() -> None:
    one = "alpha beta gamma delta"
    scattered, ordered = "delta gamma beta alpha", "alpha beta something else"
    scores = rouge(corpus((one, [ordered, scattered])))
    assert of("rouge1", scores) == pytest.approx(100.0)
    assert of("rouge2", scores) == 0.0 and of("rougeL", scores) == pytest.approx(25.0), "not the other one's"
    assert of("rougeL", rouge(corpus((one, [one]), ("", [one])))) == pytest.approx(50.0), "mean over inputs"


def test_field_scores_count_exact_parts_against_the_best_reference() -> None:
    scores = fields(
        corpus(
            ("name : A | food : B", ["name : A | food : X | area : Y"]),
            ("name : C", ["name : D", "name : C"]),
            ("", ["name : E"]),
        )
    )
    assert of("precision", scores) == pytest.approx(2 / 3)
    assert of("recall", scores) == pytest.approx(2 / 5)
    assert of("f1", scores) == pytest.approx(0.5)
    assert of("exact", scores) == pytest.approx(1 / 3)
    assert of("f1", fields(corpus(("", [" | "])))) == 0.0, "nothing made, nothing wanted: no division by zero"


def test_the_interval_of_a_mean_is_that_of_the_central_limit_theorem() -> None:
    values = np.random.default_rng(0).normal(50, 10, 400).tolist()
    score = mean_score("m", values)
    found = intervals([score], seed=3, resamples=2000)["m"]
    assert found is not None
    low, high = found
    error = float(np.std(values)) / math.sqrt(400)
    assert low == pytest.approx(score.value - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(score.value + 1.96 * error, abs=0.15 * error)


def test_intervals_repeat_with_the_seed_and_are_drawn_alike_for_every_score() -> None:
    texts = random_corpus(5)
    first, second = [bleu(texts, BleuSettings()), chrf(texts)], [chrf(texts), bleu(texts, BleuSettings())]
    found = intervals(first, seed=1, resamples=200)
    assert found == intervals(second, seed=1, resamples=200), "whatever else is scored"
    assert found != intervals(first, seed=2, resamples=200)
    for score in first:
        bounds = found[score.name]
        assert bounds is not None and bounds[0] < score.value < bounds[1]


def test_there_is_no_interval_where_it_would_be_wrong() -> None:
    one = corpus(("a b", ["a b"]))
    assert intervals([chrf(one)], seed=1) == {"chrf": None}, "of a single input"
    assert intervals([nist(random_corpus(1))], seed=1) == {"nist": None}
    assert intervals([chrf(random_corpus(1))], seed=1, resamples=0) == {"chrf": None}


def test_every_preset_names_metrics_that_there_are() -> None:
    for preset in PRESETS.values():
        assert preset.metrics and set(preset.metrics) <= set(METRICS) and preset.about
    assert not NEED_JAVA & set(PRESETS["plain"].metrics), "the default needs nothing that may be missing"


def test_unknown_names_and_empty_corpora_are_refused() -> None:
    with pytest.raises(InvalidParameter, match="expected one of plain, e2e"):
        preset_of("e3e")
    with pytest.raises(InvalidParameter, match="expected one of bleu, ter"):
        metrics_of(PRESETS["plain"], ["blue"])
    assert metrics_of(PRESETS["plain"], ["ter", "bleu", "ter"]) == ("ter", "bleu")
    assert metrics_of(PRESETS["xsum"], []) == ("rouge",)
    bad: list[tuple[list[str], list[list[str]]]] = [([], []), (["a"], []), (["a"], [[]])]
    for outputs, references in bad:
        with pytest.raises(InvalidParameter, match="expected"):
            Corpus.of(outputs, references)


def test_a_missing_java_is_named_before_anything_is_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer", reason="needs pip install 'prefixd[coco]'")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ScorerMissing, match=r"expected a Java runtime.*found none.*apt-get"):
        metrics_of(PRESETS["e2e"], [])
    assert metrics_of(PRESETS["e2e"], ["bleu", "nist"]) == ("bleu", "nist"), "these need none"


def test_a_missing_package_is_named_with_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ScorerMissing, match=r"expected the package pycocoevalcap.*pip install 'prefixd\[coco\]'"):
        metrics_of(PRESETS["e2e"], [])
