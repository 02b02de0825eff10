"""CTranslate2 without prefixes, in its own environment, for ``serve.py``. Speaks the protocol of ``contenders``.

Stands alone: the other environment has neither our packages nor our pins. The backbone is converted when this starts,
in a process of its own: beside torch's threads CTranslate2 has half of its speed in float32.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

VOCABULARY, FIRST_WORD = 50257, 5


def convert(backbone: Path, folder: Path, quantization: str | None) -> None:
    """Convert a backbone of the workload's into ``folder``, and put its tokens in order beside it.

    The converter wants special tokens, which the workload's GPT-2 lacks so that every row writes all of its tokens.
    """
    import ctranslate2  # type: ignore[import-not-found]
    from transformers import AutoTokenizer

    source = folder / "source"
    shutil.copytree(backbone, source)
    settings = json.loads((source / "tokenizer_config.json").read_text())
    for name in ("bos_token", "eos_token", "unk_token"):
        settings[name] = settings.get(name) or "Ġword0"
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    tokens = AutoTokenizer.from_pretrained(backbone).convert_ids_to_tokens(range(VOCABULARY))
    (folder / "tokens.json").write_text(json.dumps(tokens))
    converter = ctranslate2.converters.TransformersConverter(str(source))
    converter.convert(str(folder / "converted"), quantization=quantization)


class Contender:
    """A generator with one worker of so many threads."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        import ctranslate2

        self._tokens, self._options = json.loads((folder / "tokens.json").read_text()), options
        self._model = ctranslate2.Generator(
            str(folder / "converted"), device="cpu", compute_type="int8" if options.quantization else "float32",
            inter_threads=1, intra_threads=options.threads,
        )  # fmt: skip

    def run(self, prompts: list[list[int]]) -> tuple[float, int]:
        """Seconds and new tokens."""
        rows, new = [[self._tokens[token] for token in prompt] for prompt in prompts], self._options.new_tokens
        began = time.perf_counter()
        results = self._model.generate_batch(
            rows, max_length=new, min_length=new, sampling_topk=1, include_prompt_in_result=False, max_batch_size=0
        )
        seconds = time.perf_counter() - began
        made = [len(result.sequences_ids[0]) for result in results]
        assert made == [new] * len(prompts), made
        return seconds, sum(made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", type=Path, required=True)
    parser.add_argument("--prompt-tokens", type=int, required=True)
    parser.add_argument("--new-tokens", type=int, required=True)
    parser.add_argument("--quantization", choices=("int8",))
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()
    answers, sys.stdout = sys.stdout, sys.stderr
    with tempfile.TemporaryDirectory(prefix="ctranslate2-") as name:
        converting = multiprocessing.get_context("spawn").Process(
            target=convert, args=(options.backbone, Path(name), options.quantization)
        )
        converting.start()
        converting.join()
        if converting.exitcode:
            raise RuntimeError(f"CTranslate2's converter ended with {converting.exitcode}, see above")
        contender = Contender(Path(name), options)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        rng = random.Random(job["seed"])
        prompts = [
            [rng.randrange(FIRST_WORD, VOCABULARY) for _ in range(options.prompt_tokens)] for _ in range(job["rows"])
        ]
        seconds, made = contender.run(prompts)
        print(json.dumps({"seconds": seconds, "tokens": made}), file=answers, flush=True)


if __name__ == "__main__":
    main()
