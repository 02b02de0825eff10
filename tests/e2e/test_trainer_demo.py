"""The assets that ship: they fit together, are small, and do what the README promises."""

from __future__ import annotations

import pytest

from prefixes.artifact import Prefix, read_prefix
from prefixes.backbone import Backbone, load_backbone
from prefixes.checkpoint_folder import DEMOS
from prefixes.spec import check_compatible
from server.engine.types import FinishReason, Output, SamplingParams
from tests.support.paths import ROOT
from trainer.demos.demo import DECODING, demo_tasks
from trainer.evaluation.generate import decoding, generate
from trainer.evaluation.scores.base import Corpus
from trainer.evaluation.scores.fields import fields

ASSETS = ROOT / "prefixes" / "demo"
NAMES = {"demo": ("dart", "e2e", "e2e-fields"), "demo-bart": ("e2e-bart", "scitldr")}
ABSTRACT = (
    "We study how deep neural networks learn from noisy labels. Existing methods need a clean validation set. We "
    "propose a new training method that estimates the noise of each label while the network learns. Experiments on "
    "several image datasets show that our method improves the accuracy of the learned networks."
)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone("demo")


@pytest.fixture(scope="module")
def bart() -> Backbone:
    return load_backbone("demo-bart")


def demo_prefix(name: str, demo: str = "demo") -> Prefix:
    return read_prefix((ASSETS / DEMOS[demo] / "prefixes" / f"{name}.safetensors").read_bytes())


def answer(backbone: Backbone, name: str, text: str) -> Output:
    return generate(backbone, demo_prefix(name), [text], SamplingParams(**DECODING))[0].output


def answer_bart(bart: Backbone, name: str, text: str) -> Output:
    prefix = demo_prefix(name, "demo-bart")
    params, truncate = decoding(bart, prefix, {})
    return generate(bart, prefix, [text], params, truncate=truncate)[0].output


@pytest.mark.parametrize("demo", NAMES)
def test_a_demos_assets_fit_in_15_megabytes(demo: str) -> None:
    assert sum(path.stat().st_size for path in (ASSETS / DEMOS[demo]).rglob("*") if path.is_file()) < 15e6


def test_the_assets_name_their_sources() -> None:
    attribution = (ASSETS / "ATTRIBUTION.md").read_text()
    assert all(name in attribution for name in ("E2E", "DART", "SciTLDR", "CC BY-SA 4.0", "MIT", "Apache-2.0"))


@pytest.mark.parametrize("demo", NAMES)
def test_every_shipped_prefix_is_one_of_the_demo_tasks_and_nothing_else_ships(demo: str) -> None:
    shipped = {path.name for path in (ASSETS / DEMOS[demo] / "prefixes").iterdir()}
    assert shipped == {f"{name}.safetensors" for name in NAMES[demo]}
    assert sorted(task.name for task in demo_tasks(1) if task.backbone == demo) == list(NAMES[demo])


def test_nothing_made_from_webnlg_ships() -> None:
    for task in demo_tasks(1):
        conversion = task.source.conversion
        assert conversion.corpus in ("e2e", "scitldr") or "webnlg" in conversion.without


@pytest.mark.parametrize(("demo", "name"), [(demo, name) for demo, names in NAMES.items() for name in names])
def test_a_shipped_prefix_belongs_to_the_shipped_backbone(demo: str, name: str) -> None:
    spec = demo_prefix(name, demo).spec
    check_compatible(spec, load_backbone(demo).spec)
    [task] = [task for task in demo_tasks(1) if (task.backbone, task.name) == (demo, name)]
    assert (spec.template, spec.defaults) == (task.template, task.decoding)
    assert spec.sites.keys() == load_backbone(demo).spec.sites.keys(), "every site that the backbone has"
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
    assert fields(Corpus.of([output.text], [[wanted]]))[0].value >= 0.8, "F1"


def test_the_prefix_alone_chooses_the_skill(backbone: Backbone) -> None:
    text = "name : Blue Spice | Type : coffee shop | area : city centre"
    assert len({answer(backbone, name, text).text for name in ("e2e", "e2e-fields")}) == 2


def test_bart_answers_fields_with_a_fitting_sentence(bart: Backbone) -> None:
    output = answer_bart(bart, "e2e-bart", "name : Blue Spice | Type : coffee shop | area : city centre")
    assert output.finish_reason is FinishReason.STOP
    assert all(part in output.text for part in ("Blue Spice", "coffee shop", "city centre"))
    assert "||" not in output.text


def test_bart_answers_an_abstract_with_something_shorter(bart: Backbone) -> None:
    """The path, not the quality: at this size a summary is little more than phrases of its kind."""
    output = answer_bart(bart, "scitldr", ABSTRACT)
    assert 0 < len(output.text) < len(ABSTRACT)
    assert "||" not in output.text


def test_the_prefix_alone_chooses_what_bart_does(bart: Backbone) -> None:
    assert len({answer_bart(bart, name, ABSTRACT).text for name in NAMES["demo-bart"]}) == 2
