"""Which inputs a gate scores, and what it says of two versions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from prefixes.artifact import Prefix, version_of
from prefixes.backbone import Backbone
from prefixes.registry.limits import check_note
from tests.support.prefixes import make_prefix
from tests.support.trainer import tiny_backbone
from trainer.data.dataset import Dataset, Example
from trainer.data.seen import ENTRY, KEPT, SeenInputs, digest_of
from trainer.evaluation import gate as gate_module
from trainer.evaluation.gate import Gate, GateOutcome
from trainer.evaluation.gate_rule import LEAST_INPUTS, Rule
from trainer.evaluation.gate_set import MOST_INPUTS, gate_set
from trainer.evaluation.scores.presets import preset_of

PLAIN = preset_of("plain")
NOTHING = SeenInputs.of([])


def dataset(texts: Sequence[str]) -> Dataset:
    lines = enumerate(texts, 1)
    return Dataset(tuple(Example(number, text, f"the target of {text}") for number, text in lines), "sha256:0")


def inputs(count: int, name: str = "input") -> list[str]:
    return [f"{name} {number}" for number in range(count)]


def test_what_either_version_has_seen_is_left_out_and_counted() -> None:
    texts = inputs(20)
    kept, left = gate_set(dataset([*texts, *texts]), PLAIN, SeenInputs.of(texts[:5]), SeenInputs.of(texts[3:9]))
    assert set(kept) == set(texts[9:])
    assert all(len(expected) == 2 for expected in kept.values()), "two lines of an input are its references"
    assert left.as_dict() == {"new": 5, "current": 4, "unknown": 0, "surplus": 0}


def test_what_a_version_does_not_tell_is_left_out_and_for_one_that_tells_nothing_nothing_is() -> None:
    texts, seen = inputs(300), SeenInputs.of(inputs(4 * KEPT, "other"))
    cut = SeenInputs(seen.digests, sorted(seen.digests)[KEPT])
    kept, left = gate_set(dataset(texts), PLAIN, NOTHING, cut)
    assert set(kept) == {text for text in texts if cut.tells_of(text)}
    assert left.unknown == 300 - len(kept) > 0
    assert len(gate_set(dataset(texts), PLAIN, NOTHING, None)[0]) == 300


def test_of_too_many_inputs_those_with_the_least_digests_are_scored_whatever_their_order() -> None:
    texts = inputs(MOST_INPUTS + 200)
    kept, left = gate_set(dataset(texts), PLAIN, NOTHING, NOTHING)
    assert list(kept) == sorted(texts, key=digest_of)[:MOST_INPUTS]
    assert left.surplus == 200
    assert gate_set(dataset(texts[::-1]), PLAIN, NOTHING, NOTHING) == (kept, left)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return tiny_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """By version: what an engine that was not asked would say of an input, ``{input}`` in it."""
    said: dict[str, str] = {}

    def generate(_: Backbone, prefix: Prefix, texts: Sequence[str], params: Any, **options: Any) -> list[Any]:
        assert options["truncate"], "an input that is too long ends no job"
        options["report"](len(texts), len(texts))
        form = said[version_of(prefix)]
        return [SimpleNamespace(output=SimpleNamespace(text=form.replace("{input}", text))) for text in texts]

    monkeypatch.setattr(gate_module, "generate", generate)
    return said


def versions(backbone: Backbone, **origin: Any) -> tuple[Prefix, Prefix]:
    return make_prefix(backbone.spec, seed=1), make_prefix(backbone.spec, seed=2, origin=origin)


def judged(
    backbone: Backbone, count: int, new: Prefix, current: Prefix | None, rule: Rule | None = None
) -> GateOutcome:
    gate = Gate(rule or Rule("bleu", 0.5), "plain", dataset(inputs(count)), new, SeenInputs.of(["input 3"]))
    return gate.judge(backbone, current)


@pytest.mark.parametrize(
    ("new", "current", "verdict"),
    [
        ("the target of {input}", "the target of {input}", "promoted"),
        ("the target of {input}", "no idea", "promoted"),
        ("no idea", "the target of {input}", "rejected"),
    ],
)
def test_the_verdict_is_the_rules_and_everything_that_led_to_it_is_said(
    backbone: Backbone, answers: dict[str, str], new: str, current: str, verdict: str
) -> None:
    one, other = versions(backbone, **{ENTRY: SeenInputs.of(["input 5", "input 6"]).as_dict()})
    answers |= {version_of(one): new, version_of(other): current}
    found = judged(backbone, 80, one, other)
    assert (found.verdict, found.inputs, found.current, found.inputs_known) == (verdict, 77, version_of(other), True)
    assert found.scores is not None
    assert found.as_dict() == json.loads(json.dumps(found.as_dict()))
    assert found.as_dict()["left_out"] == {"new": 1, "current": 2, "unknown": 0, "surplus": 0}
    assert found.scores.low <= found.scores.difference <= found.scores.high
    assert "over 77 inputs" in found.reason
    check_note(f"gate {found.verdict}: {found.reason}")


def test_with_too_few_inputs_nothing_is_generated_and_nothing_decided(
    backbone: Backbone, answers: dict[str, str]
) -> None:
    one, other = versions(backbone, **{ENTRY: SeenInputs.of(["input 5"]).as_dict()})
    found = judged(backbone, LEAST_INPUTS + 1, one, other)
    assert (found.verdict, found.inputs, found.scores) == ("undecided", LEAST_INPUTS - 1, None)
    assert "49 inputs are left and 50 are needed" in found.reason
    answers |= dict.fromkeys((version_of(one), version_of(other)), "x")
    assert judged(backbone, LEAST_INPUTS + 2, one, other).verdict == "promoted"


def test_a_current_version_that_tells_nothing_is_compared_with_and_that_is_said(
    backbone: Backbone, answers: dict[str, str]
) -> None:
    one, other = versions(backbone)
    answers |= dict.fromkeys((version_of(one), version_of(other)), "x")
    found = judged(backbone, 60, one, other)
    assert (found.verdict, found.inputs, found.inputs_known) == ("promoted", 59, False)
    assert "not known on which inputs" in found.reason


def test_without_a_current_version_the_new_one_is_promoted_unscored(backbone: Backbone) -> None:
    found = judged(backbone, 3, versions(backbone)[0], None)
    assert (found.verdict, found.current, found.inputs) == ("promoted", None, 0)


def test_a_current_version_of_another_backbone_stays(backbone: Backbone, tmp_path: Path) -> None:
    other = make_prefix(tiny_backbone(tmp_path, family="bart").spec)
    found = judged(backbone, 80, versions(backbone)[0], other)
    assert (found.verdict, found.scores) == ("undecided", None)
    assert "another backbone" in found.reason
