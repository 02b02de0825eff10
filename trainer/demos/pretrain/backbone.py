"""The folder that a demo backbone ships in: its tokenizer, configuration and float16 weights.

Owns the files and their format; knows no family, no data and no training.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from prefixes.files import write_bytes, write_json


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer in ``folder`` as a server does."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Save the tokenizer to ``folder``, without the settings that only say how this machine loaded it."""
    tokenizer.save_pretrained(str(folder))
    path = folder / "tokenizer_config.json"
    described = json.loads(path.read_text())
    write_json(path, {key: value for key, value in described.items() if key not in ("is_local", "local_files_only")})


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    """Return the model's tensors, each once under the first of its names, so that tied ones are written once."""
    seen: set[int] = set()
    weights: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            weights[name] = tensor
    return weights


def export_backbone(model: Any, tokenizer: Any, folder: Path, published: Mapping[str, Any]) -> None:
    """Write the folder that a server loads, with ``published`` values in the configuration.

    The weights come last, whole or not at all.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_tokenizer(tokenizer, folder)
    config = model.config.__class__.from_dict(model.config.to_dict() | dict(published))
    config.architectures, config.dtype = [type(model).__name__], "float16"
    config.save_pretrained(str(folder))
    model.generation_config.save_pretrained(str(folder))
    halved = {name: tensor.detach().to(torch.float16).contiguous() for name, tensor in weights_of(model).items()}
    write_bytes(folder / "model.safetensors", save(halved, {"format": "pt"}))
