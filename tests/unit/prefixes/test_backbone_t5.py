"""Backbones of the T5 family: what is read, what is refused by name, and how every input ends."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors
from transformers import AutoTokenizer

from prefixes.backbone import Backbone, load_backbone
from prefixes.errors import BackboneError
from prefixes.spec import SiteGeometry
from tests.support.t5 import KINDS, save_tiny_t5

END = 1  # </s>


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("t5")
    save_tiny_t5(folder)
    return folder


@pytest.fixture(scope="module")
def backbone(saved: Path) -> Backbone:
    return load_backbone(str(saved))


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def change(folder: Path, name: str = "config.json", **values: Any) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("kind", KINDS)
def test_sites_head_size_and_head_are_described(tmp_path: Path, kind: str) -> None:
    model = save_tiny_t5(tmp_path, kind)
    backbone, config = load_backbone(str(tmp_path)), model.config
    decoder = SiteGeometry(config.num_decoder_layers, 4, config.d_kv)
    encoder = SiteGeometry(config.num_layers, 4, config.d_kv)
    assert backbone.spec.sites == {"decoder": decoder, "encoder": encoder, "cross": decoder}
    assert (backbone.spec.family, backbone.spec.hidden_size, backbone.spec.max_positions) == ("t5", 32, 1024)
    tied = backbone.model.lm_head.weight is backbone.model.shared.weight
    assert tied == (kind == "t5"), "v1.1 and mT5 have a head of their own"
    ids = {"input_ids": torch.tensor([[5, 6, 7, 1]]), "decoder_input_ids": torch.tensor([[0, 8]])}
    assert torch.equal(backbone.model(**ids).logits, model(**ids).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_saving_again_keeps_the_identity(tmp_path: Path, kind: str) -> None:
    save_tiny_t5(tmp_path / "one", kind)
    backbone = load_backbone(str(tmp_path / "one"))
    backbone.model.save_pretrained(tmp_path / "two")
    backbone.tokenizer.save_pretrained(tmp_path / "two")
    assert load_backbone(str(tmp_path / "two")).spec == backbone.spec


def test_outputs_begin_behind_the_start_token_and_end_with_the_end_token(backbone: Backbone) -> None:
    assert (backbone.decoder_prompt, backbone.forced_first, backbone.forced_last) == ((0,), None, None)
    assert (backbone.eos_token_ids, backbone.input_template) == ((END,), "{input}")


def test_a_model_without_a_start_token_is_refused_by_name(folder: Path) -> None:
    for name in ("config.json", "generation_config.json"):
        values = json.loads((folder / name).read_text())
        values.pop("decoder_start_token_id")
        (folder / name).write_text(json.dumps(values))
    with pytest.raises(BackboneError, match="expected a decoder_start_token_id, got none"):
        load_backbone(str(folder))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dense_act_fn": "swish7"}, "dense_act_fn: expected gelu_new or .*, got swish7"),
        ({"model_type": "umt5", "architectures": ["UMT5ForConditionalGeneration"]}, "expected gpt2 or .*, got umt5"),
        ({"model_type": "longt5", "architectures": ["LongT5ForConditionalGeneration"]}, "or t5 or mt5, got longt5"),
    ],
)
def test_what_is_not_computed_exactly_is_refused_by_name(folder: Path, values: dict[str, Any], message: str) -> None:
    change(folder, **values)
    with pytest.raises(BackboneError, match=message):
        load_backbone(str(folder))


@pytest.mark.parametrize(("stated", "window"), [(None, 512), (200, 200), (4096, 4096), (10**30, 512)])
def test_the_window_is_the_tokenizers_or_what_t5_was_pretrained_with(
    folder: Path, backbone: Backbone, stated: int | None, window: int
) -> None:
    change(folder, "tokenizer_config.json", model_max_length=stated)
    spec = load_backbone(str(folder)).spec
    assert spec.max_positions == window
    assert spec.fingerprint == backbone.spec.fingerprint, "the window is no part of the identity"


@pytest.mark.parametrize(
    "values",
    [
        {"relative_attention_max_distance": 41},
        {"relative_attention_num_buckets": 12, "layer_norm_epsilon": 1e-5},
        {"tie_word_embeddings": False},
    ],
)
def test_what_changes_outputs_is_part_of_the_identity(
    folder: Path, backbone: Backbone, values: dict[str, Any]
) -> None:
    """``tie_word_embeddings`` false leaves out the scale of the head, even where the weights are the same."""
    change(folder, **values)
    assert load_backbone(str(folder)).spec.fingerprint != backbone.spec.fingerprint


def test_an_input_ends_as_the_models_own_tokenizer_ends_a_text(backbone: Backbone) -> None:
    encoder, tokenizer = backbone.prompt_encoder, AutoTokenizer.from_pretrained(backbone.name)
    texts = ("Blue Spice", "", "café ☕ item")
    for text in texts:
        assert encoder.encode("{input}", text) == tokenizer(text).input_ids
    assert encoder.encode("name : {input}", "Blue") == tokenizer("name : Blue").input_ids
    for template in ("{input}", "name : {input} |", "{input}</s>", "{input} is </s>"):
        for text in (*texts, "a </s> b", "</s>"):
            ids = encoder.encode(template, text)
            assert ids[-1] == END and END not in ids[:-1], "once, whatever the template or the input says"
            assert encoder.fit(template, text, len(ids)).token_ids == tuple(ids)
            assert encoder.fit(template, text, len(ids) - 1).token_ids is None
    cut = encoder.fit("{input}", "Blue Spice is a coffee shop", 6, truncate=True)
    assert cut.truncated and cut.token_ids is not None and len(cut.token_ids) == 6 and cut.token_ids[-1] == END


def test_a_users_text_gets_no_special_token_though_the_vocabulary_has_them_as_pieces(backbone: Backbone) -> None:
    encoder, special = backbone.prompt_encoder, {0, END, *backbone.tokenizer.convert_tokens_to_ids(["<extra_id_0>"])}
    assert backbone.tokenizer.backend_tokenizer.model.token_to_id("</s>") == END
    for text in ("a</s>b", "</s>", "<pad> x", "x <extra_id_0>", "<extra_id_0></s>"):
        ids = encoder.encode_text(text)
        assert ids and not special & set(ids)
        assert special & set(encoder.encode_literal(text)), "the template's may have them"
    plain = "name : Blue Spice | item 7"
    assert encoder.encode_text(plain) == encoder.encode_literal(plain)


def _ends(tokenizer: Any, single: str) -> None:
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("</s>", END), ("<pad>", 0)]
    )


def test_the_last_token_is_part_of_the_identity(folder: Path) -> None:
    change(folder, "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")  # T5's own always ends with it
    fingerprints = set()
    for single in ("$A </s>", "$A", "<pad> $A </s>"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        _ends(tokenizer, single)
        tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
        again = load_backbone(str(folder))
        assert again.prompt_encoder.encode("{input}", "Blue") == again.tokenizer("Blue").input_ids
        fingerprints.add(again.spec.fingerprint)
    assert len(fingerprints) == 3
