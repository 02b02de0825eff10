"""Pretrain the demo backbone: a small GPT-2 with its own tokenizer, on E2E and DART (without its WebNLG part).

    python -m trainer.pretrain --e2e ../shared/data/e2e/src1_train.txt --dart ../shared/data/dart/dev.json \
        --minutes 53 --output prefixes/demo/gpt2

Owns the pretraining loop. The budget is wall-clock time: the learning rate follows the elapsed fraction, so that a
slower machine makes fewer steps but always a finished model. A killed run goes on from its last checkpoint; because the
schedule follows the clock, two runs do not give the same weights.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor
from torch.nn import functional

from trainer.checkpoint import CheckpointError, load_state, pack_optimizer, save_state, unpack_optimizer
from trainer.corpora import Pair, detokenize, held_out, read_dart, read_e2e
from trainer.pretrain_data import (
    DART_OPERATIONS,
    E2E_OPERATIONS,
    TokenDocument,
    batches,
    document,
    draw,
    proper_names,
    tokenize,
)
from trainer.pretrain_model import (
    WINDOW,
    build_model,
    export_backbone,
    load_tokenizer,
    train_tokenizer,
    weights_of,
)

CHUNK = 4096  # documents drawn, tokenised and sorted by length at a time
BATCH_TOKENS = 2048
LEARNING_RATE, WARMUP_STEPS, FINAL_FRACTION = 2e-3, 100, 0.03


@dataclass(frozen=True)
class Corpora:
    """The pairs to learn from, and the held-out ones."""

    e2e: list[Pair]
    dart: list[Pair]
    held_out: list[Pair]


def read_corpora(e2e: Path, dart: Path) -> Corpora:
    """Both corpora with the held-out sources apart; E2E's texts without the corpus's tokenisation."""
    tables = [Pair(pair.source, detokenize(pair.target), pair.origin) for pair in read_e2e(e2e)]
    triples = list(read_dart(dart, without=("webnlg",)))
    return Corpora(
        [pair for pair in tables if not held_out(pair.source)],
        [pair for pair in triples if not held_out(pair.source)],
        [pair for pair in [*tables, *triples] if held_out(pair.source)],
    )


def tokenizer_texts(corpora: Corpora) -> list[str]:
    """What the tokenizer is trained on: every text, DART's three times, and the instructions."""
    texts = [text for pair in [*corpora.e2e, *corpora.dart * 3] for text in (pair.source, pair.target)]
    return texts + [name for name in [*E2E_OPERATIONS, *DART_OPERATIONS] if name] * 1000


