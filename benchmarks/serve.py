"""Tokens per second of this engine against PEFT, transformers, CTranslate2 and vLLM, on one machine in one run.

    python benchmarks/serve.py [--quick]               the table, GPT-2 small
    python benchmarks/serve.py --geometry bart-base    the same for BART base, greedy and with 4 beams
    python benchmarks/serve.py --http                  a server process against its own engine

Peers that are no dependency of ours run if their environments are there in ``.peers/`` (``make bench-peers`` makes
CTranslate2's); ``--only`` runs some of the lines. Float32 or int8, every row another task. GPT-2: prompts of 40 tokens,
64 new ones, prefixes of 5. BART: inputs of 256 tokens, 48 new ones, prefixes of 20 at all three sites. Contenders take
turns, repetition by repetition; medians count. Writes benchmarks/results/<kind>-<date>.json with the machine's name.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
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

from benchmarks.workload import WORKLOADS  # noqa: E402
from server.engine.kernels.threads import available_cores  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Entry:
    """One line of the table: a contender process in one mode."""

    letter: str
    label: str
    kind: str
    mode: str = "bare"
    prefix: int = 0


@dataclass(frozen=True, order=True)
class Case:
    """One column of the table."""

    beams: int
    rows: int

    def __str__(self) -> str:
        return f"{self.rows} rows" + (f", beam {self.beams}" if self.beams > 1 else "")


ENTRIES = {
    "gpt2": (
        Entry("a", "engine, every row another task", "engine", "tasks", 5),
        Entry("a100", "engine, the same, prefixes of 100", "engine", "tasks", 100),
        Entry("a8", "engine, int8, every row another task", "engine-int8", "tasks", 5),
        Entry("b", "engine, one task for all rows", "engine", "one", 5),
        Entry("c", "engine, no prefixes", "engine", "bare", 0),
        Entry("d", "PEFT, one task at a time", "peft", "tasks", 5),
        Entry("e", "transformers, one batch, no prefixes", "transformers"),
        Entry("f", "vLLM CPU, no prefixes", "vllm"),
        Entry("g", "CTranslate2, no prefixes", "ctranslate2"),
        Entry("g8", "CTranslate2, int8, no prefixes", "ctranslate2-int8"),
    ),
    "bart-base": (
        Entry("a", "engine, every row another task", "engine", "tasks", 20),
        Entry("a8", "engine, int8, every row another task", "engine-int8", "tasks", 20),
        Entry("b", "engine, one task for all rows", "engine", "one", 20),
        Entry("c", "engine, no prefixes", "engine", "bare", 0),
        Entry("e", "transformers, one batch, no prefixes", "transformers"),
    ),
}
PEERS = ROOT / ".peers"
Targets = tuple[tuple[str, str, dict[int, float]], ...]  # letters of numerator and denominator, least ratio by rows
TARGETS: dict[str, Targets] = {
    "gpt2": (
        ("a", "c", {32: 0.97}), ("a", "b", {32: 0.97}), ("a", "e", {32: 1.5}), ("a", "f", {1: 1.8, 8: 1.8, 32: 1.3}),
        ("a", "d", {}), ("a100", "a", {}), ("a8", "a", {}),
        ("a", "g", {1: 1.1, 8: 1.1, 32: 1.1}), ("a8", "g8", {1: 1.1, 8: 1.1, 32: 1.1}),
    ),
    "bart-base": (("a", "e", {8: 1.2, 16: 1.2}), ("a", "b", {8: 0.95, 16: 0.95}), ("a", "c", {}), ("a8", "a", {})),
}  # fmt: skip


class Process:
    """A contender in a process of its own."""

    def __init__(self, command: list[str], log: Path, checkout: Path = ROOT) -> None:
        """Run ``command`` in ``checkout``, with that checkout's code, and wait until it is ready."""
        self._log = log.open("w")
        self._process = subprocess.Popen(
            command, cwd=checkout, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
            env={**os.environ, "PYTHONPATH": str(checkout)},
        )  # fmt: skip
        self._read()

    def run(self, **job: Any) -> float:
        """Run one job; return its tokens per second."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        answer = self._read()
        return float(answer["tokens"] / answer["seconds"])

    def close(self) -> None:
        """End the process by closing its input."""
        self._process.communicate()
        self._log.close()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a contender ended early; its output: {Path(self._log.name).read_text()[-3000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def machine() -> dict[str, Any]:
    """Describe the machine that the numbers come from."""
    import torch

    model = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        model = next((x.split(":")[1].strip() for x in info.read_text().splitlines() if "model name" in x), model)
    return {
        "cpu": model, "cores": available_cores(), "load_before": os.getloadavg()[0], "torch": torch.__version__,
        "python": platform.python_version(), "system": platform.platform(),
    }  # fmt: skip


def start(kind: str, folder: Path, options: argparse.Namespace) -> Process:
    """Start one contender and wait until it is ready."""
    log, (name, _, quantize) = folder / f"{kind}.log", kind.partition("-")
    threads = ["--threads", str(options.threads)]
    python = peer_python(name)
    if python is not None:
        work = WORKLOADS[options.geometry]
        script = [str(python), "-P", f"benchmarks/{name}_contender.py", "--backbone", str(folder)]  # -P: no ``kernels``
        sizes = ["--prompt-tokens", str(work.input_tokens), "--new-tokens", str(work.new_tokens)]
        given = threads if name == "ctranslate2" else []
        return Process([*script, *sizes, *given, *(["--quantization", quantize] if quantize else [])], log)
    given = ["--kernels", options.kernels, "--quantize", quantize or "none"] if name == "engine" else []
    command = [sys.executable, "benchmarks/contenders.py", name, "--backbone", str(folder)]
    return Process([*command, "--geometry", options.geometry, *threads, *given], log)


def peer_python(name: str) -> Path | None:
    """The Python of a peer that has an environment of its own; None if it runs in ours."""
    return PEERS / name / "bin" / "python" if name in ("ctranslate2", "vllm") else None


def runs_here(entry: Entry, options: argparse.Namespace) -> bool:
    """Whether it was asked for, and its peer is here; says so if that is not."""
    if options.only and entry.letter not in options.only:
        return False
    python = peer_python(entry.kind.partition("-")[0])
    if python is not None and not python.exists():
        print(f"({entry.letter}) {entry.label}: skipped, expected an environment with it at {python.relative_to(ROOT)}")
        return False
    return True


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Run all contenders in turns; return rates by letter and case."""
    work = WORKLOADS[options.geometry]
    cases = [Case(beams, rows) for beams in work.beams for rows in options.rows or work.rows]
    entries = [entry for entry in ENTRIES[options.geometry] if runs_here(entry, options)]
    rates: dict[str, dict[str, list[float]]] = {entry.letter: {} for entry in entries}
    with tempfile.TemporaryDirectory(prefix="prefixd-bench-") as name:
        folder = Path(name)
        work.save(folder)
        processes = {kind: start(kind, folder, options) for kind in dict.fromkeys(entry.kind for entry in entries)}
        for repeat in range(-1, options.repeats):  # the first round warms up and does not count
            for case in cases:
                for entry in entries:
                    job = {"rows": case.rows, "beams": case.beams, "mode": entry.mode, "prefix": entry.prefix}
                    rate = processes[entry.kind].run(**job, seed=repeat + 1)
                    if repeat >= 0:
                        rates[entry.letter].setdefault(str(case), []).append(rate)
            print(f"round {repeat + 1} of {options.repeats} done", file=sys.stderr)
        for process in processes.values():
            process.close()
    medians = {letter: {n: statistics.median(r) for n, r in by.items()} for letter, by in rates.items()}
    show(medians, entries, cases, TARGETS[options.geometry])
    return {"tokens_per_second": medians, "repetitions": rates}


