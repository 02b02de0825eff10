"""The direction of imports is the architecture; this test reads it from the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.support.paths import ROOT

PACKAGES = ("prefixes", "server", "trainer")

# What the trainer may use of the server beside its engine: the web helpers, and the one rule for what a version's
# defaults mean, so that a score is of what will be served.
SHARED_WITH_TRAINER = ("server.engine", "server.web", "server.parameters", "server.parameter_schemas")

# Each tree's rooms, from the ground. A room is a module or a folder with all that is in it. A module may import from
# its own room and from rooms on the floors below it; two rooms of one floor do not know each other.
FLOORS: dict[str, tuple[tuple[str, ...], ...]] = {
    "prefixes": (
        (
            "errors", "digest", "files", "event_stream", "strict_json", "byte_level", "leading_space",
            "tokenizer_backends",
        ),
        ("parameters", "fetchable"),
        ("spec",),
        ("actor", "checkpoint_folder", "credentials", "families", "generation_fields", "prompt", "spec_json"),
        ("checkpoint", "fetch", "gguf_file", "tenancy", "usage"),
        ("limiter", "gguf_models"),
        ("generation_config", "gguf_checkpoint"),
        ("artifact", "backbone"),
        ("registry", "formats"),
        ("remote",),
        ("client", "remote_directory", "remote_usage"),
        ("cli",),
    ),
    "prefixes.registry": (
        ("subscription",),
        ("base",),
        ("limits", "changes"),
        ("history", "quota"),
        ("transitions", "deleted", "identity", "failed_tenants"),
        ("records", "store", "stored_json", "listing", "copied_keys", "copied_usage"),
        ("disk", "redis"),
        ("__init__", "copied_audit"),
        ("transfer", "limiter"),
    ),
    "prefixes.tenancy": (
        ("denial", "limits", "secret"),
        ("model", "store"),
        ("records", "changes"),
        ("directory",),
        ("keyring", "hash_file"),
    ),
    "prefixes.limiter": (("base",), ("windows", "charges"), ("memory",), ("shared",)),
    "prefixes.usage": (("model",), ("records", "store", "prices"), ("outbox", "table")),
    "prefixes.registry.disk": (("files",), ("log", "tenancy", "usage"), ("writer",), ("registry",)),
    "prefixes.registry.redis": (
        ("errors", "keys", "scripts", "limiter_scripts", "usage_scripts", "url", "preflight"),
        ("identity", "watch", "blobs"),
        ("tenancy", "limiter", "usage"),
        ("commands",),
        ("reader",),
        ("kept",),
        ("writer",),
        ("gc",),
        ("registry",),
    ),
    "server": (
        ("web", "engine", "labels"),
        ("labelled_series",),
        ("answers", "answer_schemas", "metering", "metrics", "parameters", "settings", "tokenizing", "limit_headers"),
        ("parameter_schemas", "reservations"),
        ("tiers",),
        ("registry",),
        ("schemas",),
        ("service", "key_schemas", "usage_schemas"),
        ("openai",),
        ("request_fields",),
        ("runtime", "uploads"),
        ("routes",),
        ("assembly",),
        ("app",),
        ("lifecycle",),
        ("cli",),
    ),
    "server.engine": (
        ("types", "config", "step_watch"),
        ("observer", "inflow"),
        ("kernels", "memory"),
        ("models", "prefixes", "decoding"),
        ("row",),
        ("scheduling",),
        ("batch", "grouping", "reporter"),
        ("runner",),
        ("postprocess",),
        ("engine",),
        ("async_engine",),
    ),
    "server.engine.kernels": (("base", "frozen", "threads"), ("torch_reference",), ("dense", "numba"), ("__init__",)),
    "server.engine.kernels.numba": (
        ("jit", "checks", "emitter"),
        ("tiles",),
        ("math", "panels", "products", "int8_tile"),
        ("linear", "norm", "rows", "top"),
        ("attention", "int8"),
        ("jobs",),
        ("pool",),
        ("layers", "paged"),
        ("kernels",),
    ),
    "server.engine.models": (("layers",), ("bart", "gpt2", "llama", "t5"), ("__init__",)),
    "trainer": (
        ("data", "jobs"),
        ("client", "evaluation"),
        ("reports",),
        ("training",),
        ("service", "cli"),
        ("demos",),
    ),
    "trainer.evaluation": (("scores", "generate"), ("bootstrap",), ("evaluate", "gate_rule"), ("gate_set",), ("gate",)),
    "trainer.reports": (("content", "style", "svg", "plot", "search"), ("html",), ("report",)),
    "trainer.cli": (
        ("options", "terminal"),
        ("training_options", "train_gate"),
        ("train", "convert", "evaluate", "jobs"),
    ),
    "trainer.cli.jobs": (("target", "display"), ("datasets", "watch"), ("submit", "manage"), ("__init__",)),
    "trainer.service": (
        ("settings", "schemas", "answer_schemas", "process", "metrics", "landlock"),
        ("quotas", "steps", "usage", "current"),
        ("settling", "gating"),
        ("request", "outcome", "progress_writer", "job_service", "job_pages"),
        ("registry_retry", "rights", "run_job", "runtime", "guard", "confinement"),
        ("publishing",),
        ("child", "worker", "routes"),
        ("app", "assembly"),
        ("lifecycle",),
        ("cli",),
    ),
}

TORCH_FREE = (
    "prefixes.spec",
    "prefixes.errors",
    "prefixes.registry.base",
    "prefixes.registry.limiter",
    "prefixes.registry.redis.limiter",
    "server.engine.types",
    "server.engine.row",
    "server.engine.memory.blocks",
    "server.engine.scheduling.encoding",
    "server.engine.scheduling.entrance",
    "server.engine.scheduling.fairness",
    "server.engine.scheduling.prefill",
    "server.engine.scheduling.running_rows",
    "server.engine.scheduling.scheduler",
    "server.engine.scheduling.tenant_queue",
    "server.engine.scheduling.admission",
    "trainer.client.client",
    "trainer.jobs.job",
    "trainer.jobs.open_job",
    "trainer.jobs.turns",
    "trainer.service.confinement",
    "trainer.service.lifecycle",
)


@cache
def modules() -> dict[str, Path]:
    """Every module of ours; a package's own is its ``__init__``."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            found[".".join(path.relative_to(ROOT).with_suffix("").parts)] = path
    return found


