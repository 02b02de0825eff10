"""However a batch is computed (in parts, layers run twice, in half precision): the same loss, the same gradient."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from prefixes.backbone import Backbone
from server.engine.kernels.dense import DenseKernels
from server.engine.models import load_model
from tests.support.trainer import (
    FAMILIES,
    forward_logits,
    tiny_backbone,
    tiny_model,
    toy_examples,
    toy_pairs,
    toy_plan,
    toy_trainer,
    write_jsonl,
)
from trainer.data.sequences import collate
from trainer.training import loss as losses
from trainer.training.config import TrainConfig
from trainer.training.forward import Compute, forward_hidden
from trainer.training.loop import Trainer
from trainer.training.loss import batch_loss, learnt_loss, token_loss
from trainer.training.request import RunRequest
from trainer.training.run import run_training

CONFIG = TrainConfig(prefix_length=4, middle=16, batch_size=7, epochs=1, seed=3)


@pytest.fixture(params=[*FAMILIES, "t5"])
def backbone(request: pytest.FixtureRequest, tmp_path: Path) -> Backbone:
    return tiny_backbone(tmp_path / "backbone", torch.float64, request.param)


def loss_and_gradients(backbone: Backbone, **options: Any) -> tuple[float, list[Tensor]]:
    """Of one batch of seven sequences of different lengths, through the loop's own step, before the optimiser's."""
    trainer = toy_trainer(backbone, TrainConfig(**{**CONFIG.as_dict(), **options}))
    examples = sorted(toy_examples(backbone), key=lambda example: example.size)[::3][:7]
    assert len({example.size for example in examples}) > 2
    value = trainer._accumulate_gradients(examples)
    gradients = [parameter.grad for parameter in trainer.prefix.parameters() if parameter.grad is not None]
    assert len(gradients) == len(list(trainer.prefix.parameters()))
    return value, gradients


@pytest.mark.parametrize("method", ["mlp", "direct"])
@pytest.mark.parametrize("reduction", ["sequence", "token"])
@pytest.mark.parametrize(
    "options", [{"accumulate": 3}, {"accumulate": 7}, {"checkpoint_activations": True}], ids=["3", "7", "recompute"]
)
def test_micro_batches_and_recomputed_layers_give_the_large_batchs_loss_and_gradient(
    backbone: Backbone, method: str, reduction: str, options: dict[str, Any]
) -> None:
    shared = {"method": method, "reduction": reduction}
    expected, wanted = loss_and_gradients(backbone, **shared)
    got, gradients = loss_and_gradients(backbone, **shared, **options)
    assert got == pytest.approx(expected, rel=1e-13)
    assert max(float(gradient.abs().max()) for gradient in wanted) > 1e-3
    for mine, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-13)


def test_the_chunked_loss_equals_cross_entropy_over_all_logits_at_once(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = collate(toy_examples(backbone)[:6])
    model, plan = tiny_model(backbone), toy_plan(backbone, CONFIG)
    torch.manual_seed(1)
    prefix = {site: _pair(shape) for site, shape in _shapes(backbone).items()}
    hidden = forward_hidden(model, batch, prefix, plan).detach().requires_grad_()
    expected = functional.cross_entropy(model.logits(hidden), batch.targets, reduction="sum")
    (wanted,) = torch.autograd.grad(expected * 3, hidden)
    for rows in (1, 5, 1000):
        monkeypatch.setitem(losses.ROWS, "cpu", rows)
        got = learnt_loss(model, hidden, batch.targets)
        (gradient,) = torch.autograd.grad(got * 3, hidden)
        torch.testing.assert_close(got, expected, rtol=1e-13, atol=0)
        torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-14)
        with torch.no_grad():
            assert learnt_loss(model, hidden, batch.targets) == got.detach()


def test_the_chunked_loss_stays_finite_and_right_for_scores_that_overflow_an_exponential() -> None:
    class Head:
        def logits(self, hidden: Tensor) -> Tensor:
            return hidden * 1e4

    hidden = torch.tensor([[1.0, -1.0, 0.5], [0.2, 0.2, 0.2]], requires_grad=True)
    targets = torch.tensor([1, 2])
    got = learnt_loss(Head(), hidden, targets)  # type: ignore[arg-type]
    expected = functional.cross_entropy(hidden * 1e4, targets, reduction="sum")
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got, hidden)[0], torch.autograd.grad(expected, hidden)[0])


@pytest.mark.parametrize("recompute", [False, True])
def test_the_last_layer_computes_only_what_is_learnt_and_gives_the_same_states(
    backbone: Backbone, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = collate(toy_examples(backbone)[:6])
    batch = replace(batch, predict=batch.predict[::2])  # an encoder-decoder learns all that its decoder reads
    model, plan, compute = tiny_model(backbone), toy_plan(backbone, CONFIG), Compute(recompute=recompute)
    prefix = {site: _pair(shape) for site, shape in _shapes(backbone).items()}
    everything = replace(batch, predict=torch.arange(batch.read.ids.numel()))
    states = forward_hidden(model, everything, prefix, plan)
    assert len(batch.predict) < len(states)
    last, computed = model.layers[-1], []
    feed_forward = last.feed_forward

    def counted(x: Tensor) -> Tensor:
        computed.append(len(x))
        return feed_forward(x)

    monkeypatch.setattr(last, "feed_forward", counted)
    learnt = forward_hidden(model, batch, prefix, plan, compute)
    torch.testing.assert_close(learnt, states[batch.predict], rtol=1e-12, atol=0)
    assert computed == [len(batch.predict)]


def test_validation_is_the_mean_over_learnt_tokens_whatever_the_batches(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples, plan, model = toy_examples(backbone), toy_plan(backbone, CONFIG), tiny_model(backbone)
    prefix = {site: _pair(shape) for site, shape in _shapes(backbone).items()}
    summed = sum(batch_loss(model, collate([example]), prefix, plan).item() for example in examples)
    expected = summed / sum(example.learnt for example in examples)
    for tokens in (1, 60, 4096):
        monkeypatch.setattr(losses, "VALIDATION_TOKENS", tokens)
        calls: list[None] = []
        got = token_loss(model, examples, prefix, plan, between=lambda seen=calls: seen.append(None))  # type: ignore[misc]
        assert got == pytest.approx(expected, rel=1e-12)
        assert (len(calls) == len(examples)) == (tokens == 1) and (len(calls) == 1) == (tokens == 4096)


def test_autocast_computes_in_bfloat16_and_stays_within_its_precision(tmp_path: Path) -> None:
    """Against float32: the matrix products are bfloat16's, the residual sums, the loss and the gradient float32's."""
    for family in FAMILIES:
        backbone = tiny_backbone(tmp_path / family, torch.float32, family)
        batch = collate(toy_examples(backbone)[:8])
        plan = toy_plan(backbone, CONFIG)
        made = {}
        for dtype in (None, torch.bfloat16):
            torch.manual_seed(1)
            prefix = {site: _pair(shape, torch.float32) for site, shape in _shapes(backbone).items()}
            compute = Compute(dtype)
            model = load_model(backbone, DenseKernels(dtype))
            loss = batch_loss(model, batch, prefix, plan, compute)
            loss.backward()
            with compute.context(torch.device("cpu")):
                states = forward_hidden(model, batch, prefix, plan, compute)
                logits = forward_logits(model, batch, prefix, plan)
            gradients = [tensor.grad for pair in prefix.values() for tensor in pair if tensor.grad is not None]
            assert (loss.dtype, states.dtype, gradients[0].dtype) == (torch.float32,) * 3
            assert logits.dtype == (dtype or torch.float32)
            made[dtype] = (loss.detach(), torch.cat([gradient.flatten() for gradient in gradients]))
        (expected, wanted), (got, gradient) = made[None], made[torch.bfloat16]
        assert got != expected, "it was computed in another precision"
        torch.testing.assert_close(got, expected, rtol=2e-2, atol=0)
        assert functional.cosine_similarity(gradient, wanted, dim=0) > 0.99


def test_nothing_is_kept_for_the_weights_and_half_the_activations_with_recomputed_layers(tmp_path: Path) -> None:
    """What autograd saves, counted: no weight's input, and with ``recompute`` little but each layer's input."""
    backbone = tiny_backbone(tmp_path, torch.float32)
    batch = collate(toy_examples(backbone)[:8])
    plan, model = toy_plan(backbone, CONFIG), tiny_model(backbone)
    weights = {parameter.data_ptr() for parameter in backbone.model.parameters()}

    def kept(recompute: bool) -> int:
        """Floats per token, each storage once, weights and what is shared with them left out."""
        saved: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights and tensor.is_floating_point():
                saved[storage.data_ptr()] = storage.nbytes() // 4
            return tensor

        prefix = {site: _pair(shape, torch.float32) for site, shape in _shapes(backbone).items()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            forward_hidden(model, batch, prefix, plan, Compute(recompute=recompute))
        return sum(saved.values()) // batch.read.ids.numel()

    hidden, layers = backbone.spec.hidden_size, backbone.spec.sites["decoder"].layers
    # A layer keeps two norms' inputs (2), queries (with keys and values that share their storage: 3), keys and values
    # behind the prefix (2, and the prefix), the attention's output (1), the MLP before its activation (4).
    assert 8 * layers * hidden < kept(False) < 13 * layers * hidden
    assert hidden < kept(True) < 2 * layers * hidden


def _shapes(backbone: Backbone) -> dict[Any, tuple[int, ...]]:
    sites = toy_plan(backbone, CONFIG).sites
    return {
        site: (planned.geometry.layers, 4, planned.geometry.kv_heads, planned.geometry.head_dim)
        for site, planned in sites.items()
    }


def _pair(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(shape, dtype=dtype, requires_grad=True), torch.randn(shape, dtype=dtype, requires_grad=True)


def test_the_mlp_runs_once_per_step_whatever_the_micro_batches(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer: Trainer = toy_trainer(backbone, TrainConfig(**{**CONFIG.as_dict(), "accumulate": 5}))
    calls = 0
    inner = trainer.prefix.forward

    def counted() -> Any:
        nonlocal calls
        calls += 1
        return inner()

    monkeypatch.setattr(trainer.prefix, "forward", counted)
    trainer._step(toy_examples(backbone)[:7])
    assert calls == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_on_the_gpu_in_bfloat16_follows_the_run_on_the_cpu(tmp_path: Path, family: str) -> None:
    FAMILIES[family](tmp_path / "backbone")
    data = write_jsonl(tmp_path / "data.jsonl", toy_pairs(40))
    config = TrainConfig(prefix_length=4, method="direct", epochs=10, batch_size=8, learning_rate=0.02, accumulate=2)
    losses = {}
    for device in ("cpu", "cuda"):
        request = RunRequest(data, str(tmp_path / "backbone"), None, tmp_path / device, config, device=device)
        assert request.autocast is (device == "cuda")
        losses[device] = run_training(request).record["scores"]["validation_loss_per_token"]
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=0.05)
