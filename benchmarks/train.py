"""Learnt tokens per second and peak memory of this trainer against PEFT's prefix tuning under transformers' Trainer.

    python benchmarks/train.py [--quick]

GPT-2 small's geometry with random weights, its real tokenizer, E2E from ../shared/data, prefix length 5, MLP 512, batch
10, AdamW with a linear schedule and no warm-up, clip 1.0, mean loss over learnt tokens, float32. Every run takes the
first steps of an epoch over the same 2,000 examples, each contender in its own order and its own batches. One process a
run; contenders take turns, repetition by repetition; medians count. Writes benchmarks/results/train-<date>.json with
the machine's name.

On a machine that others use too, ``--threads 1`` and the rate by processor time tell more: time that others took does
not count, and with one thread nothing spins while it waits for another.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.serve import RESULTS, machine  # noqa: E402
from server.engine.kernels.threads import available_cores  # noqa: E402

CORPORA = ROOT.parent / "shared" / "data"
BATCH, EXAMPLES = 10, 2000


@dataclass(frozen=True)
class Entry:
    """One line of the table."""

    letter: str
    label: str
    command: tuple[str, ...]


ENTRIES = (
    Entry("a", "prefixd", ("prefixd",)),
    Entry("a2", "prefixd, --accumulate 2", ("prefixd", "--accumulate", "2")),
    Entry("ar", "prefixd, --checkpoint-activations", ("prefixd", "--recompute")),
    Entry("p", "PEFT, Trainer", ("peft",)),
    Entry("pg", "PEFT, Trainer, group_by_length", ("peft", "--group")),
)
RATE_TARGET, MEMORY_TARGET = 1.4, 0.8  # ratios of (a) to (p)


def prepare(folder: Path) -> None:
    """Save to ``folder`` the backbone and ``examples.json``, pairs of token ids and the index of the target's first."""
    import torch
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    from trainer.data.corpora import read_e2e

    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config()).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(CORPORA / "tokenizers" / "gpt2")
    tokenizer.save_pretrained(folder)
    pairs = list(read_e2e(CORPORA / "e2e" / "src1_train.txt"))
    chosen = random.Random(0).sample(pairs, EXAMPLES)
    end, examples = [tokenizer.eos_token_id], []
    for pair in chosen:  # the template `{input} <|endoftext|>`
        before = [*tokenizer.encode(pair.source), *tokenizer.encode(" "), *end]
        examples.append(([*before, *tokenizer.encode(pair.target), *end], len(before)))
    (folder / "examples.json").write_text(json.dumps(examples))


def run(entry: Entry, folder: Path, steps: int, threads: int) -> dict[str, Any]:
    """Run one training in its own process; return its figures and the machine's load."""
    command = [sys.executable, "benchmarks/train_contenders.py", *entry.command]
    options = ["--backbone", str(folder), "--examples", str(folder / "examples.json")]
    options += ["--steps", str(steps), "--threads", str(threads)]
    done = subprocess.run(
        [*command, *options], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{entry.label} ended early: {done.stderr[-3000:]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer | {"load": os.getloadavg()[0]}


def show(medians: dict[str, dict[str, float]], entries: list[Entry]) -> dict[str, dict[str, float]]:
    """Print the table; return the ratios of (a) to each of PEFT's lines."""
    print(f"\n{'':40}{'learnt tokens/s':>16}{'s/step':>9}{'peak MiB':>10}{'training MiB':>16}")
    for entry in entries:
        row, label = medians[entry.letter], f"({entry.letter}) {entry.label}"
        print(f"{label:40}{row['rate']:16.1f}{row['step']:9.2f}{row['peak_mib']:10.0f}{row['training_mib']:16.0f}")
    ratios = {}
    for other in ("p", "pg"):
        if other in medians:
            ours, theirs = medians["a"], medians[other]
            ratios[f"a/{other}"] = {
                name: ours[name] / theirs[name] for name in ("rate", "cpu_rate", "peak_mib", "training_mib")
            }
    for name, ratio in ratios.items():
        print(f"{name}: {ratio['rate']:.2f} x the rate, {ratio['cpu_rate']:.2f} x by processor time, ", end="")
        print(f"{ratio['peak_mib']:.2f} x the peak memory", end="")
        print(f" ({ratio['training_mib']:.2f} x without what is held before the first step)")
    if "a/p" in ratios:
        rate = "ok" if ratios["a/p"]["rate"] >= RATE_TARGET else "miss"
        memory = "ok" if ratios["a/p"]["peak_mib"] <= MEMORY_TARGET else "miss"
        print(f"targets: rate {rate} {RATE_TARGET}, memory {memory} {MEMORY_TARGET}")
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10, help="batches of 10 examples in a run")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--only", nargs="+", choices=[entry.letter for entry in ENTRIES], help="lines of the table")
    parser.add_argument("--quick", action="store_true", help="one repetition of 4 steps, (a) and (p)")
    options = parser.parse_args()
    if options.quick:
        options.steps, options.repeats, options.only = 4, 1, ["a", "p"]
    entries = [entry for entry in ENTRIES if options.only is None or entry.letter in options.only]
    facts = machine()
    runs: dict[str, list[dict[str, Any]]] = {entry.letter: [] for entry in entries}
    with tempfile.TemporaryDirectory(prefix="prefixd-bench-") as name:
        folder = Path(name)
        prepare(folder)
        for repeat in range(options.repeats):
            for entry in entries:
                runs[entry.letter].append(run(entry, folder, options.steps, options.threads))
            print(f"repetition {repeat + 1} of {options.repeats} done", file=sys.stderr)
    medians = {letter: _medians(made) for letter, made in runs.items()}
    ratios = show(medians, entries)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"train-{time.strftime('%Y%m%d-%H%M%S')}.json"
    workload = {"steps": options.steps, "batch": BATCH, "threads": options.threads}
    result = {"machine": facts, "workload": workload, "medians": medians, "ratios": ratios, "repetitions": runs}
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{facts['cpu']}, {facts['cores']} cores, load {facts['load_before']:.1f} before; written to {path}")


def _medians(runs: list[dict[str, Any]]) -> dict[str, float]:
    return {
        "rate": statistics.median(run["learnt"] / run["seconds"] for run in runs),
        "cpu_rate": statistics.median(run["learnt"] / run["cpu_seconds"] for run in runs),
        "step": statistics.median(run["seconds"] / run["steps"] for run in runs),
        "peak_mib": statistics.median(run["peak_mib"] for run in runs),
        "training_mib": statistics.median(run["peak_mib"] - run["loaded_mib"] for run in runs),
    }


if __name__ == "__main__":
    main()
