"""Writes small models as GGUF files, as llama.cpp's converter does: names, order of rows, tokenizer. Knows no test."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import gguf
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from transformers import AutoTokenizer

from prefixes.backbone import Backbone, load_backbone
from tests.support.llama import save_tiny_llama

ROOM: Final = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
"""Rows of a multiple of 32 values, as quantised types have them."""
KINDS: Final[Mapping[str, Mapping[str, Any]]] = {
    "llama": ROOM, "qwen2": {key: ROOM[key] for key in ("hidden_size", "intermediate_size")},
    "qwen3": {**ROOM, "head_dim": 128},
}  # fmt: skip
"""Architecture -> what its small model needs; transformers reads no other size of a Qwen 3 head."""
NAMES: Final = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip

Change = Callable[[dict[str, Any], dict[str, Any]], None]
"""Changes metadata and tensors before they are written."""


def save_tiny_gguf(
    path: Path,
    architecture: str = "llama",
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    change: Change = lambda metadata, tensors: None,
    **config: Any,
) -> Any:
    """A random model at ``path``, and as safetensors in the folder ``twin`` beside it. Returns the model."""
    model = save_tiny_llama(path.parent / "twin", architecture, **{**KINDS[architecture], **config})
    metadata = _metadata(model, path.parent / "twin", architecture)
    tensors = {_name(name): _stored(name, tensor, model, architecture) for name, tensor in model.named_parameters()}
    change(metadata, tensors)
    write(path, metadata, tensors, kind)
    return model


def tiny_gguf(path: Path, kind: GGMLQuantizationType = GGMLQuantizationType.F32, **config: Any) -> Backbone:
    """A loaded one."""
    save_tiny_gguf(path, kind=kind, **config)
    return load_backbone(str(path))


def write(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, Any], kind: GGMLQuantizationType) -> None:
    """A file with matrices of type ``kind``; vectors are float32 as everywhere."""
    writer = GGUFWriter(path, metadata["general.architecture"])
    for key, value in metadata.items():
        if key == "general.architecture":
            continue  # the writer has written it
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_array(key, value)
    for name, tensor in tensors.items():
        values = tensor.detach().float().numpy()
        if tensor.dim() > 1 and kind != GGMLQuantizationType.F32:
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _metadata(model: Any, folder: Path, architecture: str) -> dict[str, Any]:
    config, tokenizer = model.config, AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.get_vocab()
    vocabulary = sorted(ids, key=ids.__getitem__)
    vocabulary += [f"[PAD{index}]" for index in range(len(vocabulary), config.vocab_size)]
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    of_model = {
        "block_count": config.num_hidden_layers, "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size, "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads, "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps, "rope.freq_base": config.rope_parameters["rope_theta"],
        "vocab_size": config.vocab_size,
    }  # fmt: skip
    if architecture != "qwen2":
        of_model |= {"attention.key_length": config.head_dim, "attention.value_length": config.head_dim}
    if architecture == "llama":
        of_model["rope.dimension_count"] = config.head_dim
    return {
        "general.architecture": architecture, "general.name": "tiny",
        **{f"{architecture}.{key}": value for key, value in of_model.items()},
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": vocabulary,
        "tokenizer.ggml.token_type": [3 if token in tokenizer.all_special_tokens else 1 for token in vocabulary],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
        "tokenizer.ggml.eos_token_id": tokenizer.eos_token_id,
        "tokenizer.ggml.add_bos_token": tokenizer("a").input_ids[0] == tokenizer.bos_token_id,
        **({"tokenizer.ggml.bos_token_id": tokenizer.bos_token_id} if tokenizer.bos_token is not None else {}),
    }  # fmt: skip


def _name(name: str) -> str:
    stem, _, part = name.rpartition(".")
    if not stem.startswith("model.layers."):
        return f"{NAMES[stem]}.{part}"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[rest]}.{part}"


def _stored(name: str, tensor: torch.Tensor, model: Any, architecture: str) -> torch.Tensor:
    """As the file has it: for ``llama`` a head's rows in pairs that turn together."""
    heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
    projection = name.split(".")[-2]
    if architecture != "llama" or projection not in heads:
        return tensor
    return tensor.reshape(heads[projection], 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
