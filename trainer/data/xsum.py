"""Reader of XSum in its two common forms: JSONL as dataset hubs give it, and line-aligned files.

Owns these formats; knows no tokenizer and no training. This project does not distribute XSum.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from prefixes.strict_json import strict_json
from trainer.data.corpora import CorpusError, Pair, read_lines
from trainer.data.texts import checked, is_blank

FIELDS = ("document", "summary", "id")


def read_xsum(path: Path) -> Iterator[Pair]:
    """Read articles and summaries; line breaks become spaces.

    ``path`` is a JSONL of ``{"document", "summary", "id"}`` lines. Or it is the common beginning of two line-aligned
    files, ``path.source`` and ``path.target`` (``xsum/train``, as the paper's code reads it). CorpusError names file,
    line and field.
    """
    aligned = [path.with_name(f"{path.name}.{side}") for side in ("source", "target")]
    if path.is_file():
        return _read_jsonl(path)
    if any(side.exists() for side in aligned):
        return _read_aligned(aligned[0], aligned[1])
    raise CorpusError(
        f"cannot read {path}: expected a JSONL file, or {aligned[0].name} and {aligned[1].name} beside each other",
        path=str(path),
    )


def _read_jsonl(path: Path) -> Iterator[Pair]:
    for number, line in enumerate(read_lines(path), 1):
        if is_blank(line):
            continue
        where = f"{path.name} line {number}"
        try:
            record = strict_json(line)
        except ValueError as error:
            raise CorpusError(f"{where}: expected JSON, got {error}", line=number) from error
        if not isinstance(record, dict):
            raise CorpusError(f"{where}: expected an object, got {type(record).__name__}", line=number)
        document, summary, origin = (_field(where, number, record, name) for name in FIELDS)
        yield Pair(document, summary, origin)


def _field(where: str, number: int, record: dict[str, object], name: str) -> str:
    value = record.get(name)
    if not isinstance(value, str) or is_blank(value):
        got = "an empty one" if isinstance(value, str) else "none" if name not in record else type(value).__name__
        raise CorpusError(f"{where}, field {name!r}: expected a text, got {got}", line=number, field=name)
    try:
        return " ".join(checked(value).split())
    except ValueError as error:
        raise CorpusError(f"{where}, field {name!r}: expected a text, got {error}", line=number, field=name) from None


def _read_aligned(source: Path, target: Path) -> Iterator[Pair]:
    documents, summaries = read_lines(source), read_lines(target)
    if len(documents) != len(summaries):
        raise CorpusError(
            f"{source.name} and {target.name}: expected as many lines in both, got {len(documents)} and "
            f"{len(summaries)}"
        )
    for number, texts in enumerate(zip(documents, summaries, strict=True), 1):
        document, summary = (" ".join(text.split()) for text in texts)
        for path, text in ((source, document), (target, summary)):
            if is_blank(text):
                raise CorpusError(f"{path.name} line {number}: expected a text, got an empty line", line=number)
        yield Pair(document, summary, f"{source.stem}/{number}")
