"""Imports PEFT's prefix tuning and cartridges: reads a PEFT folder into a Prefix, without PEFT itself.

Owns reading `adapter_config.json` and the one tensor `prompt_embeddings`; ``peft_layout`` has the tensor's layout. The
saved tensor is the prefix encoder's output, even if the configuration says `prefix_projection: true`: PEFT reads it as
folded, and so do we. Tokens stand behind the prefix (`shifted`), because transformers counts positions from the cache's
length, in an encoder-decoder's decoder too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import safetensors
import torch

from prefixes.artifact import Prefix, check_prefix
from prefixes.digest import dtype_name
from prefixes.errors import IncompatiblePrefix, InvalidArtifact
from prefixes.formats.peft_layout import PeftType, is_encoder_decoder, taken_layers, unpack
from prefixes.spec import INPUT_SLOT, BackboneSpec, PrefixSpec, SitePrefix, check_compatible
from prefixes.spec_json import parse_json

CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = "adapter_model.safetensors"
PICKLED: Final = "adapter_model.bin"
TENSOR: Final = "prompt_embeddings"
FROZEN: Final = "num_frozen_tokens"
"""A cartridge's first positions that training leaves alone: a key of PEFT's configuration and of our ``origin``."""
PEFT_TYPES: Final[tuple[PeftType, ...]] = ("PREFIX_TUNING", "CARTRIDGE")


def import_peft(
    folder: str | Path,
    backbone: BackboneSpec,
    *,
    template: str = INPUT_SLOT,
    defaults: Mapping[str, Any] | None = None,
) -> Prefix:
    """The prefix in a PEFT ``folder``, as PEFT applies it to ``backbone``: at the decoder alone.

    PEFT saves no fingerprint, so only the geometry is compared. ``template`` says how the inputs were written; for an
    encoder-decoder that is mostly ``Backbone.input_template``. Raises InvalidArtifact for a folder that holds something
    else, IncompatiblePrefix for another geometry or kind of model, both with expected and got.
    """
    folder = Path(folder)
    config = _read_config(folder)
    _check_task(config, backbone)
    flat = _read_tensor(folder)  # (P, trained * 2 * kv_heads * head_dim)
    trained = _trained_layers(config, flat, backbone)
    origin = {"method": "peft", "peft_type": config["peft_type"], "peft_version": config.get("peft_version")}
    if config["peft_type"] == "CARTRIDGE":
        origin[FROZEN] = _frozen(config, flat.shape[0])
    geometry = backbone.sites["decoder"]
    spec = PrefixSpec(
        fingerprint=backbone.fingerprint,
        sites={"decoder": SitePrefix(flat.shape[0], "shifted", geometry, dtype_name(flat))},
        template=template,
        defaults=dict(defaults or {}),
        origin=origin,
    )
    check_compatible(spec, backbone)
    key, value = unpack(flat, geometry, taken_layers(backbone, trained))
    prefix = Prefix(spec, {"decoder.key": key, "decoder.value": value})
    check_prefix(prefix)
    return prefix


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = parse_json(CONFIG, (folder / CONFIG).read_bytes())
    except OSError as error:
        raise InvalidArtifact(f"{folder}: expected a PEFT folder with {CONFIG}: {error.strerror}") from None
    if not isinstance(config, dict) or config.get("peft_type") not in PEFT_TYPES:
        got = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise InvalidArtifact(
            f"peft_type: expected {' or '.join(PEFT_TYPES)}, got {str(got)[:40]}",
            expected=list(PEFT_TYPES),
            got=str(got)[:40],
        )
    return config


def _check_task(config: Mapping[str, Any], backbone: BackboneSpec) -> None:
    """Check the one task type and number of submodules with which PEFT's prefixes work on this kind of model."""
    kind, submodules = ("SEQ_2_SEQ_LM", 2) if is_encoder_decoder(backbone) else ("CAUSAL_LM", 1)
    task = config.get("task_type")
    if task != kind and not (task is None and kind == "CAUSAL_LM"):
        error = IncompatiblePrefix if task in ("SEQ_2_SEQ_LM", "CAUSAL_LM") else InvalidArtifact
        raise error(
            f"task_type: expected {kind} for a {backbone.family} backbone, got {str(task)[:40]}",
            expected=kind,
            got=str(task)[:40],
        )
    got = config.get("num_transformer_submodules")
    if got not in (submodules, None):
        raise InvalidArtifact(
            f"num_transformer_submodules: expected {submodules} for {kind}, got {str(got)[:40]}",
            expected=submodules,
            got=str(got)[:40],
        )


