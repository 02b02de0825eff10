"""The gate of a finished run: which inputs it has, and which ones the run has seen. Owns nothing of how it judges."""

from __future__ import annotations

from pathlib import Path

from prefixes.artifact import read_prefix
from trainer.data.dataset import read_dataset
from trainer.evaluation.gate import Gate
from trainer.evaluation.gate_rule import Rule
from trainer.training.request import RunRequest, read_datasets, seen_inputs


def gate_of(run: RunRequest, artifact: bytes, rule: Rule, preset: str, data: Path | None) -> Gate:
    """Return the gate for what the run has made, with inputs of ``data`` or of the share that the run held out."""
    if data is None:
        _, inputs = read_dataset(run.data).split_gate(run.gate_hold_out)
    else:
        inputs = read_dataset(data)
    return Gate(rule, preset, inputs, read_prefix(artifact), seen_inputs(run, *read_datasets(run)))
