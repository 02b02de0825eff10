"""This engine against the one of another checkout, such as the commit before a change, pair by pair in one run.

    python -m benchmarks.before CHECKOUT [--geometry bart-base]

The same requests go to both in turn, A B B A ..., in every mode and with every number of rows. Prints and writes the
tokens per second of both and the median of the pairs' ratios: above 1 this checkout is faster.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

from benchmarks.serve import ENTRIES, RESULTS, ROOT, Case, Process, machine
from benchmarks.workload import WORKLOADS
from server.engine.kernels.threads import available_cores

LEAST: Final = 0.97
"""A median ratio below this means a slower engine, not noise."""


def start(checkout: Path, folder: Path, geometry: str, threads: int) -> Process:
    """Start the engine of ``checkout``; return when it is ready."""
    script = [sys.executable, str(ROOT / "benchmarks/contenders.py"), "engine"]
    sizes = ["--backbone", str(folder), "--geometry", geometry, "--threads", str(threads)]
    return Process([*script, *sizes], folder / f"{checkout.name}.log", checkout)


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Measure both in turns; return their rates and median ratios, by mode and case."""
    work = WORKLOADS[options.geometry]
    cases = [Case(beams, rows) for beams in work.beams for rows in options.rows or work.rows]
    known = [entry for entry in ENTRIES[options.geometry] if entry.kind == "engine"]
    entries = [entry for entry in known if entry.letter in options.entries]
    pairs: dict[str, dict[str, list[tuple[float, float]]]] = {entry.letter: {} for entry in entries}
    with tempfile.TemporaryDirectory(prefix="prefixd-bench-") as name:
        folder = Path(name)
        work.save(folder)
        processes = [start(path, folder, options.geometry, options.threads) for path in (ROOT, options.checkout)]
        for repeat in range(-1, options.repeats):  # the first round warms up and does not count
            for case in cases:
                for entry in entries:
                    job = {"rows": case.rows, "beams": case.beams, "mode": entry.mode, "prefix": entry.prefix}
                    order = (0, 1) if repeat % 2 else (1, 0)
                    rates = {which: processes[which].run(**job, seed=repeat + 1) for which in order}
                    if repeat >= 0:
                        pairs[entry.letter].setdefault(str(case), []).append((rates[0], rates[1]))
            print(f"round {repeat + 1} of {options.repeats} done", file=sys.stderr)
        for process in processes:
            process.close()
    ratios = {
        letter: {case: statistics.median(now / before for now, before in found) for case, found in by.items()}
        for letter, by in pairs.items()
    }
    print(f"\n{'median of the pairs: now / before':42}" + "".join(f"{case!s:>18}" for case in cases))
    for entry in entries:
        cells = [f"{ratio:.3f} ({'ok' if ratio >= LEAST else 'slower'})" for ratio in ratios[entry.letter].values()]
        print(f"{f'({entry.letter}) {entry.label}':42}" + "".join(f"{cell:>18}" for cell in cells))
    return {"now_before_tokens_per_second": pairs, "median_ratio": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=lambda text: Path(text).resolve(), help="folder with the other code")
    parser.add_argument("--geometry", choices=tuple(WORKLOADS), default="gpt2", help="the backbone's")
    parser.add_argument("--entries", default="ac", help="letters of serve.py's entries for the engine in floats")
    parser.add_argument("--rows", type=int, nargs="+", help="the geometry's own: 1 8 32, or 1 8 16")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=available_cores())
    options = parser.parse_args()
    facts = machine()
    result = compare(options)
    path = RESULTS / f"before-{options.geometry}-{time.strftime('%Y%m%d-%H%M%S')}.json"
    path.write_text(json.dumps({"machine": facts, **result}, indent=1) + "\n")
    print(f"\n{facts['cpu']}, {facts['cores']} cores, load {facts['load_before']:.1f} before; written to {path}")


if __name__ == "__main__":
    main()
