"""Makes small random T5s of each kind, with a tokenizer as T5 has it. Knows no test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import MT5Config, MT5ForConditionalGeneration, T5Config, T5ForConditionalGeneration, T5Tokenizer

from prefixes.backbone import Backbone, load_backbone
from tests.support.llama import with_exact_norms
from tests.support.prefixes import CORPUS

SIZES: Final = {
    "vocab_size": 320, "d_model": 32, "d_kv": 12, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4,
    "relative_attention_num_buckets": 12, "relative_attention_max_distance": 40, "decoder_start_token_id": 0,
    "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
GATED: Final = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
KINDS: Final[dict[str, tuple[type[Any], type[Any], dict[str, Any]]]] = {
    "t5": (T5Config, T5ForConditionalGeneration, {"feed_forward_proj": "relu"}),
    "t5 v1.1": (T5Config, T5ForConditionalGeneration, GATED),
    "mt5": (MT5Config, MT5ForConditionalGeneration, GATED | {
        "num_layers": 3, "num_decoder_layers": 2, "d_kv": 8, "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
    }),
}  # fmt: skip
"""Name -> the configuration's and the model's class, and what is special. Flan-T5 is of the kind of v1.1."""


def save_tiny_t5_tokenizer(folder: Path, window: int | None = 1024) -> T5Tokenizer:
    """A Unigram tokenizer as T5 folders have it: ``<pad>`` 0, ``</s>`` 1, ``<unk>`` 2; ``</s>`` behind each text."""
    trained = Tokenizer(models.Unigram())
    metaspace = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    trained.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), metaspace])
    special = ["<pad>", "</s>", "<unk>"]
    corpus = [*CORPUS, "the quick brown fox jumps over the lazy dog ; item 0123456789 cheap dear yes no <>/_"] * 3
    trained.train_from_iterator(
        corpus, trainers.UnigramTrainer(vocab_size=150, special_tokens=special, unk_token="<unk>", show_progress=False)
    )
    pieces = [tuple(piece) for piece in json.loads(trained.to_str())["model"]["vocab"]]
    limit = {} if window is None else {"model_max_length": window}
    sentinels = [(f"<extra_id_{index}>", 0.0) for index in (1, 0)]
    tokenizer: T5Tokenizer = T5Tokenizer(vocab=[*pieces, *sentinels], extra_ids=2, **limit)
    tokenizer.save_pretrained(folder)
    return tokenizer


def tiny_t5_model(kind: str = "t5", *, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    """A random one in which every weight matters. The head of a kind that unties it is one of its own."""
    config_class, model_class, special = KINDS[kind]
    torch.manual_seed(seed)
    model: Any = model_class(config_class(**{**SIZES, **special, **config})).to(dtype).eval()
    if special.get("tie_word_embeddings") is False:
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) * 0.3)
        model.all_tied_weights_keys.pop("lm_head.weight")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_()
            elif "relative_attention_bias" in name:
                parameter.normal_(std=2)
            elif name.endswith("q.weight"):  # made for embeddings in the tens, as trained ones are
                parameter.mul_(3)
    return model.requires_grad_(False)


def save_tiny_t5(folder: Path, kind: str = "t5", *, window: int | None = 1024, **model: Any) -> Any:
    """``tiny_t5_model(kind, **model)`` saved to ``folder``, as published ones are, with a tokenizer."""
    save_tiny_t5_tokenizer(folder, window)
    made = tiny_t5_model(kind, **model)
    made.save_pretrained(folder)
    path, tied = folder / "config.json", KINDS[kind][2].get("tie_word_embeddings", True)
    values = json.loads(path.read_text())
    values.pop("scale_decoder_outputs", None)  # newer than the published ones, which say it by the next
    path.write_text(json.dumps(values | {"tie_word_embeddings": tied}))
    return made


def tiny_t5(folder: Path, kind: str = "t5", dtype: torch.dtype = torch.float64, **options: Any) -> Backbone:
    """A loaded one. Its norms are exact in float64, where transformers measures the rows in float32."""
    save_tiny_t5(folder, kind, **options)
    return with_exact_norms(load_backbone(str(folder), dtype=dtype))
