"""The training loop: it learns, it leaves the backbone alone, and it resumes exactly."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from prefixes.artifact import read_prefix, write_prefix
from prefixes.backbone import Backbone
from prefixes.errors import InvalidParameter
from prefixes.files.folder import TEMPORARY
from prefixes.spec import Site
from tests.support.trainer import (
    FAMILIES,
    forward_logits,
    tiny_backbone,
    tiny_model,
    toy_examples,
    toy_plan,
    toy_trainer,
    weights_digest,
)
from trainer.data.errors import TrainingStopped
from trainer.data.sequences import collate
from trainer.training import loop
from trainer.training.checkpoint import CheckpointError, load_state
from trainer.training.config import TrainConfig, linear_schedule
from trainer.training.export import fold, unfold
from trainer.training.loop import Progress, TrainingDiverged
from trainer.training.reparam import PrefixKV

DIRECT = TrainConfig(
    prefix_length=4, method="direct", init="Blue Spice", epochs=6, batch_size=5, learning_rate=0.05, seed=2
)
MLP = TrainConfig(prefix_length=3, middle=16, epochs=6, batch_size=5, learning_rate=0.01, validate_every=3)
PARTS = TrainConfig(**{**MLP.as_dict(), "accumulate": 3, "checkpoint_activations": True})


class Killed(Exception):
    pass


@pytest.fixture(params=FAMILIES)
def backbone(request: pytest.FixtureRequest, tmp_path: Path) -> Backbone:
    return tiny_backbone(tmp_path / "backbone", torch.float32, request.param)


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


@pytest.mark.parametrize("config", [DIRECT, MLP, PARTS], ids=["direct", "mlp", "parts"])
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
    spent = load_state(tmp_path / "cut.safetensors")[1]["state"]["seconds"]
    resumed = toy_trainer(backbone, config, tmp_path / "cut.safetensors")
    steps: list[int] = []
    got = resumed.run(lambda progress: steps.append(progress.step))
    assert steps[0] == killed_at - killed_at % 2 + (1 if killed_at % 2 else -1), "starts after the last checkpoint"
    assert same(got, expected)
    assert replace(resumed.state, seconds=0) == replace(whole.state, seconds=0)
    assert resumed.state.seconds > spent > 0, "what it took before the kill counts"


def test_the_same_seed_gives_the_same_prefix_bit_for_bit_and_another_seed_another(backbone: Backbone) -> None:
    config = TrainConfig(**{**PARTS.as_dict(), "epochs": 1})
    torch.manual_seed(1)
    first = toy_trainer(backbone, config).run()
    torch.manual_seed(2)  # the process's own random numbers do not matter
    assert same(toy_trainer(backbone, config).run(), first)
    assert not same(toy_trainer(backbone, TrainConfig(**{**config.as_dict(), "seed": 5})).run(), first)


def test_progress_counts_the_tokens_through_the_model_and_those_learnt(backbone: Backbone, tmp_path: Path) -> None:
    config, path = TrainConfig(**{**MLP.as_dict(), "epochs": 2, "checkpoint_every": 1}), tmp_path / "state.safetensors"
    examples, seen = toy_examples(backbone)[:18], list[Progress]()

    def kill(progress: Progress) -> None:
        seen.append(progress)
        if progress.step == 3:
            raise Killed

    with pytest.raises(Killed):
        toy_trainer(backbone, config, path).run(kill)
    toy_trainer(backbone, config, path).run(seen.append)
    assert seen[-1].step == seen[-1].total
    read = sum(len(example.ids) - 1 + len(example.input_ids) for example in examples)
    learnt = sum(len(example.ids) - example.start for example in examples)
    assert (seen[-1].tokens, seen[-1].learnt) == (2 * read, 2 * learnt), "a resumed run counts on"
    counts = [progress.tokens for progress in seen if progress.step != 3]
    assert counts == sorted(counts) and counts[0] > 0


def test_a_stop_takes_effect_before_the_next_step_and_the_run_goes_on_from_its_checkpoint(
    backbone: Backbone, tmp_path: Path
) -> None:
    config, path = TrainConfig(**{**DIRECT.as_dict(), "checkpoint_every": 2}), tmp_path / "state.safetensors"
    expected = toy_trainer(backbone, config).run()
    steps: list[int] = []
    with pytest.raises(TrainingStopped, match="before step 6 of") as stopped:
        toy_trainer(backbone, config, path).run(lambda seen: steps.append(seen.step), lambda: steps[-1:] == [5])
    assert (stopped.value.code, steps) == ("cancelled", [1, 2, 3, 4, 5])
    steps.clear()
    assert same(toy_trainer(backbone, config, path).run(lambda seen: steps.append(seen.step)), expected)
    assert steps[0] == 6, "goes on behind the stop"


def test_nothing_is_lost_wherever_a_stop_comes_also_within_a_validation(backbone: Backbone, tmp_path: Path) -> None:
    config = TrainConfig(**{**DIRECT.as_dict(), "validate_every": 2, "checkpoint_every": 10_000})
    expected, unbroken = list[Progress](), toy_trainer(backbone, config)
    best = unbroken.run(expected.append)
    path, seen, stops = tmp_path / "state.safetensors", list[Progress](), 0
    while True:
        asked = iter(range(2 + stops % 4))  # within a validation, which asks too, and between steps

        def stop() -> bool:
            return next(asked, None) is None  # noqa: B023

        trainer = toy_trainer(backbone, config, path)
        try:
            resumed = trainer.run(seen.append, stop)
            break
        except TrainingStopped as stopped:
            stops += 1
            assert path.exists() and f"before step {trainer.state.step + 1} of" in stopped.message
        assert stops < 200, "each attempt gets further"
    assert stops > 3
    assert seen == expected, "each step once, with its loss, rate and validation"
    assert same(resumed, best)
    assert trainer.state.metrics == unbroken.state.metrics


def test_a_stop_takes_effect_within_a_validation_and_within_an_initialisation(backbone: Backbone) -> None:
    asked = 0

    def third() -> bool:
        nonlocal asked
        asked += 1
        return asked == 3

    words = TrainConfig(**{**MLP.as_dict(), "init": "Blue Spice"})
    with pytest.raises(TrainingStopped, match="before step 1 of"):
        toy_trainer(backbone, words).run(should_stop=third)
    validated: list[float | None] = []
    every = TrainConfig(**{**MLP.as_dict(), "validate_every": 1, "checkpoint_every": 1})
    asked = 1  # the next question but one is the first validation's
    with pytest.raises(TrainingStopped, match="before step 2 of"):
        toy_trainer(backbone, every).run(lambda seen: validated.append(seen.validation_loss), third)
    assert (asked, validated) == (3, [])


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
def test_the_exported_artifact_reproduces_the_logits_in_memory_exactly(backbone: Backbone, config: TrainConfig) -> None:
    trainer = toy_trainer(backbone, TrainConfig(**{**config.as_dict(), "epochs": 1, "validate_every": 0}))
    trainer.run()
    kv = trainer.prefix()  # the parameters themselves, the MLP not folded
    plan = toy_plan(backbone, config)
    reloaded = read_prefix(write_prefix(fold(kv, plan, {"method": "test"})))
    assert reloaded.spec.sites == plan.sites
    batch = collate(toy_examples(backbone)[:6])
    model = tiny_model(backbone)
    in_memory = forward_logits(model, batch, kv, plan)
    read = unfold(reloaded)
    assert torch.equal(forward_logits(model, batch, read, reloaded.spec), in_memory)
    for site, (key, value) in read.items():
        changed: PrefixKV = {**read, site: (key + 0.01, value)}
        assert not torch.equal(forward_logits(model, batch, changed, reloaded.spec), in_memory), site


def test_each_site_learns_by_itself_and_sites_left_out_have_no_prefix(tmp_path: Path) -> None:
    backbone = tiny_backbone(tmp_path, torch.float32, "bart")
    sites: tuple[Site, ...] = ("encoder", "cross")
    trainer = toy_trainer(backbone, TrainConfig(**{**MLP.as_dict(), "sites": sites, "epochs": 1}))
    before = {site: (key.clone(), value.clone()) for site, (key, value) in trainer.prefix().items()}
    trained = trainer.run()
    assert set(trained) == set(before) == set(sites)
    for site in sites:
        assert not any(torch.equal(*pair) for pair in zip(trained[site], before[site], strict=True))
    owners = {name.split(".")[1] for name, _ in trainer.prefix.named_parameters()}
    assert owners == set(sites), "no parameter is shared"


def test_a_checkpoint_of_other_sites_is_refused(tmp_path: Path) -> None:
    backbone, path = tiny_backbone(tmp_path, torch.float32, "bart"), tmp_path / "state.safetensors"
    toy_trainer(backbone, TrainConfig(**{**DIRECT.as_dict(), "epochs": 1}), path).run()
    with pytest.raises(CheckpointError, match="expected config"):
        toy_trainer(backbone, TrainConfig(**{**DIRECT.as_dict(), "epochs": 1, "sites": ["decoder"]}), path).run()


def test_a_checkpoint_has_no_pickle_and_every_number_of_the_state(backbone: Backbone, tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    trainer = toy_trainer(backbone, MLP, path)
    trainer.run()
    tensors, meta = load_state(path)
    assert meta["state"] == vars(trainer.state)
    assert {f"best.{site}.{part}" for site in backbone.spec.sites for part in ("key", "value")} < tensors.keys()
    assert not [entry for entry in tmp_path.iterdir() if entry.name.startswith(TEMPORARY)]


def test_linear_schedule_rises_over_the_warm_up_and_falls_to_zero() -> None:
    assert [linear_schedule(step, 4, 0) for step in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert [linear_schedule(step, 6, 2) for step in range(7)] == [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0]


@pytest.mark.parametrize(
    "options",
    [
        {"learning_rate": 0},
        {"epochs": -1},
        {"frozen_positions": 1},
        {"method": "magic"},
        {"warmup_steps": -1},
        {"sites": ("decoder", "head")},
        {"positions": "rotated"},
        {"reduction": "mean"},
        {"accumulate": 0},
        {"accumulate": 11},
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidParameter, match="expected"):
        TrainConfig.of("e2e", options)


def test_a_run_takes_as_many_steps_as_it_is_told_whatever_an_epoch_has(backbone: Backbone) -> None:
    for steps in (3, 10):  # an epoch has four
        seen = list[Progress]()
        toy_trainer(backbone, TrainConfig(**{**MLP.as_dict(), "steps": steps})).run(seen.append)
        assert [progress.step for progress in seen] == list(range(1, steps + 1))
        assert {progress.total for progress in seen} == {steps}
        assert seen[-1].learning_rate == pytest.approx(MLP.learning_rate / steps), "the rate falls to its end"
        assert seen[-1].validation_loss is not None


def test_a_run_ends_when_it_no_longer_validates_better_and_a_resumed_one_too(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = [5.0, 4.0, 4.5, 3.0, 3.0, 3.5, 3.25, 1.0, 1.0, 1.0]
    config = TrainConfig(**{**MLP.as_dict(), "validate_every": 1, "steps": 10, "patience": 3})
    path, seen, losses = tmp_path / "state.safetensors", list[Progress](), iter(measured)
    monkeypatch.setattr(loop, "token_loss", lambda *_: next(losses))
    trainer = toy_trainer(backbone, config, path)
    kept = trainer.run(seen.append)
    assert [progress.validation_loss for progress in seen] == measured[:7]
    assert (trainer.state.best_loss, trainer.state.best_step) == (3.0, 4)
    again = list[Progress]()
    assert same(toy_trainer(backbone, config, path).run(again.append), kept) and again == [], "it has ended already"
    losses = iter(measured)
    toy_trainer(backbone, TrainConfig(**{**config.as_dict(), "patience": 0})).run(again.append)
    assert len(again) == 10


def test_options_of_a_later_release_that_are_not_used_leave_a_runs_options_as_they_were() -> None:
    assert {"steps", "patience"} & DIRECT.as_dict().keys() == set()
    assert TrainConfig(**TrainConfig(steps=3, patience=2).as_dict()) == TrainConfig(steps=3, patience=2)
