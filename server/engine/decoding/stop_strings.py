"""Finds stop strings in a text that comes in pieces. Torch-free.

Owns the automaton of a request's stop strings (Aho and Corasick 1975): a state stands for the longest end of the text
that begins a stop string. Knows neither tokens nor what is done with a match. Reading a text takes at most two moves a
character, however long and many the strings are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

START = 0


class StopStrings:
    """The automaton. It does not change once it is built: outputs share it, and each has a state of its own."""

    def __init__(self, strings: Iterable[str] = ()) -> None:
        self._next: list[dict[str, int]] = [{}]  # state -> character -> state
        self._depth = [0]  # state -> length of the text's end that it stands for
        self._complete = [0]  # state -> length of the longest stop string that ends here; 0 is none
        for string in strings:
            self._add(string)
        self._shorter = self._link()  # state -> the longest shorter end that begins a stop string

    def read(self, state: int, piece: str) -> tuple[int, tuple[int, int] | None]:
        """Go on from ``state`` over ``piece``, up to the first complete stop string.

        Returns the new state, and for a match where it begins and ends, counted from the piece's beginning: the longest
        one, if several end there. It may begin before the piece, at a negative place.
        """
        for at, character in enumerate(piece, 1):
            while state != START and character not in self._next[state]:
                state = self._shorter[state]
            state = self._next[state].get(character, START)
            if length := self._complete[state]:
                return state, (at - length, at)
        return state, None

    def undecided(self, state: int) -> int:
        """Length of the end of the text that may still become a stop string."""
        return self._depth[state]

    def _add(self, string: str) -> None:
        state = START
        for character in string:
            if character not in self._next[state]:
                self._next[state][character] = len(self._next)
                self._next.append({})
                self._depth.append(self._depth[state] + 1)
                self._complete.append(0)
            state = self._next[state][character]
        self._complete[state] = len(string)

    def _link(self) -> list[int]:
        """Link each state to the longest shorter one, nearest to the start first; a match there is one here too."""
        shorter = [START] * len(self._next)
        waiting = deque(self._next[START].values())
        while waiting:
            state = waiting.popleft()
            self._complete[state] = self._complete[state] or self._complete[shorter[state]]
            for character, following in self._next[state].items():
                waiting.append(following)
                behind = shorter[state]
                while behind != START and character not in self._next[behind]:
                    behind = shorter[behind]
                shorter[following] = self._next[behind].get(character, START)
        return shorter
