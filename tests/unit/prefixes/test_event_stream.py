"""Server-sent events are read from their bytes, however these are cut."""

from __future__ import annotations

import pytest

from prefixes.event_stream import EventDecoder, ServerSentEvent


def decoded(content: bytes, size: int = 1 << 20) -> list[ServerSentEvent | None]:
    decoder = EventDecoder()
    pieces = [content[start : start + size] for start in range(0, len(content), size)]
    return [event for piece in pieces for event in decoder.feed(piece)]


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_pieces_of_any_length_give_the_same_events(size: int) -> None:
    content = ": \n\nid: 7-1\nevent: state\ndata: é\u2028\u0085\n\n: heartbeat\n\ndata:2\n\n".encode()
    expected = [None, ServerSentEvent("7-1", "state", "é\u2028\u0085"), None, ServerSentEvent(None, None, "2")]
    assert decoded(content, size) == expected


def test_lines_may_end_with_carriage_returns_and_several_lines_of_data_are_one_text() -> None:
    assert decoded(b"event: a\r\ndata: 1\r\ndata: 2\r\n\r\n") == [ServerSentEvent(None, "a", "1\n2")]


def test_a_comment_behind_an_event_is_no_event_of_the_same_id() -> None:
    assert decoded(b"id: 1\ndata: x\n\n: \n\n") == [ServerSentEvent("1", None, "x"), None]


@pytest.mark.parametrize("content", [b"data: x\n", b"event: state\n\n", b"\n\n", b"<html>hello</html>"])
def test_what_has_no_data_or_no_end_is_no_event(content: bytes) -> None:
    assert decoded(content) == []
