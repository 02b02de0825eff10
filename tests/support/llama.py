"""Makes small random backbones of the Llama family, one of each kind, for tests. Knows no test."""

from __future__ import annotations

from pathlib import Path
from types import MethodType
from typing import Any, Final

import torch
from tokenizers import processors
from transformers import (
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from prefixes.backbone import Backbone, load_backbone
from tests.support.prefixes import save_tiny_tokenizer

SIZES: Final = {
    "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 320, "vocab_size": 304, "initializer_range": 0.3,
    "tie_word_embeddings": False,
}  # fmt: skip
BASE: Final = {"rope_theta": 1000.0}
KINDS: Final[dict[str, tuple[type[Any], dict[str, Any]]]] = {
    "llama": (LlamaConfig, {}),
    "llama3": (LlamaConfig, {"num_key_value_heads": 1, "rope_parameters": BASE | {
        "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 80,
    }}),
    "linear, tied, biases": (LlamaConfig, {
        "rope_parameters": BASE | {"rope_type": "linear", "factor": 2.5}, "tie_word_embeddings": True,
        "attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4,
    }),
    "yarn": (LlamaConfig, {"rope_parameters": BASE | {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 80,
    }}),
    "mistral": (MistralConfig, {"sliding_window": None, "head_dim": 12}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {"head_dim": 12, "num_attention_heads": 6}),
    "smollm3": (SmolLM3Config, {"num_hidden_layers": 4, "no_rope_layer_interval": 2}),
}  # fmt: skip
"""Name -> the configuration's class and what is special."""


def save_tiny_llama(folder: Path, kind: str = "llama", *, seed: int = 0, begins: bool = False, **config: Any) -> Any:
    """A random model of ``kind`` with its tokenizer; all weights matter. ``begins``: each text gets a first token."""
    made = save_tiny_tokenizer(folder)
    end = made.eos_token_id
    if begins:
        backend = made.backend_tokenizer
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 300)])
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
        tokenizer.add_special_tokens({"bos_token": "<s>"})
        tokenizer.save_pretrained(folder)
    kind_of, special = KINDS[kind]
    torch.manual_seed(seed)
    ids = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": None}
    model = AutoModelForCausalLM.from_config(kind_of(**{**SIZES, **ids, **special, **config}))
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        elif name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return model.eval()


def tiny_llama(folder: Path, kind: str = "llama", dtype: torch.dtype = torch.float64, **config: Any) -> Backbone:
    """A loaded one. Its norms are exact in float64, where transformers measures the rows in float32."""
    save_tiny_llama(folder, kind, **config)
    return with_exact_norms(load_backbone(str(folder), dtype=dtype))


def with_exact_norms(backbone: Backbone) -> Backbone:
    """``backbone``, whose root-mean-square norms measure the rows in float64 if it is of that type."""
    if backbone.model.dtype == torch.float64:
        make_norms_exact(backbone.model)
    return backbone


def make_norms_exact(model: Any) -> None:
    """Have the norms of a float64 ``model`` measure rows in float64."""
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.forward = MethodType(_exact_norm, module)


def _exact_norm(module: Any, x: torch.Tensor) -> torch.Tensor:
    normed: torch.Tensor = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + module.variance_epsilon) * module.weight
    return normed
