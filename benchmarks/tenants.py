"""What keys, limits and usage cost: a server that needs them beside one that is open, 32 streaming clients at each.

    python -m benchmarks.tenants [--repeats 7] [--redis redis://…/0 redis://…/1]

Both servers run the same backbone, GPT-2 small with random weights, with the same 32 tasks; the load goes to one after
the other, A B B A ... The closed server's key has every limit, none of which is reached. Both registries are folders,
or two empty Redis; limits and usage then are calls over a socket. Prints and writes the medians of the pairs' ratios,
closed over open, of tokens per second and of tokens per second of the server's processor time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.http_load import CLIENTS, PREFIX, WORK, load, start_server
from benchmarks.serve import RESULTS, machine
from benchmarks.workload import random_prefix
from prefixes.artifact import write_prefix
from prefixes.backbone import load_backbone
from prefixes.registry import open_registry
from prefixes.tenancy.directory import Directory
from prefixes.tenancy.limits import NAMES
from server.engine.kernels.threads import available_cores

FAR: Final = 10**9
"""A limit that is counted and never reached."""
TARGET: Final = 0.97


@dataclass
class Served:
    """One of the two servers, and what its runs gave."""

    name: str
    process: subprocess.Popen[bytes]
    url: str
    secret: str | None

    def run(self, seed: int) -> dict[str, float]:
        """One load: tokens per second, and per second of the server's processor time."""
        before, began = self._cpu_seconds(), time.perf_counter()
        rate, first = asyncio.run(load(self.url, seed, self.secret))
        tokens = rate * (time.perf_counter() - began)
        return {"rate": rate, "first_token_s": first, "per_cpu_second": tokens / (self._cpu_seconds() - before)}

    def _cpu_seconds(self) -> float:
        user, system = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def start(name: str, folder: Path, registry: str, threads: int) -> Served:
    """A server on a registry with the tasks; "closed" has a key with every limit."""
    spec = load_backbone(str(folder)).spec
    store = open_registry(registry, create=True)
    for task in range(CLIENTS):
        store.publish("default", f"task{task}", write_prefix(random_prefix(spec, PREFIX, task)), record={})
    secret = None
    if name == "closed":
        directory = Directory(store.tenancy)
        made = directory.create_key("default", "bench", ["generate"], actor="bench")
        secret, every = made.secret, dict.fromkeys(NAMES, FAR)
        directory.limit_tenant("default", every, actor="bench")
        directory.limit_key(made.key.id, every, actor="bench")
    store.close()
    process, url = start_server(folder, registry, threads)
    return Served(name, process, url, secret)


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Measure both in turns; return every run and the median ratios."""
    runs: dict[str, list[dict[str, float]]] = {"open": [], "closed": []}
    redis = dict(zip(runs, options.redis, strict=False))
    with tempfile.TemporaryDirectory(prefix="prefixd-bench-") as name, ExitStack() as stack:
        servers = []
        for which in runs:
            folder = Path(name) / which
            folder.mkdir()
            WORK.save(folder)
            registry = redis[which] if redis else str(folder / "registry")
            servers.append(start(which, folder, registry, options.threads))
            stack.callback(_end, servers[-1].process)
        for repeat in range(-1, options.repeats):
            for served in servers if repeat % 2 else reversed(servers):
                got = served.run(repeat + 1)
                if repeat >= 0:  # the first round warms up
                    runs[served.name].append(got)
            print(f"round {repeat + 1} of {options.repeats} done", file=sys.stderr)
    ratios = {
        kind: statistics.median(
            closed[kind] / opened[kind] for opened, closed in zip(runs["open"], runs["closed"], strict=True)
        )
        for kind in ("rate", "per_cpu_second")
    }
    return {"ratios": ratios, "runs": runs}


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    process.wait(60)


def main() -> None:
    """Run, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument(
        "--redis", nargs=2, default=(), metavar=("OPEN", "CLOSED"), help="URLs of two empty Redis for the registries"
    )
    options = parser.parse_args()
    facts, result = machine(), compare(options)
    place = "Redis" if options.redis else "a folder"
    for kind, ratio in result["ratios"].items():
        print(f"{CLIENTS} streams, closed on {place} / open, {kind:15} {ratio:6.3f} (target {TARGET})")
    path = RESULTS / f"tenants-{time.strftime('%Y%m%d-%H%M%S')}.json"
    path.write_text(json.dumps({"machine": facts, "registry": place, **result}, indent=1) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
