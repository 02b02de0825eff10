"""The direction of imports is the architecture; this test reads it from the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import ROOT

PACKAGES = ("prefixes", "server", "trainer")

# What the trainer may use of the server beside its engine: the web helpers, and the one rule for what a version's
# defaults mean, so that a score is of what will be served.
SHARED_WITH_TRAINER = (
    "server.engine", "server.web", "server.parameters",
)  # fmt: skip

# server/engine, lowest first: a module may import from its own line and from lines above it.
ENGINE_LAYERS = (
    ("types", "config", "observer", "token_rules", "heap", "kernels"),
    ("blocks", "noise", "detokenizer", "models", "beams", "processors", "tables"),
    ("prompt_reuse", "prefix_loader", "prefix_store", "sequence", "encoding", "sampler"),
    ("scheduler", "reporter"),
    ("runner", "admission", "advance"),
    ("engine",),
    ("async_engine",),
)

TORCH_FREE = (
    "prefixes.spec",
    "prefixes.errors",
    "prefixes.registry.base",
    "server.engine.types",
    "server.engine.memory.blocks",
    "server.engine.scheduling.encoding",
    "server.engine.scheduling.scheduler",
    "server.engine.scheduling.admission",
    "trainer.jobs.job",
    "trainer.service.lifecycle",
)


def modules() -> Iterator[tuple[str, Path]]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(part for part in parts if part != "__init__"), path


def imports(path: Path) -> Iterator[str]:
    """Our own modules that a file imports, also inside functions and for type checking."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module or ""]
            if node.module and (ROOT / node.module.replace(".", "/")).is_dir():
                names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] in PACKAGES)


def allowed(module: str, imported: str) -> bool:
    package, target = module.split(".")[0], imported.split(".")[0]
    if package == "prefixes":
        return target == "prefixes"
    if package == "trainer":
        return target in ("prefixes", "trainer") or imported.startswith(SHARED_WITH_TRAINER)
    if module.startswith("server.web"):
        return imported == "prefixes.errors" or imported.startswith(("prefixes.spec", "server.web"))
    if module.startswith("server.engine"):
        return target == "prefixes" or imported.startswith("server.engine")
    return target in ("prefixes", "server")


def engine_layer(module: str) -> int | None:
    if not module.startswith("server.engine."):
        return None
    name = module.split(".")[2]
    found = [index for index, names in enumerate(ENGINE_LAYERS) if name in names]
    assert found, f"{module} has no place in ENGINE_LAYERS"
    return found[0]


@pytest.mark.parametrize(("module", "path"), list(modules()), ids=lambda value: value if isinstance(value, str) else "")
def test_imports_point_one_way(module: str, path: Path) -> None:
    for imported in imports(path):
        assert allowed(module, imported), f"{module} must not import {imported}"
        mine, theirs = engine_layer(module), engine_layer(imported)
        assert mine is None or theirs is None or theirs <= mine, f"{module} must not import {imported}: it stands above"


@pytest.mark.parametrize("module", TORCH_FREE)
def test_decisions_are_made_without_torch(module: str) -> None:
    check = f"import sys, {module}; sys.exit('torch is imported' if 'torch' in sys.modules else 0)"
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
