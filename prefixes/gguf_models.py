"""Which GGUF files are served: their architectures, tensors, sizes and tokenizers. All others are refused by name.

A file is checked before transformers reads it: transformers ignores keys and tensors that it does not know (scaled
positions, experts, biases), fills missing tensors with random numbers, and makes a model as large as the file says.
Knows no transformers; ``gguf_file`` has read the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from prefixes.gguf_file import GgufFile

_LAYER: Final = {
    "attn_norm.weight": ("hidden",), "ffn_norm.weight": ("hidden",),
    "attn_q.weight": ("queries", "hidden"), "attn_k.weight": ("keys", "hidden"), "attn_v.weight": ("keys", "hidden"),
    "attn_output.weight": ("hidden", "queries"),
    "ffn_gate.weight": ("inner", "hidden"), "ffn_up.weight": ("inner", "hidden"),
    "ffn_down.weight": ("hidden", "inner"),
}  # fmt: skip
"""Tensor of a layer -> its shape, in the words of ``_sizes``."""
_ENDS: Final = {"token_embd.weight": ("vocabulary", "hidden"), "output_norm.weight": ("hidden",)}
_HEAD: Final = {"output.weight": ("vocabulary", "hidden")}  # left out where it is the embedding
_ARCHITECTURES: Final[Mapping[str, Mapping[str, tuple[str, ...]]]] = {
    "llama": _LAYER,
    "qwen2": {**_LAYER, "attn_q.bias": ("queries",), "attn_k.bias": ("keys",), "attn_v.bias": ("keys",)},
    "qwen3": {**_LAYER, "attn_q_norm.weight": ("head",), "attn_k_norm.weight": ("head",)},
}
_KEYS: Final = frozenset({
    "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.layer_norm_rms_epsilon",
    "attention.value_length", "block_count", "context_length", "embedding_length", "feed_forward_length",
    "rope.dimension_count", "rope.freq_base", "vocab_size",
})  # fmt: skip
"""What a file may say of its architecture: what transformers reads, or what follows from it."""
_MOST_LAYERS: Final = 1000
SPLITS: Final = ("gpt-2", "llama-bpe", "qwen2", "smollm")
"""How byte-level tokenizers cut a text before they merge, ``tokenizer.ggml.pre``."""


def check_served(file: GgufFile) -> None:
    """Raise BackboneError unless the file is a model that transformers reads as a whole, with all of its tensors."""
    architecture = file.get("general.architecture", str)
    if architecture not in _ARCHITECTURES:
        raise file.error(f"general.architecture: expected {' or '.join(_ARCHITECTURES)}, got {architecture[:80]}")
    for key in file.metadata:
        prefix, _, rest = key.partition(".")
        if prefix == architecture and rest not in _KEYS:
            raise file.error(f"{key[:80]}: expected no such key, found one; what it changes is not computed")
    _check_tokenizer(file)
    layers, sizes = _sizes(file, architecture)
    expected = {**_ENDS, **(_HEAD if _HEAD.keys() <= file.tensors.keys() else {})}
    for name, shape in _ARCHITECTURES[architecture].items():
        expected |= {f"blk.{layer}.{name}": shape for layer in range(layers)}
    for name in [*expected, *file.tensors]:
        if name not in file.tensors:
            raise file.error(f"tensor {name}: expected in the file, found none")
        if name not in expected:
            raise file.error(f"tensor {name[:80]}: expected none of this name in {architecture}, found one")
        wanted, got = [sizes[part] for part in expected[name]], list(file.tensors[name].shape)
        if wanted != got:
            raise file.error(f"tensor {name}: expected a shape of {wanted}, got {got}")


def _sizes(file: GgufFile, architecture: str) -> tuple[int, dict[str, int]]:
    """Layers, and what the shapes are made of."""
    layers, hidden, inner, heads = (
        file.get(f"{architecture}.{key}", int)
        for key in ("block_count", "embedding_length", "feed_forward_length", "attention.head_count")
    )
    if not 1 <= layers <= _MOST_LAYERS:
        raise file.error(f"{architecture}.block_count: expected 1 to {_MOST_LAYERS}, got {layers}")
    if heads < 1:
        raise file.error(f"{architecture}.attention.head_count: expected at least 1, got {heads}")
    file.get(f"{architecture}.context_length", int)
    file.get(f"{architecture}.attention.layer_norm_rms_epsilon", float)
    shared = file.get(f"{architecture}.attention.head_count_kv", int, heads)
    rotated, values = f"{architecture}.rope.dimension_count", f"{architecture}.attention.value_length"
    head = file.get(f"{architecture}.attention.key_length", int, file.get(rotated, int, hidden // heads))
    for key in (rotated, values):
        if file.get(key, int, head) != head:
            raise file.error(f"{key}: expected {head}, the size of a head, got {file.get(key, int)}")
    vocabulary = file.get(f"{architecture}.vocab_size", int, len(file.get("tokenizer.ggml.tokens", list)))
    return layers, {
        "hidden": hidden, "inner": inner, "queries": heads * head, "keys": shared * head, "head": head,
        "vocabulary": vocabulary,
    }  # fmt: skip


def _check_tokenizer(file: GgufFile) -> None:
    kind = file.get("tokenizer.ggml.model", str)
    if kind != "gpt2":
        raise file.error(f"tokenizer.ggml.model: expected gpt2, a byte-level one, got {kind[:80]}")
    split = file.get("tokenizer.ggml.pre", str, "none")
    if split not in SPLITS:
        raise file.error(f"tokenizer.ggml.pre: expected {' or '.join(SPLITS)}, got {split[:80]}")