def imports(path: Path) -> Iterator[str]:
    """Our own modules that a file imports, also inside functions and for type checking."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        yield from (module_of(name) for name in names if name.split(".")[0] in PACKAGES)


def module_of(name: str) -> str:
    """The module that ``name``, of a module or of something in one, is from."""
    while name:
        for candidate in (name, f"{name}.__init__"):
            if candidate in modules():
                return candidate
        name = name.rpartition(".")[0]
    raise AssertionError("no such module")


def allowed(module: str, imported: str) -> bool:
    package, target = module.split(".")[0], imported.split(".")[0]
    if package == "prefixes":
        return target == "prefixes"
    if package == "trainer":
        return target in ("prefixes", "trainer") or imported.startswith(SHARED_WITH_TRAINER)
    if module.startswith("server.web"):
        return imported.startswith(("prefixes.errors", "prefixes.spec", "prefixes.tenancy", "server.web"))
    if module.startswith("server.engine"):
        return target == "prefixes" or imported.startswith("server.engine")
    return target in ("prefixes", "server")


def place(tree: str, module: str) -> tuple[int, str] | None:
    """Floor and room of a module of ``tree``; None for others."""
    if not module.startswith(f"{tree}."):
        return None
    room = module.removeprefix(f"{tree}.").split(".")[0]
    if room == "__init__" and all(room not in rooms for rooms in FLOORS[tree]):
        return None  # an empty one
    found = [floor for floor, rooms in enumerate(FLOORS[tree]) if room in rooms]
    assert found, f"{module} has no room in FLOORS[{tree!r}]"
    return found[0], room


@pytest.mark.parametrize("module", modules())
def test_imports_point_one_way(module: str) -> None:
    for imported in imports(modules()[module]):
        assert allowed(module, imported), f"{module} must not import {imported}"
        for tree in FLOORS:
            mine, theirs = place(tree, module), place(tree, imported)
            if mine is None or theirs is None or mine[1] == theirs[1]:
                continue
            assert theirs[0] < mine[0], f"{module} must not import {imported}: it is not on a floor below"


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = {module: {name for name in imports(path) if name != module} for module, path in modules().items()}
    while free := {module for module, needed in graph.items() if not needed & graph.keys()}:
        graph = {module: needed for module, needed in graph.items() if module not in free}
    assert not graph, f"these modules are in or above a circle: {sorted(graph)}"


@pytest.mark.parametrize("module", TORCH_FREE)
def test_decisions_are_made_without_torch(module: str) -> None:
    check = f"import sys, {module}; sys.exit('torch is imported' if 'torch' in sys.modules else 0)"
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
