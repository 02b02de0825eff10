"""Training data: what is read, what is refused, what is learnt."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from prefixes.backbone import Backbone
from prefixes.prompt import PromptEncoder
from tests.support.trainer import CORPORA, TEMPLATE, tiny_backbone, toy_examples, toy_pairs, write_jsonl
from trainer.config import GPT2_TEMPLATE
from trainer.data import Dataset, Example, InvalidData, collate, epoch_batches, read_dataset, tokenize


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return tiny_backbone(tmp_path_factory.mktemp("backbone"))


def test_reads_lines_in_order_with_their_numbers_and_the_files_digest(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"input": "a", "target": "b"}\n\n{"target": " d ", "input": "c\\u2028"}\n')
    data = read_dataset(path)
    assert data.examples == (Example(1, "a", "b"), Example(3, "c\u2028", " d "))
    path.write_text('{"input": "a", "target": "B"}\n')
    assert read_dataset(path).digest != data.digest


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2: expected JSON"),
        ("[1]", "line 2: expected an object"),
        ('{"input": "a"}', "'target', got \\['input'\\]"),
        ('{"input": "a", "target": "b", "extra": 1}', "line 2: .*extra"),
        ('{"input": 1, "target": "b"}', "line 2, field 'input': expected a text, got int"),
        ('{"input": "a", "target": " "}', "line 2, field 'target': expected a text, got an empty one"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"input": "a", "target": "b"}\n' + line + "\n")
    with pytest.raises(InvalidData, match=said):
        read_dataset(path)


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xff\xfe"])
def test_an_empty_or_binary_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(InvalidData, match="expected"):
        read_dataset(path)


def test_the_split_keeps_all_lines_of_an_input_on_one_side(tmp_path: Path) -> None:
    pairs = [{"input": f"item {i // 3}", "target": f"text {i}"} for i in range(300)]
    train, held_out = read_dataset(write_jsonl(tmp_path / "data.jsonl", pairs)).split(20)
    assert len(train.examples) + len(held_out.examples) == 300
    assert 0 < len({e.input for e in held_out.examples}) < 50
    assert not {e.input for e in train.examples} & {e.input for e in held_out.examples}


def test_target_and_end_token_are_learnt_and_nothing_else(backbone: Backbone) -> None:
    examples = toy_examples(backbone)[:3]
    batch = collate(examples, pad=backbone.pad_token_id)
    flat = batch.ids.flatten()
    assert torch.equal(flat[batch.predict + 1], batch.targets)
    for row, pair in enumerate(toy_pairs()[:3]):
        learnt = batch.targets[batch.sequence == row].tolist()
        assert learnt[-1] == backbone.eos_token_ids[0]
        assert backbone.tokenizer.decode(learnt[:-1]) == pair["target"]


def test_special_tokens_in_data_are_split_but_the_templates_are_not(backbone: Backbone) -> None:
    end = backbone.eos_token_ids[0]
    data = Dataset((Example(1, "a<|endoftext|>", "b<|endoftext|>"),), "sha256:0")
    (example,), _ = tokenize(backbone.prompt_encoder, TEMPLATE, end, data, 60)
    ends = [index for index, token in enumerate(example.ids) if token == end]
    assert ends == [example.start - 1, len(example.ids) - 1]


def test_a_line_past_the_window_is_named_or_left_out(backbone: Backbone) -> None:
    data = Dataset((Example(1, "a", "b"), Example(2, "word " * 50, "b")), "sha256:0")
    arguments = (backbone.prompt_encoder, TEMPLATE, backbone.eos_token_ids[0], data, 30)
    with pytest.raises(InvalidData, match="line 2: expected at most 30 tokens"):
        tokenize(*arguments)
    kept, dropped = tokenize(*arguments, drop_long=True)
    assert (len(kept), dropped) == (1, 1)


def test_an_epochs_batches_hold_every_example_once_and_depend_on_seed_and_epoch(backbone: Backbone) -> None:
    examples = toy_examples(backbone)
    batches = epoch_batches(examples, 5, seed=1, epoch=0)
    assert sorted(index for batch in batches for index in batch) == list(range(len(examples)))
    assert batches == epoch_batches(examples, 5, seed=1, epoch=0)
    assert batches != epoch_batches(examples, 5, seed=1, epoch=1) != epoch_batches(examples, 5, seed=2, epoch=1)


@pytest.mark.corpora
def test_the_default_template_with_paper_spaces_gives_the_papers_tokens() -> None:
    """GPT-2's own tokenizer over `` {source} <|endoftext|> {target} <|endoftext|>``, as one string."""
    folder = CORPORA / "tokenizers" / "gpt2"
    if not folder.exists():
        pytest.skip(f"needs {folder}")
    from transformers import GPT2Tokenizer

    vocabulary = json.loads((folder / "vocab.json").read_text())
    merges = [tuple(line.split()) for line in (folder / "merges.txt").read_text().splitlines()[1:] if line]
    tokenizer = GPT2Tokenizer(vocab=vocabulary, merges=merges)
    source, target = "name : The Vaults | Type : pub", "The Vaults is a pub ."
    data = Dataset((Example(1, f" {source}", f" {target} "),), "sha256:0")
    end = tokenizer.eos_token_id
    (example,), _ = tokenize(PromptEncoder(tokenizer), GPT2_TEMPLATE, end, data, 100)
    assert list(example.ids) == tokenizer(f" {source} <|endoftext|> {target} <|endoftext|>")["input_ids"]
