"""load_backbone(): the one loader of frozen models, their tokenizers and their identity.

Owns what is read from a checkpoint through transformers; knows no prefix and no engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from prefixes.checkpoint import checkpoint_files, checkpoint_folder, fingerprint
from prefixes.errors import BackboneError, InvalidParameter
from prefixes.families import Family, family_of
from prefixes.parameters import DECODING_PARAMETERS, check_decoding_parameters
from prefixes.prompt import PromptEncoder
from prefixes.spec import INPUT_SLOT, BackboneSpec


@dataclass(frozen=True)
class Backbone:
    """A frozen model and what belongs to it.

    ``model`` is in eval mode, without gradients, in the requested dtype. ``generation_defaults`` holds the
    ``DECODING_PARAMETERS`` that its generation config sets. ``eos_token_ids`` may be empty. An encoder-decoder's output
    begins behind ``decoder_prompt``. For a decoder-only model that is empty, and the output begins behind the input.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    prompt_encoder: PromptEncoder
    spec: BackboneSpec
    generation_defaults: Mapping[str, Any]
    eos_token_ids: tuple[int, ...]
    input_template: str  # wraps a text as in pretraining, where no task has a template of its own
    decoder_prompt: tuple[int, ...]
    forced_first: int | None  # an encoder-decoder's first token, whatever its logits say
    forced_last: int | None  # its last token where an output reaches its limit
    pad_token_id: int  # the tokenizer's, else the first end token, else 0; attention never reads it


def load_backbone(name: str, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Backbone:
    """Load the backbone ``name``: "demo" or "demo-bart" (bundled), a folder, or a hub id.

    Reads only safetensors and runs no code from the checkpoint. Raises BackboneError for an unknown family, a variant
    that the engine does not compute exactly, missing tensors, or no fast tokenizer.
    """
    folder = checkpoint_folder(name)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError and its validators' own errors
        raise BackboneError(f"backbone {name!r}: cannot read its configuration: {str(error)[:300]}") from error
    family = family_of(config)
    sites = family.sites(config)
    files = checkpoint_files(folder)
    tokenizer = _load_tokenizer(name, folder, config.vocab_size)
    model = _load_model(name, folder, family, config, dtype)
    architecture = {**family.architecture(config), "tied": _head_is_tied(model)}
    spec = BackboneSpec(
        family=family.name,
        sites=sites,
        hidden_size=int(config.hidden_size),
        vocab_size=int(config.vocab_size),
        max_positions=family.window(config),
        fingerprint=fingerprint(family.name, architecture, model, files, tokenizer),
    )
    eos_token_ids = _eos_token_ids(name, model, tokenizer)
    return Backbone(
        name=name,
        model=model.to(device),
        tokenizer=tokenizer,
        prompt_encoder=PromptEncoder(tokenizer),
        spec=spec,
        generation_defaults=_generation_defaults(name, model),
        eos_token_ids=eos_token_ids,
        input_template=_input_template(name, family, tokenizer),
        decoder_prompt=_decoder_prompt(name, model),
        forced_first=_forced(name, model, "forced_bos_token_id"),
        forced_last=_forced(name, model, "forced_eos_token_id"),
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (*eos_token_ids, 0)[0],
    )


def _load_model(name: str, folder: str, family: Family, config: Any, dtype: torch.dtype) -> Any:
    try:
        model, info = getattr(transformers, family.auto_class).from_pretrained(
            folder, config=config, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except Exception as error:  # as above, and safetensors' own
        raise BackboneError(f"backbone {name!r}: cannot load its weights: {str(error)[:300]}") from error
    missing = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if missing:  # transformers would fill them with random weights
        raise BackboneError(
            f"backbone {name!r}: expected every weight in the checkpoint, missing {', '.join(missing[:8])}",
            missing=missing[:8],
        )
    return model.eval().requires_grad_(False)


def _load_tokenizer(name: str, folder: str, vocab_size: int) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise BackboneError(f"backbone {name!r}: cannot load its tokenizer: {str(error)[:300]}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise BackboneError(f"backbone {name!r}: expected a fast tokenizer, got {type(tokenizer).__name__}")
    if tokenizer.backend_tokenizer.get_vocab_size(with_added_tokens=False) == 0:
        # transformers makes such a tokenizer, without an error, for a folder that has no tokenizer files
        raise BackboneError(f"backbone {name!r}: expected a tokenizer beside the weights, found no vocabulary")
    largest = max(tokenizer.get_vocab().values())
    if largest >= vocab_size:
        raise BackboneError(
            f"backbone {name!r}: expected a tokenizer with ids from 0 to {vocab_size - 1}, got ids up to {largest}",
            expected=vocab_size - 1,
            got=largest,
        )
    return tokenizer


def _head_is_tied(model: Any) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def _eos_token_ids(name: str, model: Any, tokenizer: Any) -> tuple[int, ...]:
    for configured in (model.generation_config.eos_token_id, model.config.eos_token_id, tokenizer.eos_token_id):
        if configured is None:
            continue
        ids = tuple(configured) if isinstance(configured, (list, tuple)) else (configured,)
        if not all(isinstance(token, int) and 0 <= token < model.config.vocab_size for token in ids):
            raise BackboneError(
                f"backbone {name!r}: eos_token_id: expected ids from 0 to {model.config.vocab_size - 1}, got {ids}",
                got=list(ids),
            )
        return ids
    return ()


def _input_template(name: str, family: Family, tokenizer: Any) -> str:
    if not family.wraps_input:
        return INPUT_SLOT
    if tokenizer.bos_token is None or tokenizer.eos_token is None:
        raise BackboneError(f"backbone {name!r}: expected a tokenizer with tokens for begin and end, got none")
    return f"{tokenizer.bos_token}{INPUT_SLOT}{tokenizer.eos_token}"


def _decoder_prompt(name: str, model: Any) -> tuple[int, ...]:
    if not model.config.is_encoder_decoder:
        return ()
    for start in (model.generation_config.decoder_start_token_id, model.config.decoder_start_token_id):
        if start is not None:
            return (_vocabulary_id(name, model, "decoder_start_token_id", start),)
    raise BackboneError(
        f"backbone {name!r}: expected a decoder_start_token_id, got none; set it in generation_config.json"
    )


def _forced(name: str, model: Any, key: str) -> int | None:
    token = getattr(model.generation_config, key, None) if model.config.is_encoder_decoder else None
    return None if token is None else _vocabulary_id(name, model, key, token)


def _vocabulary_id(name: str, model: Any, key: str, token: Any) -> int:
    vocab = model.config.vocab_size
    if not isinstance(token, int) or not 0 <= token < vocab:
        raise BackboneError(f"backbone {name!r}: {key}: expected one id from 0 to {vocab - 1}, got {token}", got=token)
    return token


def _generation_defaults(name: str, model: Any) -> Mapping[str, Any]:
    configured = model.generation_config.to_dict()
    defaults = {key: configured[key] for key in DECODING_PARAMETERS if configured.get(key) is not None}
    if model.config.is_encoder_decoder:  # its lengths count the decoder's start token and not the input
        for ours, theirs in (("max_new_tokens", "max_length"), ("min_new_tokens", "min_length")):
            length = configured.get(theirs)
            if ours not in defaults and isinstance(length, int) and length > 1:
                defaults[ours] = length - 1
    try:
        check_decoding_parameters(defaults)
    except InvalidParameter as error:
        raise BackboneError(f"backbone {name!r}: generation config: {error.message}", **error.detail) from None
    return defaults
