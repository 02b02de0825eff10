"""The plain BART reference is BART: it equals transformers without prefixes, and with those prefixes that transformers
can have, which are the keys and values of more rows in front. In fp64.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, GenerationConfig

from prefixes.spec import Positions, Site
from server.engine.types import SamplingParams
from tests.support.bart import tiny_bart_model
from tests.support.bart_reference import (
    POSITION_OFFSET,
    reference_decode,
    reference_encode,
    reference_generate,
    reference_logits,
    until_end,
)

VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "plain": {},
    "scaled": {"scale_embedding": True, "layers": (1, 4)},
    "bias": {"logits_bias": True, "activation_function": "gelu_new", "layers": (3, 2)},
    "relu": {"activation_function": "relu", "seed": 3, "encoder_attention_heads": 2, "decoder_attention_heads": 2},
    "tanh": {"activation_function": "gelu_pytorch_tanh", "scale_embedding": True, "logits_bias": True},
}


@pytest.fixture(scope="module", params=VARIANTS)
def model(request: pytest.FixtureRequest) -> Any:
    return tiny_bart_model(dtype=torch.float64, **VARIANTS[request.param])


def close(ours: Tensor, theirs: Tensor) -> None:
    assert theirs.abs().max() > 1, "logits that say nothing"
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def token_ids(count: int, seed: int, vocab: int = 320) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(vocab) for _ in range(count)]


@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (1, 9), (17, 1), (64, 64)])
def test_without_a_prefix_it_equals_transformers(model: Any, inputs: int, outputs: int) -> None:
    input_ids, decoder_ids = token_ids(inputs, 1), token_ids(outputs, 2)
    theirs = model(torch.tensor([input_ids]), decoder_input_ids=torch.tensor([decoder_ids])).logits[0]
    close(reference_logits(model, input_ids, decoder_ids, {}, {}), theirs)


@pytest.mark.parametrize("length", [1, 7])
def test_a_shifted_decoder_prefix_equals_transformers_cache(model: Any, length: int) -> None:
    layers, heads = model.config.decoder_layers, model.config.decoder_attention_heads
    torch.manual_seed(length)
    keys, values = torch.randn(2, layers, length, heads, model.config.d_model // heads, dtype=torch.float64)
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    for layer in range(layers):
        cache.self_attention_cache.update(keys[layer].transpose(0, 1)[None], values[layer].transpose(0, 1)[None], layer)
    input_ids, decoder_ids = token_ids(9, 1), token_ids(6, 2)
    theirs = model(
        torch.tensor([input_ids]), decoder_input_ids=torch.tensor([decoder_ids]), past_key_values=cache
    ).logits[0]
    prefix: dict[Site, tuple[Tensor, Tensor]] = {"decoder": (keys, values)}
    close(reference_logits(model, input_ids, decoder_ids, prefix, {"decoder": "shifted"}), theirs)


@contextmanager
def outputs_of(modules: Mapping[str, Any]) -> Iterator[dict[str, Tensor]]:
    """What each of ``modules`` gave for a batch of one."""
    caught: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda _m, _i, output, name=name: caught.__setitem__(name, output[0]))
        for name, module in modules.items()
    ]
    yield caught
    for hook in hooks:
        hook.remove()


def projections(layers: Any, attention: str) -> dict[str, Any]:
    names = ("k_proj", "v_proj")
    return {f"{name}.{i}": getattr(getattr(layer, attention), name) for name in names for i, layer in enumerate(layers)}


def first_rows(caught: Mapping[str, Tensor], layers: int, length: int, heads: int) -> tuple[Tensor, Tensor]:
    """The keys and values of the first ``length`` rows as a prefix ``(layers, length, heads, head_dim)``."""
    key, value = (
        torch.stack([caught[f"{name}.{i}"][:length] for i in range(layers)]).unflatten(-1, (heads, -1))
        for name in ("k_proj", "v_proj")
    )
    return key, value


def embedded(module: Any, scale: float, ids: Sequence[int], length: int, positions: str) -> Tensor:
    """``length`` random vectors, then tokens which, once transformers has added its own positions, have ours."""
    table, first = module.embed_positions.weight, POSITION_OFFSET + (length if positions == "shifted" else 0)
    theirs = table[POSITION_OFFSET + length :][: len(ids)]
    tokens = module.embed_tokens.weight[list(ids)] * scale + table[first : first + len(ids)] - theirs
    return torch.cat([torch.randn(length, tokens.shape[1], dtype=tokens.dtype), tokens])[None]


def transformers_with_rows_in_front(
    model: Any, input_ids: Sequence[int], decoder_ids: Sequence[int], lengths: Mapping[Site, int], positions: Positions
) -> tuple[Tensor, dict[Site, tuple[Tensor, Tensor]]]:
    """transformers' logits with rows in front of the tokens and of the encoder's output, and those rows as a prefix.

    Rows in front of the encoder's tokens see only one another, so that nothing but the tokens depends on them.
    """
    config, encoder, decoder = model.config, model.model.encoder, model.model.decoder
    scale = config.d_model**0.5 if config.scale_embedding else 1.0
    sizes = {site: lengths.get(site, 0) for site in ("encoder", "decoder", "cross")}
    rows = sizes["encoder"] + len(input_ids)
    hidden = torch.zeros(1, 1, rows, rows, dtype=torch.float64)
    hidden[:, :, : sizes["encoder"], sizes["encoder"] :] = -torch.inf
    prefix: dict[Site, tuple[Tensor, Tensor]] = {}
    with outputs_of(projections(encoder.layers, "self_attn")) as caught:
        embeds = embedded(encoder, scale, input_ids, sizes["encoder"], positions)
        encoded = encoder(inputs_embeds=embeds, attention_mask=hidden)[0][:, sizes["encoder"] :]
        prefix["encoder"] = first_rows(caught, config.encoder_layers, sizes["encoder"], config.encoder_attention_heads)
    in_front = torch.randn(1, sizes["cross"], config.d_model, dtype=torch.float64)
    own, cross = projections(decoder.layers, "self_attn"), projections(decoder.layers, "encoder_attn")
    with outputs_of(own) as of_self, outputs_of(cross) as of_cross:
        embeds = embedded(decoder, scale, decoder_ids, sizes["decoder"], positions)
        logits = model(encoder_outputs=(torch.cat([in_front, encoded], dim=1),), decoder_inputs_embeds=embeds).logits
        shape = (config.decoder_layers, sizes["decoder"], config.decoder_attention_heads)
        prefix["decoder"] = first_rows(of_self, *shape)
        prefix["cross"] = first_rows(of_cross, shape[0], sizes["cross"], shape[2])
    return logits[0, sizes["decoder"] :], {site: pair for site, pair in prefix.items() if site in lengths}


@pytest.mark.parametrize("positions", ["shifted", "unshifted"])
@pytest.mark.parametrize(
    "lengths",
    [
        {"encoder": 4},
        {"decoder": 5},
        {"cross": 6},
        {"encoder": 1, "cross": 9},
        {"encoder": 7, "decoder": 2, "cross": 3},
    ],
)
def test_prefixes_that_transformers_can_have_give_its_logits(
    model: Any, lengths: dict[Site, int], positions: Positions
) -> None:
    torch.manual_seed(sum(lengths.values()))
    input_ids, decoder_ids = token_ids(11, 3), token_ids(8, 4)
    theirs, prefix = transformers_with_rows_in_front(model, input_ids, decoder_ids, lengths, positions)
    counted = {site: "unshifted" if site == "cross" else positions for site in lengths}
    close(reference_logits(model, input_ids, decoder_ids, prefix, counted), theirs)
    bare = reference_logits(model, input_ids, decoder_ids, {}, {})
    assert (bare - theirs).abs().max() > 1e-2, "a prefix that changes nothing"


@pytest.mark.parametrize("site", ["encoder", "decoder"])
def test_positions_count(model: Any, site: Site) -> None:
    """Shifted and unshifted differ: else no test above would see them confused."""
    _, prefix = transformers_with_rows_in_front(model, [3, 4], [5, 6], {site: 4}, "shifted")
    shifted, unshifted = (
        reference_logits(model, [3, 4], [5, 6], prefix, {site: positions}) for positions in ("shifted", "unshifted")
    )
    assert (shifted - unshifted).abs().max() > 1e-2


def test_the_prefix_has_gradients_at_every_site() -> None:
    model = tiny_bart_model(dtype=torch.float64, layers=(2, 2), d_model=8, vocab_size=20)
    _, prefix = transformers_with_rows_in_front(
        model, [3, 4, 5], [2, 6], {"encoder": 2, "decoder": 2, "cross": 2}, "shifted"
    )
    flat = [tensor.detach().requires_grad_() for pair in prefix.values() for tensor in pair]
    sites = list(prefix)
    counted: dict[Site, str] = {"encoder": "unshifted", "decoder": "shifted", "cross": "unshifted"}

    def loss(*tensors: Tensor) -> Tensor:
        of_site = {site: (tensors[2 * i], tensors[2 * i + 1]) for i, site in enumerate(sites)}
        encoded = reference_encode(model, [3, 4, 5], of_site, counted)
        return reference_decode(model, encoded, [2, 6], of_site, counted)[-1].log_softmax(-1)[7]

    assert torch.autograd.gradcheck(loss, flat, eps=1e-6, atol=1e-7, fast_mode=True)
    assert all(gradient.abs().max() > 1e-6 for gradient in torch.autograd.grad(loss(*flat), flat))


def ending_model(seed: int = 0) -> Any:
    """A model that sometimes ends by itself."""
    model = tiny_bart_model(dtype=torch.float64, logits_bias=True, seed=seed)
    model.final_logits_bias[0, 2] = 3.0
    return model


SEARCHES: list[dict[str, Any]] = [
    {},
    {"min_new_tokens": 9, "max_new_tokens": 9},
    {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
    {"max_new_tokens": 1},
    *({"num_beams": beams, "num_return_sequences": beams - 1} for beams in range(2, 7)),
    {"num_beams": 6, "length_penalty": 0.8, "min_new_tokens": 5, "no_repeat_ngram_size": 3, "early_stopping": True},
    {"num_beams": 4, "length_penalty": 2.0, "early_stopping": "never", "repetition_penalty": 1.2},
    {"num_beams": 3, "length_penalty": -1.0, "num_return_sequences": 3, "no_repeat_ngram_size": 1},
]


@pytest.mark.parametrize("search", SEARCHES, ids=str)
@pytest.mark.parametrize(("forced_first", "forced_last"), [(0, 2), (None, None), (None, 2)])
def test_generate_equals_transformers_generate_without_a_prefix(
    search: dict[str, Any], forced_first: int | None, forced_last: int | None
) -> None:
    params = SamplingParams(**{"max_new_tokens": 12, **search})
    for seed in (0, 3):
        model, input_ids = ending_model(seed), token_ids(5 + seed, seed)
        model.generation_config = GenerationConfig(
            **{"max_new_tokens": 12, **search},
            decoder_start_token_id=2, eos_token_id=2, pad_token_id=1, bos_token_id=0,
            forced_bos_token_id=forced_first, forced_eos_token_id=forced_last,
            output_scores=True, return_dict_in_generate=True,
        )  # fmt: skip
        theirs = model.generate(torch.tensor([input_ids]))
        ours = reference_generate(model, input_ids, {}, {}, params, (2,), forced_first, forced_last, (2,))
        assert [found for found, _ in ours] == [until_end(row[1:].tolist(), (2,)) for row in theirs.sequences]
        if params.num_beams > 1:
            torch.testing.assert_close(torch.tensor([score for _, score in ours]), theirs.sequences_scores)


def test_the_searches_above_end_by_themselves_and_at_the_limit() -> None:
    params = SamplingParams(max_new_tokens=12, num_beams=4, num_return_sequences=3)
    lengths = {
        len(found)
        for seed in (0, 3)
        for found, _ in reference_generate(
            ending_model(seed), token_ids(5 + seed, seed), {}, {}, params, (2,), None, 2, (2,)
        )
    }
    assert max(lengths) == 12 and min(lengths) < 12


def test_generate_is_greedy_over_the_reference_and_cut_to_the_window() -> None:
    """Two starting tokens, several end tokens, a prefix at each site: step by step as the logits say."""
    model = tiny_bart_model(dtype=torch.float64, window=16, seed=5)
    lengths: dict[Site, int] = {"encoder": 2, "decoder": 6, "cross": 3}
    _, prefix = transformers_with_rows_in_front(model, [3, 4], [2, 6], lengths, "shifted")
    counted: dict[Site, str] = {"encoder": "unshifted", "decoder": "shifted", "cross": "unshifted"}
    expected: list[int] = []
    for _ in range(16 - 6 - 2):
        logits = reference_logits(model, [7, 8, 9], [2, 0, *expected], prefix, counted)
        expected.append(int(logits[-1].argmax()))
    params = SamplingParams(max_new_tokens=500)
    assert reference_generate(model, [7, 8, 9], prefix, counted, params, (2, 0), None, None, ()) == [(expected, None)]
    end = expected[3]
    cut = expected[: expected.index(end) + 1]
    assert reference_generate(model, [7, 8, 9], prefix, counted, params, (2, 0), None, None, (end, 2)) == [(cut, None)]
