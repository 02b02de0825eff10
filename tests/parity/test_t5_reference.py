"""The plain T5 reference is T5: it equals transformers without prefixes, and with those prefixes that transformers can
have, which are the keys and values of more rows in front, or in the decoder's cache. In fp64.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache
from transformers.models.t5.modeling_t5 import T5Attention

from prefixes.spec import Positions, Site
from tests.support.t5 import KINDS, tiny_t5
from tests.support.t5_reference import bucket_of, reference_logits

Prefix = dict[Site, tuple[Tensor, Tensor]]


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_t5(tmp_path_factory.mktemp("t5"), request.param).model


def close(ours: Tensor, theirs: Tensor) -> None:
    assert theirs.abs().max() > 1, "logits that say nothing"
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def token_ids(count: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(320) for _ in range(count)]


@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (1, 9), (17, 1), (150, 150)])
def test_without_a_prefix_it_equals_transformers(model: Any, inputs: int, outputs: int) -> None:
    input_ids, decoder_ids = token_ids(inputs, 1), token_ids(outputs, 2)
    theirs = model(torch.tensor([input_ids]), decoder_input_ids=torch.tensor([decoder_ids])).logits[0]
    close(reference_logits(model, input_ids, decoder_ids, {}, {}), theirs)


@pytest.mark.parametrize("causal", [True, False])
def test_buckets_are_transformers_own(causal: bool) -> None:
    distances = torch.arange(-300, 300)
    for buckets, most in ((32, 128), (12, 40), (8, 20)):
        theirs = T5Attention._relative_position_bucket(distances, not causal, buckets, most).tolist()
        assert [bucket_of(d, buckets, most, causal=causal) for d in distances.tolist()] == theirs


@pytest.mark.parametrize("length", [1, 7, 60])
def test_a_shifted_decoder_prefix_equals_transformers_cache(model: Any, length: int) -> None:
    layers, heads, dim = model.config.num_decoder_layers, model.config.num_heads, model.config.d_kv
    torch.manual_seed(length)
    keys, values = torch.randn(2, layers, length, heads, dim, dtype=torch.float64)
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    for layer in range(layers):
        cache.self_attention_cache.update(keys[layer].transpose(0, 1)[None], values[layer].transpose(0, 1)[None], layer)
    input_ids, decoder_ids = token_ids(9, 1), token_ids(6, 2)
    theirs = model(
        torch.tensor([input_ids]), decoder_input_ids=torch.tensor([decoder_ids]), past_key_values=cache
    ).logits[0]
    prefix: Prefix = {"decoder": (keys, values)}
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


def projections(stack: Any, part: int, name: str) -> dict[str, Any]:
    modules = [getattr(block.layer[part], name) for block in stack.block]
    return {f"{x}.{index}": getattr(module, x) for x in "kv" for index, module in enumerate(modules)}


def first_rows(caught: Mapping[str, Tensor], layers: int, length: int, heads: int) -> tuple[Tensor, Tensor]:
    """The keys and values of the first ``length`` rows as a prefix ``(layers, length, heads, head_dim)``."""
    key, value = (
        torch.stack([caught[f"{name}.{i}"][:length] for i in range(layers)]).unflatten(-1, (heads, -1)) for name in "kv"
    )
    return key, value


@contextmanager
def without_bias(stack: Any, length: int) -> Iterator[None]:
    """The first ``length`` keys of a stack get no bias."""
    attention = stack.block[0].layer[0].SelfAttention
    whole = attention.compute_bias

    def partly(*args: Any, **options: Any) -> Tensor:
        bias: Tensor = whole(*args, **options).clone()
        bias[..., :length] = 0
        return bias

    attention.compute_bias = partly
    yield
    del attention.compute_bias


def transformers_with_rows_in_front(
    model: Any, input_ids: Sequence[int], decoder_ids: Sequence[int], lengths: Mapping[Site, int], positions: Positions
) -> tuple[Tensor, Prefix]:
    """transformers' logits with rows in front of the tokens and of the encoder's output, and those rows as a prefix.

    Rows in front of the encoder's tokens see only one another, so that nothing but the tokens depends on them.
    """
    config, table = model.config, model.shared.weight
    sizes = {site: lengths.get(site, 0) for site in ("encoder", "decoder", "cross")}
    rows, heads = sizes["encoder"] + len(input_ids), config.num_heads
    hidden = torch.zeros(1, 1, rows, rows, dtype=torch.float64)
    hidden[:, :, : sizes["encoder"], sizes["encoder"] :] = -torch.inf

    def embedded(ids: Sequence[int], length: int) -> Tensor:
        return torch.cat([torch.randn(length, config.d_model, dtype=torch.float64), table[list(ids)]])[None]

    bare = {stack: sizes[name] if positions == "unshifted" else 0 for name, stack in
            (("encoder", model.encoder), ("decoder", model.decoder))}  # fmt: skip
    prefix: Prefix = {}
    with outputs_of(projections(model.encoder, 0, "SelfAttention")) as caught, without_bias(
        model.encoder, bare[model.encoder]
    ):
        front = embedded(input_ids, sizes["encoder"])
        encoded = model.encoder(inputs_embeds=front, attention_mask=hidden)[0][:, sizes["encoder"] :]
        prefix["encoder"] = first_rows(caught, config.num_layers, sizes["encoder"], heads)
    in_front = torch.randn(1, sizes["cross"], config.d_model, dtype=torch.float64)
    own, cross = projections(model.decoder, 0, "SelfAttention"), projections(model.decoder, 1, "EncDecAttention")
    with outputs_of(own) as of_self, outputs_of(cross) as of_cross, without_bias(model.decoder, bare[model.decoder]):
        front = embedded(decoder_ids, sizes["decoder"])
        logits = model(encoder_outputs=(torch.cat([in_front, encoded], dim=1),), decoder_inputs_embeds=front).logits
        prefix["decoder"] = first_rows(of_self, config.num_decoder_layers, sizes["decoder"], heads)
        prefix["cross"] = first_rows(of_cross, config.num_decoder_layers, sizes["cross"], heads)
    return logits[0, sizes["decoder"] :], {site: pair for site, pair in prefix.items() if site in lengths}


@pytest.mark.parametrize("positions", ["shifted", "unshifted"])
@pytest.mark.parametrize(
    "lengths",
    [
        {"encoder": 4},
        {"decoder": 50},
        {"cross": 6},
        {"encoder": 60, "cross": 9},
        {"encoder": 7, "decoder": 2, "cross": 3},
    ],
)
def test_prefixes_that_transformers_can_have_give_its_logits(
    model: Any, lengths: dict[Site, int], positions: Positions
) -> None:
    """Shifted, they are as its rows in front are. Unshifted, as if its bias left these out."""
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
