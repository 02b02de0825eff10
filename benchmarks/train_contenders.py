"""The contenders of ``train.py`` and ``taught.py``: one training run in a process, timed from first step to last.

Protocol: ``python benchmarks/train_contenders.py KIND --backbone FOLDER --examples FILE`` prints one JSON line:
``{"seconds", "cpu_seconds", "steps", "learnt", "loaded_mib", "peak_mib", "loss"}``. Both get the same token ids and
learn by the same rules, each in its own batches, ``--steps`` of them; loading is not timed. ``--save`` leaves the
prefix in a folder, ours as an artifact and PEFT's as PEFT saves it. Memory is the process's own (VmHWM, VmRSS of
/proc/self/status; ``ru_maxrss`` would begin with that of the process that started it).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MIDDLE, CLIP = 512, 1.0


def resident_mib(field: str) -> float:
    """Return ``VmHWM``, the peak so far, or ``VmRSS``, the memory held now, in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status: expected {field}, found none")


def clocks() -> tuple[float, float]:
    """Return wall-clock time and processor time of all threads, in seconds."""
    return time.perf_counter(), time.process_time()


def since(began: tuple[float, float], ended: tuple[float, float]) -> dict[str, float]:
    """Return the times between two readings of ``clocks``."""
    return {"seconds": ended[0] - began[0], "cpu_seconds": ended[1] - began[1]}


def read_examples(path: Path) -> list[tuple[list[int], int]]:
    """Read examples: token ids, and the index of the first learnt one."""
    return [(ids, start) for ids, start in json.loads(path.read_text())]


def train_prefixd(folder: str, pairs: list[tuple[list[int], int]], options: argparse.Namespace) -> dict[str, Any]:
    """Train with this trainer."""
    import torch

    from prefixes.artifact import write_prefix
    from prefixes.backbone import load_backbone
    from server.engine.kernels.dense import DenseKernels
    from server.engine.models import load_model
    from trainer.data.sequences import TokenExample
    from trainer.training.config import TrainConfig
    from trainer.training.export import fold
    from trainer.training.loop import Progress, Trainer
    from trainer.training.plan import plan_prefix

    torch.set_num_threads(options.threads)
    config = TrainConfig(
        prefix_length=options.length, middle=MIDDLE, batch_size=options.batch, learning_rate=options.rate,
        gradient_clip=CLIP, steps=options.steps, seed=options.seed, reduction="token",
        accumulate=options.accumulate, checkpoint_activations=options.recompute,
    )  # fmt: skip
    backbone = load_backbone(folder)
    examples = [TokenExample(tuple(ids), start) for ids, start in pairs]
    model, plan = load_model(backbone, DenseKernels()), plan_prefix(config, backbone)
    trainer = Trainer(config, plan, backbone, model, examples, [], identity="benchmark")
    seen: list[Progress] = []
    loaded, began = resident_mib("VmRSS"), clocks()
    with profiled(options.profile):
        made = trainer.run(seen.append)
    ended = clocks()
    if options.save is not None:
        options.save.mkdir()
        (options.save / "prefix.safetensors").write_bytes(write_prefix(fold(made, plan, {})))
    loss = sum(progress.loss for progress in seen) / len(seen)
    return {
        **since(began, ended), "steps": len(seen), "learnt": seen[-1].learnt, "loaded_mib": loaded, "loss": loss,
    }  # fmt: skip


def train_peft(folder: str, pairs: list[tuple[list[int], int]], options: argparse.Namespace) -> dict[str, Any]:
    """Train with PEFT's prefix tuning under transformers' ``Trainer``; batches are padded to their longest example.

    It runs without dropout, as in the paper, which also saves time.
    """
    import torch
    from peft import PrefixTuningConfig, get_peft_model
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

    from prefixes.backbone import load_backbone

    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    backbone = load_backbone(folder)
    tokenizer = backbone.tokenizer
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "right"
    for module in backbone.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model = get_peft_model(
        backbone.model,
        PrefixTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=options.length, prefix_projection=True, encoder_hidden_size=MIDDLE
        ),
    )
    rows = [
        {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * start + ids[start:]}
        for ids, start in pairs
    ]
    collate, learnt, times = DataCollatorForSeq2Seq(tokenizer), list[int](), list[tuple[float, float]]()

    def counted(batch: list[dict[str, Any]]) -> Any:
        made = collate(batch)
        learnt.append(int((made["labels"] != -100).sum()))
        return made

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            times.append(clocks())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(clocks())

    arguments = TrainingArguments(
        output_dir=str(options.examples.parent / "peft"), per_device_train_batch_size=options.batch,
        max_steps=options.steps, learning_rate=options.rate, lr_scheduler_type="linear", warmup_steps=0,
        weight_decay=0.0, max_grad_norm=CLIP, use_cpu=True, save_strategy="no", logging_strategy="no", report_to=[],
        disable_tqdm=True, seed=options.seed,
        train_sampling_strategy="group_by_length" if options.group else "random",
    )  # fmt: skip
    trainer = Trainer(
        model=model, args=arguments, train_dataset=rows, data_collator=counted, callbacks=[Clock()],
    )  # fmt: skip
    loaded = resident_mib("VmRSS")
    with profiled(options.profile):
        done = trainer.train()
    if options.save is not None:
        model.save_pretrained(options.save)
    return {
        **since(times[0], times[-1]), "steps": done.global_step, "learnt": sum(learnt[: done.global_step]),
        "loaded_mib": loaded, "loss": done.training_loss,
    }  # fmt: skip


@contextmanager
def profiled(wanted: bool) -> Iterator[None]:
    """Run torch's profiler if ``wanted``, and print its table at the end."""
    if not wanted:
        yield
        return
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        yield
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=30), file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("prefixd", "peft"))
    parser.add_argument("--backbone", required=True)
    parser.add_argument("--examples", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--length", type=int, default=5)
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument("--rate", type=float, default=8e-5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--save", type=Path, help="folder for the prefix")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--accumulate", type=int, default=1, help="prefixd: micro-batches")
    parser.add_argument("--recompute", action="store_true", help="prefixd: activation checkpointing")
    parser.add_argument("--group", action="store_true", help="peft: group_by_length")
    parser.add_argument("--profile", action="store_true", help="print torch's profile; not for figures")
    options = parser.parse_args()
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries print too
    train = train_prefixd if options.kind == "prefixd" else train_peft
    result = train(options.backbone, read_examples(options.examples), options)
    print(json.dumps({**result, "peak_mib": resident_mib("VmHWM")}), file=answers, flush=True)


if __name__ == "__main__":
    main()
