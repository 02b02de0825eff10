"""The demo BART's pretraining: its documents, its loss, its tokenizer, what it ships, and taking a run up."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from prefixes.prompt import PromptEncoder
from tests.support.paths import ROOT
from trainer.data.corpora import Pair
from trainer.demos.pretrain import bart
from trainer.demos.pretrain.backbone import export_backbone
from trainer.demos.pretrain.bart import BartRecipe, bart_recipe, loss_of
from trainer.demos.pretrain.bart_documents import Document, Example, document, draw, encode
from trainer.demos.pretrain.loop import Pretraining
from trainer.demos.pretrain.tables import Corpora, read_corpora

E2E = [
    Pair(f"name : Alpha {i} | Type : pub | near : Beta", f"Alpha {i} is near Beta. It is a pub.", "e2e")
    for i in range(40)
]
DART = [Pair(f"Gamma {i} : in : Delta", f"Gamma {i} is in Delta.", "x") for i in range(40)]
SCITLDR = [Pair(f"We show {i}. It holds. We prove it. It is new.", f"A proof of {i}.", f"p{i}") for i in range(40)]
SHIPPED = ROOT / "prefixes" / "demo" / "bart"
SHARED = Corpora(E2E, DART, SCITLDR)
FEW = Corpora(E2E[:3], DART[:3], SCITLDR[:3])


@pytest.fixture(scope="module")
def recipe() -> BartRecipe:
    return bart_recipe(SHARED, FEW, seed=1)


@pytest.fixture(scope="module")
def tokenizer(recipe: BartRecipe, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return recipe.train_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def run(recipe: BartRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pretraining[Example]:
    for name, value in (("LAYERS", 2), ("HIDDEN", 32), ("HEADS", 4), ("FEED_FORWARD", 64), ("CHUNK", 64)):
        monkeypatch.setattr(bart, name, value)
    return Pretraining(recipe, tmp_path / "state", seed=1)


def test_scitldr_is_read_beside_the_tables_and_its_held_out_abstracts_are_apart(tmp_path: Path) -> None:
    (tmp_path / "e2e").write_text("name : N | Type : pub||N is a pub . \n")
    (tmp_path / "dart").write_text("[]")
    papers = [{"paper_id": f"p{i}", "source": [f"We show {i}.", "It holds."], "target": [f"T{i}."]} for i in range(200)]
    (tmp_path / "scitldr").write_text("".join(json.dumps(paper) + "\n" for paper in papers))
    learnt, apart = read_corpora(tmp_path / "e2e", tmp_path / "dart", tmp_path / "scitldr")
    assert len(learnt.scitldr) + len(apart.scitldr) == 200
    assert 0 < len(apart.scitldr) < 25
    assert not {pair.source for pair in learnt.scitldr} & {pair.source for pair in apart.scitldr}
    assert "SciTLDR" in str(learnt)


def test_the_special_tokens_have_barts_ids_and_the_mask_takes_the_space_before_it(tokenizer: Any) -> None:
    assert [tokenizer.convert_tokens_to_ids(token) for token in ("<s>", "<pad>", "</s>", "<unk>")] == [0, 1, 2, 3]
    assert tokenizer.is_fast
    ids = tokenizer("Alpha <mask> ||name")["input_ids"]
    assert (ids[0], ids[-1]) == (0, 2)
    assert ids == tokenizer("Alpha<mask> ||name")["input_ids"]
    assert len(tokenizer(" ||", add_special_tokens=False)["input_ids"]) == 1
    assert tokenizer.decode(tokenizer("Café £5 ü", add_special_tokens=False)["input_ids"]) == "Café £5 ü"


def test_every_kind_of_document_of_every_corpus_is_drawn() -> None:
    rng = random.Random(0)
    drawn = [draw(SHARED, ["Omega"], rng, 0.0) for _ in range(3000)]
    kinds = set()
    for doc in drawn:
        texts = " ".join(doc.parts)
        corpus = "scitldr" if "show" in texts or "proof" in texts else "dart" if "Gamma" in texts else "e2e"
        form = "hidden" if doc.hidden is not None else "whole"
        kinds.add((corpus, len(doc.parts), form, tuple(" : " in p or "show" in p for p in doc.parts), doc.hidden))
    for corpus in ("e2e", "dart", "scitldr"):
        alone = {(corpus, 1, "whole", (True,), None), (corpus, 1, "whole", (False,), None)}
        both = {(corpus, 2, "whole", order, None) for order in ((True, False), (False, True))}
        hidden = {(corpus, 2, "hidden", order, part) for order in ((True, False), (False, True)) for part in (0, 1)}
        assert alone | both | hidden <= kinds, corpus
    assert any("Omega" in " ".join(doc.parts) for doc in drawn)


def test_the_second_half_of_the_budget_draws_more_papers() -> None:
    def papers(fraction: float) -> float:
        rng = random.Random(0)
        drawn = [" ".join(draw(SHARED, [], rng, fraction).parts) for _ in range(3000)]
        return sum("show" in text or "proof" in text for text in drawn) / len(drawn)

    assert papers(0.0) == papers(0.49) == pytest.approx(0.12, abs=0.02)
    assert papers(0.5) == papers(1.0) == pytest.approx(0.30, abs=0.03)


def test_a_hidden_part_is_one_mask_and_the_rest_stands_as_a_server_would_send_it(tokenizer: Any) -> None:
    pair = E2E[0]
    parts = (pair.target, pair.source)
    first, last = encode(
        tokenizer, [Document(parts, parts, 0), Document(parts[::-1], parts[::-1], 1)], 512, random.Random(0)
    )
    prompts = PromptEncoder(tokenizer)
    assert first.corrupted == prompts.encode("<s><mask> ||{input}</s>", pair.source)
    assert last.corrupted == prompts.encode("<s>{input} ||<mask></s>", pair.source)
    assert tokenizer.decode(first.target) == f"<s>{pair.target} ||{pair.source}</s>"
    assert tokenizer.decode(last.target) == f"<s>{pair.source} ||{pair.target}</s>"
    assert first.learnt == len(first.target)


def test_noise_touches_the_input_alone_and_long_documents_are_left_out(tokenizer: Any) -> None:
    rng, pair = random.Random(0), SCITLDR[0]
    permuted = False
    for _ in range(50):
        doc = document(pair, "source", rng)
        (one,) = encode(tokenizer, [doc], 512, rng)
        assert doc.parts == (pair.source,)
        assert tokenizer.decode(one.target) == f"<s>{pair.source}</s>"
        assert tokenizer.mask_token_id in one.corrupted
        assert sorted(doc.permuted[0].split()) == sorted(pair.source.split())
        permuted |= doc.permuted != doc.parts
    assert permuted
    long = Document(("Alpha " * 600,), ("Alpha " * 600,))
    assert encode(tokenizer, [long, doc], 512, rng)[0].target == one.target


def test_the_loss_is_that_of_transformers_and_padding_changes_nothing(run: Pretraining[Example]) -> None:
    run.model.train()
    batch = [one for some in run.next_chunk() for one in some][::9]
    assert len({len(one.target) for one in batch}) > 1
    pad = torch.nn.utils.rnn.pad_sequence
    inputs = pad([torch.tensor(one.corrupted) for one in batch], batch_first=True, padding_value=1)
    labels = pad([torch.tensor(one.target) for one in batch], batch_first=True, padding_value=-100)
    with torch.no_grad():
        loss, count = loss_of(run.model, batch)
        alone = [loss_of(run.model, [one]) for one in batch]
        expected = run.model(input_ids=inputs, attention_mask=(inputs != 1).long(), labels=labels).loss
    assert count == sum(len(one.target) for one in batch) == sum(number for _, number in alone)
    torch.testing.assert_close(loss / count, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss, torch.stack([one for one, _ in alone]).sum(), rtol=1e-5, atol=1e-3)


def test_an_untrained_decoder_looks_at_its_own_place_in_the_encoder(run: Pretraining[Example]) -> None:
    """Without the aligned start the attention is uniform, and copying is not learnt within the budget."""
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        encoder = run.model.model.encoder(input_ids=ids).last_hidden_state
        embedded = run.model.model.decoder.layernorm_embedding(
            run.model.model.shared(ids) + run.model.model.decoder.embed_positions(ids)
        )
        attention = run.model.model.decoder.layers[0].encoder_attn
        queries, keys = (
            projection(states).view(40, attention.num_heads, -1).transpose(0, 1)
            for projection, states in ((attention.q_proj, embedded), (attention.k_proj, encoder))
        )
        nearest = (queries @ keys.transpose(1, 2)).sum(dim=0).argmax(dim=-1)
    assert (nearest == torch.arange(40)).float().mean() > 0.9


def test_validation_measures_every_corpus_and_the_text_behind_the_mask_alone(run: Pretraining[Example]) -> None:
    assert run.validate().keys() == {f"{c} {m}" for c in ("e2e", "dart", "scitldr") for m in ("denoising", "text")}
    parts = (E2E[0].target, E2E[0].source)
    (one,) = encode(run.tokenizer, [Document(parts, parts, 0)], 512, random.Random(0))
    learnt = bart._first_part(one)
    assert run.tokenizer.decode(one.target[: learnt.learnt]) == f"<s>{E2E[0].target} ||"


def test_a_few_steps_learn_and_a_saved_run_is_taken_up_where_it_stood(
    run: Pretraining[Example], tmp_path: Path
) -> None:
    batch = run.next_chunk()[0]
    before = loss_of(run.model, batch)[0].item()
    for _ in range(20):
        run.train(batch, 0.0)
    assert loss_of(run.model, batch)[0].item() < before
    run.chunk = 1
    run.save()
    again = Pretraining(run.recipe, tmp_path / "state", seed=1)
    assert (again.step, again.chunk) == (20, 1)
    assert again.next_chunk()[0] == run.next_chunk()[0]
    for one in (run, again):
        one.train(batch, 0.5)
    for (name, tensor), other in zip(run.model.state_dict().items(), again.model.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), name
    assert again.model.lm_head.weight.data_ptr() == again.model.model.encoder.embed_tokens.weight.data_ptr()


def test_the_exported_folder_is_a_float16_bart_that_loads_and_computes_the_same(
    run: Pretraining[Example], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    export_backbone(run.model, run.tokenizer, out, run.recipe.published)
    tokenizer = AutoTokenizer.from_pretrained(out)
    model, info = AutoModelForSeq2SeqLM.from_pretrained(
        out, dtype=torch.float32, use_safetensors=True, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert tokenizer.is_fast
    assert tokenizer.get_vocab() == run.tokenizer.get_vocab()
    generation = model.generation_config
    assert (generation.decoder_start_token_id, generation.forced_bos_token_id) == (2, 0)
    assert (generation.forced_eos_token_id, generation.eos_token_id, generation.pad_token_id) == (2, 2, 1)
    ids = tokenizer(" ||", return_tensors="pt")["input_ids"]
    run.model.half().float()
    with torch.no_grad():
        expected = run.model.eval()(input_ids=ids, decoder_input_ids=torch.tensor([[2, 0]])).logits
        actual = model.eval()(input_ids=ids, decoder_input_ids=torch.tensor([[2, 0]])).logits
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    output = model.generate(ids, max_new_tokens=5, do_sample=False)[0].tolist()
    assert output[:2] == [2, 0]
    assert output[-1] == 2


def test_the_published_sizes_leave_room_for_prefixes_in_fifteen_megabytes() -> None:
    with torch.device("meta"):
        model = bart.build_model(bart.VOCABULARY)
    bytes_in_float16 = 2 * sum(parameter.numel() for parameter in model.parameters())
    assert bytes_in_float16 < 13.25e6, "and a tokenizer of 0.2 MB"


def test_the_shipped_backbone_fits_loads_and_writes_the_text_behind_the_mask() -> None:
    assert sum(path.stat().st_size for path in SHIPPED.iterdir() if path.is_file()) <= 13.5e6
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    model, info = AutoModelForSeq2SeqLM.from_pretrained(
        SHIPPED, dtype=torch.float32, use_safetensors=True, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert model.num_parameters() == 6_580_224
    source = "name : Blue Spice | Type : pub | area : riverside"
    ids = PromptEncoder(tokenizer).encode("<s><mask> ||{input}</s>", source)
    output = tokenizer.decode(model.generate(torch.tensor([ids]), max_new_tokens=80, do_sample=False)[0])
    text, separator, copied = output.removeprefix("</s><s>").removesuffix("</s>").partition(" ||")
    assert "Blue Spice" in text
    assert "pub" in text
    assert (separator, copied) == (" ||", source)
