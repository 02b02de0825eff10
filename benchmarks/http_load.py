"""``serve.py --http``: streaming clients over a real server process, against the engine's own tokens per second.

Owns the server process and the load; knows no other contender. The clients share the machine with the server.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from benchmarks.workload import WORKLOADS, random_prefix, text_prompts
from prefixes.artifact import write_prefix
from prefixes.backbone import load_backbone
from prefixes.event_stream import EventDecoder
from prefixes.registry import open_registry

WORK = WORKLOADS["gpt2"]
CLIENTS = 32
PREFIX = 5


async def stream(client: httpx.AsyncClient, task: str, text: str) -> tuple[float, int]:
    """Stream one request; return the seconds to the first token and the number of tokens."""
    body = {"task": task, "input": text, "parameters": {"max_new_tokens": WORK.new_tokens}, "stream": True}
    began, first, tokens, decoder = time.perf_counter(), 0.0, 0, EventDecoder()
    async with client.stream("POST", "/generate", json=body) as response:
        response.raise_for_status()
        async for piece in response.aiter_bytes():
            for event in filter(None, decoder.feed(piece)):
                if event.name == "token" and not first:
                    first = time.perf_counter() - began
                elif event.name == "error":
                    raise RuntimeError(f"the server answered with an error: {event.data}")
                elif event.name == "done":
                    tokens = json.loads(event.data)["usage"]["output_tokens"]
    return first, tokens


async def load(url: str, seed: int, secret: str | None = None) -> tuple[float, float]:
    """Run all clients, with a key if need be; return total tokens per second and the median time to first token."""
    limits = httpx.Limits(max_connections=CLIENTS)
    headers = {"authorization": f"Bearer {secret}"} if secret else {}
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits, headers=headers) as client:
        began = time.perf_counter()
        texts = text_prompts(WORK, CLIENTS, seed)
        answers = await asyncio.gather(*(stream(client, f"task{i}", text) for i, text in enumerate(texts)))
        seconds = time.perf_counter() - began
    return sum(tokens for _, tokens in answers) / seconds, statistics.median(first for first, _ in answers)


def start_server(folder: Path, registry: Path | str, threads: int) -> tuple[subprocess.Popen[bytes], str]:
    """Start a server on a free port and wait until it is ready; return its process and URL."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    arguments = ["--backbone", str(folder), "--registry", str(registry), "--threads", str(threads)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PREFIXD_")}
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "prefixd", "serve", "--port", str(port), "--admin-port", "0", *arguments],
            stdout=log, stderr=log, env=environment,
        )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    while process.poll() is None:
        try:
            if httpx.get(f"{url}/ready", timeout=5).status_code == 200:
                return process, url
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise RuntimeError(f"the server ended: {(folder / 'server.log').read_text()[-3000:]}")


def compare_http(options: argparse.Namespace, start: Callable[..., Any]) -> dict[str, Any]:
    """Measure server and engine in turns; print and return rates and their ratio."""
    with tempfile.TemporaryDirectory(prefix="prefixd-bench-") as name:
        folder = Path(name)
        WORK.save(folder)
        spec = load_backbone(str(folder)).spec
        registry = open_registry(str(folder / "registry"))
        for task in range(CLIENTS):
            registry.publish("default", f"task{task}", write_prefix(random_prefix(spec, PREFIX, task)), record={})
        engine = start("engine", folder, options)
        process, url = start_server(folder, folder / "registry", options.threads)
        rates: dict[str, list[float]] = {"engine": [], "http": []}
        first_tokens = []
        try:
            for repeat in range(-1, options.repeats):
                engine_rate = engine.run(rows=CLIENTS, beams=1, mode="tasks", prefix=PREFIX, seed=repeat + 1)
                http_rate, first_token = asyncio.run(load(url, repeat + 1))
                if repeat >= 0:
                    rates["engine"].append(engine_rate)
                    rates["http"].append(http_rate)
                    first_tokens.append(first_token)
        finally:
            engine.close()
            process.terminate()
            process.wait(60)
    medians = {kind: statistics.median(values) for kind, values in rates.items()}
    ratio = medians["http"] / medians["engine"]
    print(f"engine alone              {medians['engine']:8.1f} tokens/s")
    print(f"server, {CLIENTS} streams        {medians['http']:8.1f} tokens/s   ratio {ratio:.2f} (target 0.9)")
    print(f"median time to first token {statistics.median(first_tokens):7.2f} s")
    return {"tokens_per_second": medians, "ratio": ratio, "time_to_first_token_s": first_tokens, "repetitions": rates}
