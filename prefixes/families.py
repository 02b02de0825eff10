"""The table of model families: what each reads from a configuration, and which variants it refuses. Torch-free.

Owns what differs between families when a backbone is loaded. Does not know how a family computes: that is
``server.engine.models``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from prefixes.errors import BackboneError
from prefixes.spec import Site, SiteGeometry


@dataclass(frozen=True)
class Family:
    """One family, as its ``transformers`` configurations describe it."""

    name: Literal["gpt2", "bart"]
    auto_class: str  # of transformers
    architecture: Callable[[Any], Mapping[str, Any]]  # every number and switch that changes the output
    sites: Callable[[Any], Mapping[Site, SiteGeometry]]
    window: Callable[[Any], int]  # positions; with an encoder, each of encoder and decoder has that many
    wraps_input: bool  # whether the tokenizer's special tokens enclose an input, as in pretraining
    required: Mapping[str, tuple[Any, ...]]  # configuration key -> the values that the engine computes exactly


def _gpt2_architecture(config: Any) -> Mapping[str, Any]:
    keys = ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size", "activation_function")
    return {
        **{key: getattr(config, key) for key in keys},
        "n_inner": config.n_inner or 4 * config.n_embd,
        "layer_norm_epsilon": float(config.layer_norm_epsilon),
    }


def _gpt2_sites(config: Any) -> Mapping[Site, SiteGeometry]:
    if config.n_head < 1 or config.n_embd % config.n_head:
        raise BackboneError(
            f"n_embd: expected a multiple of n_head={config.n_head}, got {config.n_embd}",
            expected=config.n_head,
            got=config.n_embd,
        )
    return {"decoder": SiteGeometry(config.n_layer, config.n_head, config.n_embd // config.n_head)}


GPT2: Final = Family(
    name="gpt2",
    auto_class="AutoModelForCausalLM",
    architecture=_gpt2_architecture,
    sites=_gpt2_sites,
    window=lambda config: int(config.n_positions),
    wraps_input=False,
    required={
        "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu", "relu"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "reorder_and_upcast_attn": (False,),
        "add_cross_attention": (False,),
    },
)


def _bart_architecture(config: Any) -> Mapping[str, Any]:
    keys = (
        "d_model", "encoder_layers", "encoder_attention_heads", "encoder_ffn_dim", "decoder_layers",
        "decoder_attention_heads", "decoder_ffn_dim", "max_position_embeddings", "vocab_size", "activation_function",
        "scale_embedding",
    )  # fmt: skip
    return {key: getattr(config, key) for key in keys}


def _bart_sites(config: Any) -> Mapping[Site, SiteGeometry]:
    heads, hidden = config.decoder_attention_heads, config.d_model
    if heads < 1 or hidden % heads or config.encoder_attention_heads != heads:
        raise BackboneError(
            f"attention heads: expected the same number in encoder and decoder, a divisor of d_model={hidden}; got "
            f"{config.encoder_attention_heads} and {heads}",
            got=[config.encoder_attention_heads, heads],
        )
    decoder = SiteGeometry(config.decoder_layers, heads, hidden // heads)
    return {
        "decoder": decoder,
        "encoder": SiteGeometry(config.encoder_layers, heads, hidden // heads),
        "cross": decoder,
    }


BART: Final = Family(
    name="bart",
    auto_class="AutoModelForSeq2SeqLM",
    architecture=_bart_architecture,
    sites=_bart_sites,
    window=lambda config: int(config.max_position_embeddings),
    wraps_input=True,
    required={
        "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu", "relu"),
        "is_encoder_decoder": (True,),
    },
)

FAMILIES: Final[Mapping[str, Family]] = {"gpt2": GPT2, "bart": BART}
"""``model_type`` of a configuration -> its family."""


def family_of(config: Any) -> Family:
    """The family of a ``transformers`` configuration. Raises BackboneError if the engine cannot compute it exactly."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise BackboneError(
            f"model family: expected {' or '.join(FAMILIES)}, got {config.model_type}",
            expected=list(FAMILIES),
            got=str(config.model_type),
        )
    for key, allowed in family.required.items():
        value = getattr(config, key)
        if value not in allowed:
            raise BackboneError(
                f"{family.name} configuration {key}: expected {' or '.join(map(str, allowed))}, got {value}",
                key=key,
                expected=list(allowed),
                got=str(value),
            )
    return family
