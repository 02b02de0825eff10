"""Linear layers and attention, torch against numba, per shape: what `docs/decisions.md` says of them rests on it.

Run by hand: ``python benchmarks/kernels.py [--threads N] [--cpu-time]``. Repetitions are interleaved; the fastest of
each counts. ``--cpu-time`` (with one thread) tells the kernels apart on a machine that other work disturbs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from server.engine.kernels.threads import configure_threads

SHAPES = {"qkv": (2304, 768), "project": (768, 768), "up": (3072, 768), "down": (768, 3072), "head": (50257, 768)}
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512)
CONTEXTS = ((1, 1, 75), (8, 1, 75), (32, 1, 75), (32, 1, 400), (1, 40, 40), (8, 40, 40), (1, 512, 512), (4, 128, 512))
HEADS, HEAD_DIM, BLOCK_SIZE, PREFIX = 12, 64, 16, 5
COPIES = 6  # of each weight and cache, used in turn, so that none is still in the processor's cache


def fastest(runs: dict[str, Callable[..., Any]], clock: Callable[[], float], repeats: int) -> dict[str, float]:
    """Run the functions in turns; return the milliseconds of each one's fastest repetition."""
    best = dict.fromkeys(runs, float("inf"))
    for repeat in range(repeats):
        for name, function in runs.items():
            start = clock()
            function(repeat)
            best[name] = min(best[name], (clock() - start) * 1e3)
    return best


def bench_linear(kernels: dict[str, Any], clock: Callable[[], float], repeats: int) -> list[dict[str, Any]]:
    import torch

    results = []
    for name, (outs, count) in SHAPES.items():
        weights = [torch.randn(outs, count) for _ in range(1 if outs > 10000 else COPIES)]
        bias = None if name == "head" else torch.randn(outs)
        activation = "gelu_new" if name == "up" else "none"
        layers = {kind: [k.linear(weight, bias, activation) for weight in weights] for kind, k in kernels.items()}
        for rows in ROWS:
            x = torch.randn(rows, count)
            runs = {kind: lambda i, of=of, x=x: of[i % len(of)](x) for kind, of in layers.items()}
            best = fastest(runs, clock, repeats if rows <= 64 else max(repeats // 4, 2))
            rate = 2 * rows * outs * count / best["numba"] / 1e6
            results.append({"linear": name, "rows": rows, **best, "numba_gflops": rate})
            print(f"{name:8} {rows:4} rows   {line(best)}   numba {rate:6.1f} GFLOP/s")
    return results


def bench_attention(kernels: dict[str, Any], clock: Callable[[], float], repeats: int) -> list[dict[str, Any]]:
    import torch

    from server.engine.kernels.base import KVCache, PagedBatch

    results = []
    for rows, count, context in CONTEXTS:
        per_row = -(-PREFIX // BLOCK_SIZE) + -(-context // BLOCK_SIZE)
        blocks = torch.randperm(rows * per_row, dtype=torch.int32).reshape(rows, per_row)
        tables = torch.zeros(rows, 2, per_row - 1, dtype=torch.int32)
        tables[:, 0, 0], tables[:, 1] = blocks[:, 0], blocks[:, 1:]
        batch = PagedBatch(
            tables=tables,
            lengths=torch.tensor([[PREFIX, context]] * rows, dtype=torch.int32),
            unplaced=torch.zeros(rows, dtype=torch.int32),
            slots=torch.empty(0, dtype=torch.int64),
            counts=(count,) * rows,
            longest=(PREFIX, context),
        )
        shape = (COPIES, rows * per_row, HEADS, BLOCK_SIZE, HEAD_DIM)
        cache = KVCache(torch.randn(shape), torch.randn(shape))
        query = torch.randn(rows * count, 3, HEADS, HEAD_DIM)[:, 0]
        prepared = {kind: k.prepare(cache, batch) for kind, k in kernels.items()}
        runs = {kind: lambda i, p=p, q=query: p.attend(i % COPIES, q) for kind, p in prepared.items()}
        best = fastest(runs, clock, repeats)
        results.append({"attention_rows": rows, "tokens": count, "context": context, **best})
        print(f"{rows:3} rows x {count:3} tokens, context {context:3}   {line(best)}")
    return results


def line(best: dict[str, float]) -> str:
    times = "   ".join(f"{kind} {milliseconds:8.3f} ms" for kind, milliseconds in best.items())
    return f"{times}   torch/numba {best['torch'] / best['numba']:5.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--only", default="", help="only linear layers whose name starts so")
    parser.add_argument("--cpu-time", action="store_true", help="the calling thread's CPU time instead of the clock")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    options = parser.parse_args()
    threads = configure_threads(options.threads)
    import torch

    from server.engine.kernels import select_kernels

    if options.cpu_time and threads != 1:
        parser.error("--cpu-time: expected --threads 1")
    clock = time.thread_time if options.cpu_time else time.perf_counter
    kernels = {kind: select_kernels("cpu", torch.float32, kind, threads) for kind in ("torch", "numba")}
    with torch.inference_mode():
        results = list(itertools.chain(
            bench_linear(kernels, clock, options.repeats), bench_attention(kernels, clock, options.repeats)
        ))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
