"""vLLM without prefixes, in its environment ``.peers/vllm``, for ``serve.py``. Speaks the protocol of ``contenders``.

Stands alone: the other environment has neither our packages nor our pins.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", required=True)
    parser.add_argument("--prompt-tokens", type=int, required=True)
    parser.add_argument("--new-tokens", type=int, required=True)
    options = parser.parse_args()
    answers, sys.stdout = sys.stdout, sys.stderr
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

    model = LLM(options.backbone, dtype="float32", max_model_len=256, enable_prefix_caching=False)
    params = SamplingParams(
        temperature=0.0, max_tokens=options.new_tokens, min_tokens=options.new_tokens, ignore_eos=True
    )
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        rng = random.Random(job["seed"])
        prompts = [
            {"prompt_token_ids": [rng.randrange(5, 50257) for _ in range(options.prompt_tokens)]}
            for _ in range(job["rows"])
        ]
        began = time.perf_counter()
        results = model.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - began
        tokens = sum(len(result.outputs[0].token_ids) for result in results)
        print(json.dumps({"seconds": seconds, "tokens": tokens}), file=answers, flush=True)


if __name__ == "__main__":
    main()
