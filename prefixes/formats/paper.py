"""Imports prefixes of the paper's published code (XiangLi1999/PrefixTuning): runs its MLP once, over all positions.

Owns what its tensors mean. GPT-2 (`gpt2/train_control.py`): `wte` (P, d) goes through `control_trans`, which is Linear,
Tanh, Linear (the deep variant adds Tanh, Linear). The result is `(P, layers * 2 * d)`: key and value in turn, layer by
layer. In the shallow variants `control_trans` holds the keys and values themselves. BART (`seq2seq/prefixTuning.py`)
has three such sets: `wte`/`control_trans` for the decoder, `wte_enc`/`control_trans_enc` for the encoder and
`wte2`/`control_trans2` for cross-attention, all with the decoder's number of layers.

Positions count as in the code's own transformers. GPT-2's tokens stand behind the prefix: its positions count from the
cache's length. BART's do not: its encoder and decoder positions count only tokens, with and without the cache.

A variant that depends on the input (infix, control codes) or lives in the embeddings is no prefix of keys and values.
It is refused, as is everything unknown. Does not know how a checkpoint lies on disk: that is ``paper_file``.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch.nn import functional

from prefixes.artifact import Prefix, check_prefix
from prefixes.digest import dtype_name
from prefixes.errors import IncompatiblePrefix, InvalidArtifact
from prefixes.formats.paper_file import read_checkpoint
from prefixes.spec import INPUT_SLOT, BackboneSpec, Positions, PrefixSpec, Site, SitePrefix, check_compatible

FAMILIES: Final = ("gpt2", "bart")
_ENDINGS: Final[Mapping[str, Site]] = {"": "decoder", "_enc": "encoder", "2": "cross"}
_NAME: Final = re.compile(r"(wte|control_trans)(_enc|2|)((?:\.[a-z0-9]+)*)")
_DIRECT: Final = frozenset({"control_trans"})
_EMBEDDING: Final = frozenset({"wte.weight"})
_MLPS: Final[Mapping[frozenset[str], tuple[int, ...]]] = {
    _EMBEDDING | {f"control_trans.{n}.{part}" for n in linears for part in ("weight", "bias")}: linears
    for linears in ((0, 2), (0, 2, 4))
}
"""The tensor names of one set -> where its Linears stand. A Tanh stands between any two."""


def import_paper(
    path: str | Path,
    backbone: BackboneSpec,
    *,
    template: str = INPUT_SLOT,
    defaults: Mapping[str, Any] | None = None,
) -> Prefix:
    """The prefix in the published code's checkpoint at ``path``. It must have been trained on ``backbone``.

    Such a checkpoint has no fingerprint, so only the geometry is compared. The MLP runs in float32, or in float64 if
    the checkpoint is. ``template`` says how the inputs were written; for BART that is mostly
    ``Backbone.input_template``. Raises InvalidArtifact for a file that holds something else or a variant that is no
    prefix of keys and values, IncompatiblePrefix for another geometry, both with expected and got.
    """
    if backbone.family not in FAMILIES:
        raise IncompatiblePrefix(
            f"the paper's code: expected a {' or '.join(FAMILIES)} backbone, got a {backbone.family} one",
            expected=list(FAMILIES),
            got=backbone.family,
        )
    checkpoint = read_checkpoint(path)
    _check_config(checkpoint.config, backbone)
    positions: Positions = "shifted" if backbone.family == "gpt2" else "unshifted"
    sited: dict[Site, SitePrefix] = {}
    tensors: dict[str, torch.Tensor] = {}
    for site, named in _sets(checkpoint.tensors, backbone).items():
        pairs = _fold(site, named, backbone)  # (P, layers, 2, kv_heads, head_dim)
        for index, part in enumerate(("key", "value")):
            tensors[f"{site}.{part}"] = pairs[:, :, index].transpose(0, 1).contiguous()
        sited[site] = SitePrefix(pairs.shape[0], positions, backbone.sites[site], dtype_name(pairs))
    _check_length(checkpoint.config, sited["decoder"].length)
    origin = {"method": "paper", "parametrization": "direct" if "control_trans" in checkpoint.tensors else "mlp"}
    if isinstance(task := checkpoint.config.get("_my_arg_task_mode"), str):
        origin["task_mode"] = task[:80]
    spec = PrefixSpec(backbone.fingerprint, sited, template, dict(defaults or {}), origin)
    check_compatible(spec, backbone)
    prefix = Prefix(spec, tensors)
    check_prefix(prefix)
    return prefix


def _check_config(config: Mapping[str, Any], backbone: BackboneSpec) -> None:
    """Check that the variant has keys and values and that its model is the backbone's. No tensor shows the heads."""
    if config.get("use_infix") in (True, "yes") or config.get("format_mode") == "infix":
        raise _variant("infix-tuning, whose activations depend on the input")
    if config.get("optim_prefix") in (False, "no"):
        raise _variant("control codes (optim_prefix is off), whose activations depend on the input")
    decoder = backbone.sites["decoder"]
    expected: dict[str, Any] = {"model_type": backbone.family}
    if backbone.family == "gpt2":
        expected |= {"n_layer": decoder.layers, "n_head": decoder.kv_heads, "n_embd": backbone.hidden_size}
    else:
        expected |= {"encoder_layers": backbone.sites["encoder"].layers, "decoder_layers": decoder.layers}
        expected |= {"decoder_attention_heads": decoder.kv_heads, "d_model": backbone.hidden_size}
    for key, value in expected.items():
        if config.get(key) not in (value, None):
            raise IncompatiblePrefix(
                f"the checkpoint's {key}: this backbone has {value}, the prefix was made for {str(config[key])[:40]}",
                key=key,
                expected=value,
                got=str(config[key])[:40],
            )


