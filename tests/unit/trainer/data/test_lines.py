"""The lines of a training file: the same are taken and refused, in the same words, however their bytes arrive."""

from __future__ import annotations

import hashlib
import tracemalloc
from pathlib import Path

import pytest

from tests.support.datasets import line, lines, pieces
from trainer.data.dataset import Example, InvalidData, read_dataset
from trainer.data.lines import MAX_LINE, LineReader

GOOD = b'{"input": "a", "target": "b"}'


def fed(content: bytes, size: int) -> list[Example]:
    reader = LineReader("data.jsonl")
    examples: list[Example] = []
    for chunk in pieces(content, size):
        examples += reader.feed(chunk)
    return [*examples, *reader.finish()]


TAKEN: dict[str, tuple[bytes, list[int]]] = {
    "with an end": (GOOD + b"\n", [1]),
    "without an end": (GOOD + b"\n" + GOOD, [1, 2]),
    "blank lines": (b"\n \n" + GOOD + b"\n\n\t\n" + GOOD + b"\n\n", [3, 6]),
    "carriage returns": (GOOD + b"\r\n\r\n" + GOOD + b"\r\n", [1, 3]),
    "other separators within": ('{"input": "a\u2028\x85b\\u000b", "target": "é😀"}\n'.encode() + GOOD, [1, 2]),
    "spaces within": (b' { "target" : "b" , "input" : "a" } \n', [1]),
    "as long as may be": (b'{"input": "a", "target": "' + b"b" * (MAX_LINE - 28) + b'"}\n' + GOOD, [1, 2]),
}


@pytest.mark.parametrize("size", [1, 7, 1 << 20])
@pytest.mark.parametrize("case", TAKEN)
def test_lines_are_taken_however_they_are_cut(tmp_path: Path, case: str, size: int) -> None:
    content, numbers = TAKEN[case]
    (tmp_path / "data.jsonl").write_bytes(content)
    data = read_dataset(tmp_path / "data.jsonl")
    assert [example.line for example in data.examples] == numbers
    assert data.digest == f"sha256:{hashlib.sha256(content).hexdigest()}"
    assert tuple(fed(content, size)) == data.examples


REFUSED: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "data.jsonl: expected at least one line, got none"),
    "blank lines": (b"\n \r\n", "data.jsonl: expected at least one line, got none"),
    "half an object": (b"{", "data.jsonl line 1: expected JSON, got Expecting property name enclosed in double quotes "
                       "at character 2"),
    "a list": (GOOD + b"\n\n[1]\n", "data.jsonl line 3: expected an object with 'input' and 'target', got list"),
    "two objects": (GOOD + GOOD, "data.jsonl line 1: expected JSON, got Extra data at character 30"),
    "a field more": (GOOD + b'\n{"input": "a", "target": "b", "id": 1}', "data.jsonl line 2: expected an object with "
                     "'input' and 'target', got ['id', 'input', 'target']"),
    "a number": (b'{"input": 1, "target": "b"}\n', "data.jsonl line 1, field 'input': expected a text, got int"),
    "an empty text": (b'{"input": "a", "target": " "}', "data.jsonl line 1, field 'target': expected a text, got an "
                      "empty one"),
    "zero-width characters": (b'{"input": "a", "target": "\\u200b\\u2060 "}', "data.jsonl line 1, field 'target': "
                              "expected a text, got an empty one"),
    "a field twice": (GOOD + b'\n{"input": "a", "input": "b", "target": "b"}', "data.jsonl line 2: expected JSON, got "
                      "a key twice in one object"),
    "a field twice, escaped": (b'{"input": "a", "\\u0069nput": "a", "target": "b"}', "data.jsonl line 1: expected "
                               "JSON, got a key twice in one object"),
    "NaN": (b'{"input": NaN, "target": "b"}', "data.jsonl line 1: expected JSON, got the constant NaN, which is not "
            "JSON"),
    "a marked text": (b'{"input": "\\ufeffa", "target": "b"}', "data.jsonl line 1, field 'input': expected a text, "
                      "got a byte order mark at its beginning"),
    "a byte order mark": (b"\xef\xbb\xbf" + GOOD, "data.jsonl line 1: expected UTF-8 without a byte order mark, got "
                          "one"),
    "UTF-16": ("{}\n".encode("utf-16-le"), "data.jsonl line 1: expected UTF-8 text, got a NUL byte (UTF-16 has them)"),
    "a NUL": (GOOD + b'\n{"input": "a\0", "target": "b"}\n', "data.jsonl line 2: expected UTF-8 text, got a NUL byte "
              "(UTF-16 has them)"),
    "Latin-1": (GOOD + b'\n{"input": "caf\xe9", "target": "b"}\n', "data.jsonl line 2: expected UTF-8, got the byte "
                "0xe9 at 15 (invalid continuation byte)"),
    "a character cut at the end": (GOOD + b'\n"\xc3', "data.jsonl line 2: expected UTF-8, got the byte 0xc3 at 2 "
                                   "(unexpected end of data)"),
    "a line too long": (GOOD + b"\n" + b" " * (MAX_LINE + 1) + b"\n", f"data.jsonl line 2: expected at most {MAX_LINE} "
                        "bytes, got more"),
    "a last line too long": (b"x" * (MAX_LINE + 1), f"data.jsonl line 1: expected at most {MAX_LINE} bytes, got more"),
}  # fmt: skip


@pytest.mark.parametrize("size", [1, 7, 1 << 20])
@pytest.mark.parametrize("case", REFUSED)
def test_lines_are_refused_in_the_same_words_however_they_are_cut(tmp_path: Path, case: str, size: int) -> None:
    content, said = REFUSED[case]
    (tmp_path / "data.jsonl").write_bytes(content)
    with pytest.raises(InvalidData) as read:
        read_dataset(tmp_path / "data.jsonl")
    with pytest.raises(InvalidData) as uploaded:
        fed(content, size)
    assert read.value.message == uploaded.value.message == said
    assert read.value.detail == uploaded.value.detail


@pytest.mark.parametrize(
    "bad",
    [
        b"[" * 500_000,
        b'{"input": ' + b"9" * 5000 + b', "target": "b"}',
        b'{"' + b"x" * 100_000 + b'": 1}',
        b"{" + b",".join(b'"%d": 1' % number for number in range(10_000)) + b"}",
        b'{"input": "a", "target": "' + b"b" * 100_000,
    ],
    ids=["brackets", "digits", "name", "names", "text"],
)
def test_a_hostile_line_is_a_short_message(bad: bytes) -> None:
    with pytest.raises(InvalidData, match=r"data\.jsonl line 1: expected") as caught:
        fed(bad, 1 << 20)
    assert len(caught.value.message) < 600


def test_a_message_quotes_no_text() -> None:
    for bad in (b'{"input": "secret", "target": 1}', b'{"input": "secret"', b'"secret"', b'["secret"]'):
        with pytest.raises(InvalidData) as caught:
            fed(bad, 1 << 20)
        assert "secret" not in caught.value.message


def test_a_file_is_not_in_memory_beside_its_examples(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes((b" " * 65535 + b"\n") * 128 + line(1))
    tracemalloc.start()
    data = read_dataset(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert data.examples[0].line == 129
    assert peak < 4 << 20


def test_reading_lines_holds_no_more_of_many_than_of_few() -> None:
    peaks = []
    for count in (200, 20_000):
        content = lines(count)
        reader = LineReader("data.jsonl")
        tracemalloc.start()
        for chunk in pieces(content, 4096):
            for _ in reader.feed(chunk):
                pass
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert reader.examples == count
    assert peaks[1] < peaks[0] + 4096
