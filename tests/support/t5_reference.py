"""The oracle for T5 with prefixes: plain and slow, no cache and no batch, prefixes concatenated in front of the keys
and values of all three sites, and the bias of each pair of a query and a key straight from its definition.

Reads the weights of transformers' model and computes with matmul and softmax alone, in the model's dtype,
differentiable in the prefix. ``tests/parity/test_t5_reference.py`` proves that it is T5. Knows nothing of the engine.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import T5ForConditionalGeneration, T5PreTrainedModel
from transformers.modeling_outputs import Seq2SeqLMOutput

from prefixes.backbone import Backbone
from prefixes.spec import Site
from server.engine.types import SamplingParams
from tests.support.bart_reference import PrefixKV, offset_of, searched


def reference_logits(
    model: Any, input_ids: Sequence[int], decoder_ids: Sequence[int], prefix: PrefixKV, positions: Mapping[Site, str]
) -> Tensor:
    """Logits ``(len(decoder_ids), vocab)`` behind each of ``decoder_ids``.

    ``positions[site]`` "shifted": the prefix is at positions 0 to ``prefix_len - 1``, and tokens go on behind it;
    "unshifted": it is at none, and has no bias.
    """
    encoded = reference_encode(model, input_ids, prefix, positions)
    return reference_decode(model, encoded, decoder_ids, prefix, positions)


def reference_encode(model: Any, input_ids: Sequence[int], prefix: PrefixKV, positions: Mapping[Site, str]) -> Tensor:
    """The encoder's output ``(len(input_ids), hidden)``: every token sees the encoder's prefix and every token."""
    stack, x = model.encoder, model.shared.weight[list(input_ids)]
    length = prefix["encoder"][0].shape[1] if "encoder" in prefix else 0
    bias = _bias(model.config, stack, len(x), length, offset_of("encoder", prefix, positions), causal=False)
    for index, block in enumerate(stack.block):
        normed = _norm(block.layer[0].layer_norm, x)
        x = x + _attention(block.layer[0].SelfAttention, normed, normed, _of_layer(prefix, "encoder", index), bias)
        x = x + _feed_forward(model.config, block.layer[-1], x)
    return _norm(stack.final_layer_norm, x)


def reference_decode(
    model: Any, encoded: Tensor, decoder_ids: Sequence[int], prefix: PrefixKV, positions: Mapping[Site, str]
) -> Tensor:
    """Logits ``(len(decoder_ids), vocab)``. Every token sees the decoder's prefix, itself and the tokens before it; in
    cross-attention the cross prefix and all of ``encoded (input, hidden)``.
    """
    stack, x = model.decoder, model.shared.weight[list(decoder_ids)]
    length = prefix["decoder"][0].shape[1] if "decoder" in prefix else 0
    bias = _bias(model.config, stack, len(x), length, offset_of("decoder", prefix, positions), causal=True)
    for index, block in enumerate(stack.block):
        normed = _norm(block.layer[0].layer_norm, x)
        x = x + _attention(block.layer[0].SelfAttention, normed, normed, _of_layer(prefix, "decoder", index), bias)
        normed = _norm(block.layer[1].layer_norm, x)
        x = x + _attention(block.layer[1].EncDecAttention, normed, encoded, _of_layer(prefix, "cross", index), None)
        x = x + _feed_forward(model.config, block.layer[-1], x)
    x = _norm(stack.final_layer_norm, x)
    if getattr(model.config, "scale_decoder_outputs", False):
        x = x / math.sqrt(model.config.d_model)
    logits: Tensor = x @ model.lm_head.weight.T
    return logits


def bucket_of(distance: int, buckets: int, most: int, *, causal: bool) -> int:
    """The row of the table for a key at ``distance`` from the query: its position less the query's."""
    first = 0
    if not causal:
        buckets //= 2
        first, distance = buckets if distance > 0 else 0, -abs(distance)
    behind, exact = max(-distance, 0), buckets // 2
    if behind < exact:
        return first + behind
    steps = torch.log(torch.tensor(behind / exact)) / math.log(most / exact) * (buckets - exact)  # in float32
    return first + min(exact + int(steps), buckets - 1)


