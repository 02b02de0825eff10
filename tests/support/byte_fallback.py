"""Makes small real tokenizers of SentencePiece's kind: bytes for what has no token. Knows no test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS: Final = ["Hello world", "the pub is near the world", "the  pub\ufffd is café ☕ 中", "a b c :"]
STARTS: Final = ("legacy", "always", "first", "never")
"""How a text gets its first space: by Llama 2's normaliser of old files, or by the three schemes of Metaspace."""


def byte_fallback_tokenizer(start: str = "first", size: int = 300) -> Tokenizer:
    """A tokenizer of ``size`` tokens: ``<unk>``, ``<s>``, ``</s>``, all bytes, and what it learnt from ``CORPUS``."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=specials, show_progress=False)
    trained.train_from_iterator(CORPUS, trainer)
    learnt = json.loads(trained.to_str())["model"]
    merges = [(left, right) for left, right in learnt["merges"]]
    made = Tokenizer(models.BPE(learnt["vocab"], merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.add_special_tokens(specials[:3])
    if start == "legacy":
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=start, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*steps, *([] if start == "never" else [decoders.Strip(" ", 1, 0)])])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made


def save_byte_fallback_tokenizer(folder: Path, start: str = "first") -> Any:
    """One in ``folder``, as transformers loads it. Each text begins with ``<s>``."""
    backend = byte_fallback_tokenizer(start)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(folder)
    return tokenizer
