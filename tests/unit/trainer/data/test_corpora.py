"""SciTLDR's reader, and what all readers refuse, on small files of its format and on the corpus itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.paths import SHARED
from trainer.data.corpora import CorpusError, Pair, read_dart, read_e2e, read_lines, read_scitldr

SCITLDR = SHARED / "scitldr"
PAPER = {"paper_id": "p1", "source": ["First  one.", "Second."], "target": ["Short. ", "Other."], "title": "T"}


def written(tmp_path: Path, *papers: Any) -> Path:
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(paper) + "\n" for paper in papers))
    return path


def test_an_abstract_stands_before_each_of_its_summaries(tmp_path: Path) -> None:
    other = PAPER | {"paper_id": "p2", "target": ["Only."]}
    assert list(read_scitldr(written(tmp_path, PAPER, other))) == [
        Pair("First one. Second.", "Short.", "p1"),
        Pair("First one. Second.", "Other.", "p1"),
        Pair("First one. Second.", "Only.", "p2"),
    ]


@pytest.mark.parametrize(
    "broken",
    [
        [],
        {key: value for key, value in PAPER.items() if key != "target"},
        PAPER | {"source": "a text"},
        PAPER | {"source": [1]},
        PAPER | {"source": []},
        PAPER | {"target": [" "]},
        PAPER | {"paper_id": 5},
    ],
)
def test_a_line_of_another_form_is_named(tmp_path: Path, broken: Any) -> None:
    with pytest.raises(CorpusError, match=r"train\.jsonl line 2: expected"):
        list(read_scitldr(written(tmp_path, PAPER, broken)))


def test_a_line_that_is_no_json_and_a_file_that_is_not_there_are_named(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text('{"source": [\n')
    with pytest.raises(CorpusError, match=r"train\.jsonl line 1: expected"):
        list(read_scitldr(path))
    with pytest.raises(CorpusError, match="cannot read"):
        list(read_scitldr(tmp_path / "absent"))


@pytest.mark.parametrize(("read", "name"), [(read_e2e, "e2e.txt"), (read_scitldr, "tldr.jsonl"), (read_dart, "d.json")])
def test_a_byte_that_is_no_utf_8_is_named_with_its_line(
    tmp_path: Path, read: Callable[[Path], Iterator[Pair]], name: str
) -> None:
    (tmp_path / name).write_bytes(b'name : A||A .\n"caf\xe9"\n')
    with pytest.raises(CorpusError, match=f"{name} line 2: expected UTF-8, got the byte 0xe9"):
        list(read_lines(tmp_path / name))
    with pytest.raises(CorpusError):
        list(read(tmp_path / name))


def test_half_a_character_is_named(tmp_path: Path) -> None:
    """JSON's escapes can write a surrogate without its other half; no file can hold it."""
    broken = PAPER | {"target": ["Short \ud800."]}
    with pytest.raises(CorpusError, match=r"train\.jsonl line 2: expected .*lone surrogate"):
        list(read_scitldr(written(tmp_path, PAPER, broken)))
    annotations = [{"source": "x", "text": "C in \udc00"}]
    dart = written(tmp_path, [{"tripleset": [["C", "IN", "D"]], "annotations": annotations}])
    with pytest.raises(CorpusError, match=r"entry 0: .*lone surrogate"):
        list(read_dart(dart))


@pytest.mark.corpora
@pytest.mark.skipif(not SCITLDR.is_dir(), reason="needs ../shared/data/scitldr")
@pytest.mark.parametrize(("name", "papers", "pairs"), [("train", 1992, 1992), ("dev", 619, 1453), ("test", 618, 1967)])
def test_scitldr_itself(name: str, papers: int, pairs: int) -> None:
    read = list(read_scitldr(SCITLDR / f"{name}.jsonl"))
    assert (len({pair.origin for pair in read}), len(read)) == (papers, pairs)
