"""PEFT's prefix tuning and cartridges: a folder of theirs to a Prefix, and back. Without PEFT itself.

Owns the reading of `adapter_config.json` and of the one tensor `prompt_embeddings`, `(P, layers*2*kv_heads*head_dim)`
with key and value alternating from layer to layer, as `PeftModel.get_prompt` takes it apart. The saved tensor is what
the prefix encoder put out, also where the configuration says `prefix_projection: true`: PEFT reads it as folded, and so
do we. Tokens stand behind the prefix (`shifted`), because transformers counts positions from the cache's length.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

import safetensors
import torch
from safetensors.torch import save as save_safetensors

from prefixes.artifact import Prefix, check_prefix
from prefixes.digest import dtype_name
from prefixes.errors import IncompatiblePrefix, InvalidArtifact
from prefixes.spec import INPUT_SLOT, BackboneSpec, PrefixSpec, SiteGeometry, SitePrefix, check_compatible
from prefixes.spec_json import parse_json

CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = "adapter_model.safetensors"
PICKLED: Final = "adapter_model.bin"
TENSOR: Final = "prompt_embeddings"

PeftType = Literal["PREFIX_TUNING", "CARTRIDGE"]
PEFT_TYPES: Final[tuple[PeftType, ...]] = ("PREFIX_TUNING", "CARTRIDGE")


def import_peft(
    folder: str | Path,
    backbone: BackboneSpec,
    *,
    template: str = INPUT_SLOT,
    defaults: Mapping[str, Any] | None = None,
) -> Prefix:
    """The prefix in a PEFT ``folder``, for ``backbone``, which must be the model that it was trained on.

    PEFT saves no fingerprint: geometry is all that can be compared. Raises InvalidArtifact for a folder that holds
    something else, IncompatiblePrefix for another geometry, both with expected and got.
    """
    folder = Path(folder)
    config = _read_config(folder)
    flat = _read_tensor(folder)  # (prefix_len, layers * 2 * kv_heads * head_dim)
    geometry = _geometry(config, flat, backbone)
    length = flat.shape[0]
    pairs = flat.view(length, geometry.layers, 2, geometry.kv_heads, geometry.head_dim)
    spec = PrefixSpec(
        fingerprint=backbone.fingerprint,
        sites={"decoder": SitePrefix(length, "shifted", geometry, dtype_name(flat))},
        template=template,
        defaults=dict(defaults or {}),
        origin={"method": "peft", "peft_type": config["peft_type"], "peft_version": config.get("peft_version")},
    )
    check_compatible(spec, backbone)
    key, value = (pairs[:, :, part].transpose(0, 1).contiguous() for part in (0, 1))
    prefix = Prefix(spec, {"decoder.key": key, "decoder.value": value})
    check_prefix(prefix)
    return prefix


def export_peft(
    prefix: Prefix,
    folder: str | Path,
    *,
    peft_type: PeftType = "PREFIX_TUNING",
    base_model: str | None = None,
    num_frozen_tokens: int = 1,
) -> None:
    """Write ``prefix`` to a new or empty ``folder`` such that ``PeftModel.from_pretrained`` loads it.

    Template and default parameters have no place there and stay behind. ``base_model`` is what PEFT notes as the
    model's name; ``num_frozen_tokens`` counts for cartridges alone. Raises InvalidArtifact for what PEFT cannot hold,
    FileExistsError for a folder with something in it.
    """
    check_prefix(prefix)
    sited = prefix.spec.sites.get("decoder")
    if sited is None or len(prefix.spec.sites) > 1 or sited.positions != "shifted":
        got = {site: sited.positions for site, sited in prefix.spec.sites.items()}
        raise InvalidArtifact(
            f"export to PEFT: expected one prefix, at the decoder, with shifted positions; got {got}", got=got
        )
    if peft_type not in PEFT_TYPES or not 0 <= num_frozen_tokens <= sited.length:
        raise InvalidArtifact(
            f"export to PEFT: expected {' or '.join(PEFT_TYPES)} and 0 to {sited.length} frozen tokens, "
            f"got {peft_type} and {num_frozen_tokens}"
        )
    pairs = torch.stack([prefix.tensors["decoder.key"], prefix.tensors["decoder.value"]], dim=2)
    flat = pairs.transpose(0, 1).reshape(sited.length, -1).contiguous()  # (prefix_len, layers*2*kv_heads*head_dim)
    config = _config(sited, peft_type, base_model, num_frozen_tokens)
    files = {
        CONFIG: json.dumps(config, indent=2, sort_keys=True).encode() + b"\n",
        WEIGHTS: save_safetensors({TENSOR: flat}, metadata={"format": "pt"}),
    }
    _write_folder(Path(folder), files)


def _config(sited: SitePrefix, peft_type: PeftType, base_model: str | None, num_frozen_tokens: int) -> dict[str, Any]:
    width = sited.geometry.kv_heads * sited.geometry.head_dim
    own = (
        {"prefix_projection": False, "encoder_hidden_size": width}
        if peft_type == "PREFIX_TUNING"
        else {"num_frozen_tokens": num_frozen_tokens}
    )
    return {
        "peft_type": peft_type,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "num_virtual_tokens": sited.length,
        "num_layers": sited.geometry.layers,
        "num_attention_heads": sited.geometry.kv_heads,
        "token_dim": width,
        "num_transformer_submodules": 1,
        **own,
    }


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
    if config.get("task_type") == "SEQ_2_SEQ_LM" or config.get("num_transformer_submodules") == 2:
        raise InvalidArtifact(
            "PEFT folder: expected a decoder-only model's prefix, got an encoder-decoder's, which is not supported yet"
        )
    if config.get("task_type") not in ("CAUSAL_LM", None):
        raise InvalidArtifact(
            f"task_type: expected CAUSAL_LM, got {str(config['task_type'])[:40]}", got=str(config["task_type"])[:40]
        )
    return config


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


def _geometry(config: Mapping[str, Any], flat: torch.Tensor, backbone: BackboneSpec) -> SiteGeometry:
    """The backbone's decoder geometry, once configuration and tensor agree with it."""
    expected = backbone.sites["decoder"]
    width = expected.kv_heads * expected.head_dim
    said = {"num_layers": expected.layers, "num_attention_heads": expected.kv_heads, "token_dim": width}
    for key, value in said.items():
        if config.get(key) not in (value, None):
            raise IncompatiblePrefix(
                f"PEFT's {key}: this backbone has {value}, the prefix was made for {config[key]}",
                expected=value,
                got=config[key],
                key=key,
            )
    if flat.dim() != 2 or flat.shape[1] != expected.layers * 2 * width:
        raise IncompatiblePrefix(
            f"{TENSOR}: expected (prefix_len, {expected.layers * 2 * width}), got {tuple(flat.shape)}",
            expected=[None, expected.layers * 2 * width],
            got=list(flat.shape),
        )
    if config.get("num_virtual_tokens") not in (flat.shape[0], None):
        raise InvalidArtifact(
            f"num_virtual_tokens: expected the tensor's {flat.shape[0]}, got {config['num_virtual_tokens']}",
            expected=flat.shape[0],
            got=config["num_virtual_tokens"],
        )
    return expected


def _write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """All files or none: written beside the folder, then renamed into its place."""
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder}: expected a new or empty folder")
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        temporary.chmod(0o755)
        for name, data in files.items():
            with (temporary / name).open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