def _sets(tensors: Mapping[str, torch.Tensor], backbone: BackboneSpec) -> dict[Site, dict[str, torch.Tensor]]:
    """Each site's set, with the decoder's names: ``wte.weight``, ``control_trans.0.weight``, … None may be left over.
    """
    sets: dict[Site, dict[str, torch.Tensor]] = {}
    unknown = []
    for name, tensor in tensors.items():
        if match := _NAME.fullmatch(name):
            sets.setdefault(_ENDINGS[match[2]], {})[match[1] + match[3]] = tensor
        else:
            unknown.append(name[:80])
    if unknown or "decoder" not in sets:
        got = sorted(unknown or [name[:80] for name in tensors])
        raise InvalidArtifact(
            "checkpoint of the paper's code: expected wte.weight and control_trans.0 and .2, for BART the same with "
            f"_enc and 2; got {'also ' if 'decoder' in sets else ''}{', '.join(got[:8])}{', …' if got[8:] else ''}",
            got=got[:8],
        )
    if sets.get("cross", {}).keys() == _EMBEDDING:
        raise _variant("infix-tuning (wte2 without control_trans2), whose activations depend on the input")
    if foreign := [site for site in sets if site not in backbone.sites]:
        raise IncompatiblePrefix(
            f"sites: a {backbone.family} backbone has only {', '.join(backbone.sites)}, the checkpoint has a prefix at "
            f"{', '.join(foreign)} as well",
            expected=list(backbone.sites),
            got=foreign,
        )
    return sets


def _fold(site: Site, named: Mapping[str, torch.Tensor], backbone: BackboneSpec) -> torch.Tensor:
    """One set's keys and values: ``(P, layers, 2, kv_heads, head_dim)``."""
    decoder, layers = backbone.sites["decoder"], backbone.sites[site].layers
    if layers > decoder.layers:
        raise IncompatiblePrefix(
            f"layers at site {site!r}: the paper's code gives every site the decoder's {decoder.layers} and cannot run "
            f"this backbone's {layers}",
            expected=decoder.layers,
            got=layers,
        )
    names = frozenset(named)
    if names == _DIRECT and backbone.family == "gpt2":
        flat = _run_direct(named["control_trans"], backbone)
    elif names in _MLPS:
        flat = _run_mlp(site, named, _MLPS[names], backbone)
    elif names == _EMBEDDING:
        raise _variant("a prefix of embeddings (wte alone)")
    elif "wte.weight" not in names:
        raise _variant(f"{', '.join(sorted(names))} without wte.weight: control codes, not a prefix")
    else:
        raise _variant(f"at site {site!r} {', '.join(sorted(names))}")
    shape = (flat.shape[0], decoder.layers, 2, decoder.kv_heads, decoder.head_dim)
    return flat.view(shape)[:, :layers]  # an encoder with fewer layers takes the first ones


