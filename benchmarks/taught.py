"""What a prefix teaches a frozen model: BLEU of ours, of PEFT's, and of the model with examples in its prompt.

    python -m benchmarks.taught --data e2e.jsonl --test e2e-test.jsonl --backbone smollm2

Ours and PEFT's train in turns, seed by seed, each in a process of its own, on the same token ids: as many steps and as
large batches, the same length, MLP and rate. Their seconds are from the first step to the last. The serving engine
scores all of them, greedily, on every input of ``--test``; PEFT's is imported for that. The model alone has
``--shots`` training pairs in its prompt, other ones for each seed. Writes benchmarks/results/taught-<date>.json behind
every seed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.inits import spread
from benchmarks.serve import RESULTS, machine
from benchmarks.train import ROOT
from prefixes.artifact import Prefix, read_prefix
from prefixes.backbone import Backbone, load_backbone
from prefixes.formats.peft import import_peft
from server.engine.kernels.threads import available_cores
from server.engine.types import SamplingParams
from trainer.data.dataset import Example, read_dataset
from trainer.evaluation.evaluate import references
from trainer.evaluation.generate import generate
from trainer.evaluation.scores.base import Corpus
from trainer.evaluation.scores.presets import preset_of, scores_of
from trainer.training.config import TrainConfig
from trainer.training.material import Material
from trainer.training.plan import usual_template
from trainer.training.request import RunRequest

OURS, PEFT, BARE = "prefixd", "PEFT, Trainer", "no prefix, examples in the prompt"
SHOT: Final = "{input}\n{target}\n\n"  # an example in the prompt; an output ends where the next one would begin


def train(kind: str, seed: int, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Train in a process of its own; return its figures. The prefix lies in ``folder``'s ``{kind}-{seed}``."""
    command = [sys.executable, "benchmarks/train_contenders.py", kind, "--backbone", options.backbone]
    for name in ("steps", "length", "batch", "rate", "threads"):
        command += [f"--{name}", str(getattr(options, name))]
    command += ["--examples", str(folder / "examples.json"), "--seed", str(seed)]
    done = subprocess.run(
        [*command, "--save", str(folder / f"{kind}-{seed}")], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{kind} ended early: {done.stderr[-3000:]}")
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def bleu(backbone: Backbone, prefix: Prefix | None, template: str, options: argparse.Namespace) -> float:
    """Score the outputs for all inputs of the test set."""
    wanted = references(read_dataset(options.test), preset_of("plain"), options.limit)
    stop = () if prefix is not None else ("\n",)
    params = SamplingParams(max_new_tokens=options.new_tokens, stop=stop)
    made = generate(backbone, prefix, list(wanted), params, template=template, threads=options.threads, quantize="none")
    corpus = Corpus.of([one.output.text for one in made], list(wanted.values()))
    [score] = scores_of(corpus, preset_of("plain"), ("bleu",))
    return score.value


def with_shots(examples: Sequence[Example], seed: int, shots: int) -> str:
    """The template of a prompt with so many training pairs before the input."""
    drawn = random.Random(seed).sample(examples, shots)
    told = "".join(SHOT.replace("{input}", pair.input).replace("{target}", pair.target) for pair in drawn)
    return told + SHOT.partition("{target}")[0]


def show(runs: dict[str, list[dict[str, Any]]]) -> None:
    """Print the table, and ours against PEFT's."""
    print(f"\n{'':36}{'BLEU of each seed':>26}{'mean':>9}{'seconds':>10}")
    for label, made in runs.items():
        scores, seconds = [run["bleu"] for run in made], spread([run["seconds"] for run in made])[0]
        each = " ".join(f"{score:.1f}" for score in scores)
        print(f"{label:36}{each:>26}{spread(scores)[0]:9.2f}{seconds:10.1f}")
    ours, theirs = (runs[label] for label in (OURS, PEFT))
    ratios = sorted(one["seconds"] / other["seconds"] for one, other in zip(ours, theirs, strict=True))
    less = spread([run["bleu"] for run in ours])[0] - spread([run["bleu"] for run in theirs])[0]
    print(f"{OURS} less {PEFT}: {less:+.2f} BLEU; {ratios[len(ratios) // 2]:.2f} of its time (median)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="JSONL to train on")
    parser.add_argument("--test", type=Path, required=True, help="JSONL to score on")
    parser.add_argument("--backbone", default="smollm2")
    parser.add_argument("--template")
    parser.add_argument("--length", type=int, default=10)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--shots", type=int, default=8)
    parser.add_argument("--limit", type=int, help="inputs that are scored; default: all")
    parser.add_argument("--new-tokens", type=int, default=80)
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    options = parser.parse_args()
    facts, backbone = machine(), load_backbone(options.backbone)
    options.template = options.template or usual_template(backbone)
    runs: dict[str, list[dict[str, Any]]] = {OURS: [], PEFT: [], BARE: []}
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"taught-{time.strftime('%Y%m%d-%H%M%S')}.json"
    asked = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    with tempfile.TemporaryDirectory(prefix="prefixd-bench-") as name:
        folder = Path(name)
        config = TrainConfig(prefix_length=options.length)
        request = RunRequest(options.data, options.backbone, options.template, folder / "run", config, hold_out=0)
        material = Material.read(request)
        pairs = [(example.ids, example.start) for example in material.train.examples]
        (folder / "examples.json").write_text(json.dumps(pairs))
        for seed in options.seeds:
            for label, kind in ((OURS, "prefixd"), (PEFT, "peft")):
                figures = train(kind, seed, folder, options)
                made = folder / f"{kind}-{seed}"
                if kind == "prefixd":
                    prefix = read_prefix((made / "prefix.safetensors").read_bytes())
                else:
                    prefix = import_peft(made, backbone.spec, template=options.template)
                score = bleu(backbone, prefix, options.template, options)
                runs[label].append({"seed": seed, "bleu": score, **figures})
            began = time.perf_counter()
            shown = with_shots(material.train_set.examples, seed, options.shots)
            score = bleu(backbone, None, shown, options)
            runs[BARE].append({"seed": seed, "bleu": score, "seconds": time.perf_counter() - began})
            path.write_text(json.dumps({"machine": facts, "options": asked, "runs": runs}, indent=1) + "\n")
            print(f"seed {seed}: " + ", ".join(f"{label} {made[-1]['bleu']:.2f}" for label, made in runs.items()))
    show(runs)
    print(f"\n{facts['cpu']}, {facts['cores']} cores; written to {path}")


if __name__ == "__main__":
    main()
