"""Readers of the corpora: E2E, WebNLG 2017 and DART in the paper's input format, and SciTLDR. All give ``Pair``.

Owns the corpora's file formats and the text form of their structured side; knows no tokenizer and no training.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from prefixes.errors import PrefixdError
from prefixes.strict_json import strict_json
from trainer.data.texts import BYTE_ORDER_MARK, checked, is_blank

Triple = tuple[str, str, str]  # subject, relation, object


class CorpusError(PrefixdError):
    """A corpus file is missing or does not have its documented form."""

    code = "invalid_data"


@dataclass(frozen=True)
class Pair:
    """One reference: the input (the structured side as text, or an abstract), the text to write, and its origin."""

    source: str
    target: str
    origin: str  # "e2e", WebNLG's category, DART's annotation source, or SciTLDR's paper id


def read_e2e(path: Path) -> Iterator[Pair]:
    """Read lines of ``fields||text``; fields look like ``name : X | Type : Y``. CorpusError names file and line."""
    for number, line in enumerate(read_lines(path), 1):
        source, bar, target = (part.strip() for part in line.partition("||"))
        if not bar or is_blank(source) or is_blank(target) or target.startswith(BYTE_ORDER_MARK):
            raise CorpusError(f"{path.name} line {number}: expected fields||text, got {line[:60]!r}", line=number)
        yield Pair(source, target, "e2e")


def read_webnlg(path: Path) -> Iterator[Pair]:
    """Read WebNLG 2017 JSON, only lexicalisations marked good. See ``webnlg_source`` for the sources."""
    for wrapped, where in _entries(path, "entries"):
        with where:
            entry = next(iter(wrapped.values()))
            source = webnlg_source(
                _triples([(t["subject"], t["property"], t["object"]) for t in entry["modifiedtripleset"]])
            )
            good = [lex["lex"].strip() for lex in entry["lexicalisations"] if lex["comment"] == "good"]
            pairs = [Pair(source, checked(text), entry["category"]) for text in good if not is_blank(text)]
        yield from pairs


def read_dart(path: Path, *, without: Sequence[str] = ()) -> Iterator[Pair]:
    """Read DART v1.1.1 JSON. ``without`` leaves out annotations of these sources (for example ``webnlg``)."""
    for entry, where in _entries(path, None):
        with where:
            source = dart_source(_triples(entry["tripleset"]))
            kept = [item for item in entry["annotations"] if item["source"] not in without and item["text"]]
            texts = [(checked(" ".join(item["text"].split())), item["source"]) for item in kept]
            pairs = [Pair(source, text, origin) for text, origin in texts if not is_blank(text)]
        yield from pairs


def read_scitldr(path: Path) -> Iterator[Pair]:
    """Read SciTLDR-A JSONL: an abstract, its sentences joined by a space, with each of its summaries, in file order.

    All references of a paper share source and origin. CorpusError names file and line.
    """
    for number, line in enumerate(read_lines(path), 1):
        where = f"{path.name} line {number}"
        try:
            paper = strict_json(line)
            origin, sentences, summaries = paper["paper_id"], _texts(paper["source"]), _texts(paper["target"])
        except (ValueError, KeyError, TypeError) as error:
            raise CorpusError(f"{where}: expected paper_id, source and target, got {error!r}", line=number) from error
        if not sentences or not summaries or not isinstance(origin, str):
            raise CorpusError(f"{where}: expected a paper with sentences and summaries, got {line[:60]!r}", line=number)
        yield from (Pair(" ".join(sentences), summary, origin) for summary in summaries)


def webnlg_source(triples: Sequence[Triple]) -> str:
    """Write triples as `` | s : r : o | s : r : o``, with the leading bar of the published code."""
    return "".join(f" | {subject} : {relation} : {obj}" for subject, relation, obj in triples)


def dart_source(triples: Sequence[Triple]) -> str:
    """Write triples as ``s : r : o | s : r : o``, with lower-cased relations."""
    return " | ".join(f"{subject} : {relation.lower()} : {obj}" for subject, relation, obj in triples)


_RATED: Final = (
    "priced price prices rated rate rating ratings reviewed ranked ranged range quality cost costs level end"
)
_COMPOUNDS: Final = frozenset(
    (first, second)
    for firsts, seconds in (
        ("family adult adults child children kid kids", "friendly unfriendly friendliness oriented free only style "
         "styled themed centric welcoming approved"),
        ("high highly higher low lower lowly mid middle medium moderate moderately average averagely averaged cheap "
         "cheaply cheaper fair fairly reasonable reasonably well good poor poorly top upper normal expensive decent "
         "excellent over", _RATED),
        ("well highly newly", "respected known recognized received recommended acclaimed opened"),
        ("above below", "average"),
        ("low high good", "budget energy key value"),
        ("english british french italian japanese chinese indian american asian oriental pub sushi",
         "style styled type themed inspired serving"),
        ("customer customers costumer price", "rated rating ratings range ranged favourite"),
        ("one two three four five 1 2 3 4 5", "star stars starred"),
        ("twenty thirty forty fifty", "one two three four five six seven eight nine"),
        ("take eat dine sit stand", "away aways in out outs down"),
        ("fast fine full coffee city river sea gastro grown close go", "food foods service dining shop centre center "
         "side pub up by to"),
    )
    for first in firsts.split()
    for second in seconds.split()
)  # fmt: skip
_PREFIXES: Final = frozenset({"non", "anti", "co", "sub", "semi"})
_HYPHEN: Final = re.compile(r"(\w+) ?- (?=£?(\w+))")


def detokenize(text: str) -> str:
    """Undo the tokenisation of the E2E files: ``The Vaults , from £ 30 .`` becomes ``The Vaults, from £30.``

    A hyphen loses its spaces within a compound of E2E's and between numbers. Between clauses it is a dash and keeps
    them.
    """
    text = re.sub(r" ([.,;:!?])", r"\1", text)
    text = re.sub(r" '(s|t|re|ll|ve|m|d)\b", r"'\1", text)
    text = re.sub(r"£ (?=\d)", "£", text)
    text = _HYPHEN.sub(_joined, text)
    text = text.replace("-Friendly", "-friendly").replace("-Rated", "-rated")
    return " ".join(text.split())


def _joined(match: re.Match[str]) -> str:
    """Write a hyphen without its spaces, or leave a dash as it is."""
    first, second = match[1].lower(), match[2].lower()
    numbers = first[-1].isdigit() and second[0].isdigit()
    return f"{match[1]}-" if numbers or first in _PREFIXES or (first, second) in _COMPOUNDS else match[0]


def _texts(value: Any) -> list[str]:
    """Return the texts of a list with single spaces, without empty ones."""
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise TypeError(f"expected a list of texts, got {str(value)[:60]!r}")
    return [text for text in (" ".join(checked(text).split()) for text in value) if not is_blank(text)]


def _triples(value: Any) -> list[Triple]:
    """Return the triples of a list, at least one, of texts. Raises ValueError, TypeError, AttributeError."""
    triples = [(checked(subject), checked(relation), checked(obj)) for subject, relation, obj in value]
    if not triples:
        raise ValueError("no triple")
    return triples


def read_lines(path: Path) -> list[str]:
    """Read a UTF-8 file and split it only at line feeds: texts hold other separators. CorpusError names the line.

    No line may begin with a byte order mark: files that were put behind each other have it in the middle.
    """
    lines = _read(path).split("\n")
    for number, line in enumerate(lines, 1):
        if line.startswith(BYTE_ORDER_MARK):
            raise _marked(path, number)
    return lines[:-1] if lines[-1] == "" else lines


def _read(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CorpusError(f"cannot read {path}: {error.strerror}", path=str(path)) from error
    if content.startswith(BYTE_ORDER_MARK.encode()):
        raise _marked(path, 1)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise CorpusError(
            f"{path.name} line {line}: expected UTF-8, got the byte 0x{content[error.start]:02x}",
            path=str(path),
            line=line,
        ) from error


def _marked(path: Path, line: int) -> CorpusError:
    return CorpusError(
        f"{path.name} line {line}: expected UTF-8 without a byte order mark, got one", path=str(path), line=line
    )


def _entries(path: Path, key: str | None) -> Iterator[tuple[Any, AbstractContextManager[None]]]:
    """Yield every entry with a context that turns a fault in the entry into a CorpusError with its number."""
    try:
        document = strict_json(_read(path))
    except ValueError as error:
        raise CorpusError(f"{path.name}: expected JSON, got {error}", path=str(path)) from error
    entries = document.get(key) if key and isinstance(document, dict) else document
    if not isinstance(entries, list):
        raise CorpusError(f"{path.name}: expected a list of entries{f' under {key!r}' if key else ''}", path=str(path))
    for number, entry in enumerate(entries):
        yield entry, _named(path, number)


@contextmanager
def _named(path: Path, number: int) -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, StopIteration) as error:
        raise CorpusError(f"{path.name} entry {number}: not of the corpus's form: {error!r}", entry=number) from error


def held_out(source: str, percent: int = 5, *, salt: str = "") -> bool:
    """Whether a source belongs to the held-out part: a fixed ``percent`` of the sources, by their hash.

    All references of a source fall on the same side, whatever the order of its fields. Another ``salt`` gives another,
    independent split.
    """
    return int.from_bytes(hashlib.sha256((salt + canonical(source)).encode()).digest()[:8], "big") % 100 < percent


def canonical(source: str) -> str:
    """One text per source, whatever the order of its fields."""
    return "|".join(sorted(part.strip() for part in source.split("|")))
