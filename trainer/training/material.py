"""What every trial of a run shares: the backbone, its model, the data, and the plan of the prefix.

Owns their reading and checks, before anything is trained; knows no folder and no search.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from prefixes.backbone import Backbone, load_backbone
from prefixes.errors import BackboneError
from prefixes.spec import PrefixSpec
from prefixes.spec_json import spec_to_dict
from server.engine.kernels.dense import DenseKernels
from server.engine.models import Model, load_model
from trainer.data.dataset import Dataset, shared_inputs
from trainer.data.sequences import TokenExample, Tokenized, tokenize
from trainer.training.config import TrainConfig
from trainer.training.initial import InitialVersion
from trainer.training.loop import Trainer
from trainer.training.plan import plan_prefix
from trainer.training.request import RunRequest, read_datasets
from trainer.training.search import LENGTHS


@dataclass(frozen=True)
class Material:
    """``plan`` has the greatest length that the run may try: all of its trials learn from sequences that fit it."""

    request: RunRequest
    backbone: Backbone
    plan: PrefixSpec
    lengths: tuple[int, ...]  # the most plausible first
    train_set: Dataset
    validation_set: Dataset

    @classmethod
    def read(cls, request: RunRequest) -> Material:
        """Read data and backbone. Raises what speaks against the run."""
        train_set, validation_set = read_datasets(request)
        backbone = load_backbone(
            request.backbone, dtype=getattr(torch, request.dtype), device=request.device,
            ignore_generation_config=request.ignore_generation_config,
        )  # fmt: skip
        if not backbone.eos_token_ids:
            raise BackboneError(f"backbone {request.backbone!r}: expected an end-of-text token to learn, got none")
        lengths = lengths_of(request, backbone)
        longest = replace(request.config, prefix_length=max(lengths))
        plan = plan_prefix(longest, backbone, request.template, request.defaults)
        # What no artifact can hold is refused now, not after the last step.
        spec_to_dict(replace(plan, origin={"hyperparameters": request.config.as_dict(), "backbone": request.backbone}))
        if request.initial is not None:
            request.initial.check(backbone, plan)
        return cls(request, backbone, plan, lengths, train_set, validation_set)

    @property
    def identity(self) -> dict[str, str]:
        """Names backbone, template, data and the order of its batches, which was once another."""
        named = {
            "backbone": self.backbone.spec.fingerprint,
            "template": self.plan.template,
            "data": self.train_set.digest,
            "validation": self.validation_set.digest,
            "batches": "shuffled",
        }
        initial = self.request.initial
        return named if initial is None else named | {"initial": json.dumps(initial.as_dict(), sort_keys=True)}

    @cached_property
    def train(self) -> Tokenized:
        """The training data's sequences. Raises InvalidData."""
        return self._tokenized(self.train_set)

    @cached_property
    def validation(self) -> Tokenized:
        """The held-out data's sequences. Raises InvalidData."""
        return self._tokenized(self.validation_set)

    @property
    def warnings(self) -> list[str]:
        """What makes the scores of this run worth less."""
        shared, inputs = shared_inputs(self.train_set, self.validation_set)
        if not shared:
            return []
        return [
            f"{shared} of the {inputs} held-out inputs are training inputs too: losses and scores on them are better "
            "than on unseen inputs"
        ]

    def trainer(
        self,
        config: TrainConfig,
        checkpoint: Path | None,
        train: Sequence[TokenExample],
        validation: Sequence[TokenExample],
    ) -> Trainer:
        """A run of ``config`` over these sequences."""
        return Trainer(
            config,
            self.plan_of(config),
            self.backbone,
            self._model,
            train,
            validation,
            identity=json.dumps(self.identity),
            checkpoint=checkpoint,
            initial=self.request.initial,
            autocast=self._autocast,
        )

    def plan_of(self, config: TrainConfig) -> PrefixSpec:
        """The plan of a prefix of ``config``'s length."""
        return plan_prefix(config, self.backbone, self.request.template, self.request.defaults)

    @property
    def _autocast(self) -> torch.dtype | None:
        return torch.bfloat16 if self.request.autocast else None

    @cached_property
    def _model(self) -> Model:
        return load_model(self.backbone, DenseKernels(self._autocast))

    def _tokenized(self, data: Dataset) -> Tokenized:
        request = self.request
        return tokenize(self.backbone, self.plan, data, drop_long=request.drop_long, truncate=request.truncate)


def lengths_of(request: RunRequest, backbone: Backbone) -> tuple[int, ...]:
    """The lengths to try: those that leave the window to the input for the most part, or the one that is asked for."""
    asked = request.config.prefix_length
    if request.auto is None or "prefix_length" in request.auto.fixed or isinstance(request.initial, InitialVersion):
        return (asked,)
    return tuple(length for length in LENGTHS if 4 * length <= backbone.spec.max_positions) or (asked,)
