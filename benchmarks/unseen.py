"""A prefix against the bare model with examples in its prompt, on inputs that neither has seen.

    python -m benchmarks.unseen --data a.jsonl b.jsonl c.jsonl --test test.jsonl --metric fields --budget-minutes 10
    python -m benchmarks.unseen --data e2e.jsonl --test e2e-test.jsonl --prefix 1.safetensors 2.safetensors

With a budget, ``prefixd train --auto`` makes the prefixes, one for each file of ``--data`` with a seed of its own, as a
newcomer would call it: no other option but ``--hold-out``. Else ``--prefix`` gives them. The bare model has ``--shots``
training pairs in its prompt, other ones for each prefix. Both answer greedily through the serving engine. The interval
of the difference is a paired bootstrap's, 95 %. Writes benchmarks/results/unseen-<date>.json behind every seed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.inits import spread
from benchmarks.serve import RESULTS, machine
from benchmarks.taught import with_shots
from prefixes.artifact import Prefix, read_prefix
from prefixes.backbone import Backbone, load_backbone
from server.engine.kernels.threads import available_cores
from server.engine.types import SamplingParams
from trainer.data.dataset import read_dataset
from trainer.evaluation.bootstrap import difference_interval
from trainer.evaluation.evaluate import references
from trainer.evaluation.generate import generate
from trainer.evaluation.scores.base import Corpus, Score
from trainer.evaluation.scores.presets import METRICS, preset_of, scores_of


def train(data: Path, seed: int, folder: Path, options: argparse.Namespace) -> tuple[Prefix, float]:
    """A prefix by ``prefixd train --auto``, and the minutes that all of it took."""
    output, began = folder / f"run-{seed}", time.perf_counter()
    command = [
        str(Path(sys.executable).with_name("prefixd")), "train", "--task", "unseen", "--data", str(data), "--auto",
        "--budget-minutes", str(options.budget_minutes), "--hold-out", str(options.hold_out), "--seed", str(seed),
        "--backbone", options.backbone, "--output", str(output), "--threads", str(options.threads),
    ]  # fmt: skip
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)  # progress is shown
    if done.returncode:
        raise RuntimeError(f"prefixd train ended early, see above: {done.returncode}")
    print(done.stdout[-2000:], flush=True)
    return read_prefix((output / "prefix.safetensors").read_bytes()), (time.perf_counter() - began) / 60


def score(
    backbone: Backbone, prefix: Prefix | None, template: str | None, options: argparse.Namespace
) -> tuple[list[Score], list[str]]:
    """The scores on the test set, and the outputs."""
    preset = preset_of("plain")
    wanted = references(read_dataset(options.test), preset, options.limit)
    params = SamplingParams(max_new_tokens=options.new_tokens, stop=() if prefix is not None else ("\n",))
    made = generate(
        backbone, prefix, list(wanted), params, template=template, truncate=True, threads=options.threads
    )
    outputs = [one.output.text for one in made]
    return scores_of(Corpus.of(outputs, list(wanted.values())), preset, [options.metric]), outputs


def measure(backbone: Backbone, prefix: Prefix, data: Path, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Score a prefix and the bare model; every score of the metric with its difference's interval."""
    ours, outputs = score(backbone, prefix, None, options)
    bare, answers = score(backbone, None, with_shots(read_dataset(data).examples, seed, options.shots), options)
    scores = {
        one.name: {"prefix": one.value, "bare": other.value, "interval": difference_interval(one, other)}
        for one, other in zip(ours, bare, strict=True)
        if one.statistics is not None and other.statistics is not None
    }
    return {"seed": seed, "scores": scores, "shown": {"prefix": outputs[:3], "bare": answers[:3]}}


def show(runs: list[dict[str, Any]]) -> None:
    """Print every seed, and the means."""
    print(f"\n{'score':>12}{'seed':>6}{'prefix':>10}{'bare':>10}   difference, 95 %")
    for name in runs[0]["scores"]:
        for run in runs:
            made = run["scores"][name]
            low, high = made["interval"]
            print(f"{name:>12}{run['seed']:>6}{made['prefix']:10.3f}{made['bare']:10.3f}   {low:+.3f} to {high:+.3f}")
        means = [spread([run["scores"][name][who] for run in runs]) for who in ("prefix", "bare")]
        print(f"{name:>12}{'mean':>6}" + "".join(f"{mean:10.3f} ± {deviation:.3f}" for mean, deviation in means))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="JSONL to train on and show examples of")
    parser.add_argument("--test", type=Path, required=True, help="JSONL to score on")
    parser.add_argument("--metric", choices=METRICS, default="bleu")
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--budget-minutes", type=float, help="train with --auto")
    how.add_argument("--prefix", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--hold-out", type=int, default=20, help="percent of the inputs")
    parser.add_argument("--backbone", default="smollm2")
    parser.add_argument("--shots", type=int, default=8)
    parser.add_argument("--limit", type=int, help="inputs that are scored; default: all")
    parser.add_argument("--new-tokens", type=int, default=80)
    parser.add_argument("--threads", type=int, default=available_cores())
    options = parser.parse_args()
    facts, backbone, runs = machine(), load_backbone(options.backbone), list[dict[str, Any]]()
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"unseen-{time.strftime('%Y%m%d-%H%M%S')}.json"
    with tempfile.TemporaryDirectory(prefix="prefixd-bench-") as name:
        for seed in range(1, len(options.prefix or options.data) + 1):
            data, minutes = options.data[(seed - 1) % len(options.data)], None
            if options.prefix:
                prefix = read_prefix(options.prefix[seed - 1].read_bytes())
            else:
                prefix, minutes = train(data, seed, Path(name), options)
            run = measure(backbone, prefix, data, seed, options) | {"minutes": minutes}
            print(json.dumps(run), flush=True)
            runs.append(run)
            made = {"machine": facts, "options": vars(options), "runs": runs}
            path.write_text(json.dumps(made, indent=1, default=str) + "\n")  # paths as text
    show(runs)
    print(f"\n{facts['cpu']}, {facts['cores']} cores; written to {path}")


if __name__ == "__main__":
    main()
