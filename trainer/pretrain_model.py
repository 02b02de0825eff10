"""The demo backbone itself: its tokenizer, its untrained model, and the folder it ships in.

Owns sizes and files; knows no data but the texts it is given, and no training.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file

from trainer.files import write_atomic, write_json

END: Final = "<|endoftext|>"
VOCABULARY, LAYERS, HIDDEN, HEADS, WINDOW = 2048, 4, 256, 8, 512


def train_tokenizer(texts: Iterable[str], folder: Path) -> Any:
    """Train a byte-level BPE on ``texts``, save it to ``folder``, and load it as a server will."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2TokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, VOCABULARY, min_frequency=2, special_tokens=[END], show_progress=False)
    folder.mkdir(parents=True, exist_ok=True)
    bpe.save_model(str(folder))
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), END)
    tokenizer = GPT2TokenizerFast.from_pretrained(str(folder), model_max_length=WINDOW, **special)
    save_tokenizer(tokenizer, folder)
    return load_tokenizer(folder)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in ``folder``."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Save to ``folder`` without what only describes this machine's way of loading."""
    tokenizer.save_pretrained(str(folder))
    path = folder / "tokenizer_config.json"
    described = json.loads(path.read_text())
    write_json(path, {key: value for key, value in described.items() if key not in ("is_local", "local_files_only")})


def build_model(end: int) -> Any:
    """A fresh GPT-2 without dropout. Its fused tanh-GELU is ``gelu_new``, faster; the exported config says gelu_new."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=WINDOW, n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, activation_function="gelu_pytorch_tanh", bos_token_id=end, eos_token_id=end,
        pad_token_id=end,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    """The model's tensors, each once: the head is tied to the token embedding."""
    return {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}


def export_backbone(model: Any, tokenizer: Any, folder: Path) -> None:
    """The folder that a server loads: configuration, tokenizer, float16 weights; the weights last, and whole."""
    folder.mkdir(parents=True, exist_ok=True)
    save_tokenizer(tokenizer, folder)
    config = model.config.__class__.from_dict(model.config.to_dict() | {"activation_function": "gelu_new"})
    config.architectures, config.dtype = ["GPT2LMHeadModel"], "float16"
    config.save_pretrained(str(folder))
    model.generation_config.save_pretrained(str(folder))
    halved = {name: tensor.detach().to(torch.float16).contiguous() for name, tensor in weights_of(model).items()}
    write_atomic(folder / "model.safetensors", lambda part: save_file(halved, part, {"format": "pt"}))
