"""Writes a Prefix as a folder that PEFT loads, without PEFT itself.

Owns what PEFT can hold and the folder's files; ``peft_layout`` owns the tensor's layout.
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save as save_safetensors

from prefixes.artifact import Prefix, check_prefix
from prefixes.errors import InvalidArtifact
from prefixes.files import write_folder
from prefixes.formats.peft import CONFIG, FROZEN, PEFT_TYPES, TENSOR, WEIGHTS
from prefixes.formats.peft_layout import PeftType, fitting_layers, is_encoder_decoder, pack, taken_layers
from prefixes.spec import BackboneSpec, SitePrefix, check_compatible


def export_peft(
    prefix: Prefix,
    folder: str | Path,
    backbone: BackboneSpec,
    *,
    peft_type: PeftType = "PREFIX_TUNING",
    base_model: str | None = None,
    num_frozen_tokens: int | None = None,
) -> None:
    """Write ``prefix``, made for ``backbone``, to a new or empty ``folder``.

    ``PeftModel.from_pretrained`` loads the folder and computes the same. PEFT has no place for the template and the
    default parameters. PEFT notes ``base_model`` as the model's name. Only cartridges use ``num_frozen_tokens``; None
    is what an imported one said, else 1, PEFT's default. Raises InvalidArtifact for what PEFT cannot hold (other sites
    than the decoder, unshifted positions) and for invalid options, IncompatiblePrefix for another backbone's prefix,
    FileExistsError for a folder that is not empty.
    """
    check_prefix(prefix)
    check_compatible(prefix.spec, backbone)
    sited = _exportable(prefix)
    frozen = prefix.spec.origin.get(FROZEN, 1) if num_frozen_tokens is None else num_frozen_tokens
    if peft_type not in PEFT_TYPES or type(frozen) is not int or not 0 <= frozen <= sited.length:
        raise InvalidArtifact(
            f"export to PEFT: expected {' or '.join(PEFT_TYPES)} and 0 to {sited.length} frozen tokens, "
            f"got {peft_type} and {frozen}"
        )
    trained = fitting_layers(backbone)
    taken = taken_layers(backbone, trained)
    flat = pack(prefix.tensors["decoder.key"], prefix.tensors["decoder.value"], taken, trained)
    own = {"prefix_projection": False, "encoder_hidden_size": backbone.hidden_size}
    config = {
        "peft_type": peft_type,
        "task_type": "SEQ_2_SEQ_LM" if is_encoder_decoder(backbone) else "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "num_virtual_tokens": sited.length,
        "num_layers": trained,
        "num_attention_heads": sited.geometry.kv_heads,
        "token_dim": sited.geometry.kv_heads * sited.geometry.head_dim,
        "num_transformer_submodules": 2 if is_encoder_decoder(backbone) else 1,
        **(own if peft_type == "PREFIX_TUNING" else {FROZEN: frozen}),
    }
    files = {
        CONFIG: json.dumps(config, indent=2, sort_keys=True).encode() + b"\n",
        WEIGHTS: save_safetensors({TENSOR: flat}, metadata={"format": "pt"}),
    }
    write_folder(Path(folder), files)


def _exportable(prefix: Prefix) -> SitePrefix:
    got = list(prefix.spec.sites)
    sited = prefix.spec.sites.get("decoder")
    if sited is None or len(got) > 1:
        raise InvalidArtifact(
            f"export to PEFT: expected a prefix at the decoder alone, which is all that PEFT holds; got one at "
            f"{', '.join(got)}",
            expected=["decoder"],
            got=got,
        )
    if sited.positions != "shifted":
        raise InvalidArtifact(
            "export to PEFT: expected shifted positions at the decoder (transformers counts them from the cache's "
            f"length), got {sited.positions}",
            expected="shifted",
            got=sited.positions,
        )
    return sited
