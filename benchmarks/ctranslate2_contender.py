"""CTranslate2 without prefixes, in its own environment, for ``serve.py``. Speaks the protocol of ``contenders``.

Stands alone: the other environment has neither our packages nor our pins. The backbone is converted when this starts.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

VOCABULARY, FIRST_WORD = 50257, 5


def converted(backbone: Path, folder: Path, quantization: str | None) -> Path:
    """Convert a backbone of the workload's; return where the result lies.

    The converter wants special tokens, which the workload's GPT-2 lacks so that every row writes all of its tokens.
    """
    import ctranslate2  # type: ignore[import-not-found]

    source = folder / "source"
    shutil.copytree(backbone, source)
    settings = json.loads((source / "tokenizer_config.json").read_text())
    for name in ("bos_token", "eos_token", "unk_token"):
        settings[name] = settings.get(name) or "Ġword0"
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    converter = ctranslate2.converters.TransformersConverter(str(source))
    return Path(converter.convert(str(folder / "converted"), quantization=quantization))


class Contender:
    """A generator, or a translator for an encoder-decoder, with one worker of so many threads."""

    def __init__(self, folder: Path, tokens: list[str], threads: int, options: argparse.Namespace) -> None:
        import ctranslate2

        self._tokens, self._options = tokens, options
        kind = ctranslate2.Translator if options.encoder else ctranslate2.Generator
        compute = "int8" if options.quantization else "float32"
        self._model = kind(str(folder), device="cpu", compute_type=compute, inter_threads=1, intra_threads=threads)

    def run(self, prompts: list[list[int]], beams: int) -> tuple[float, int]:
        """Seconds and new tokens."""
        rows, new = [[self._tokens[token] for token in prompt] for prompt in prompts], self._options.new_tokens
        shared: dict[str, Any] = {"beam_size": beams, "max_batch_size": 0}
        began = time.perf_counter()
        if self._options.encoder:
            results = self._model.translate_batch(rows, max_decoding_length=new, min_decoding_length=new, **shared)
            made = [len(result.hypotheses[0]) for result in results]
        else:
            results = self._model.generate_batch(
                rows, max_length=new, min_length=new, sampling_topk=1, include_prompt_in_result=False, **shared
            )
            made = [len(result.sequences_ids[0]) for result in results]
        seconds = time.perf_counter() - began
        assert made == [new] * len(prompts), made
        return seconds, sum(made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", type=Path, required=True)
    parser.add_argument("--prompt-tokens", type=int, required=True)
    parser.add_argument("--new-tokens", type=int, required=True)
    parser.add_argument("--encoder", action="store_true", help="the backbone is an encoder-decoder")
    parser.add_argument("--quantization", choices=("int8",))
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()
    answers, sys.stdout = sys.stdout, sys.stderr
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(options.backbone).convert_ids_to_tokens(range(VOCABULARY))
    with tempfile.TemporaryDirectory(prefix="ctranslate2-") as name:
        contender = Contender(
            converted(options.backbone, Path(name), options.quantization), tokens, options.threads, options
        )
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        rng = random.Random(job["seed"])
        prompts = [
            [rng.randrange(FIRST_WORD, VOCABULARY) for _ in range(options.prompt_tokens)] for _ in range(job["rows"])
        ]
        seconds, made = contender.run(prompts, job["beams"])
        print(json.dumps({"seconds": seconds, "tokens": made}), file=answers, flush=True)


if __name__ == "__main__":
    main()
