"""The demo GPT-2's pretraining, and the loop that both backbones share: data, loss, export, and taking a run up."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from prefixes.backbone import load_backbone
from trainer.data.corpora import Pair
from trainer.demos.pretrain.backbone import export_backbone
from trainer.demos.pretrain.gpt2 import gpt2_recipe, loss_of
from trainer.demos.pretrain.gpt2_documents import (
    DART_OPERATIONS,
    E2E_OPERATIONS,
    TokenDocument,
    document,
    draw,
    tokenize,
)
from trainer.demos.pretrain.loop import Pretraining, learning_rate, pretrain
from trainer.demos.pretrain.tables import Corpora, batches, proper_names, read_corpora, rename
from trainer.training.checkpoint import CheckpointError, load_state, save_state

E2E = [Pair(f"name : Alpha {i} | Type : pub | near : Beta", f"Alpha {i} is near Beta.", "e2e") for i in range(40)]
DART = [Pair(f"Gamma {i} : in : Delta", f"Gamma {i} is in Delta.", "x") for i in range(40)]


SHARED = Corpora(E2E, DART)


@pytest.fixture
def run(tmp_path: Path) -> Pretraining[TokenDocument]:
    return Pretraining(gpt2_recipe(SHARED, SHARED, seed=1), tmp_path / "state", seed=1)


def test_nothing_of_webnlg_is_read_and_held_out_sources_are_apart(tmp_path: Path) -> None:
    lines = [f"name : N{i} | Type : pub||N{i} is a pub . \n" for i in range(300)]
    (tmp_path / "e2e").write_text("".join(lines))
    annotations = [{"source": "webnlg", "text": "no"}, {"source": "e2e", "text": "yes"}]
    entries = [{"tripleset": [["a", "B", "c"]], "annotations": annotations}]
    (tmp_path / "dart").write_text(json.dumps(entries))
    corpora, held_out = read_corpora(tmp_path / "e2e", tmp_path / "dart")
    learnt, apart = [*corpora.e2e, *corpora.dart], [*held_out.e2e, *held_out.dart]
    assert len(learnt) + len(apart) == 301
    assert "no" not in {pair.target for pair in [*learnt, *apart]}
    assert not {pair.source for pair in learnt} & {pair.source for pair in apart}
    assert apart


def test_the_same_input_stands_before_different_outputs_unless_an_instruction_names_one() -> None:
    rng, names = random.Random(0), ["Omega"]
    drawn = [draw(Corpora(E2E[:1], DART[:1]), names, rng) for _ in range(600)]
    bare = [d for d in drawn if d.instruction == "" and d.source.startswith("name : ")]
    assert {d.target.startswith("name, ") or d.target.startswith("Type, ") for d in bare} == {True, False}
    instructed = {d.instruction for d in drawn} - {""}
    assert instructed == {*E2E_OPERATIONS, *DART_OPERATIONS} - {""}
    assert 0.3 < sum(d.instruction != "" for d in drawn) / len(drawn) < 0.6


def test_renaming_changes_source_and_target_alike() -> None:
    renamed = rename(E2E[3], ["Omega Sigma"], random.Random(0))
    assert renamed == Pair("name : Omega Sigma | Type : pub | near : Beta", "Omega Sigma is near Beta.", "e2e")


def test_invented_names_are_capitalised_words_of_the_corpora() -> None:
    pairs = [Pair(f"name : {a}{b} | x", "", "") for a in "ABCDEFGH" for b in ("lpha", "eta", "amma", "elta")]
    names = proper_names(pairs, [], random.Random(0), count=50)
    assert len(set(names)) == 50
    assert all(name.istitle() for name in names)


def test_only_target_and_end_are_learnt_and_padding_changes_nothing(run: Pretraining[TokenDocument]) -> None:
    docs = tokenize(
        run.tokenizer, [document(pair, "table-to-text:", instructed=True) for pair in (E2E[0], E2E[1])], 512
    )
    long = document(Pair(E2E[2].source, "word " * 40, ""), "table-to-text:", instructed=False)
    longer = tokenize(run.tokenizer, [long], 512)
    with torch.no_grad():
        together, count = loss_of(run.model, [*docs, *longer])
        alone = [loss_of(run.model, [doc]) for doc in [*docs, *longer]]
    assert count == sum(len(doc.ids) - doc.start for doc in [*docs, *longer]) == sum(number for _, number in alone)
    torch.testing.assert_close(together, torch.stack([loss for loss, _ in alone]).sum(), rtol=1e-5, atol=1e-3)
    assert run.tokenizer.decode(docs[0].ids[docs[0].start :]) == f"{E2E[0].target}<|endoftext|>"


def test_batches_keep_to_the_token_budget_and_lose_nothing(run: Pretraining[TokenDocument]) -> None:
    docs = tokenize(run.tokenizer, [document(pair, "table-to-text:", instructed=True) for pair in E2E], 512)
    made = list(batches(docs, lambda one: len(one.ids), 200, random.Random(0)))
    assert all(len(batch) * max(len(doc.ids) for doc in batch) <= 200 for batch in made)
    assert sorted(tuple(doc.ids) for batch in made for doc in batch) == sorted(tuple(doc.ids) for doc in docs)


def test_a_vocabulary_too_small_for_the_names_asked_for_ends_with_fewer() -> None:
    assert len(proper_names([Pair("name : Alpha", "", "")], [], random.Random(0), count=50)) <= 6
    assert proper_names([Pair("name : alpha", "", "")], [], random.Random(0)) == []


def test_a_saved_run_is_taken_up_where_it_stood(run: Pretraining[TokenDocument], tmp_path: Path) -> None:
    batch = run.next_chunk()[0]
    run.train(batch, 0.0)
    run.chunk = 1
    run.save()
    again = Pretraining(run.recipe, tmp_path / "state", seed=1)
    assert (again.step, again.chunk) == (1, 1)
    assert again.next_chunk()[0] == run.next_chunk()[0]
    for one in (run, again):
        one.train(batch, 0.5)
    for (name, tensor), other in zip(run.model.state_dict().items(), again.model.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), name


def test_the_exported_folder_is_a_float16_gpt2_that_loads_and_computes_the_same(
    run: Pretraining[TokenDocument], tmp_path: Path
) -> None:
    export_backbone(run.model, run.tokenizer, tmp_path / "out", run.recipe.published)
    backbone = load_backbone(str(tmp_path / "out"))
    assert backbone.model.config.activation_function == "gelu_new"
    assert (tmp_path / "out" / "model.safetensors").stat().st_size < 9e6
    assert backbone.eos_token_ids == (run.tokenizer.eos_token_id,)
    ids = torch.tensor([backbone.prompt_encoder.encode("{input}<|endoftext|>", E2E[0].source)])
    (learnt,) = tokenize(run.tokenizer, [document(E2E[0], "table-to-text:", instructed=False)], 512)
    assert ids.tolist()[0] == learnt.ids[: learnt.start], "a served prompt has the tokens of the pretraining"
    mask = torch.ones_like(ids)
    run.model.half().float()
    with torch.no_grad():
        expected = run.model.eval()(ids, attention_mask=mask).logits
    torch.testing.assert_close(backbone.model(ids, attention_mask=mask).logits, expected, rtol=1e-4, atol=1e-4)


def test_the_rate_warms_up_by_steps_and_falls_with_the_elapsed_fraction() -> None:
    assert learning_rate(2e-3, 100, 0, 0.0) == pytest.approx(2e-5)
    assert learning_rate(2e-3, 100, 500, 0.0) == pytest.approx(2e-3)
    assert learning_rate(2e-3, 100, 500, 1.0) == learning_rate(2e-3, 100, 500, 2.0) == pytest.approx(6e-5)


def test_a_run_of_another_seed_or_family_is_refused(run: Pretraining[TokenDocument], tmp_path: Path) -> None:
    run.save()
    with pytest.raises(CheckpointError, match="expected seed 2, got 1"):
        Pretraining(run.recipe, tmp_path / "state", seed=2)
    with pytest.raises(CheckpointError, match="expected family bart, got gpt2"):
        Pretraining(replace(gpt2_recipe(SHARED, SHARED, seed=1), family="bart"), tmp_path / "state", seed=1)


def test_a_state_that_is_no_pretrainings_is_refused(run: Pretraining[TokenDocument], tmp_path: Path) -> None:
    run.save()
    tensors, meta = load_state(tmp_path / "state" / "state.safetensors")
    for broken, said in (
        ({name: value for name, value in meta.items() if name not in ("chunk", "seed")}, "missing seed, chunk"),
        (meta | {"optimizer": {}}, "expected this model's optimizer"),
    ):
        save_state(tmp_path / "state" / "state.safetensors", tensors, broken)
        with pytest.raises(CheckpointError, match=said):
            Pretraining(run.recipe, tmp_path / "state", seed=1)


def test_a_used_up_budget_ends_in_an_exported_backbone_and_its_held_out_losses(
    run: Pretraining[TokenDocument], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain(run, tmp_path / "out", minutes=1e-3, checkpoint_minutes=1.0)
    assert run.step >= 1
    assert "table-to-text:" in capsys.readouterr().out
    taken_up = Pretraining(run.recipe, tmp_path / "state", seed=1)
    pretrain(taken_up, tmp_path / "again", minutes=1e-3, checkpoint_minutes=1.0)
    assert taken_up.step == run.step, "only exported"
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)
