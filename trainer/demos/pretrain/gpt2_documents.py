"""The demo GPT-2's training documents: several operations on E2E and DART, half of them named by an instruction.

Owns the mixture of documents and their token form; knows no model. A document is
``{instruction}{source}<|endoftext|>{target}<|endoftext|>``, where the instruction may be missing. The loss is on the
target and the end. Without an instruction the operation is ambiguous; a trained prefix decides it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trainer.data.corpora import Pair
from trainer.demos.pretrain.tables import SHUFFLED_SHARE, Corpora, rename, shuffle_fields

E2E_OPERATIONS = {"table-to-text:": 0.55, "text-to-table:": 0.27, "list the fields:": 0.08, "": 0.10}
DART_OPERATIONS = {"triples-to-text:": 0.70, "text-to-triples:": 0.18, "": 0.12}
DART_SHARE = 0.22
INSTRUCTED_SHARE = 0.5
RENAMED_SHARE = 0.3


@dataclass(frozen=True)
class Document:
    """Three texts. An empty ``source`` and instruction make plain text, all of whose tokens are learnt."""

    instruction: str
    source: str
    target: str


@dataclass(frozen=True)
class TokenDocument:
    """Token ids, and the index of the first learnt one."""

    ids: list[int]
    start: int


def document(pair: Pair, operation: str, *, instructed: bool) -> Document:
    """Turn ``pair`` into a document of ``operation``, a key of ``E2E_OPERATIONS`` or ``DART_OPERATIONS``."""
    instruction = operation if instructed else ""
    if operation in ("text-to-table:", "text-to-triples:"):
        return Document(instruction, pair.target, pair.source)
    if operation == "list the fields:":
        return Document(instruction, pair.source, ", ".join(f.split(" : ")[0] for f in pair.source.split(" | ")))
    if operation == "":
        return Document("", "", pair.target)
    return Document(instruction, pair.source, pair.target)


def draw(corpora: Corpora, names: Sequence[str], rng: random.Random) -> Document:
    """Draw a training document of the mixture."""
    from_dart = rng.random() < DART_SHARE
    pair = rng.choice(corpora.dart if from_dart else corpora.e2e)
    table = DART_OPERATIONS if from_dart else E2E_OPERATIONS
    operation = rng.choices(list(table), list(table.values()))[0]
    if not from_dart and rng.random() < RENAMED_SHARE:
        pair = rename(pair, names, rng)
    if operation.startswith(("table", "triples", "list")) and rng.random() < SHUFFLED_SHARE:
        pair = shuffle_fields(pair, rng)
    return document(pair, operation, instructed=rng.random() < INSTRUCTED_SHARE)


def tokenize(tokenizer: Any, documents: Sequence[Document], limit: int) -> list[TokenDocument]:
    """Encode the pieces separately, as the server encodes a template and its input.

    Documents of more than ``limit`` tokens are left out.
    """
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
