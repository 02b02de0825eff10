"""The table of model families: what each reads from a configuration, and which variants it refuses. Torch-free.

Owns what differs between families when a backbone is loaded. Does not know how a family computes: that is
``server.engine.models``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from prefixes.errors import BackboneError
from prefixes.spec import Family as FamilyName
from prefixes.spec import Site, SiteGeometry


@dataclass(frozen=True)
class Family:
    """One family, as its ``transformers`` configurations describe it."""

    name: FamilyName
    auto_class: str  # of transformers
    architecture: Callable[[Any], Mapping[str, Any]]  # every number and switch that changes the output
    sites: Callable[[Any], Mapping[Site, SiteGeometry]]
    window: Callable[[Any, Any], int]  # positions, of configuration and tokenizer; each of encoder and decoder has them
    wraps_input: bool  # whether the tokenizer's special tokens enclose an input, as in pretraining
    required: Mapping[str, tuple[Any, ...]]  # configuration key -> the values that the engine computes exactly
    check: Callable[[Any], None] = lambda config: None  # raises BackboneError for what else it does not


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
    window=lambda config, tokenizer: int(config.n_positions),
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
    window=lambda config, tokenizer: int(config.max_position_embeddings),
    wraps_input=True,
    required={
        "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu", "relu"),
        "is_encoder_decoder": (True,),
    },
)

_ROPE_TYPES: Final = ("default", "linear", "llama3", "yarn")


def _llama_architecture(config: Any) -> Mapping[str, Any]:
    keys = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "max_position_embeddings", "vocab_size", "hidden_act",
    )  # fmt: skip
    rotated = getattr(config, "no_rope_layers", None) or ()
    bare = [layer for layer, rotates in enumerate(rotated) if not rotates]
    return {
        **{key: getattr(config, key) for key in keys},
        "head_dim": _llama_head_dim(config),
        "rms_norm_eps": float(config.rms_norm_eps),
        "rope": {key: value for key, value in config.rope_parameters.items() if value is not None},
        **({"layers_without_rope": bare} if bare else {}),
    }


def _llama_head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _llama_sites(config: Any) -> Mapping[Site, SiteGeometry]:
    heads, shared, dim = config.num_attention_heads, config.num_key_value_heads, _llama_head_dim(config)
    if shared < 1 or heads % shared or dim % 2:
        raise BackboneError(
            f"attention heads: expected a multiple of num_key_value_heads={shared}, of an even size; got {heads} of "
            f"size {dim}",
            got=[heads, dim],
        )
    return {"decoder": SiteGeometry(config.num_hidden_layers, shared, dim)}


def _check_llama(config: Any) -> None:
    rope = config.rope_parameters.get("rope_type", "default")
    if rope not in _ROPE_TYPES:
        raise BackboneError(
            f"rope_parameters rope_type: expected {' or '.join(_ROPE_TYPES)}, got {rope}",
            expected=list(_ROPE_TYPES),
            got=str(rope),
        )
    part = config.rope_parameters.get("partial_rotary_factor")
    if part not in (None, 1, 1.0):
        raise BackboneError(f"rope_parameters partial_rotary_factor: expected 1, got {part}", expected=1, got=part)
    window, kinds = getattr(config, "sliding_window", None), set(getattr(config, "layer_types", None) or ())
    if getattr(config, "use_sliding_window", True) and (window is not None or kinds - {"full_attention"}):
        raise BackboneError(
            f"sliding_window: expected none, got one of {window} positions; every token must see all before it",
            got=window,
        )


LLAMA: Final = Family(
    name="llama",
    auto_class="AutoModelForCausalLM",
    architecture=_llama_architecture,
    sites=_llama_sites,
    window=lambda config, tokenizer: int(config.max_position_embeddings),
    wraps_input=False,
    required={"hidden_act": ("silu", "gelu_new", "gelu_pytorch_tanh", "gelu", "relu")},
    check=_check_llama,
)

T5_WINDOW: Final = 512
"""What T5, T5 v1.1, Flan-T5 and mT5 were pretrained with: the window where the tokenizer states none."""
MAX_STATED_WINDOW: Final = 1 << 20


def _t5_architecture(config: Any) -> Mapping[str, Any]:
    keys = (
        "d_model", "d_kv", "d_ff", "num_layers", "num_decoder_layers", "num_heads", "relative_attention_num_buckets",
        "relative_attention_max_distance", "vocab_size", "dense_act_fn", "is_gated_act",
    )  # fmt: skip
    return {
        **{key: getattr(config, key) for key in keys},
        "layer_norm_epsilon": float(config.layer_norm_epsilon),
        "scale_decoder_outputs": bool(getattr(config, "scale_decoder_outputs", False)),  # mT5 has no such key
    }


def _t5_sites(config: Any) -> Mapping[Site, SiteGeometry]:
    decoder = SiteGeometry(config.num_decoder_layers, config.num_heads, config.d_kv)
    return {
        "decoder": decoder,
        "encoder": SiteGeometry(config.num_layers, config.num_heads, config.d_kv),
        "cross": decoder,
    }


def _t5_window(config: Any, tokenizer: Any) -> int:
    """The tokenizer's own limit. The model has none: its positions are relative."""
    stated = tokenizer.model_max_length  # transformers says 10**30 for none
    return int(stated) if 1 <= stated <= MAX_STATED_WINDOW else T5_WINDOW


T5: Final = Family(
    name="t5",
    auto_class="AutoModelForSeq2SeqLM",
    architecture=_t5_architecture,
    sites=_t5_sites,
    window=_t5_window,
    wraps_input=False,
    required={
        "dense_act_fn": ("gelu_new", "gelu_pytorch_tanh", "gelu", "relu", "silu"),
        "is_encoder_decoder": (True,),
    },
)

FAMILIES: Final[Mapping[str, Family]] = {
    "gpt2": GPT2, "bart": BART, **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "smollm3"), LLAMA),
    **dict.fromkeys(("t5", "mt5"), T5),
}  # fmt: skip
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
    family.check(config)
    return family
