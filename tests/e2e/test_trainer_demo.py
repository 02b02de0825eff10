"""The assets that ship: they fit together, are small, and do what the README promises."""

from __future__ import annotations

from pathlib import Path

import pytest

from prefixes.artifact import Prefix, read_prefix
from prefixes.backbone import Backbone, load_backbone
from prefixes.spec import check_compatible
from server.engine.types import FinishReason, Output, SamplingParams
from trainer.config import DEMO_TEMPLATE
from trainer.demo import DECODING, demo_tasks
from trainer.evaluate import field_scores, generate

ROOT = Path(__file__).resolve().parents[2]
ASSETS = ROOT / "prefixes" / "demo"
NAMES = ("dart", "e2e", "e2e-fields")


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone("demo")


def demo_prefix(name: str) -> Prefix:
    return read_prefix((ASSETS / "gpt2" / "prefixes" / f"{name}.safetensors").read_bytes())


def answer(backbone: Backbone, name: str, text: str) -> Output:
    return generate(backbone, demo_prefix(name), [text], SamplingParams(**DECODING))[0]


def test_the_assets_fit_in_15_megabytes_and_name_their_sources() -> None:
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) < 15e6
    attribution = (ASSETS / "ATTRIBUTION.md").read_text()
    assert all(name in attribution for name in ("E2E", "DART", "CC BY-SA 4.0", "MIT"))


def test_every_shipped_prefix_is_one_of_the_demo_tasks_and_nothing_else_ships() -> None:
    shipped = {path.name for path in (ASSETS / "gpt2" / "prefixes").iterdir()}
    assert shipped == {f"{name}.safetensors" for name in NAMES}
    assert sorted(task.name for task in demo_tasks(1)) == list(NAMES)


def test_nothing_made_from_webnlg_ships() -> None:
    for task in demo_tasks(1):
        for conversion in (task.train, task.test):
            assert conversion.corpus == "e2e" or "webnlg" in conversion.without


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_prefix_belongs_to_the_shipped_backbone(backbone: Backbone, name: str) -> None:
    spec = demo_prefix(name).spec
    check_compatible(spec, backbone.spec)
    assert (spec.template, spec.defaults) == (DEMO_TEMPLATE, DECODING)
    assert spec.origin["data"]["train"]["digest"].startswith("sha256:")
    assert spec.origin["method"].startswith("prefix-tuning/")


def test_e2e_answers_the_readmes_request_with_a_fitting_sentence(backbone: Backbone) -> None:
    output = answer(backbone, "e2e", "name : Blue Spice | Type : coffee shop | area : city centre")
    assert output.finish_reason is FinishReason.STOP
    assert all(part in output.text for part in ("Blue Spice", "coffee shop", "city centre"))
    assert output.text[0].isupper() and output.text.endswith(".")


def test_dart_answers_triples_with_a_fitting_sentence(backbone: Backbone) -> None:
    triples = "The Eagle : eattype : pub | The Eagle : food : Japanese | The Eagle : area : riverside"
    output = answer(backbone, "dart", triples)
    assert output.finish_reason is FinishReason.STOP
    assert all(part in output.text for part in ("The Eagle", "Japanese", "riverside"))


def test_e2e_fields_answers_a_sentence_with_its_fields(backbone: Backbone) -> None:
    output = answer(backbone, "e2e-fields", "Zizzi is a cheap Italian pub near Burger King in the riverside area.")
    wanted = "name : Zizzi | Type : pub | food : Italian | price : cheap | area : riverside | near : Burger King"
    assert field_scores([output.text], [[wanted]])["f1"] >= 0.8


def test_the_prefix_alone_chooses_the_skill(backbone: Backbone) -> None:
    text = "name : Blue Spice | Type : coffee shop | area : city centre"
    assert len({answer(backbone, name, text).text for name in ("e2e", "e2e-fields")}) == 2
