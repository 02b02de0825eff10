"""The gate's step in a job's process: judges the finished version, or reads the verdict of an earlier process.

Owns the verdict's file. The worker has brought the version to compare with, and moves the alias. Knows no registry.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch

from prefixes.artifact import read_prefix
from prefixes.backbone import load_backbone
from prefixes.files import write_json
from trainer.evaluation.gate_rule import Rule, after_moves
from trainer.evaluation.generate import Report
from trainer.service.current import CURRENT
from trainer.training.gate import gate_of
from trainer.training.request import RunRequest

GATE: Final = "gate.json"


def gated(
    folder: Path, asked: Mapping[str, Any], run: RunRequest, artifact: bytes, threads: int | None, report: Report
) -> Mapping[str, Any]:
    """Return the outcome of the gate that the worker ``asked`` for, as JSON values. Raises what ``report`` raises."""
    current: str | None = asked["current"]
    found: Mapping[str, Any] = json.loads((folder / GATE).read_text()) if (folder / GATE).exists() else {}
    if found.get("current", "") != current:  # none yet, or of where the alias pointed before
        data = None if asked["data"] is None else Path(asked["data"])
        gate = gate_of(run, artifact, Rule(**asked["rule"]), asked["preset"], data)
        backbone = load_backbone(
            run.backbone, dtype=getattr(torch, run.dtype), device=run.device,
            ignore_generation_config=run.ignore_generation_config,
        )  # fmt: skip
        prefix = None if current is None else read_prefix((folder / CURRENT).read_bytes(), expected_version=current)
        found = gate.judge(backbone, prefix, threads=threads, report=report).as_dict()
        write_json(folder / GATE, found)
    return after_moves(found, asked["moves"])
