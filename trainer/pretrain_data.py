"""What the demo backbone learns: several operations on E2E and DART, half of them named by an instruction.

Owns the mixture, its augmentations and its batches; knows no model. A document is
``{instruction}?{source}<|endoftext|>{target}<|endoftext|>``; the loss is on the target and the end. Without an
instruction the operation is ambiguous: that is what a trained prefix then decides.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.corpora import Pair

E2E_OPERATIONS = {"table-to-text:": 0.55, "text-to-table:": 0.27, "list the fields:": 0.08, "": 0.10}
DART_OPERATIONS = {"triples-to-text:": 0.70, "text-to-triples:": 0.18, "": 0.12}
DART_SHARE = 0.22
INSTRUCTED_SHARE = 0.5
SHUFFLED_SHARE = 0.25
RENAMED_SHARE = 0.3


@dataclass(frozen=True)
class Document:
    """Three texts; an empty ``source`` makes plain text, whose every token is learnt."""

    instruction: str
    source: str
    target: str


@dataclass(frozen=True)
class TokenDocument:
    """Token ids, and the index of the first one to learn."""

    ids: list[int]
    start: int


def document(pair: Pair, operation: str, *, instructed: bool) -> Document:
    """``pair`` under ``operation`` (a key of the operation tables)."""
    instruction = operation if instructed else ""
    if operation in ("text-to-table:", "text-to-triples:"):
        return Document(instruction, pair.target, pair.source)
    if operation == "list the fields:":
        return Document(instruction, pair.source, ", ".join(f.split(" : ")[0] for f in pair.source.split(" | ")))
    if operation == "":
        return Document("", "", pair.target)
    return Document(instruction, pair.source, pair.target)


def draw(e2e: Sequence[Pair], dart: Sequence[Pair], names: Sequence[str], rng: random.Random) -> Document:
    """One training document of the mixture."""
    from_dart = rng.random() < DART_SHARE
    pair = rng.choice(dart if from_dart else e2e)
    table = DART_OPERATIONS if from_dart else E2E_OPERATIONS
    operation = rng.choices(list(table), list(table.values()))[0]
    if not from_dart and rng.random() < RENAMED_SHARE:
        pair = rename(pair, names, rng)
    if operation.startswith(("table", "triples", "list")) and rng.random() < SHUFFLED_SHARE:
        parts = pair.source.split(" | ")
        rng.shuffle(parts)
        pair = Pair(" | ".join(parts), pair.target, pair.origin)
    return document(pair, operation, instructed=rng.random() < INSTRUCTED_SHARE)


def rename(pair: Pair, names: Sequence[str], rng: random.Random) -> Pair:
    """``pair`` with other proper names, so that names are copied and not learnt by heart."""
    source, target = pair.source, pair.target
    for part in pair.source.split(" | "):
        field, _, value = part.partition(" : ")
        if names and field in ("name", "near") and value in target:
            other = rng.choice(names)
            if other not in source:
                source = source.replace(part, f"{field} : {other}")
                target = target.replace(value, other)
    return Pair(source, target, pair.origin)


def proper_names(e2e: Sequence[Pair], dart: Sequence[Pair], rng: random.Random, count: int = 4000) -> list[str]:
    """Up to ``count`` invented names of one to three words that occur in the corpora with a capital."""
    every = {word for pair in [*e2e, *dart] for word in pair.source.split()}
    words = sorted(word for word in every if word.isalpha() and word.istitle())
    names: set[str] = set()
    for _ in range(20 * count):  # a small vocabulary may not have as many
        if len(names) == count or not words:
            break
        name = " ".join(rng.choice(words) for _ in range(rng.choice((1, 2, 2, 3))))
        names.add(f"The {name}" if rng.random() < 0.3 else name)
    return sorted(names)


def tokenize(tokenizer: Any, documents: Sequence[Document], limit: int) -> list[TokenDocument]:
    """Encode the pieces apart, as the server does with a template around its input; leave out what passes ``limit``."""
    pieces = [piece for doc in documents for piece in (doc.instruction, doc.source, doc.target)]
    encoded = tokenizer(pieces, add_special_tokens=False)["input_ids"]
    end = tokenizer.eos_token_id
    made = []
    for index in range(len(documents)):
        instruction, source, target = encoded[3 * index : 3 * index + 3]
        prompt = [*instruction, *source, end]
        if len(prompt) + len(target) < limit:
            made.append(TokenDocument([*prompt, *target, end], len(prompt)))
    return made


def batches(documents: Sequence[TokenDocument], tokens: int, rng: random.Random) -> Iterator[list[TokenDocument]]:
    """Batches of like length, each of at most ``tokens`` padded tokens, in random order."""
    ordered = sorted(documents, key=lambda doc: (len(doc.ids), rng.random()))
    made: list[list[TokenDocument]] = [[]]
    for doc in ordered:
        if (len(made[-1]) + 1) * len(doc.ids) > tokens and made[-1]:
            made.append([])
        made[-1].append(doc)
    rng.shuffle(made)
    yield from made
