"""The oracle for BART with prefixes: plain and slow, no cache and no batch, prefixes concatenated in front of the keys
and values of all three sites.

Reads the weights of a transformers ``BartForConditionalGeneration`` and computes with matmul and softmax alone, in the
model's dtype, differentiable in the prefix. ``tests/parity/test_bart_reference.py`` proves that it is BART. Greedy and
beam search around it are transformers' own. Knows nothing of the engine.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import BartForConditionalGeneration, BartPreTrainedModel, GenerationConfig
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from prefixes.artifact import Prefix
from prefixes.spec import Positions, Site
from server.engine.types import SamplingParams

PrefixKV = Mapping[Site, tuple[Tensor, Tensor]]
"""Per site, keys and values ``(layers, prefix_len, heads, head_dim)``; a missing site has no prefix."""

POSITION_OFFSET = 2  # BART's tables of positions begin with two rows that no token uses


Parts = tuple[dict[Site, tuple[Tensor, Tensor]], dict[Site, Positions]]


def parts_of(prefix: Prefix | None, dtype: torch.dtype) -> Parts:
    """An artifact as the functions below take it: tensors in ``dtype``, and how positions count; None has neither."""
    if prefix is None:
        return {}, {}
    tensors = {
        site: (prefix.tensors[f"{site}.key"].to(dtype), prefix.tensors[f"{site}.value"].to(dtype))
        for site in prefix.spec.sites
    }
    return tensors, {site: sited.positions for site, sited in prefix.spec.sites.items()}


def reference_logits(
    model: Any, input_ids: Sequence[int], decoder_ids: Sequence[int], prefix: PrefixKV, positions: Mapping[Site, str]
) -> Tensor:
    """Logits ``(len(decoder_ids), vocab)`` behind each of ``decoder_ids``.

    ``positions[site]`` "shifted": tokens of that site start at position ``prefix_len``; "unshifted": at 0.
    """
    encoded = reference_encode(model, input_ids, prefix, positions)
    return reference_decode(model, encoded, decoder_ids, prefix, positions)


def reference_encode(
    model: Any, input_ids: Sequence[int], prefix: PrefixKV, positions: Mapping[Site, str]
) -> Tensor:
    """The encoder's output ``(len(input_ids), hidden)``: every token sees the encoder's prefix and every token."""
    encoder, heads = model.model.encoder, model.config.encoder_attention_heads
    x = _embed(model.config, encoder, input_ids, offset_of("encoder", prefix, positions))
    for index, layer in enumerate(encoder.layers):
        attended = _attention(layer.self_attn, heads, x, x, _of_layer(prefix, "encoder", index), causal=False)
        x = _norm(layer.self_attn_layer_norm, x + attended)
        x = _norm(layer.final_layer_norm, x + _feed_forward(model.config, layer, x))
    return x


def reference_decode(
    model: Any, encoded: Tensor, decoder_ids: Sequence[int], prefix: PrefixKV, positions: Mapping[Site, str]
) -> Tensor:
    """Logits ``(len(decoder_ids), vocab)``. Every token sees the decoder's prefix, itself and the tokens before it; in
    cross-attention the cross prefix and all of ``encoded (input, hidden)``.
    """
    decoder, heads = model.model.decoder, model.config.decoder_attention_heads
    x = _embed(model.config, decoder, decoder_ids, offset_of("decoder", prefix, positions))
    for index, layer in enumerate(decoder.layers):
        attended = _attention(layer.self_attn, heads, x, x, _of_layer(prefix, "decoder", index), causal=True)
        x = _norm(layer.self_attn_layer_norm, x + attended)
        attended = _attention(layer.encoder_attn, heads, x, encoded, _of_layer(prefix, "cross", index), causal=False)
        x = _norm(layer.encoder_attn_layer_norm, x + attended)
        x = _norm(layer.final_layer_norm, x + _feed_forward(model.config, layer, x))
    logits: Tensor = x @ model.lm_head.weight.T + model.final_logits_bias[0]
    return logits


def offset_of(site: Site, prefix: PrefixKV, positions: Mapping[Site, str]) -> int:
    if site not in prefix:
        return 0
    assert positions[site] in ("shifted", "unshifted"), positions[site]
    return prefix[site][0].shape[1] if positions[site] == "shifted" else 0


def _of_layer(prefix: PrefixKV, site: Site, layer: int) -> tuple[Tensor, Tensor] | None:
    return (prefix[site][0][layer], prefix[site][1][layer]) if site in prefix else None


def _embed(config: Any, module: Any, token_ids: Sequence[int], offset: int) -> Tensor:
    first, scale = POSITION_OFFSET + offset, math.sqrt(config.d_model) if config.scale_embedding else 1.0
    places = module.embed_positions.weight[first : first + len(token_ids)]
    return _norm(module.layernorm_embedding, module.embed_tokens.weight[list(token_ids)] * scale + places)


def _attention(
    module: Any, heads: int, x: Tensor, context: Tensor, prefix: tuple[Tensor, Tensor] | None, *, causal: bool
) -> Tensor:
    """``x (tokens, hidden)`` attends to ``[prefix | context]``; with ``causal`` to no token behind itself."""
    query = _linear(module.q_proj, x).view(len(x), heads, -1)  # (tokens, heads, head_dim)
    key = _linear(module.k_proj, context).view(len(context), heads, -1)
    value = _linear(module.v_proj, context).view(len(context), heads, -1)
    visible = torch.ones(len(x), len(context), dtype=torch.bool, device=x.device)
    if causal:
        visible = visible.tril()
    if prefix is not None:
        key, value = torch.cat([prefix[0], key]), torch.cat([prefix[1], value])
        visible = torch.cat([visible.new_ones(len(x), len(prefix[0])), visible], dim=1)
    scores = query.transpose(0, 1) @ key.permute(1, 2, 0) / math.sqrt(query.shape[-1])  # (heads, tokens, keys)
    weights = torch.softmax(scores.masked_fill(~visible, -math.inf), dim=-1)
    attended = (weights @ value.transpose(0, 1)).transpose(0, 1)  # (tokens, heads, head_dim)
    return _linear(module.out_proj, attended.reshape(x.shape))


def _feed_forward(config: Any, layer: Any, x: Tensor) -> Tensor:
    return _linear(layer.fc2, _activation(config.activation_function, _linear(layer.fc1, x)))


def _activation(name: str, x: Tensor) -> Tensor:
    match name:
        case "relu":
            return x.clamp(min=0)
        case "gelu":
            return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
        case "gelu_new" | "gelu_pytorch_tanh":
            return x * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    raise ValueError(f"activation: expected relu or a gelu, got {name}")


def _linear(module: Any, x: Tensor) -> Tensor:
    result: Tensor = x @ module.weight.T + module.bias
    return result


def _norm(module: Any, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    variance = (centred**2).mean(-1, keepdim=True)
    result: Tensor = centred / torch.sqrt(variance + module.eps) * module.weight + module.bias
    return result


class _ReferenceModel(BartForConditionalGeneration):
    """What transformers' ``generate`` is given: its own BART, but for the logits, which are the reference's."""

    def __init__(self, model: Any, prefix: PrefixKV, positions: Mapping[Site, str]) -> None:
        BartPreTrainedModel.__init__(self, copy.deepcopy(model.config))  # builds no weights: these are shared
        self.model, self.lm_head, self.final_logits_bias = model.model, model.lm_head, model.final_logits_bias
        self.generation_config = GenerationConfig()  # a backbone's own must not fill in what a caller leaves open
        self._prefix, self._positions = prefix, positions

    def forward(self, decoder_input_ids: Tensor, encoder_outputs: Any, **_: Any) -> Any:
        rows = [
            reference_decode(self, encoded, tokens.tolist(), self._prefix, self._positions)
            for tokens, encoded in zip(decoder_input_ids, encoder_outputs[0], strict=True)
        ]
        return Seq2SeqLMOutput(logits=torch.stack(rows))


@torch.inference_mode()
def reference_generate(
    model: Any,
    input_ids: Sequence[int],
    prefix: PrefixKV,
    positions: Mapping[Site, str],
    params: SamplingParams,
    decoder_prompt: Sequence[int],
    forced_first: int | None,
    forced_last: int | None,
    eos_token_ids: Iterable[int],
) -> list[tuple[list[int], float | None]]:
    """Per output its tokens behind ``decoder_prompt``, the end token included, and with beams its score.

    Greedy or beam search: processors, beams and stopping are transformers'. ``max_new_tokens`` is cut to the window.
    """
    room = model.config.max_position_embeddings - offset_of("decoder", prefix, positions) - len(decoder_prompt)
    encoded = reference_encode(model, input_ids, prefix, positions)
    return searched(
        _ReferenceModel(model, prefix, positions), input_ids, encoded, params, room, decoder_prompt, forced_first,
        forced_last, eos_token_ids,
    )  # fmt: skip


def searched(
    oracle: Any,
    input_ids: Sequence[int],
    encoded: Tensor,
    params: SamplingParams,
    room: int,
    decoder_prompt: Sequence[int],
    forced_first: int | None,
    forced_last: int | None,
    eos_token_ids: Iterable[int],
) -> list[tuple[list[int], float | None]]:
    """What ``oracle.generate`` finds behind ``decoder_prompt`` for an input that is ``encoded``, in ``room`` tokens."""
    assert not params.do_sample, "the text of sampling has no outside oracle"
    end, device = sorted(eos_token_ids), encoded.device
    config = GenerationConfig(
        max_new_tokens=min(params.max_new_tokens, room),
        min_new_tokens=params.min_new_tokens or None,
        do_sample=False,
        num_beams=params.num_beams,
        num_return_sequences=params.num_return_sequences,
        length_penalty=params.length_penalty,
        early_stopping=params.early_stopping,
        repetition_penalty=params.repetition_penalty,
        no_repeat_ngram_size=params.no_repeat_ngram_size,
        decoder_start_token_id=decoder_prompt[0],
        forced_bos_token_id=forced_first,
        forced_eos_token_id=forced_last,
        eos_token_id=end or None,
        pad_token_id=(*end, 0)[0],
        use_cache=False,
        output_scores=True,
        return_dict_in_generate=True,
    )
    out = oracle.generate(
        torch.tensor([list(input_ids)], device=device),
        attention_mask=torch.ones(1, len(input_ids), dtype=torch.long, device=device),
        encoder_outputs=BaseModelOutput(last_hidden_state=encoded[None]),
        decoder_input_ids=torch.tensor([list(decoder_prompt)], device=device),
        generation_config=config,
    )
    scores = out.sequences_scores.tolist() if params.num_beams > 1 else [None]
    tokens = [sequence[len(decoder_prompt) :].tolist() for sequence in out.sequences]
    return [(until_end(found, end), score) for found, score in zip(tokens, scores, strict=True)]


def until_end(token_ids: list[int], eos_token_ids: Iterable[int]) -> list[int]:
    """``token_ids`` up to and with the first end token: behind it ``generate`` pads."""
    ends = [position for position, token in enumerate(token_ids) if token in set(eos_token_ids)]
    return token_ids[: ends[0] + 1] if ends else token_ids