def _run_mlp(
    site: Site, named: Mapping[str, torch.Tensor], linears: tuple[int, ...], backbone: BackboneSpec
) -> torch.Tensor:
    """``(P, decoder layers * 2 * d)`` from the embedding of every position."""
    x, width = named["wte.weight"], backbone.hidden_size
    weights = [(named[f"control_trans.{n}.weight"], named[f"control_trans.{n}.bias"]) for n in linears]
    layers = backbone.sites["decoder"].layers
    if weights[-1][0].shape[:1] == (width,):
        raise _variant(f"a prefix of embeddings (control_trans ends in {width}, the width of one)")
    middles = [tuple(bias.shape) for _, bias in weights[:-1]]
    sizes = [width, *(size[0] if len(size) == 1 else -1 for size in middles), layers * 2 * width]
    expected = [(out, size) for size, out in itertools.pairwise(sizes)]
    got = [tuple(weight.shape) for weight, _ in weights]
    if x.dim() != 2 or x.shape[1] != width or got != expected or weights[-1][1].shape != (sizes[-1],):
        raise IncompatiblePrefix(
            f"site {site!r}: expected wte (P, {width}) and control_trans {expected}, as this backbone's {layers} "
            f"layers of width {width} need; got {tuple(x.shape)} and {got}",
            expected={"wte": [None, width], "control_trans": [list(shape) for shape in expected]},
            got={"wte": list(x.shape), "control_trans": [list(shape) for shape in got]},
        )
    if x.shape[0] >= backbone.vocab_size:
        raise _variant(f"control codes (wte is a vocabulary of {x.shape[0]}), whose activations depend on the input")
    dtype = torch.promote_types(x.dtype, torch.float32)
    x = x.to(dtype)
    for index, (weight, bias) in enumerate(weights):
        x = functional.linear(torch.tanh(x) if index else x, weight.to(dtype), bias.to(dtype))
    return x


def _run_direct(tensor: torch.Tensor, backbone: BackboneSpec) -> torch.Tensor:
    """``(P, layers * 2 * d)`` from a shallow variant.

    ``tensor`` is flat, in that order, or a GPT-2 cache ``(layers * 2, 1, heads, P, head_dim)``.
    """
    decoder, got = backbone.sites["decoder"], tuple(tensor.shape)
    size = decoder.layers * 2 * decoder.kv_heads * decoder.head_dim
    if len(got) == 1 and got[0] and got[0] % size == 0:
        return tensor.view(-1, size)
    cache = (decoder.layers * 2, 1, decoder.kv_heads, got[3] if len(got) == 5 else -1, decoder.head_dim)
    if got != cache:
        raise IncompatiblePrefix(
            f"control_trans: expected (P * {size},) or ({cache[0]}, 1, {cache[2]}, P, {cache[4]}), got {got}",
            expected=[size],
            got=list(got),
        )
    return tensor[:, 0].permute(2, 0, 1, 3).reshape(-1, size)


def _check_length(config: Mapping[str, Any], length: int) -> None:
    """Check `preseqlen`, unless the words of an initialisation set the length instead."""
    said = config.get("preseqlen")
    by_words = config.get("lowdata_token") or config.get("init_shallow_word")
    if said not in (length, None) and not by_words:
        raise InvalidArtifact(
            f"preseqlen: expected the tensors' {length}, got {str(said)[:40]}", expected=length, got=str(said)[:40]
        )


def _variant(found: str) -> InvalidArtifact:
    return InvalidArtifact(
        "checkpoint of the paper's code: expected keys and values for every layer, or the MLP that makes them; "
        f"got {found}",
        got=found,
    )
