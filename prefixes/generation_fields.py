"""The fields of transformers' ``GenerationConfig``: which are read, which are refused, which cannot change tokens.

Owns names and reasons, as data. A test compares them with transformers' own list. Torch-free.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final


@dataclass(frozen=True)
class Refused:
    """A field that changes tokens in a way that the engine has not. None and ``neutral`` values change nothing."""

    reason: str
    neutral: tuple[Any, ...] = ()


READ: Final[Mapping[str, str]] = {
    "max_new_tokens": "a default of requests",
    "min_new_tokens": "a default of requests",
    "max_length": "with an encoder: max_new_tokens and the start token",
    "min_length": "with an encoder: min_new_tokens and the start token",
    "do_sample": "a default of requests",
    "temperature": "a default of requests that sample",
    "top_k": "a default of requests that sample",
    "top_p": "a default of requests that sample",
    "repetition_penalty": "a default of requests",
    "no_repeat_ngram_size": "a default of requests",
    "num_beams": "a default of requests",
    "length_penalty": "a default of requests with beams",
    "early_stopping": "a default of requests with beams",
    "num_return_sequences": "a default of requests",
    "eos_token_id": "ends an output",
    "decoder_start_token_id": "begins an encoder-decoder's output",
    "forced_bos_token_id": "the token behind a prompt of one token",
    "forced_eos_token_id": "the last token at the limit",
    "suppress_tokens": "tokens that no output has",
    "begin_suppress_tokens": "tokens that no output begins with",
}
"""Field -> what it becomes here."""

REFUSED: Final[Mapping[str, Refused]] = {
    "max_time": Refused("the clock would end outputs"),
    "stop_strings": Refused("outputs would keep the string; a task's or a request's stop does not", ([],)),
    "min_p": Refused("a filter of sampling", (0,)),
    "top_h": Refused("a filter of sampling"),
    "typical_p": Refused("a filter of sampling", (1,)),
    "epsilon_cutoff": Refused("a filter of sampling", (0,)),
    "eta_cutoff": Refused("a filter of sampling", (0,)),
    "encoder_repetition_penalty": Refused("a penalty that sees the input", (1,)),
    "encoder_no_repeat_ngram_size": Refused("a ban that sees the input", (0,)),
    "bad_words_ids": Refused("a ban of token sequences"),
    "sequence_bias": Refused("a bias on token sequences"),
    "renormalize_logits": Refused("other scores of beams", (False,)),
    "remove_invalid_values": Refused("tokens where the model's output is not finite", (False,)),
    "exponential_decay_length_penalty": Refused("a bias towards the end token"),
    "token_healing": Refused("another end of the prompt", (False,)),
    "guidance_scale": Refused("a second forward pass without the prompt", (1,)),
    "watermarking_config": Refused("a bias on tokens"),
    "is_assistant": Refused("an output ends where the model is unsure", (False,)),
    "assistant_ensemble_weight": Refused("a draft model's probabilities mixed in"),
    "penalty_alpha": Refused("contrastive search", (0,)),
    "dola_layers": Refused("other layers' logits mixed in"),
    "num_beam_groups": Refused("groups of beams", (0, 1)),
    "diversity_penalty": Refused("a penalty between groups of beams", (0,)),
    "constraints": Refused("constrained beam search"),
    "force_words_ids": Refused("constrained beam search"),
}
"""Field -> what it would need. A start is refused while it is set, unless it is to be ignored."""

WHOLE_LENGTHS: Final[Mapping[str, Refused]] = {
    "max_length": Refused("it counts the prompt too; set max_new_tokens instead"),
    "min_length": Refused("it counts the prompt too; set min_new_tokens instead", (0, 1)),
}
"""Refused without an encoder."""

QUANTIZED_CACHE: Final = Refused("keys and values of fewer bits")
"""For ``cache_implementation`` "quantized"; its other values only change speed and memory."""

HARMLESS: Final[Mapping[str, str]] = {
    "cache_implementation": "speed and memory",
    "cache_config": "of a quantized cache alone",
    "max_cache_len": "memory",
    "prefill_chunk_size": "speed",
    "compile_config": "speed",
    "disable_compile": "speed",
    "continuous_batching_config": "speed",
    "low_memory": "memory",
    "use_mtp": "speed: drafts are verified",
    "speculation_type": "speed: drafts are verified",
    "prompt_lookup_num_tokens": "speed: drafts are verified",
    "max_matching_ngram_size": "of prompt lookup alone",
    "assistant_early_exit": "speed: drafts are verified",
    "num_assistant_tokens": "of a draft model alone",
    "num_assistant_tokens_schedule": "of a draft model alone",
    "assistant_confidence_threshold": "of a draft model alone",
    "assistant_lookbehind": "of a draft model alone",
    "target_lookbehind": "of a draft model alone",
}
"""Field -> why it cannot change tokens. A start logs a warning while it is set."""

SILENT: Final[Mapping[str, str]] = {
    "bos_token_id": "begins an output without an input, and there is always one",
    "pad_token_id": "stands where attention never looks",
    "use_cache": "speed",
    "output_attentions": "what generate() returns beside tokens",
    "output_hidden_states": "what generate() returns beside tokens",
    "output_scores": "what generate() returns beside tokens",
    "output_logits": "what generate() returns beside tokens",
    "return_dict_in_generate": "what generate() returns beside tokens",
    "transformers_version": "who wrote the file",
    "_from_model_config": "where the fields come from",
    "_commit_hash": "where the file comes from",
}
"""Field -> why nobody needs to hear of it: nearly every model sets some."""
