"""What a training run is asked for, and the data that this means.

Owns the request's checks and its JSON, by which a resumed run knows itself. Knows no model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final

import torch

from prefixes.errors import InvalidParameter
from prefixes.spec import split_template
from server.parameters import WITHOUT_LIMITS, check_defaults
from trainer.data.dataset import Dataset, read_dataset
from trainer.data.seen import SeenInputs, seen_by
from trainer.training.budget import Auto, check_held_out
from trainer.training.config import RANDOM, TrainConfig
from trainer.training.initial import Initial, InitialVersion

DTYPES: Final = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class RunRequest:
    """Everything that decides the result. Without ``validation``, ``hold_out`` percent of the inputs validate.

    ``initial`` is a text or version to start from, in place of ``config.init``. ``autocast``: matrix products in
    bfloat16, the rest in float32; None means yes for a float32 model on a GPU, else no.
    """

    data: Path
    backbone: str
    template: str | None  # None: the backbone's usual one
    output: Path
    config: TrainConfig
    validation: Path | None = None
    hold_out: int = 5
    gate_hold_out: int = 0  # percent of the inputs that are for a gate alone
    defaults: Mapping[str, Any] = field(default_factory=dict)
    drop_long: bool = False
    truncate: bool = False  # cut inputs that are too long
    device: str = "cpu"
    dtype: str = "float32"
    autocast: bool | None = None
    initial: Initial | None = None
    ignore_generation_config: Sequence[str] = ()  # fields of the backbone's
    auto: Auto | None = None  # search for what is not fixed

    def __post_init__(self) -> None:
        if self.template is not None:
            split_template(self.template)
        check_defaults(self.defaults, {}, WITHOUT_LIMITS)
        if self.dtype not in DTYPES:
            raise InvalidParameter(f"dtype: expected {' or '.join(DTYPES)}, got {self.dtype!r}", got=self.dtype)
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:  # an unknown name, or a torch built without it
            reason = str(error).splitlines()[0][:120]
            raise InvalidParameter(f"device {self.device!r}: expected one that torch has here, got: {reason}") from None
        default = torch.device(self.device).type == "cuda" and self.dtype == "float32"
        object.__setattr__(self, "autocast", default if self.autocast is None else self.autocast)
        if self.autocast and self.dtype != "float32":
            raise InvalidParameter(f"autocast: expected a float32 model to compute in bfloat16, got {self.dtype}")
        if self.initial is not None and self.config.init != RANDOM:
            raise InvalidParameter("init: expected words or examples, or a text or version to start from, got both")
        if self.validation is None:
            check_held_out(self.hold_out, self.config, self.auto)

    def as_dict(self) -> dict[str, Any]:
        """JSON values; a text or version to start from is named by its digest."""
        plain = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        # A run may move to other folders and devices. The fingerprint in its identity names the backbone.
        for place in ("output", "backbone", "device", "ignore_generation_config"):
            del plain[place]
        if not self.gate_hold_out:
            del plain["gate_hold_out"]  # as in the runs of a release without it
        paths = {name: None if plain[name] is None else plain[name].name for name in ("data", "validation")}
        initial = None if self.initial is None else self.initial.as_dict()
        plain["auto"] = None if self.auto is None else self.auto.as_dict()
        return plain | paths | {"config": self.config.as_dict(), "defaults": dict(self.defaults), "initial": initial}


def read_datasets(request: RunRequest) -> tuple[Dataset, Dataset]:
    """Read training and validation data. The validation part is empty only for ``hold_out`` 0.

    Raises InvalidParameter if there are too few inputs for both parts.
    """
    everything, _ = read_dataset(request.data).split_gate(request.gate_hold_out)
    if request.validation is not None:
        return everything, read_dataset(request.validation)
    train, held_out = everything.split(request.hold_out)
    if not train.examples or (request.hold_out and not held_out.examples):
        inputs = len({example.input for example in everything.examples})
        raise InvalidParameter(
            f"hold_out: expected both sides of the split to get some of the {inputs} inputs of {everything.name}, got "
            f"none to {'validate on' if train.examples else 'train on'} with {request.hold_out} percent; give "
            "--validation FILE, or --hold-out 0 to keep the last prefix unvalidated",
            got=request.hold_out,
        )
    return train, held_out


def seen_inputs(request: RunRequest, *data: Dataset) -> SeenInputs:
    """The inputs of the ``data`` that a run trains and validates on, and those of the version that it starts from."""
    seen = SeenInputs.of(example.input for part in data for example in part.examples)
    if isinstance(request.initial, InitialVersion):
        return seen.with_start(seen_by(request.initial.prefix.spec.origin))
    return seen
