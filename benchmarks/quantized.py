"""What int8 weights cost in quality: perplexity and scores of a prefix's outputs, floats against int8.

    python -m benchmarks.quantized --backbone demo --artifact e2e.safetensors --data e2e-test.jsonl --preset e2e

Perplexity is of the test set's targets behind its inputs. Scores are of what the serving engine writes, greedily or as
``--parameter`` says, for every input, with a bootstrap's interval, 95 %. Writes
benchmarks/results/quantized-<date>.json.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.serve import RESULTS, machine
from prefixes.artifact import Prefix, read_prefix
from prefixes.backbone import Backbone, load_backbone
from server.engine.kernels import select_kernels
from server.engine.kernels.base import Quantization
from server.engine.kernels.threads import available_cores
from server.engine.models import load_model
from trainer.cli.options import decoding_parameters
from trainer.data.dataset import read_dataset
from trainer.data.sequences import tokenize
from trainer.evaluation.evaluate import evaluate
from trainer.training.loss import token_loss

KINDS: Final[tuple[Quantization, ...]] = ("none", "int8")


def perplexity(backbone: Backbone, prefix: Prefix, quantize: Quantization, options: argparse.Namespace) -> float:
    """Of the targets, end tokens among them, behind their inputs and the prefix."""
    examples = tokenize(backbone, prefix.spec, read_dataset(options.data), drop_long=True, truncate=False).examples
    kernels = select_kernels("cpu", backbone.model.dtype, threads=options.threads, quantize=quantize)
    sites = {site: (prefix.tensors[f"{site}.key"], prefix.tensors[f"{site}.value"]) for site in prefix.spec.sites}
    loss = token_loss(load_model(backbone, kernels), examples[: options.targets], sites, prefix.spec)
    return math.exp(loss)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", required=True)
    parser.add_argument("--artifact", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="JSONL to score on")
    parser.add_argument("--preset", default="plain")
    parser.add_argument("--metric", nargs="+", default=["bleu", "rouge"])
    parser.add_argument("--parameter", nargs="+", default=[], help="how to decode, name=value")
    parser.add_argument("--limit", type=int, help="inputs that are scored; default: all")
    parser.add_argument("--targets", type=int, help="of which perplexity is; default: all")
    parser.add_argument("--threads", type=int, default=available_cores())
    options = parser.parse_args()
    facts, prefix = machine(), read_prefix(options.artifact.read_bytes())
    torch.set_num_threads(options.threads)
    made: dict[str, dict[str, Any]] = {}
    for quantize in KINDS:
        backbone = load_backbone(options.backbone)
        scored = evaluate(
            backbone, prefix, read_dataset(options.data), preset=options.preset, metrics=options.metric,
            parameters=decoding_parameters("--parameter", options.parameter), truncate=True, limit=options.limit,
            threads=options.threads, quantize=quantize,
        )  # fmt: skip
        made[quantize] = {
            "perplexity": perplexity(backbone, prefix, quantize, options), "evaluation": scored.summary(),
            "outputs": [row.output for row in scored.outputs],
        }  # fmt: skip
        cells = ", ".join(
            f"{name} {score.value:.2f} ({score.low} to {score.high})" for name, score in scored.scores.items()
        )
        print(f"{quantize:5} perplexity {made[quantize]['perplexity']:.4f}; {cells}", flush=True)
    same = sum(one == other for one, other in zip(*(made[kind].pop("outputs") for kind in KINDS), strict=True))
    inputs = made["none"]["evaluation"]["inputs"]
    print(f"{same} of {inputs} outputs are the same; perplexity x "
          f"{made['int8']['perplexity'] / made['none']['perplexity']:.5f}")  # fmt: skip
    asked = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    path = RESULTS / f"quantized-{time.strftime('%Y%m%d-%H%M%S')}.json"
    path.write_text(json.dumps({"machine": facts, "options": asked, "same": same, "runs": made}, indent=1) + "\n")
    print(f"{facts['cpu']}, {facts['cores']} cores; written to {path}")


if __name__ == "__main__":
    main()
