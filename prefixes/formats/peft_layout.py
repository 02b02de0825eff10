"""The layout of PEFT's one tensor, `(P, layers * 2 * kv_heads * head_dim)`, for both kinds of models.

Owns the layout, as `PeftModel.get_prompt` takes it apart: each trained layer has a key, then a value. In a decoder-only
model, layer `i` takes trained layer `i`. For an encoder-decoder, PEFT doubles the tensor along its layers and cuts it
into groups of four. The first two of a group go to the decoder's self-attention. The other two are meant for
cross-attention and are thrown away. So decoder layer `i` takes trained layer `2i mod L`, and nothing reaches the
encoder or cross-attention. `L` is the configuration's `num_layers`, which PEFT sets to the number of encoder layers.
Knows no file.
"""

from __future__ import annotations

from typing import Literal

import torch

from prefixes.spec import BackboneSpec, SiteGeometry

PeftType = Literal["PREFIX_TUNING", "CARTRIDGE"]


def is_encoder_decoder(backbone: BackboneSpec) -> bool:
    """Whether PEFT's task type for ``backbone`` is SEQ_2_SEQ_LM."""
    return "encoder" in backbone.sites


def taken_layers(backbone: BackboneSpec, trained: int) -> tuple[int, ...]:
    """For each decoder layer, which of the ``trained`` layers PEFT gives it."""
    layers = range(backbone.sites["decoder"].layers)
    return tuple(2 * layer % trained for layer in layers) if is_encoder_decoder(backbone) else tuple(layers)


def fitting_layers(backbone: BackboneSpec) -> int:
    """A number of trained layers with which every decoder layer takes one of its own.

    For an encoder-decoder it is the decoder's number if that is odd, else one more. `2i mod L` repeats no layer only if
    `L` is odd (or at least twice the decoder's number), and PEFT fails if `L` is smaller than the decoder's number.
    """
    layers = backbone.sites["decoder"].layers
    return layers | 1 if is_encoder_decoder(backbone) else layers


def unpack(flat: torch.Tensor, geometry: SiteGeometry, taken: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Key and value, each ``(layers, P, kv_heads, head_dim)``, from ``flat (P, trained * 2 * kv_heads * head_dim)``."""
    pairs = flat.view(flat.shape[0], -1, 2, geometry.kv_heads, geometry.head_dim)
    key, value = (pairs[:, list(taken), part].transpose(0, 1).contiguous() for part in (0, 1))
    return key, value


def pack(key: torch.Tensor, value: torch.Tensor, taken: tuple[int, ...], trained: int) -> torch.Tensor:
    """The reverse of ``unpack``, for a ``taken`` without repeats. Trained layers that no decoder layer takes are zero.
    """
    pairs = torch.stack([key, value], dim=2).transpose(0, 1)  # (P, layers, 2, kv_heads, head_dim)
    flat = pairs.new_zeros(pairs.shape[0], trained, *pairs.shape[2:])
    flat[:, list(taken)] = pairs
    return flat.reshape(flat.shape[0], -1)
