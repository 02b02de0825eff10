"""Training data: what is read and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.trainer import write_jsonl
from trainer.data.corpora import held_out
from trainer.data.dataset import Dataset, Example, InvalidData, read_dataset, shared_inputs


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
        ('{"input": "a", "target": "b\\ud800"}', "line 2, field 'target': expected a text, got half a character"),
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
    train, apart = read_dataset(write_jsonl(tmp_path / "data.jsonl", pairs)).split(20)
    assert len(train.examples) + len(apart.examples) == 300
    assert 0 < len({e.input for e in apart.examples}) < 50
    assert not {e.input for e in train.examples} & {e.input for e in apart.examples}


def test_the_training_side_of_a_converted_split_is_split_once_more(tmp_path: Path) -> None:
    """With one hash for both, the inputs that would validate are the very ones that the conversion took away."""
    inputs = [f"item {i}" for i in range(1000)]
    pairs = [{"input": text, "target": "x"} for text in inputs if not held_out(text)]
    train, apart = read_dataset(write_jsonl(tmp_path / "data.jsonl", pairs)).split(5)
    assert len(train.examples) + len(apart.examples) == len(pairs) < 1000
    assert 20 < len(apart.examples) < 90


def test_inputs_that_both_sides_have_are_counted_once_and_by_every_character() -> None:
    def side(*inputs: str) -> Dataset:
        return Dataset(tuple(Example(line, text, "x") for line, text in enumerate(inputs, 1)), "sha256:0")

    assert shared_inputs(side("a", "b", "b"), side("b", "b", "c", " a")) == (1, 3)
    assert shared_inputs(side("a"), side()) == (0, 0)
    whole = side(*(f"input {number % 40}" for number in range(80)))
    assert shared_inputs(*whole.split(30))[0] == 0, "a split keeps an input's lines together"