def _bias(config: Any, stack: Any, tokens: int, length: int, offset: int, *, causal: bool) -> Tensor:
    """``(heads, tokens, length + tokens)``: what each key adds to each token's scores, -inf where it is not seen."""
    table = stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight  # (buckets, heads)
    sizes = config.relative_attention_num_buckets, config.relative_attention_max_distance
    furthest = length + tokens
    buckets = torch.tensor([bucket_of(distance, *sizes, causal=causal) for distance in range(-furthest, tokens)])
    own, query = torch.arange(-length, tokens), torch.arange(tokens)[:, None]  # the prefix stands at -length to -1
    bias = table[buckets[own - query + furthest]].permute(2, 0, 1)  # (heads, tokens, length + tokens)
    if not offset:
        bias = bias.masked_fill(own < 0, 0)
    seen: Tensor = bias.masked_fill(own > query, -math.inf) if causal else bias
    return seen


def _of_layer(prefix: PrefixKV, site: Site, layer: int) -> tuple[Tensor, Tensor] | None:
    return (prefix[site][0][layer], prefix[site][1][layer]) if site in prefix else None


def _attention(
    module: Any, x: Tensor, context: Tensor, prefix: tuple[Tensor, Tensor] | None, bias: Tensor | None
) -> Tensor:
    """``x (tokens, hidden)`` attends to ``[prefix | context]``, without a scale."""
    heads = module.n_heads
    query = (x @ module.q.weight.T).view(len(x), heads, -1)  # (tokens, heads, head_dim)
    key = (context @ module.k.weight.T).view(len(context), heads, -1)
    value = (context @ module.v.weight.T).view(len(context), heads, -1)
    if prefix is not None:
        key, value = torch.cat([prefix[0], key]), torch.cat([prefix[1], value])
    scores = query.transpose(0, 1) @ key.permute(1, 2, 0)  # (heads, tokens, keys)
    weights = torch.softmax(scores if bias is None else scores + bias, dim=-1)
    attended = (weights @ value.transpose(0, 1)).transpose(0, 1)  # (tokens, heads, head_dim)
    result: Tensor = attended.reshape(len(x), -1) @ module.o.weight.T
    return result


def _feed_forward(config: Any, layer: Any, x: Tensor) -> Tensor:
    mlp, normed = layer.DenseReluDense, _norm(layer.layer_norm, x)
    if config.is_gated_act:
        inner = _activation(config.dense_act_fn, normed @ mlp.wi_0.weight.T) * (normed @ mlp.wi_1.weight.T)
    else:
        inner = _activation(config.dense_act_fn, normed @ mlp.wi.weight.T)
    result: Tensor = inner @ mlp.wo.weight.T
    return result


def _activation(name: str, x: Tensor) -> Tensor:
    match name:
        case "relu":
            return x.clamp(min=0)
        case "gelu_new":
            return x * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    raise ValueError(f"activation: expected relu or gelu_new, got {name}")


def _norm(module: Any, x: Tensor) -> Tensor:
    result: Tensor = x / torch.sqrt((x**2).mean(-1, keepdim=True) + module.variance_epsilon) * module.weight
    return result


class _ReferenceModel(T5ForConditionalGeneration):
    """What transformers' ``generate`` is given: its own T5, but for the logits, which are the reference's."""

    def __init__(self, model: Any, prefix: PrefixKV, positions: Mapping[Site, str]) -> None:
        T5PreTrainedModel.__init__(self, copy.deepcopy(model.config))  # builds no weights: these are shared
        self.shared, self.encoder, self.decoder = model.shared, model.encoder, model.decoder
        self.lm_head = model.lm_head
        self._prefix, self._positions = prefix, positions

    def forward(self, decoder_input_ids: Tensor, encoder_outputs: Any, **_: Any) -> Any:
        rows = [
            reference_decode(self, encoded, tokens.tolist(), self._prefix, self._positions)
            for tokens, encoded in zip(decoder_input_ids, encoder_outputs[0], strict=True)
        ]
        return Seq2SeqLMOutput(logits=torch.stack(rows))


@torch.inference_mode()
def reference_generate(
    backbone: Backbone,
    input_ids: Sequence[int],
    prefix: PrefixKV,
    positions: Mapping[Site, str],
    params: SamplingParams,
) -> list[tuple[list[int], float | None]]:
    """Per output its tokens, the end token included, and with beams its score: greedy or beam search."""
    room = backbone.spec.max_positions - offset_of("decoder", prefix, positions) - len(backbone.decoder_prompt)
    return searched(
        _ReferenceModel(backbone.model, prefix, positions), input_ids,
        reference_encode(backbone.model, input_ids, prefix, positions), params, room, backbone.decoder_prompt, None,
        None, backbone.eos_token_ids,
    )  # fmt: skip
