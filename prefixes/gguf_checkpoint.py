"""What transformers makes of a checked GGUF file: configuration, tokenizer, and a plain model of its floats.

Owns where transformers' own reading is not the model's: how a tokenizer cuts texts, which tokens end one, what lies
beside the file. Knows no fingerprint; ``gguf_file`` and ``gguf_models`` have read and checked the file before.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import normalizers, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast
from transformers.utils import is_accelerate_available, is_gguf_available
from transformers.utils.logging import is_progress_bar_enabled

from prefixes.errors import BackboneError
from prefixes.gguf_file import INSTALL, GgufFile, read_gguf
from prefixes.gguf_models import check_served


def open_gguf(path: Path) -> GgufFile:
    """Read and check the file. Raises BackboneError for one that is not served, and where the extra is missing."""
    if not (is_gguf_available() and is_accelerate_available() and hasattr(transformers, "GgufConfig")):
        raise BackboneError(
            f"GGUF file {path.name}: expected gguf, accelerate and transformers 5.23 or newer, found not all: {INSTALL}"
        )
    file = read_gguf(path)
    check_served(file)
    return file


def gguf_config(file: GgufFile) -> Any:
    """The model's configuration. Its special tokens are transformers' own defaults: ``load_gguf`` puts that right."""
    return AutoConfig.from_pretrained(file.path.parent, gguf_file=file.path.name, trust_remote_code=False)


def gguf_tokenizer(file: GgufFile) -> PreTrainedTokenizerFast:
    """The tokenizer in the file, whatever other one lies beside it. It cuts texts as the model was trained to."""
    tokenizer = PreTrainedTokenizerFast(name_or_path=str(file.path.parent), gguf_file=file.path.name)
    backend, split = tokenizer.backend_tokenizer, file.get("tokenizer.ggml.pre", str)
    if split == "smollm":
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    elif split == "llama-bpe":
        backend.model.ignore_merges = True
    elif split == "qwen2":
        backend.normalizer = normalizers.NFC()
    return tokenizer


def load_gguf(
    file: GgufFile,
    config: Any,
    tokenizer: PreTrainedTokenizerFast,
    dtype: torch.dtype,
    generation: Mapping[str, Any],
) -> tuple[Any, Any]:
    """The model, with all weights as floats, and transformers' account of what was missing.

    Special tokens are the tokenizer's. ``generation`` is the generation config beside the file, empty if there is none.
    """
    for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, token, getattr(tokenizer, token))
    with _quiet():
        model, info = AutoModelForCausalLM.from_pretrained(
            file.path.parent, gguf_file=file.path.name, config=config, dtype=dtype, trust_remote_code=False,
            quantization_config=transformers.GgufConfig(dequantize=True), output_loading_info=True,
        )  # fmt: skip
    if generation:
        model.generation_config = GenerationConfig.from_dict(dict(generation))
    return model, info


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress where transformers shows none: reading GGUF files it asks nobody."""
    with contextlib.redirect_stderr(sys.stderr if is_progress_bar_enabled() else io.StringIO()):
        yield
