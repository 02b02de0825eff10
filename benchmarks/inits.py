"""What a prefix should start from: held-out loss and BLEU of each start, at equal steps, over several seeds.

    python -m benchmarks.inits --data e2e.jsonl --test e2e-test.jsonl --backbone FOLDER --words "table-to-text:"

Every start trains as long, with the same data, length and batch; its method's rate is given. A start from a text
(``--text FILE``), from words (``--words``) or from a version (``--version FILE.safetensors``) takes part where it is
given. Losses are per token on the held-out part of the data, BLEU on ``--test``, else on the held-out part too, which
the kept prefix was chosen by. Prints mean and spread (standard deviation over seeds), and writes
benchmarks/results/inits-<date>.json with every seed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.serve import RESULTS, machine
from prefixes.artifact import read_prefix
from prefixes.backbone import load_backbone
from trainer.cli.options import initial_text
from trainer.data.dataset import read_dataset
from trainer.evaluation.evaluate import evaluate
from trainer.training.config import EXAMPLES, RANDOM, TrainConfig
from trainer.training.initial import Initial, InitialText, InitialVersion
from trainer.training.request import RunRequest, read_datasets
from trainer.training.run import run_training


@dataclass(frozen=True)
class Entry:
    """One line of the table."""

    start: str
    method: str
    init: str = RANDOM
    initial: Initial | None = None

    @property
    def label(self) -> str:
        return f"{self.start}, {self.method}"


def entries(options: argparse.Namespace) -> list[Entry]:
    """Every start with every method that was asked for."""
    starts: list[tuple[str, str, Initial | None]] = [("random", RANDOM, None), ("examples", EXAMPLES, None)]
    if options.words is not None:
        starts.append(("words", options.words, None))
    if options.text is not None:
        starts.append(("text", RANDOM, InitialText(initial_text(options.text))))
    if options.version is not None:
        starts.append(("version", RANDOM, InitialVersion.read(options.version.read_bytes())))
    return [Entry(name, method, init, initial) for name, init, initial in starts for method in options.methods]


def measure(entry: Entry, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train and score one start with one seed."""
    direct = entry.method == "direct"
    config = TrainConfig(
        prefix_length=options.length,
        method="direct" if direct else "mlp",
        frozen_positions=int(direct and entry.start in ("examples", "text")),
        init=entry.init,
        steps=options.steps,
        batch_size=options.batch,
        learning_rate=options.direct_rate if direct else options.mlp_rate,
        validate_every=max(1, options.steps // 4),
        seed=seed,
    )
    with tempfile.TemporaryDirectory(prefix="prefixd-bench-") as folder:
        request = RunRequest(
            options.data, options.backbone, options.template, Path(folder) / "run", config, hold_out=options.hold_out,
            truncate=True, initial=entry.initial, defaults={"num_beams": 1, "max_new_tokens": options.new_tokens},
        )  # fmt: skip
        began = time.perf_counter()
        result = run_training(request)
        seconds = time.perf_counter() - began
    data = read_datasets(request)[1] if options.test is None else read_dataset(options.test)
    scored = evaluate(
        load_backbone(options.backbone), read_prefix(result.artifact), data,
        metrics=("bleu",), limit=options.limit, truncate=True,
    )  # fmt: skip
    loss = result.record["scores"]["validation_loss_per_token"]
    return {"seed": seed, "loss": loss, "bleu": scored.scores["bleu"].value, "seconds": seconds}


def show(made: dict[str, list[dict[str, Any]]]) -> None:
    """Print the table, the lowest loss first."""
    print(f"\n{'start, method':24}{'held-out loss':>20}{'BLEU':>18}{'seconds':>10}")
    for label, runs in sorted(made.items(), key=lambda entry: statistics.fmean(run["loss"] for run in entry[1])):
        loss, bleu = (spread([run[name] for run in runs]) for name in ("loss", "bleu"))
        seconds = statistics.fmean(run["seconds"] for run in runs)
        print(f"{label:24}{loss[0]:12.4f} ± {loss[1]:.3f}{bleu[0]:11.2f} ± {bleu[1]:.2f}{seconds:10.0f}")


def spread(values: list[float]) -> tuple[float, float]:
    """Mean and standard deviation; 0 for one value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="JSONL to train on")
    parser.add_argument("--test", type=Path, help="JSONL to score on")
    parser.add_argument("--backbone", default="demo")
    parser.add_argument("--template")
    parser.add_argument("--words")
    parser.add_argument("--text", type=Path, metavar="FILE")
    parser.add_argument("--version", type=Path, metavar="FILE")
    parser.add_argument("--methods", nargs="+", choices=("direct", "mlp"), default=["direct", "mlp"])
    parser.add_argument("--length", type=int, default=10)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--direct-rate", type=float, default=5e-3)
    parser.add_argument("--mlp-rate", type=float, default=1e-3)
    parser.add_argument("--hold-out", type=int, default=5)
    parser.add_argument("--limit", type=int, default=60, help="inputs that are scored")
    parser.add_argument("--new-tokens", type=int, default=60)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    options = parser.parse_args()
    facts, made = machine(), dict[str, list[dict[str, Any]]]()
    for seed in options.seeds:  # starts take turns, so that a slow hour is everybody's
        for entry in entries(options):
            run = measure(entry, seed, options)
            made.setdefault(entry.label, []).append(run)
            print(f"seed {seed}, {entry.label}: {run['loss']:.4f}, BLEU {run['bleu']:.2f}", file=sys.stderr)
    show(made)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"inits-{time.strftime('%Y%m%d-%H%M%S')}.json"
    asked = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    path.write_text(json.dumps({"machine": facts, "options": asked, "runs": made}, indent=1) + "\n")
    print(f"\n{facts['cpu']}, {facts['cores']} cores; written to {path}")


if __name__ == "__main__":
    main()
