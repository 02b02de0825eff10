"""Imports cartridges as prefix adapters of torchtitan's save them: one safetensors file, a key and a value per layer.

Owns the names `layers.N.attention.prefix.keys` and `.values`, each `(1, P, kv_heads, head_dim)`. The keys are as
attention sees them, and tokens stand behind the cartridge (`shifted`). torchtitan's Llama 3 rotates neighbouring
components of a head where transformers rotates its two halves: such keys are `interleaved`, and are put in order here.
The file does not say which it has. Opens no pickle.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import safetensors
import torch

from prefixes.artifact import Prefix, check_prefix
from prefixes.digest import dtype_name
from prefixes.errors import IncompatiblePrefix, InvalidArtifact
from prefixes.spec import INPUT_SLOT, BackboneSpec, PrefixSpec, SiteGeometry, SitePrefix, check_compatible

_NAME: Final = re.compile(r"layers\.(0|[1-9][0-9]{0,5})\.attention\.prefix\.(keys|values)")
_PICKLED: Final = (b"PK\x03\x04", b"\x80")  # how torch.save's files begin, and bare pickles
_CONVERSION: Final = (
    "where you trust it, convert it: safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in "
    "torch.load(FILE, map_location='cpu').items() if '.attention.prefix.' in name}, 'cartridge.safetensors')"
)


def import_cartridge(
    path: str | Path,
    backbone: BackboneSpec,
    *,
    interleaved: bool = False,
    template: str = INPUT_SLOT,
    defaults: Mapping[str, Any] | None = None,
) -> Prefix:
    """The cartridge in the file at ``path``, which must have been trained on ``backbone``.

    The file has no fingerprint, so only the geometry is compared. ``interleaved``: the keys' neighbouring components
    rotate together. ``template`` says how the inputs were written. Raises InvalidArtifact for a file that holds
    something else, IncompatiblePrefix for another geometry or kind of model, both with expected and got.
    """
    if "encoder" in backbone.sites:
        raise IncompatiblePrefix(
            f"cartridge: expected a backbone that is a decoder alone, got a {backbone.family} backbone",
            expected=["decoder"],
            got=list(backbone.sites),
        )
    geometry = backbone.sites["decoder"]
    key, value = _stacked(_read(Path(path)), geometry)
    if interleaved:
        key = key.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2).contiguous()
    spec = PrefixSpec(
        fingerprint=backbone.fingerprint,
        sites={"decoder": SitePrefix(key.shape[1], "shifted", geometry, dtype_name(key))},
        template=template,
        defaults=dict(defaults or {}),
        origin={"method": "cartridge", "interleaved": interleaved},
    )
    check_compatible(spec, backbone)
    prefix = Prefix(spec, {"decoder.key": key, "decoder.value": value})
    check_prefix(prefix)
    return prefix


def _read(path: Path) -> dict[str, torch.Tensor]:
    """The file's tensors by name."""
    try:
        with path.open("rb") as file:
            pickled = file.read(4).startswith(_PICKLED)
        with safetensors.safe_open(path, framework="pt") as opened:
            return {name: opened.get_tensor(name).clone() for name in sorted(opened.keys())}
    except OSError as error:
        raise InvalidArtifact(f"{path}: expected a cartridge, a safetensors file: {error.strerror}") from None
    except safetensors.SafetensorError as error:
        got = f"a pickled one, which is never opened; {_CONVERSION}" if pickled else str(error)[:200]
        raise InvalidArtifact(f"{path.name}: expected a safetensors file, got: {got}") from None


def _stacked(named: Mapping[str, torch.Tensor], geometry: SiteGeometry) -> tuple[torch.Tensor, torch.Tensor]:
    """Key and value, each ``(layers, P, kv_heads, head_dim)``."""
    foreign = sorted(name[:80] for name in named if not _NAME.fullmatch(name))
    if foreign or not named:
        raise InvalidArtifact(
            "cartridge: expected layers.N.attention.prefix.keys and .values and no other tensor, got "
            f"{', '.join(foreign[:8]) or 'none'}",
            got=foreign[:8],
        )
    wanted = {f"layers.{layer}.attention.prefix.{part}" for layer in range(geometry.layers)
              for part in ("keys", "values")}  # fmt: skip
    if wanted != named.keys():
        missing, further = sorted(wanted - named.keys()), sorted(named.keys() - wanted)
        raise IncompatiblePrefix(
            f"cartridge: expected keys and values of this backbone's {geometry.layers} layers; missing "
            f"{', '.join(missing[:4]) or 'none'}, further {', '.join(further[:4]) or 'none'}",
            expected=geometry.layers,
            missing=missing[:8],
            further=further[:8],
        )
    first = named["layers.0.attention.prefix.keys"]
    length = first.shape[1] if first.dim() == 4 else -1
    shape = (1, length, geometry.kv_heads, geometry.head_dim)
    for name, tensor in named.items():
        if tuple(tensor.shape) != shape or tensor.dtype != first.dtype:
            raise IncompatiblePrefix(
                f"{name}: expected {dtype_name(first)} (1, {length if length >= 0 else 'P'}, {shape[2]}, {shape[3]}), "
                f"got {dtype_name(tensor)} {tuple(tensor.shape)}",
                expected=[1, None, *shape[2:]],
                got=list(tensor.shape),
            )
    key, value = (
        torch.cat([named[f"layers.{layer}.attention.prefix.{part}"] for layer in range(geometry.layers)])
        for part in ("keys", "values")
    )
    return key, value