def _read_tensor(folder: Path) -> torch.Tensor:
    path = folder / WEIGHTS
    if not path.is_file():
        pickled = ", found only a pickled one, which is never opened: save it again with safetensors"
        raise InvalidArtifact(
            f"{folder}: expected {WEIGHTS}{pickled if (folder / PICKLED).is_file() else ', found none'}"
        )
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            names = sorted(file.keys())
            if names != [TENSOR]:
                raise InvalidArtifact(
                    f"{WEIGHTS}: expected the one tensor {TENSOR}, got {', '.join(names[:8]) or 'none'}", got=names[:8]
                )
            tensor: torch.Tensor = file.get_tensor(TENSOR).clone()
    except (OSError, safetensors.SafetensorError) as error:
        raise InvalidArtifact(f"{WEIGHTS}: expected a safetensors file, got: {str(error)[:200]}") from None
    return tensor


def _trained_layers(config: Mapping[str, Any], flat: torch.Tensor, backbone: BackboneSpec) -> int:
    """How many layers ``flat`` holds. Raises unless configuration, tensor and backbone agree."""
    decoder = backbone.sites["decoder"]
    width = decoder.kv_heads * decoder.head_dim
    trained = _layers_said(config, backbone)
    for key, value in {"num_attention_heads": decoder.kv_heads, "token_dim": width}.items():
        if config.get(key) not in (value, None):
            raise _other(key, value, config[key])
    if flat.dim() != 2 or flat.shape[1] != trained * 2 * width:
        raise IncompatiblePrefix(
            f"{TENSOR}: expected (prefix_len, {trained * 2 * width}), got {tuple(flat.shape)}",
            expected=[None, trained * 2 * width],
            got=list(flat.shape),
        )
    if config.get("num_virtual_tokens") not in (flat.shape[0], None):
        raise InvalidArtifact(
            f"num_virtual_tokens: expected the tensor's {flat.shape[0]}, got {config['num_virtual_tokens']}",
            expected=flat.shape[0],
            got=config["num_virtual_tokens"],
        )
    return trained


def _frozen(config: Mapping[str, Any], length: int) -> int:
    frozen = config.get(FROZEN, 1)  # PEFT's default
    if type(frozen) is not int or not 0 <= frozen <= length:
        raise InvalidArtifact(
            f"{FROZEN}: expected 0 to the prefix's {length}, got {str(frozen)[:40]}",
            expected=length,
            got=str(frozen)[:40],
        )
    return frozen


def _layers_said(config: Mapping[str, Any], backbone: BackboneSpec) -> int:
    said, decoder = config.get("num_layers"), backbone.sites["decoder"].layers
    if not is_encoder_decoder(backbone):
        if said not in (decoder, None):
            raise _other("num_layers", decoder, said)
        return decoder
    trained = backbone.sites["encoder"].layers if said is None else said
    if type(trained) is not int or trained < decoder:
        raise IncompatiblePrefix(
            f"PEFT's num_layers: expected at least {decoder}, this backbone's decoder layers, got {str(trained)[:40]}: "
            "PEFT itself cannot run such a prefix (by default it trains as many layers as the encoder has)",
            expected=decoder,
            got=str(trained)[:40],
        )
    return trained


def _other(key: str, expected: int, got: Any) -> IncompatiblePrefix:
    return IncompatiblePrefix(
        f"PEFT's {key}: this backbone has {expected}, the prefix was made for {str(got)[:40]}",
        expected=expected,
        got=str(got)[:40],
        key=key,
    )
