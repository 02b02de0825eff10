"""The contenders of ``serve.py``, each in its own process with its own threads, which sleep while others run.

Protocol: ``python benchmarks/contenders.py KIND --backbone FOLDER`` prints one JSON line when ready, then for each
``{"rows", "beams", "mode", "prefix", "seed"}`` on its input one ``{"seconds", "tokens"}``. ``vllm_contender.py`` does
the same.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

from benchmarks.workload import WORKLOADS, Workload, prompts, random_prefix
from server.engine.kernels.threads import available_cores, configure_threads

SEQUENTIAL_ROWS = 4  # most rows that PEFT generates, one after the other: its rate does not depend on their number


class EngineContender:
    """This engine. Mode ``tasks`` gives every row another task, ``one`` one task to all rows, ``bare`` no prefix."""

    def __init__(self, work: Workload, folder: str, kernels: str, threads: int, quantize: str) -> None:
        import torch

        from prefixes.artifact import Prefix
        from prefixes.backbone import load_backbone
        from server.engine.config import EngineConfig
        from server.engine.engine import Engine
        from server.engine.kernels import select_kernels
        from server.engine.types import PrefixKey

        self._work, self._backbone = work, load_backbone(folder)
        self._library: dict[PrefixKey, Prefix] = {}
        given: dict[str, Any] = {} if quantize == "none" else {"quantize": quantize}  # ``before.py``: older code
        self._kernels = select_kernels("cpu", torch.float32, kernels, threads, **given)
        # Calls with 1, 8 and 32 rows share their first prompts. No reuse: the other contenders compute them each time.
        config = EngineConfig(kv_cache_bytes=2 << 30, reuse_prompts=False, max_rows=128)
        self._engine = Engine(self._backbone, self._kernels, config, self._library.__getitem__)
        self._requests = 0

    def run(self, rows: int, beams: int, mode: str, prefix: int, seed: int) -> tuple[float, int]:
        from server.engine.types import Finished, GenerationRequest, PrefixKey, SamplingParams

        requests = []
        for row, token_ids in enumerate(prompts(self._work, rows, seed)):
            self._requests += 1
            key, spec = None, None
            if mode != "bare":
                task = row if mode == "tasks" else 0
                key = PrefixKey("default", f"sha256:{prefix * 1000 + task:064x}")
                if key not in self._library:
                    self._library[key] = random_prefix(self._backbone.spec, prefix, task)
                spec = self._library[key].spec
            params = SamplingParams(max_new_tokens=self._work.new_tokens, num_beams=beams)
            requests.append(GenerationRequest(str(self._requests), "default", tuple(token_ids), params, key, spec))
        tokens, began = 0, time.perf_counter()
        for request in requests:
            self._engine.add(request)
        while self._engine.requests:
            for event in self._engine.step():
                if isinstance(event, Finished):
                    tokens += event.usage.output_tokens
        return time.perf_counter() - began, tokens


class TransformersContender:
    """``generate`` on one batch, without prefixes."""

    def __init__(self, work: Workload, folder: str) -> None:
        from prefixes.backbone import load_backbone

        self._work, self._model = work, load_backbone(folder).model

    def run(self, rows: int, beams: int, mode: str, prefix: int, seed: int) -> tuple[float, int]:
        return generate(self._model, self._work, prompts(self._work, rows, seed), beams)


class PeftContender:
    """PEFT's prefix tuning, one task at a time: sets the adapter, generates the row, takes the next."""

    def __init__(self, work: Workload, folder: str) -> None:
        from transformers import GPT2LMHeadModel

        self._work = work
        self._base = GPT2LMHeadModel.from_pretrained(folder).eval()
        self._models: dict[int, Any] = {}

    def run(self, rows: int, beams: int, mode: str, prefix: int, seed: int) -> tuple[float, int]:
        from peft import PrefixTuningConfig, get_peft_model

        rows = min(rows, SEQUENTIAL_ROWS)
        if prefix not in self._models:
            config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=prefix, inference_mode=True)
            model = get_peft_model(self._base, config, adapter_name="task0")
            for task in range(1, SEQUENTIAL_ROWS):
                model.add_adapter(f"task{task}", config)
            self._models[prefix] = model.eval()
        model, seconds, tokens = self._models[prefix], 0.0, 0
        for row, token_ids in enumerate(prompts(self._work, rows, seed)):
            began = time.perf_counter()
            model.set_adapter(f"task{row}")
            seconds += time.perf_counter() - began
            took, new = generate(model, self._work, [token_ids], beams)
            seconds, tokens = seconds + took, tokens + new
        return seconds, tokens


def generate(model: Any, work: Workload, token_ids: list[list[int]], beams: int) -> tuple[float, int]:
    """Run transformers' ``generate``, greedy or with beams; return seconds and new tokens."""
    import torch

    inputs = torch.tensor(token_ids)
    with torch.inference_mode():
        began = time.perf_counter()
        out = model.generate(
            input_ids=inputs, attention_mask=torch.ones_like(inputs), do_sample=False, num_beams=beams,
            max_new_tokens=work.new_tokens, pad_token_id=0,
        )  # fmt: skip
        seconds = time.perf_counter() - began
    new = out[:, -work.new_tokens :]
    assert new.shape == (len(token_ids), work.new_tokens), new.shape
    return seconds, new.numel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("engine", "transformers", "peft"))
    parser.add_argument("--backbone", required=True)
    parser.add_argument("--geometry", choices=tuple(WORKLOADS), default="gpt2")
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--quantize", default="none")
    parser.add_argument("--threads", type=int, default=available_cores())
    options = parser.parse_args()
    work = WORKLOADS[options.geometry]
    contender: EngineContender | TransformersContender | PeftContender
    if options.kind == "engine":
        threads = configure_threads(options.threads)
        contender = EngineContender(work, options.backbone, options.kernels, threads, options.quantize)
    else:  # as its users run it: torch's threads with their default waiting
        import torch

        torch.set_num_threads(options.threads)
        kind = PeftContender if options.kind == "peft" else TransformersContender
        contender = kind(work, options.backbone)
    serve(contender)


def serve(contender: Any) -> None:
    """Answer the driver until it closes our input."""
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries print too
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        seconds, tokens = contender.run(**json.loads(line))
        print(json.dumps({"seconds": seconds, "tokens": tokens}), file=answers, flush=True)


if __name__ == "__main__":
    main()
