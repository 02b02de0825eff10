"""Texts to token sequences to batches, for a decoder alone and for an encoder-decoder.

Owns the places of input and target, the learnt tokens, and the order of batches. The order is a pure function of seed
and epoch, so that a resumed run continues exactly. Knows no model.

Without an encoder a sequence is ``input target end``. With one, the encoder reads the input, and the decoder reads
``start begin target end``, BART's ``</s><s>…</s>``. ``begin``, ``target`` and ``end`` are learnt: the server generates
``begin`` too.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prefixes.backbone import Backbone
from prefixes.prompt import Fitted
from prefixes.spec import PrefixSpec, split_template
from trainer.data.dataset import Dataset, Example, InvalidData


@dataclass(frozen=True)
class TokenExample:
    """The decoder's tokens, the index ``start`` of the first learnt one, and the encoder's tokens, if any."""

    ids: tuple[int, ...]
    start: int
    input_ids: tuple[int, ...] = ()

    @property
    def size(self) -> tuple[int, int]:
        """Sort key that brings similar lengths together."""
        return len(self.input_ids), len(self.ids)

    @property
    def learnt(self) -> int:
        """Number of learnt tokens."""
        return len(self.ids) - self.start

    @property
    def tokens(self) -> int:
        """Number of tokens that go through the model: all but the last one, which is only a target."""
        return len(self.input_ids) + len(self.ids) - 1


@dataclass(frozen=True)
class Tokenized:
    """The examples that fit, the number left out, and the number whose input was cut."""

    examples: Sequence[TokenExample] = ()
    dropped: int = 0
    cut: int = 0


@dataclass(frozen=True)
class Ragged:
    """Sequences one behind the other, without padding: ``ids (tokens,)`` int64, and the tokens of each."""

    ids: Tensor
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> Ragged:
        """Put them one behind the other."""
        ids = torch.tensor([token for row in rows for token in row], dtype=torch.long, device=device)
        return cls(ids, tuple(map(len, rows)))


@dataclass(frozen=True)
class Batch:
    """What the decoder reads, all tokens of a sequence but the last, and what an encoder reads.

    ``predict`` are indices into the decoder's tokens; the token that follows each one is learnt and stands in
    ``targets``.
    """

    read: Ragged
    predict: Tensor  # (learnt,) int64
    targets: Tensor  # (learnt,) int64
    inputs: Ragged | None  # None where the decoder reads the input itself


def target_opening(backbone: Backbone) -> tuple[int, ...]:
    """Return the tokens that begin every output: the forced first one, else those that begin the backbone's inputs.

    For BART this is ``<s>``. It is empty for a decoder alone, whose output continues the input.
    """
    if backbone.decoder_prompt and backbone.forced_first is not None:
        return (backbone.forced_first,)
    return tuple(backbone.prompt_encoder.encode_literal(split_template(backbone.input_template)[0]))


def tokenize(
    backbone: Backbone, plan: PrefixSpec, dataset: Dataset, *, drop_long: bool = False, truncate: bool = False
) -> Tokenized:
    """Tokenise every example as the server tokenises prompts, with the target where the server generates.

    An example that exceeds the window raises InvalidData with file and line. With ``truncate`` its input loses its end
    instead; with ``drop_long`` it is left out. A target is never cut.
    """
    opening = target_opening(backbone)
    made: list[TokenExample] = []
    cut = 0
    for example in dataset.examples:
        try:
            fitted, was_cut = _fit(backbone, plan, opening, example, truncate)
        except InvalidData as error:
            if not drop_long:
                raise InvalidData(f"{dataset.name} {error.message}", **error.detail) from None
        else:
            made.append(fitted)
            cut += was_cut
    if dataset.examples and not made:
        raise InvalidData(f"{dataset.name}: no example fits the window of {backbone.spec.max_positions} positions")
    return Tokenized(made, len(dataset.examples) - len(made), cut)


def _fit(
    backbone: Backbone, plan: PrefixSpec, opening: tuple[int, ...], example: Example, truncate: bool
) -> tuple[TokenExample, bool]:
    """Return one example's sequences, and whether its input was cut.

    Raises InvalidData, without the file's name, if they exceed the window.
    """
    encoder, spec, start = backbone.prompt_encoder, backbone.spec, backbone.decoder_prompt
    told = encoder.encode_text(example.target, continues=not start)  # an encoder-decoder's begins a text
    target = (*opening, *told, backbone.end_token_id)
    most = spec.max_positions - plan.position_offset("decoder") - len(start)
    if len(target) > most:
        raise _too_long(example, "target", most, Fitted(None, len(target)), "--drop-long leaves such lines out")
    encoded = spec.input_site == "encoder"
    room = spec.input_room(plan) if encoded else most - len(target)
    fitted = encoder.fit(plan.template, example.input, room, truncate=truncate)
    if fitted.token_ids is None:
        beside = "" if encoded else f" beside a target of {len(target)}"
        remedy = "--truncate cuts inputs, --drop-long leaves such lines out"
        raise _too_long(example, f"input and template{beside}", room, fitted, remedy)
    read, before = (fitted.token_ids, start) if encoded else ((), (*start, *fitted.token_ids))
    return TokenExample((*before, *target), len(before), read), fitted.truncated


def _too_long(example: Example, what: str, expected: int, got: Fitted, remedy: str) -> InvalidData:
    return InvalidData(
        f"line {example.line}: expected at most {expected} tokens of {what}, got {got.shown} ({remedy})",
        line=example.line,
        expected=expected,
        got=got.got,
    )


def epoch_batches(examples: Sequence[TokenExample], size: int, seed: int, epoch: int) -> list[list[int]]:
    """Return the batches of an epoch, as indices: a shuffle, cut into pieces.

    Lengths stay mixed. Nothing is padded, so like lengths together would save nothing; and where a loss is a mean over
    the tokens of a batch, they teach short outputs: a token weighs more in a batch of short ones.
    """
    order = list(range(len(examples)))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return [order[begin : begin + size] for begin in range(0, len(order), size)]


def collate(examples: Sequence[TokenExample], device: torch.device | str = "cpu") -> Batch:
    """Tokens from ``start`` on are learnt. Either all examples have encoder inputs, or none has."""
    read, predict, targets = list[tuple[int, ...]](), list[int](), list[int]()
    begin = 0
    for example in examples:
        predict += range(begin + example.start - 1, begin + len(example.ids) - 1)
        targets += example.ids[example.start :]
        read.append(example.ids[:-1])
        begin += len(example.ids) - 1
    inputs = [example.input_ids for example in examples]
    return Batch(
        Ragged.of(read, device), torch.tensor(predict, device=device), torch.tensor(targets, device=device),
        Ragged.of(inputs, device) if any(inputs) else None,
    )  # fmt: skip


def split_batch(examples: Sequence[TokenExample], parts: int) -> list[Sequence[TokenExample]]:
    """Split into ``parts`` micro-batches of similar lengths and nearly equal numbers. None is empty."""
    ordered = sorted(examples, key=lambda example: example.size)
    parts = min(parts, len(ordered))
    bounds = [len(ordered) * part // parts for part in range(parts + 1)]
    return [ordered[begin:end] for begin, end in itertools.pairwise(bounds)]
