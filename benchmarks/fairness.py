"""What fairness gives a tenant beside a flood, and what it costs: the bundled demo model, one engine, no HTTP.

    python -m benchmarks.fairness [--repeats 7]

A flood of 150 long requests waits when another tenant sends 40 shorter ones. The same requests run twice: each under
its tenant's name, and all under one name, which is the order of arrival. Prints how long the other tenant waits in
steps, and the median of the pairs' ratios of tokens per second of processor time (A B B A ...; on a busy machine the
clock tells nothing), also with the requests spread over 64 tenants, and what the scheduler takes of a step. Writes
benchmarks/results/fairness-<date>.json and the picture docs/images/fairness.svg.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from benchmarks.serve import RESULTS, ROOT, machine
from server.engine.kernels.threads import configure_threads

if TYPE_CHECKING:  # imports torch, after the threads are set
    from server.engine.scheduling.plan import StepPlan

FLOOD, OTHER, AT_STEP = 150, 40, 100
LONG, SHORT = (60, 60), (20, 20)  # tokens of input and output
ROWS: Final = 16
PICTURE = ROOT / "docs" / "images" / "fairness.svg"


@dataclass
class Run:
    """One run to the end: seconds by the clock and of the processor, tokens, those served to each side after each step,
    and the other's waits."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    tokens: int = 0
    served: dict[str, list[int]] = field(default_factory=lambda: {"flood": [], "other": []})
    waits: list[int] = field(default_factory=list)  # steps from submission to the end
    scheduling_us: float = 0.0  # of the processor, a step: the choice of its rows


class Bench:
    """An engine over the demo model that runs the same requests under different tenants' names."""

    def __init__(self, threads: int) -> None:
        configure_threads(threads)
        import torch

        from prefixes.backbone import load_backbone
        from server.engine.config import EngineConfig
        from server.engine.engine import Engine
        from server.engine.kernels import select_kernels

        configure_threads(threads)
        backbone = load_backbone("demo")
        kernels = select_kernels(torch.device("cpu"), torch.float32, "auto", threads, deterministic=True)
        config = EngineConfig(kv_cache_bytes=256 << 20, max_rows=ROWS, deterministic=True, reuse_prompts=False)
        self._vocab = backbone.spec.vocab_size
        self._engine = Engine(backbone, kernels, config, lambda key: [][0])
        self._schedule = self._engine._scheduler.schedule
        self._scheduling = 0.0
        self._engine._scheduler.schedule = self._timed  # type: ignore[method-assign]

    def run(self, tenants: int) -> Run:
        """``tenants`` 1: all under one name. 2: flood and other. More: the requests in turn under so many names."""
        from server.engine.types import Finished, TokenEvent

        made, steps, arrived = Run(), 0, dict[str, int]()
        totals = {"flood": 0, "other": 0}
        self._add("flood", FLOOD, LONG, tenants, arrived, 0)
        self._scheduling = 0.0
        began, cpu_began = time.perf_counter(), time.process_time()
        while self._engine.requests:
            if steps == AT_STEP:
                self._add("other", OTHER, SHORT, tenants, arrived, steps)
            steps += 1
            for event in self._engine.step():
                side = event.request_id.partition(" ")[0]
                if isinstance(event, TokenEvent):
                    totals[side] += len(event.token_ids)
                elif isinstance(event, Finished):
                    totals[side] += event.usage.input_tokens
                    if side == "other":
                        made.waits.append(steps - arrived[event.request_id])
            for side, total in totals.items():
                made.served[side].append(total)
        made.seconds, made.cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
        made.tokens, made.scheduling_us = sum(totals.values()), 1e6 * self._scheduling / steps
        return made

    def _timed(self) -> StepPlan:
        began = time.thread_time()
        plan = self._schedule()
        self._scheduling += time.thread_time() - began
        return plan

    def _add(self, side: str, count: int, sizes: tuple[int, int], tenants: int, arrived: dict[str, int], step: int
             ) -> None:
        from server.engine.types import GenerationRequest, SamplingParams

        length, output = sizes
        params = SamplingParams(max_new_tokens=output, min_new_tokens=output)
        for index in range(count):
            name = f"{side} {index}"
            caller = {1: "all", 2: side}.get(tenants, f"tenant{index % tenants}")
            tokens = tuple((7 * index + 13 * position) % self._vocab for position in range(length))
            self._engine.add(GenerationRequest(name, caller, tokens, params))
            arrived[name] = step


def draw(runs: dict[str, Run]) -> None:
    """Tokens served to both sides over steps, in order of arrival and by counters."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    canvas = FigureCanvasSVG(figure)
    for panel, (title, run) in zip(figure.subplots(1, 2, sharey=True), runs.items(), strict=True):
        for side, colour in (("flood", "tab:gray"), ("other", "tab:blue")):
            panel.plot(run.served[side], color=colour, label=side)
        panel.axvline(AT_STEP, color="black", linewidth=0.6, linestyle=":")
        panel.set_title(title)
        panel.set_xlabel("step")
        panel.legend(loc="upper left")
    figure.axes[0].set_ylabel("tokens served")
    picture = io.StringIO()
    with rc_context({"svg.hashsalt": "prefixd"}):
        canvas.print_svg(picture, metadata={"Date": None})
    PICTURE.write_text("\n".join(line.rstrip() for line in picture.getvalue().splitlines()) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    facts, bench = machine(), Bench(options.threads)
    shown = {"in order of arrival": bench.run(1), "by tenants' counters": bench.run(2)}
    draw(shown)
    for title, run in shown.items():
        print(f"{title:24} other waits {statistics.median(run.waits):.0f} steps (median), {max(run.waits)} at most")
    ratios: dict[int, list[tuple[float, float]]] = {2: [], 64: []}
    scheduling: dict[int, list[float]] = {1: [], 2: [], 64: []}
    for repeat in range(options.repeats):
        for tenants, found in ratios.items():
            order = (1, tenants) if repeat % 2 else (tenants, 1)
            runs = {which: bench.run(which) for which in order}
            for which, run in runs.items():
                scheduling[which].append(run.scheduling_us)
            found.append((runs[1].cpu_seconds / runs[tenants].cpu_seconds, runs[1].seconds / runs[tenants].seconds))
    medians = {tenants: [statistics.median(each) for each in zip(*found, strict=True)]
               for tenants, found in ratios.items()}  # fmt: skip
    for tenants, (cpu, clock) in medians.items():
        print(f"tokens per second, {tenants} tenants / order of arrival: {cpu:.3f}, by the clock {clock:.3f}")
    for tenants, costs in scheduling.items():
        print(f"scheduling of a step, {tenants} tenants: {statistics.median(costs):.0f} us")
    result: dict[str, Any] = {
        "scheduling_us_a_step": scheduling,
        "waits_in_steps": {title: sorted(run.waits) for title, run in shown.items()},
        "ratios_of_tokens_per_second_cpu_clock": ratios,
        "median_ratio_cpu_clock": medians,
    }
    path = RESULTS / f"fairness-{time.strftime('%Y%m%d-%H%M%S')}.json"
    path.write_text(json.dumps({"machine": facts, **result}, indent=1) + "\n")
    print(f"{facts['cpu']}, {facts['cores']} cores, load {facts['load_before']:.1f} before; written to {path}")


if __name__ == "__main__":
    main()