def loss_of(model: Any, batch: Sequence[TokenDocument]) -> tuple[Tensor, int]:
    """Summed cross-entropy of the learnt tokens, and how many they are. Logits are made only where they are learnt.

    Padding on the right needs no mask: causal order hides it from every real token.
    """
    longest = max(len(doc.ids) for doc in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    learnt = torch.zeros(len(batch), longest, dtype=torch.bool)
    for row, doc in enumerate(batch):
        ids[row, : len(doc.ids)] = torch.tensor(doc.ids)
        learnt[row, doc.start : len(doc.ids)] = True
    hidden = model.transformer(ids, use_cache=False).last_hidden_state[:, :-1]  # (rows, longest - 1, hidden)
    targets = ids[:, 1:][learnt[:, 1:]]
    logits = model.lm_head(hidden[learnt[:, 1:]])  # (learnt, vocabulary)
    return functional.cross_entropy(logits, targets, reduction="sum"), targets.numel()


@torch.no_grad()
def validation(model: Any, tokenizer: Any, pairs: Sequence[Pair], per_operation: int = 128) -> dict[str, float]:
    """Mean loss per learnt token on held-out pairs, per operation, with its instruction."""
    rng = random.Random(0)
    losses = {}
    for operation in ("table-to-text:", "text-to-table:", "triples-to-text:"):
        wanted = [pair for pair in pairs if pair.source.startswith("name : ") == (operation != "triples-to-text:")]
        chosen = rng.sample(wanted, min(per_operation, len(wanted)))
        docs = tokenize(tokenizer, [document(pair, operation, instructed=True) for pair in chosen], WINDOW)
        sums = [loss_of(model, batch) for batch in batches(docs, 4096, rng)]
        losses[operation] = float(sum(loss for loss, _ in sums)) / sum(count for _, count in sums)
    return losses


def learning_rate(step: int, fraction: float) -> float:
    """Linear warm-up by steps, then a cosine over the elapsed fraction of the budget."""
    cosine = FINAL_FRACTION + (1 - FINAL_FRACTION) * 0.5 * (1 + math.cos(math.pi * min(fraction, 1.0)))
    return LEARNING_RATE * cosine * min(1.0, (step + 1) / WARMUP_STEPS)


class Pretraining:
    """Model, optimizer and position of a run, with the file they are kept in."""

    def __init__(self, corpora: Corpora, folder: Path, seed: int) -> None:
        """Start a run in ``folder``, or take up the one that is there."""
        self.corpora, self.seed, self._file = corpora, seed, folder / "state.safetensors"
        torch.manual_seed(seed)
        resumed = self._file.exists()
        tokens = folder / "tokenizer"
        self.tokenizer = load_tokenizer(tokens) if resumed else train_tokenizer(tokenizer_texts(corpora), tokens)
        self.model = build_model(self.tokenizer.eos_token_id)
        parameters = list(self.model.parameters())
        self._optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.01},
                {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
            ],
            lr=LEARNING_RATE,
            betas=(0.9, 0.98),
            fused=True,
        )
        self.step, self.chunk, self.elapsed, self.loss = 0, 0, 0.0, 0.0
        self._names = proper_names(corpora.e2e, corpora.dart, random.Random(seed))
        if resumed:
            self._restore()

    def next_chunk(self) -> list[list[TokenDocument]]:
        """The batches of the next chunk, a function of the seed and the chunk's number."""
        rng = random.Random(f"{self.seed}/{self.chunk}")
        drawn = [draw(self.corpora.e2e, self.corpora.dart, self._names, rng) for _ in range(CHUNK)]
        return list(batches(tokenize(self.tokenizer, drawn, WINDOW), BATCH_TOKENS, rng))

    def train(self, batch: list[TokenDocument], fraction: float) -> None:
        """One step, at ``fraction`` of the budget."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(self.step, fraction)
        loss, count = loss_of(self.model, batch)
        (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.loss = 0.98 * self.loss + 0.02 * loss.item() / count if self.loss else loss.item() / count

    def save(self) -> None:
        """Keep the run as it stands."""
        packed, optimizer = pack_optimizer(self._optimizer)
        weights = {f"model.{name}": tensor for name, tensor in weights_of(self.model).items()}
        position = {"seed": self.seed, "step": self.step, "chunk": self.chunk, "elapsed": self.elapsed}
        save_state(self._file, weights | packed, position | {"optimizer": optimizer})

    def validate(self) -> dict[str, float]:
        """Held-out losses of the model as it stands."""
        return validation(self.model, self.tokenizer, self.corpora.held_out)

    def _restore(self) -> None:
        tensors, meta = load_state(self._file)
        if meta["seed"] != self.seed:
            raise CheckpointError(f"{self._file}: expected seed {self.seed}, got {meta['seed']}")
        weights = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")}
        missing = self.model.load_state_dict(weights, strict=False).missing_keys
        if set(missing) - {"lm_head.weight"}:
            raise CheckpointError(f"{self._file}: expected the model's tensors, missing {', '.join(missing)}")
        unpack_optimizer(self._optimizer, tensors, meta["optimizer"])
        self.step, self.chunk, self.elapsed = meta["step"], meta["chunk"], meta["elapsed"]


def pretrain(
    e2e: Annotated[Path, typer.Option(help="E2E's src1_train.txt.")],
    dart: Annotated[Path, typer.Option(help="DART's dev.json; its WebNLG annotations are left out.")],
    output: Annotated[Path, typer.Option(help="Folder for the backbone, weights in float16.")],
    state: Annotated[Path, typer.Option(help="Folder for the checkpoint; one that is there is taken up.")] = Path(
        "runs/pretrain"
    ),
    minutes: Annotated[float, typer.Option(help="Wall-clock budget; the schedule ends with it.")] = 53.0,
    seed: Annotated[int, typer.Option(help="Of the weights and of the data.")] = 1,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    checkpoint_minutes: Annotated[float, typer.Option(help="Between checkpoints.")] = 3.0,
) -> None:
    """Pretrain the demo backbone and export it. A run that has used up its budget is only exported."""
    torch.set_num_threads(threads)
    console, budget = Console(), 60 * minutes
    run = Pretraining(read_corpora(e2e, dart), state, seed)
    console.print(
        f"{len(run.corpora.e2e)} E2E and {len(run.corpora.dart)} DART pairs, {len(run.corpora.held_out)} held out, "
        f"{sum(p.numel() for p in run.model.parameters()):,} parameters"
    )
    started, saved = time.monotonic() - run.elapsed, run.elapsed
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("pretraining", total=budget)
        while run.elapsed < budget:
            for batch in run.next_chunk():
                run.train(batch, run.elapsed / budget)
                run.elapsed = time.monotonic() - started
                progress.update(bar, completed=run.elapsed, description=f"step {run.step} loss {run.loss:.3f}")
                if run.elapsed >= budget:
                    break
            run.chunk += 1
            if run.elapsed - saved > 60 * checkpoint_minutes or run.elapsed >= budget:
                run.save()
                saved = run.elapsed
                held = " ".join(f"{name} {loss:.4f}" for name, loss in run.validate().items())
                console.print(
                    f"{run.elapsed / 60:.1f} min, step {run.step}, loss {run.loss:.4f}; held out: {held}",
                    soft_wrap=True,
                )
    export_backbone(run.model, run.tokenizer, output)
    run.model.half().float()  # what the exported weights give
    console.print({"seed": seed, "steps": run.step, "held out, in float16": run.validate()})


if __name__ == "__main__":
    typer.run(pretrain)
