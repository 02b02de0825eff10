"""METEOR, CIDEr and COCO's ROUGE-L through their own programs. Skipped without Java or the package."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from tests.unit.trainer.evaluation.scores.test_scores import EXAMPLE, example
from trainer.evaluation.bootstrap import intervals
from trainer.evaluation.scores.base import Corpus, Score
from trainer.evaluation.scores.coco import tokenized
from trainer.evaluation.scores.presets import PRESETS, scores_of

pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer", reason="needs pip install 'prefixd[coco]'")
pytestmark = [
    pytest.mark.slow,  # METEOR reads 60 MB of paraphrases first
    pytest.mark.skipif(shutil.which("java") is None, reason="needs a Java runtime (the program java)"),
]


@pytest.mark.corpora
@pytest.mark.skipif(not EXAMPLE.is_dir(), reason="needs the corpora beside the checkout (../shared/data)")
def test_e2es_example_has_all_five_official_scores() -> None:
    scores = {score.name: score.value for score in scores_of(example(), PRESETS["e2e"], PRESETS["e2e"].metrics)}
    assert scores == {
        "bleu": pytest.approx(72.03, abs=0.005),
        "nist": pytest.approx(7.7889, abs=0.00005),
        "meteor": pytest.approx(48.01, abs=0.005),
        "coco_rougeL": pytest.approx(79.10, abs=0.005),
        "cider": pytest.approx(2.3039, abs=0.00005),
    }


def test_meteors_formula_is_the_programs_also_for_hostile_texts() -> None:
    """What intervals are made of: the formula over sums of statistics gives the program's own figures."""
    outputs = ["the cat is on the mat", "a fast fox leaps quickly", "", "a ||| b", "...", "the mats"]
    references = [
        ["the cat sat on the mat", "a cat was on a mat"], ["the quick fox jumps"], ["some words"], ["a b", "|||"],
        ["words"], ["the mat"],
    ]  # fmt: skip
    [score] = scores_of(Corpus.of(outputs, references), PRESETS["e2e"], ("meteor",))
    assert isinstance(score, Score) and score.statistics is not None and score.of_sums is not None
    assert score.per_input is not None and score.per_input[2] == score.per_input[4] == 0.0
    np.testing.assert_allclose(score.of_sums(score.statistics), score.per_input, atol=1e-9)
    assert score.of_sums(score.statistics.sum(axis=0, keepdims=True))[0] == pytest.approx(score.value, abs=1e-9)
    bounds = intervals([score], seed=1, resamples=200)["meteor"]
    assert bounds is not None and bounds[0] < score.value < bounds[1]


def test_tokens_do_not_depend_on_the_machines_locale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LC_ALL", "C")
    texts = Corpus.of(["Café Müller — «ok»!\nSecond line", ""], [["Ünal's \x85 pub \u2028 here"], ["a", "!"]])
    made = tokenized(texts)
    assert made.outputs == ("café müller ok second line", "")
    assert made.references == (("ünal 's pub here",), ("a", ""))
