"""load_backbone(): the one loader of frozen models, their tokenizers and their identity.

Owns what is read from a checkpoint through transformers; knows no prefix and no engine.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from prefixes.checkpoint import added_tokens, canonical_tokenizer, checkpoint_files, fingerprint, stored_parts
from prefixes.checkpoint_folder import checkpoint_place
from prefixes.errors import BackboneError
from prefixes.families import Family, family_of
from prefixes.generation_config import read_file, read_generation
from prefixes.gguf_checkpoint import gguf_config, gguf_tokenizer, load_gguf, open_gguf
from prefixes.prompt import NO_TOKENS, PromptEncoder
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
    forced_first: int | None  # the token behind a decoder's prompt of one token, whatever the logits say
    forced_last: int | None  # the last token where an output reaches its limit
    suppressed: frozenset[int]  # tokens that no output has
    suppressed_first: frozenset[int]  # tokens that no output begins with, behind a forced one
    quantized: bool = False  # its file has no more than some 8 bits for any weight of a matrix

    def release(self) -> None:
        """Give up the model's tensors. Who has copied them, or holds them, goes on."""
        self.model.to("meta")

    @property
    def end_token_id(self) -> int:
        """The end token that closes a target: the tokenizer's own if outputs end at it, else the first of
        ``eos_token_ids``, which must not be empty.
        """
        own: int | None = self.tokenizer.eos_token_id
        return own if own in self.eos_token_ids else self.eos_token_ids[0]


def load_backbone(
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    ignore_generation_config: Collection[str] | None = (),
) -> Backbone:
    """Load the backbone ``name``: bundled or fetched under that name, a folder, a GGUF file, or a hub id.

    Reads only safetensors and GGUF, and runs no code from the checkpoint. Raises BackboneError for an unknown family, a
    variant that the engine does not compute exactly, missing tensors, no fast tokenizer, or a generation config that is
    not supported but for the fields in ``ignore_generation_config``; None is for those who generate nothing.
    """
    folder, path = checkpoint_place(name)
    gguf = open_gguf(path) if path else None
    with _told(name, "cannot read its configuration"):
        config = gguf_config(gguf) if gguf else AutoConfig.from_pretrained(folder, trust_remote_code=False)
    family = family_of(config)
    sites = family.sites(config)
    files = {} if gguf else checkpoint_files(folder)
    with _told(name, "cannot load its tokenizer"):
        tokenizer = gguf_tokenizer(gguf) if gguf else AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    _check_tokenizer(name, tokenizer, config.vocab_size)
    added = NO_TOKENS if family.wraps_input else added_tokens(tokenizer, behind="encoder" in sites)
    generation_file = read_file(name, folder)
    with _told(name, "cannot load its weights"):
        if gguf:
            model, info = load_gguf(gguf, config, tokenizer, dtype, generation_file)
        else:
            model, info = getattr(transformers, family.auto_class).from_pretrained(
                folder, config=config, dtype=dtype, use_safetensors=True, trust_remote_code=False,
                output_loading_info=True,
            )  # fmt: skip
    _check_whole(name, info)
    model.eval().requires_grad_(False)
    identity = {
        "family": family.name,
        "architecture": {**family.architecture(config), "tied": _head_is_tied(model)},
        **({"first_tokens": list(added.first)} if added.first else {}),
        **({"last_tokens": list(added.last)} if added.last else {}),
        **({"format": "gguf"} if gguf else {"tokenizer": canonical_tokenizer(tokenizer)}),
    }
    spec = BackboneSpec(
        family=family.name,
        sites=sites,
        hidden_size=int(config.hidden_size),
        vocab_size=int(config.vocab_size),
        max_positions=family.window(config, tokenizer),
        fingerprint=fingerprint(identity, gguf.parts() if gguf else stored_parts(model, files)),
    )
    generation = read_generation(name, model, tokenizer, generation_file, ignore_generation_config)
    return Backbone(
        name=name,
        model=model.to(device),
        tokenizer=tokenizer,
        prompt_encoder=PromptEncoder(tokenizer, added),
        spec=spec,
        generation_defaults=generation.defaults,
        eos_token_ids=generation.eos_token_ids,
        input_template=_input_template(name, family, tokenizer),
        decoder_prompt=generation.decoder_prompt,
        forced_first=generation.forced_first,
        forced_last=generation.forced_last,
        suppressed=generation.suppressed,
        suppressed_first=generation.suppressed_first,
        quantized=gguf is not None and gguf.quantized,
    )


@contextmanager
def _told(name: str, failure: str) -> Iterator[None]:
    """Name the backbone and what failed: transformers raises OSError, ValueError, KeyError and its libraries' own."""
    try:
        yield
    except BackboneError:
        raise
    except Exception as error:
        raise BackboneError(f"backbone {name!r}: {failure}: {str(error)[:300]}") from error


def _check_whole(name: str, info: Mapping[str, Any]) -> None:
    missing = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if missing:  # transformers would fill them with random weights
        raise BackboneError(
            f"backbone {name!r}: expected every weight in the checkpoint, missing {', '.join(missing[:8])}",
            missing=missing[:8],
        )


def _check_tokenizer(name: str, tokenizer: Any, vocab_size: int) -> None:
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


def _head_is_tied(model: Any) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def _input_template(name: str, family: Family, tokenizer: Any) -> str:
    if not family.wraps_input:
        return INPUT_SLOT
    if tokenizer.bos_token is None or tokenizer.eos_token is None:
        raise BackboneError(f"backbone {name!r}: expected a tokenizer with tokens for begin and end, got none")
    return f"{tokenizer.bos_token}{INPUT_SLOT}{tokenizer.eos_token}"
