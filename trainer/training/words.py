"""The start of a prefix from real tokens: the frozen model's own keys and values over them, at every site.

Words and texts stand where a text stands: in an encoder between the tokens that the backbone puts around every input,
in a decoder behind those that begin every output. Only the words' own positions are kept. Where a decoder reads the
input and the model's tokenizer begins a text with a token (``<s>``), the words begin with it: attention rests on it. A
decoder with an encoder attends to the encoded words meanwhile; the keys and values of cross-attention are over the same
words. Words are repeated or cut to the prefix's length. A text is cut, and must be long enough. Whole sequences, such
as training pairs, have nothing around them.

Owns which activations these are; knows no parameterisation.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from prefixes.backbone import Backbone
from prefixes.errors import InvalidParameter
from prefixes.spec import SITES, Site
from server.engine.kernels.dense import DenseAttention
from server.engine.models import Model
from trainer.data.sequences import Ragged, target_opening
from trainer.training.forward import run_decoder, run_encoder
from trainer.training.plan import dtype_of
from trainer.training.reparam import PrefixKV


@dataclass
class _Recording:
    """An ``Attention`` that keeps the keys and values it is given, per site in the order of layers."""

    inner: DenseAttention
    made: dict[Site, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)

    def __call__(self, site: Site, layer: int, query: Tensor, key: Tensor | None, value: Tensor | None) -> Tensor:
        if key is not None and value is not None:
            self.made.setdefault(site, []).append((key, value))
        return self.inner(site, layer, query, key, value)

    def store(self, site: Site, layer: int, key: Tensor, value: Tensor) -> None:
        self.made.setdefault(site, []).append((key, value))
        self.inner.store(site, layer, key, value)


def word_activations(model: Model, backbone: Backbone, words: str, length: int, sites: Collection[Site]) -> PrefixKV:
    """Keys and values ``(layers, length, kv_heads, head_dim)`` over ``words``, at each of ``sites``.

    Raises InvalidParameter for words without a token, and if the window does not hold ``length`` beside the tokens
    around the words.
    """
    tokens = backbone.prompt_encoder.encode_text(words)
    if not tokens:
        raise InvalidParameter(f"initial words: expected at least one token, got none in {words!r}", got=words)
    repeated = tokens * -(-length // len(tokens))
    return _activations(model, backbone, [*_first(backbone), *repeated][:length], sites)


def text_tokens(backbone: Backbone, text: str, length: int) -> Sequence[int]:
    """The first ``length`` tokens of ``text``. Raises InvalidParameter if it has fewer."""
    tokens = [*_first(backbone), *backbone.prompt_encoder.encode_text(text)]
    if len(tokens) < length:
        raise InvalidParameter(
            f"initial text: expected at least the prefix's {length} tokens, got {len(tokens)}; a shorter prefix starts "
            "from less text",
            expected=length,
            got=len(tokens),
        )
    return tokens[:length]


def text_activations(model: Model, backbone: Backbone, text: str, length: int, sites: Collection[Site]) -> PrefixKV:
    """Keys and values ``(layers, length, kv_heads, head_dim)`` over the first ``length`` tokens of ``text``.

    A decoder with shifted positions goes on exactly as if the text stood before the input. Raises InvalidParameter for
    a text with fewer tokens, and if the window does not hold ``length``.
    """
    return _activations(model, backbone, text_tokens(backbone, text, length), sites)


def _first(backbone: Backbone) -> Sequence[int]:
    return backbone.prompt_encoder.first if backbone.spec.input_site == "decoder" else ()


def sequence_activations(
    model: Model, backbone: Backbone, inputs: Sequence[int], outputs: Sequence[int], sites: Collection[Site]
) -> PrefixKV:
    """Keys and values ``(layers, length, kv_heads, head_dim)`` over whole sequences, at each of ``sites``.

    The decoder reads ``outputs``, an encoder ``inputs`` of the same length. Raises InvalidParameter beyond the window.
    """
    length = len(outputs)
    _check_room(backbone, length, 0)
    return _recorded(model, backbone, inputs, outputs, dict.fromkeys(SITES, 0), length, sites)


def _activations(model: Model, backbone: Backbone, tokens: Sequence[int], sites: Collection[Site]) -> PrefixKV:
    encoder, length = backbone.prompt_encoder, len(tokens)
    encodes = backbone.spec.input_site == "encoder"
    before, after, _ = encoder.around(backbone.input_template) if encodes else ([], [], False)
    begin = [*backbone.decoder_prompt, *target_opening(backbone)]
    _check_room(backbone, length, max(len(before) + len(after), len(begin)))
    starts: dict[Site, int] = {"decoder": len(begin), "encoder": len(before), "cross": len(before)}
    return _recorded(model, backbone, [*before, *tokens, *after], [*begin, *tokens], starts, length, sites)


@torch.no_grad()
def _recorded(
    model: Model,
    backbone: Backbone,
    inputs: Sequence[int],
    outputs: Sequence[int],
    starts: Mapping[Site, int],
    length: int,
    sites: Collection[Site],
) -> PrefixKV:
    """The keys and values of ``length`` tokens from ``starts`` on, at each of ``sites``."""
    device = next(backbone.model.parameters()).device
    recording = _Recording(DenseAttention([len(outputs)], {}, [len(inputs)], model.scores))
    if backbone.spec.input_site == "encoder":
        run_encoder(model, Ragged.of([inputs], device), recording, 0)
    nothing = torch.empty(0, dtype=torch.int64, device=device)  # no hidden states: only keys and values are kept
    run_decoder(model, Ragged.of([outputs], device), recording, 0, nothing)
    dtype = getattr(torch, dtype_of(backbone))
    return {site: _stacked(recording.made[site], starts[site], length, dtype) for site in sites}


def _check_room(backbone: Backbone, length: int, beside: int) -> None:
    most = backbone.spec.max_positions - beside
    if length > most:
        raise InvalidParameter(
            f"init: expected a prefix of at most {most} positions, the window has no more; got {length}",
            expected=most,
            got=length,
        )


def _stacked(made: list[tuple[Tensor, Tensor]], start: int, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    keys, values = (torch.stack([pair[part] for pair in made]).to(dtype) for part in (0, 1))
    return keys[:, start : start + length], values[:, start : start + length]  # (layers, length, heads, head_dim)
