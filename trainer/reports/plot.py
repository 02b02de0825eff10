"""The loss curve of a run as a PNG. Owns the picture; knows nothing of how the losses came about."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefixes.files import write_bytes


def plot_losses(path: Path, metrics: Sequence[Mapping[str, Any]]) -> None:
    """Training loss (left axis) and validation loss per token (right axis) by step."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    canvas = FigureCanvasAgg(figure)  # no display, no global state
    training = figure.subplots()
    training.plot([line["step"] for line in metrics], [line["loss"] for line in metrics], color="tab:blue")
    training.set_xlabel("step")
    training.set_ylabel("training loss", color="tab:blue")
    measured = [(line["step"], line["validation_loss"]) for line in metrics if "validation_loss" in line]
    if measured:
        validation = training.twinx()
        validation.plot(*zip(*measured, strict=True), color="tab:orange", marker="o")
        validation.set_ylabel("validation loss per token", color="tab:orange")
    picture = io.BytesIO()
    canvas.print_png(picture)
    write_bytes(path, picture.getvalue())
