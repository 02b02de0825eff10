"""Server-sent events from the caller's side: the bytes of a stream, as they come, to events and comments.

Owns the form of HTML's chapter on server-sent events, as far as our services send it: lines end with a line feed or
with both, never with a carriage return alone. Knows no client, no service and nothing of what an event's data mean.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class ServerSentEvent:
    """One event. ``id`` and ``name`` are None where it has none; several lines of data are joined by line feeds."""

    id: str | None
    name: str | None
    data: str


class EventDecoder:
    """Reads one stream. What is left when it ends is no whole event and is dropped."""

    def __init__(self) -> None:
        self._begun = b""  # a line whose end has not come yet
        self._fields: dict[str, str] = {}

    def feed(self, piece: bytes) -> Iterator[ServerSentEvent | None]:
        """The events that ``piece``, of any length, completes; None for a comment, which is a sign of life."""
        *lines, self._begun = (self._begun + piece).split(b"\n")  # other separators of Unicode's are text
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
