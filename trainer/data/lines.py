"""Reads the lines of a training file as its bytes arrive: JSONL of ``{"input", "target"}``.

Owns the format of a line and every message about a bad one, the same for files and uploads. Holds one line at a time.
Knows neither files nor sockets, and quotes no text in a message.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from prefixes.errors import PrefixdError
from prefixes.strict_json import strict_json
from trainer.data.texts import checked, is_blank

MAX_LINE: Final = 1 << 20
"""Most bytes of a line: many times what a model's window holds."""
FIELDS: Final = ("input", "target")
_SHOWN: Final = 8  # most field names in a message
_CUT: Final = 40  # most characters of each
_BOM: Final = b"\xef\xbb\xbf"


class InvalidData(PrefixdError):
    """A training file is missing, or one of its lines does not have the format."""

    code = "invalid_data"


@dataclass(frozen=True)
class Example:
    """One line: its number, the input as the server will get it, and the output to learn."""

    line: int
    input: str
    target: str


class LineReader:
    """Splits bytes into lines and reads them. A line ends with a line feed, with or without a carriage return.

    Blank lines are skipped but counted. The last line needs no end.
    """

    def __init__(self, name: str) -> None:
        """``name`` is the file's name in messages."""
        self.examples = 0
        self._name = name
        self._number = 0  # of the last line that was read
        self._begun = bytearray()  # the line that has not ended yet

    def feed(self, chunk: bytes) -> Iterator[Example]:
        """Yield the examples of the lines that end within ``chunk``. Exhaust it before the next call.

        Raises InvalidData, which names the line, the field, and what was expected and found.
        """
        begin = 0
        while (end := chunk.find(b"\n", begin)) >= 0:
            self._check_length(len(self._begun) + end - begin)
            line = bytes(self._begun) + chunk[begin:end]
            self._begun.clear()
            yield from self._read(line)
            begin = end + 1
        self._check_length(len(self._begun) + len(chunk) - begin)
        self._begun += chunk[begin:]

    def finish(self) -> Iterator[Example]:
        """Yield the example of a last line without an end. Raises InvalidData, also if there was no example at all."""
        line = bytes(self._begun)
        self._begun.clear()
        yield from self._read(line)
        if not self.examples:
            raise InvalidData(f"{self._name}: expected at least one line, got none")

    def _read(self, line: bytes) -> Iterator[Example]:
        self._number += 1
        text = self._text(line)
        if text.strip():
            example = self._example(text)
            self.examples += 1
            yield example

    def _text(self, line: bytes) -> str:
        if self._number == 1 and line.startswith(_BOM):
            raise self._bad("expected UTF-8 without a byte order mark, got one")
        if b"\0" in line:
            raise self._bad("expected UTF-8 text, got a NUL byte (UTF-16 has them)")
        try:
            return line.decode()
        except UnicodeDecodeError as error:
            got = f"the byte 0x{line[error.start]:02x} at {error.start + 1}"
            raise self._bad(f"expected UTF-8, got {got} ({error.reason})") from None

    def _example(self, text: str) -> Example:
        try:
            record: Any = strict_json(text)
        except json.JSONDecodeError as error:
            raise self._bad(f"expected JSON, got {error.msg} at character {error.pos + 1}") from None
        except ValueError as error:  # a key twice, NaN, an integer of thousands of digits, deeply nested brackets
            raise self._bad(f"expected JSON, got {error}") from None
        if not isinstance(record, dict) or set(record) != set(FIELDS):
            got = _names(record) if isinstance(record, dict) else type(record).__name__
            raise self._bad(f"expected an object with 'input' and 'target', got {got}")
        for field in FIELDS:
            value = record[field]
            if not isinstance(value, str):
                raise self._bad_field(field, type(value).__name__)
            if is_blank(value):
                raise self._bad_field(field, "an empty one")
            try:
                checked(value)
            except ValueError as error:
                raise self._bad_field(field, str(error)) from None
        return Example(self._number, record["input"], record["target"])

    def _check_length(self, length: int) -> None:
        if length > MAX_LINE:
            self._number += 1
            raise self._bad(f"expected at most {MAX_LINE} bytes, got more")

    def _bad(self, what: str) -> InvalidData:
        return InvalidData(f"{self._name} line {self._number}: {what}", line=self._number)

    def _bad_field(self, field: str, got: str) -> InvalidData:
        message = f"{self._name} line {self._number}, field {field!r}: expected a text, got {got}"
        return InvalidData(message, line=self._number, field=field)


def _names(record: dict[str, Any]) -> list[str]:
    """Return the fields of a record, cut so that no line's text fills a message."""
    return [name[:_CUT] for name in sorted(record)[:_SHOWN]]
