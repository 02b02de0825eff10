"""Trained here or by PEFT under transformers' own ``Trainer``: the same loss, and the same prefix after some steps.

The published ways of both sides: our prefix reaches PEFT through the export, PEFT's data through its collator, its loss
is transformers' with ``labels``. Right-padded batches, examples of several lengths.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from torch.nn import functional
from transformers import DataCollatorForSeq2Seq, GPT2LMHeadModel, PreTrainedTokenizerFast, Trainer, TrainingArguments

from prefixes.backbone import Backbone
from prefixes.formats.peft_export import export_peft
from tests.support.trainer import tiny_backbone, tiny_model, toy_examples, toy_plan, toy_trainer
from trainer.data.sequences import TokenExample, collate, epoch_batches
from trainer.training.config import TrainConfig
from trainer.training.export import fold
from trainer.training.loss import batch_loss, denominator

CONFIG = TrainConfig(prefix_length=5, method="direct", init="Blue Spice", batch_size=6, reduction="token", epochs=1)


def features(examples: list[TokenExample]) -> list[dict[str, list[int]]]:
    """As transformers takes them: labels of -100 are not learnt."""
    return [
        {
            "input_ids": list(example.ids),
            "attention_mask": [1] * len(example.ids),
            "labels": [-100] * example.start + list(example.ids[example.start :]),
        }
        for example in examples
    ]


def collator(backbone: Backbone) -> Any:
    tokenizer: PreTrainedTokenizerFast = backbone.tokenizer
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "right"
    return DataCollatorForSeq2Seq(tokenizer)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_the_loss_equals_pefts_for_the_same_prefix_batch_and_definition(
    tmp_path: Path, dtype: torch.dtype, tolerance: float
) -> None:
    backbone = tiny_backbone(tmp_path / "backbone", dtype)
    trained = toy_trainer(backbone, TrainConfig(**{**CONFIG.as_dict(), "learning_rate": 0.05})).run()
    prefix = {site: (key.float().to(dtype), value.float().to(dtype)) for site, (key, value) in trained.items()}
    examples, plan = toy_examples(backbone)[3:13], toy_plan(backbone, CONFIG)
    assert len({len(example.ids) for example in examples}) > 1
    batch, model = collate(examples), tiny_model(backbone)
    ours = batch_loss(model, batch, prefix, plan) / denominator(examples, "token")

    # PEFT holds a prefix in float32 whatever the model: nothing is lost by that.
    export_peft(fold(prefix, plan, {}), tmp_path / "adapter", backbone.spec)
    base = GPT2LMHeadModel.from_pretrained(tmp_path / "backbone", dtype=dtype)
    theirs = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        inputs = collator(backbone)(features(examples))
        made = theirs(**inputs)
    torch.testing.assert_close(ours.float(), made.loss.float(), rtol=2e-6, atol=0)
    # transformers makes the loss in float32 whatever the model; here of its logits, in the model's dtype.
    logits, labels = made.logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten()
    assert logits.dtype == dtype
    torch.testing.assert_close(ours, functional.cross_entropy(logits, labels), rtol=tolerance, atol=0)
    bare = batch_loss(model, batch, {}, None) / denominator(examples, "token")
    assert abs(bare - ours) > 1e-3, "the prefix matters"


def test_the_same_steps_give_the_prefix_that_pefts_trainer_gives(tmp_path: Path) -> None:
    """AdamW, linear schedule, clip: three steps over the same batches in the same order, in float64 but its loss."""
    backbone = tiny_backbone(tmp_path / "backbone", torch.float64)
    config = TrainConfig(**{**CONFIG.as_dict(), "learning_rate": 0.02, "gradient_clip": 0.5})
    trainer = toy_trainer(backbone, config)
    start = dict(trainer.prefix.named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in start.items()}
    trainer.config = TrainConfig(**{**config.as_dict(), "init": "random"})  # what it was made with
    trainer._validation = ()
    ours = trainer.run()["decoder"]

    base = GPT2LMHeadModel.from_pretrained(
        tmp_path / "backbone", dtype=torch.float64, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    peft: Any = get_peft_model(base, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)).double()
    weight = peft.prompt_encoder["default"].embedding.weight
    key, value = before["trained.decoder_key"], before["trained.decoder_value"]  # (layers, P, heads, dim)
    with torch.no_grad():
        weight.copy_(torch.stack([key, value], dim=1).permute(2, 0, 1, 3, 4).reshape(5, -1))
    examples = toy_examples(backbone)[:18]
    order = [index for part in epoch_batches(examples, 6, config.seed, 0) for index in part]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"), per_device_train_batch_size=6, num_train_epochs=1, learning_rate=0.02,
        lr_scheduler_type="linear", warmup_steps=0, weight_decay=0.0, max_grad_norm=0.5, use_cpu=True,
        save_strategy="no", logging_strategy="no", report_to=[], disable_tqdm=True,
        train_sampling_strategy="sequential",
    )  # fmt: skip
    rows = features([examples[index] for index in order])
    Trainer(model=peft, args=arguments, train_dataset=rows, data_collator=collator(backbone)).train()
    layers, length, heads, dim = key.shape
    theirs = weight.detach().view(length, layers, 2, heads, dim).permute(2, 1, 0, 3, 4)
    assert (ours[0] - key).abs().max() > 0.01, "it has moved"
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-7)