def show(medians: dict[str, dict[str, float]], entries: list[Entry], cases: list[Case], every: Targets) -> None:
    """Print the table and the ratios, each with its target."""
    print(f"\n{'tokens/s':42}" + "".join(f"{case!s:>18}" for case in cases))
    for entry in entries:
        label = f"({entry.letter}) {entry.label}"
        print(f"{label:42}" + "".join(f"{medians[entry.letter][str(case)]:18.1f}" for case in cases))
    print(f"\n{'ratio':42}" + "".join(f"{case!s:>18}" for case in cases))
    for over, under, targets in every:
        if over in medians and under in medians:
            cells = []
            for case in cases:
                ratio = medians[over][str(case)] / medians[under][str(case)]
                target = targets.get(case.rows)
                cells.append(f"{ratio:.2f}" + (f" ({'ok' if ratio >= target else 'miss'} {target})" if target else ""))
            print(f"{f'({over}) / ({under})':42}" + "".join(f"{cell:>18}" for cell in cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=tuple(WORKLOADS), default="gpt2", help="the backbone's")
    parser.add_argument("--rows", type=int, nargs="+", help="the geometry's own: 1 8 32, or 1 8 16")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--kernels", default="auto", help="kernel set of the engine: auto, torch or numba")
    parser.add_argument("--only", nargs="+", help="letters of the table's lines")
    parser.add_argument("--http", action="store_true", help="a server process at 32 clients against its engine")
    parser.add_argument("--quick", action="store_true", help="one repetition, 1 and 8 rows")
    options = parser.parse_args()
    if options.quick:
        options.rows, options.repeats = [1, 8], 1
    facts = machine()
    if options.http:
        from benchmarks.http_load import compare_http

        kind, result = "http", compare_http(options, start)
    else:
        kind, result = f"serve-{options.geometry}", compare(options)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{kind}-{time.strftime('%Y%m%d-%H%M%S')}.json"
    path.write_text(json.dumps({"machine": facts, **result}, indent=1) + "\n")
    print(f"\n{facts['cpu']}, {facts['cores']} cores, load {facts['load_before']:.1f} before; written to {path}")


if __name__ == "__main__":
    main()
