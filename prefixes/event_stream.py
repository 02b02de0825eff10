"""Server-sent events on the caller's side: turns the bytes of a stream, as they come, into events and comments.

Owns the format (HTML standard, "Server-sent events") as far as our services send it: lines end with LF or CR LF, never
with CR alone. Knows no client and no service, and not what an event's data mean.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class ServerSentEvent:
    """One event. ``id`` and ``name`` are None if it has none. Line feeds join several lines of data."""

    id: str | None
    name: str | None
    data: str


class EventDecoder:
    """Decodes one stream. An event that is incomplete when the stream ends is dropped."""

    def __init__(self) -> None:
        self._begun = b""  # an unfinished line
        self._fields: dict[str, str] = {}

    def feed(self, piece: bytes) -> Iterator[ServerSentEvent | None]:
        """Yield the events that ``piece``, of any length, completes, and None for a comment (a sign of life)."""
        *lines, self._begun = (self._begun + piece).split(b"\n")  # Unicode's other line separators are text
        for line in lines:
            text = line.removesuffix(b"\r").decode(errors="replace")
            if text.startswith(":"):
                yield None
            elif text:
                self._add(text)
            else:
                fields, self._fields = self._fields, {}
                if "data" in fields:
                    yield ServerSentEvent(fields.get("id"), fields.get("event"), fields["data"])

    def _add(self, line: str) -> None:
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data" and "data" in self._fields:
            value = f"{self._fields['data']}\n{value}"
        self._fields[name] = value
