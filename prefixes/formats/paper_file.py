"""Reads checkpoints of the paper's published code: named tensors and a configuration, without running a pickle's code.

Owns the files: folders of `save_pretrained` (`pytorch_model.bin` and `config.json`; the BART code names the folders
`checkpointepoch=N.ckpt`), and Lightning checkpoints. No other module opens pickled files. This one uses torch's
restricted unpickler (`weights_only=True`), which builds tensors and plain containers and runs no code from the file.
It allows one more class, `argparse.Namespace`, a plain bag of attributes, because a Lightning file may hold its options
in one. Does not know what the tensors mean.
"""

from __future__ import annotations

import argparse
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from prefixes.errors import InvalidArtifact
from prefixes.spec_json import parse_json

WEIGHTS: Final = "pytorch_model.bin"
CONFIG: Final = "config.json"
_PREFIX_MODEL, _FROZEN_MODEL = "model.", "seq2seq_model."  # attributes of the published LightningModule
_GLOBAL: Final = re.compile(r"GLOBAL ([\w.]+)")


@dataclass(frozen=True)
class Checkpoint:
    """The prefix model's tensors, on the CPU, by name, and its configuration or hyperparameters, empty if none."""

    tensors: Mapping[str, torch.Tensor]
    config: Mapping[str, Any]


def read_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint at ``path``: a folder of `save_pretrained`, its weights, or a Lightning file.

    Raises InvalidArtifact, saying expected and got, for anything else: a file that torch did not write, a file that
    needs other classes than tensors and plain containers, tensors that are not dense, floating and finite.
    """
    path = Path(path)
    weights = path / WEIGHTS if path.is_dir() else path
    if not weights.is_file():
        found = sorted(item.name for item in path.iterdir())[:8] if path.is_dir() else "none"
        raise InvalidArtifact(f"{path}: expected a folder with {WEIGHTS}, or a checkpoint file, found {found}")
    config = _read_config(weights.with_name(CONFIG)) if weights.name == WEIGHTS else {}
    raw = _load(weights)
    if isinstance(raw, Mapping) and isinstance(raw.get("state_dict"), Mapping):
        config = {**config, **_hyperparameters(raw.get("hyper_parameters"))}
        named = {
            str(name).removeprefix(_PREFIX_MODEL): tensor
            for name, tensor in raw["state_dict"].items()
            if not str(name).startswith(_FROZEN_MODEL)
        }
    else:
        named = raw
    if not isinstance(named, Mapping) or not named:
        got = type(raw).__name__ if not isinstance(named, Mapping) else "none"
        raise InvalidArtifact(f"{weights.name}: expected tensors by name, got {got}", got=got)
    return Checkpoint({str(name): _checked(str(name), tensor) for name, tensor in named.items()}, config)


def _load(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = _GLOBAL.search(str(error))
        needs = f"one that needs {found[1][:80]}" if found else f"one it refuses: {str(error)[:120]!r}"
        raise InvalidArtifact(
            f"{path.name}: expected a checkpoint of tensors alone, got {needs}; its pickled code was not run. Where "
            "the file is trusted, load it with the code that wrote it and save the prefix model's state_dict() alone",
            needs=found[1][:80] if found else None,
        ) from None
    except Exception as error:  # anything that torch's readers raise: the bytes are at fault
        raise InvalidArtifact(f"{path.name}: expected a whole file of torch.save, got: {str(error)[:200]}") from None


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    config = parse_json(CONFIG, path.read_bytes())
    if not isinstance(config, dict):
        raise InvalidArtifact(f"{CONFIG}: expected an object, got {type(config).__name__}")
    return config


def _hyperparameters(raw: Any) -> dict[str, Any]:
    fields = vars(raw) if isinstance(raw, argparse.Namespace) else raw
    if not isinstance(fields, Mapping):
        return {}
    plain = (str, int, float, list, type(None))  # values with an ordinary ==; a tensor compares elementwise
    return {str(key): value for key, value in fields.items() if isinstance(value, plain)}


def _checked(name: str, tensor: Any) -> torch.Tensor:
    shown = name[:80]
    if not isinstance(tensor, torch.Tensor):
        raise InvalidArtifact(f"checkpoint entry {shown!r}: expected a tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided or not tensor.is_floating_point():
        raise InvalidArtifact(
            f"checkpoint tensor {shown!r}: expected dense floating point, got {tensor.layout} {tensor.dtype}"
        )
    plain: torch.Tensor = tensor.detach()
    if not bool(torch.isfinite(plain).all()):
        raise InvalidArtifact(f"checkpoint tensor {shown!r}: expected finite values, got NaN or infinite ones")
    return plain
