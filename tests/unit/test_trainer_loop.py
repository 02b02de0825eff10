"""The training loop: it learns, it leaves the backbone alone, and it resumes exactly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from prefixes.artifact import read_prefix, write_prefix
from prefixes.backbone import Backbone
from prefixes.errors import InvalidParameter
from tests.support.trainer import TEMPLATE, tiny_backbone, tiny_model, toy_examples, toy_trainer, weights_digest
from trainer.checkpoint import CheckpointError, load_state
from trainer.config import TrainConfig, linear_schedule
from trainer.data import collate
from trainer.export import fold, unfold
from trainer.loop import Progress, TrainingDiverged, forward_logits
from trainer.reparam import PrefixKV

DIRECT = TrainConfig(
    prefix_length=4, method="direct", init="Blue Spice", epochs=6, batch_size=5, learning_rate=0.05, seed=2
)
MLP = TrainConfig(prefix_length=3, middle=16, epochs=6, batch_size=5, learning_rate=0.01, validate_every=3)


class Killed(Exception):
    pass


@pytest.fixture
def backbone(tmp_path: Path) -> Backbone:
    return tiny_backbone(tmp_path / "backbone", torch.float32)


def same(one: PrefixKV, other: PrefixKV) -> bool:
    return all(torch.equal(a, b) for site in one for a, b in zip(one[site], other[site], strict=True))


@pytest.mark.parametrize("config", [DIRECT, MLP], ids=["direct", "mlp"])
def test_training_lowers_the_loss_and_changes_no_tensor_of_the_backbone(
    backbone: Backbone, config: TrainConfig
) -> None:
    before = weights_digest(backbone)
    trainer = toy_trainer(backbone, TrainConfig(**{**config.as_dict(), "epochs": 40}))
    losses: list[float] = []
    trainer.run(lambda progress: losses.append(progress.loss))
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4]), "the last epoch against the first"
    assert weights_digest(backbone) == before
    assert all(parameter.grad is None for parameter in backbone.model.parameters())
    assert not backbone.model.training


@pytest.mark.parametrize("config", [DIRECT, MLP], ids=["direct", "mlp"])
@pytest.mark.parametrize("killed_at", [5, 14])
def test_a_resumed_run_ends_in_the_same_prefix_bit_for_bit(
    backbone: Backbone, config: TrainConfig, killed_at: int, tmp_path: Path
) -> None:
    config = TrainConfig(**{**config.as_dict(), "checkpoint_every": 2})
    whole = toy_trainer(backbone, config, tmp_path / "whole.safetensors")
    expected = whole.run()

    def kill(progress: Progress) -> None:
        if progress.step == killed_at:
            raise Killed

    with pytest.raises(Killed):
        toy_trainer(backbone, config, tmp_path / "cut.safetensors").run(kill)
    torch.manual_seed(999)  # a new process starts with other random numbers
    resumed = toy_trainer(backbone, config, tmp_path / "cut.safetensors")
    steps: list[int] = []
    got = resumed.run(lambda progress: steps.append(progress.step))
    assert steps[0] == killed_at - killed_at % 2 + (1 if killed_at % 2 else -1), "starts after the last checkpoint"
    assert same(got, expected)
    assert resumed.state == whole.state


def test_a_checkpoint_of_another_configuration_or_data_is_refused(backbone: Backbone, tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    toy_trainer(backbone, DIRECT, path).run()
    other = TrainConfig(**{**DIRECT.as_dict(), "learning_rate": 0.01})
    with pytest.raises(CheckpointError, match="expected config"):
        toy_trainer(backbone, other, path).run()


def test_the_best_validated_prefix_is_kept_not_the_last(backbone: Backbone) -> None:
    config = TrainConfig(**{**DIRECT.as_dict(), "validate_every": 1, "learning_rate": 0.3})
    trainer = toy_trainer(backbone, config)
    seen: list[float] = []
    trainer.run(lambda progress: seen.append(progress.validation_loss or 0.0))
    assert trainer.state.best_loss == min(seen)
    assert trainer.state.best_step == seen.index(min(seen)) + 1


def test_a_diverging_run_stops_with_a_named_error(backbone: Backbone) -> None:
    trainer = toy_trainer(backbone, TrainConfig(**{**DIRECT.as_dict(), "init": "random", "learning_rate": 1e30}))
    with pytest.raises(TrainingDiverged, match="expected a finite loss"):
        trainer.run()


@pytest.mark.parametrize("config", [DIRECT, MLP], ids=["direct", "mlp"])
def test_the_exported_artifact_reproduces_the_logits_in_memory_exactly(
    backbone: Backbone, config: TrainConfig
) -> None:
    trainer = toy_trainer(backbone, TrainConfig(**{**config.as_dict(), "epochs": 1, "validate_every": 0}))
    trainer.run()
    kv = trainer.prefix()  # the parameters themselves, the MLP not folded
    data = write_prefix(fold(kv, backbone, template=TEMPLATE, defaults={"num_beams": 1}, origin={"method": "test"}))
    reloaded = read_prefix(data)
    assert reloaded.spec.sites["decoder"].positions == "shifted"
    batch = collate(toy_examples(backbone)[:6], backbone.pad_token_id)
    model, length = tiny_model(backbone), config.prefix_length
    in_memory = forward_logits(model, batch, kv, length)
    assert torch.equal(forward_logits(model, batch, unfold(reloaded), length), in_memory)
    other = {site: (key + 0.01, value) for site, (key, value) in unfold(reloaded).items()}
    assert not torch.equal(forward_logits(model, batch, other, length), in_memory)


def test_a_checkpoint_has_no_pickle_and_every_number_of_the_state(backbone: Backbone, tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    trainer = toy_trainer(backbone, MLP, path)
    trainer.run()
    tensors, meta = load_state(path)
    assert meta["state"] == vars(trainer.state)
    assert {"best.decoder.key", "best.decoder.value"} < tensors.keys()
    assert not [entry for entry in tmp_path.iterdir() if entry.name.endswith(".part.safetensors")]


def test_linear_schedule_rises_over_the_warm_up_and_falls_to_zero() -> None:
    assert [linear_schedule(step, 4, 0) for step in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert [linear_schedule(step, 6, 2) for step in range(7)] == [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0]


@pytest.mark.parametrize(
    "options",
    [{"learning_rate": 0}, {"epochs": -1}, {"frozen_positions": 1}, {"method": "magic"}, {"warmup_steps": -1}],
)
def test_impossible_options_are_refused(options: dict[str, int | str]) -> None:
    with pytest.raises(InvalidParameter, match="expected"):
        TrainConfig.of("e2e", options)
