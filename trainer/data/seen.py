"""The inputs that a version has seen, as a bounded list of digests that its artifact keeps.

Owns the digest of an input. It also says whether a gate holds the input out: those with the least digests are. A list
that is too long keeps the least too, so that it always tells of every input that its version held out. Knows no file.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from trainer.data.corpora import canonical

ENTRY: Final = "seen_inputs"
"""Of an artifact's origin."""
SALT: Final = "gate:"
"""Makes the gate's split independent of the others."""
BITS: Final = 32
"""Of a digest. An input is wrongly taken for one of ``n`` that were seen with a chance of ``n / 2**32``."""
KEPT: Final = 2048
"""Most digests of a version, 11 KB of text: a registry writes a task's versions with every change."""


@dataclass(frozen=True)
class SeenInputs:
    """Whether a text is among the inputs that a version was trained or chosen on, or a version that it started from.

    The list tells of texts whose digest is below ``bound`` and of no others. ``whole`` is False where a version that it
    started from keeps no list.
    """

    digests: frozenset[int]
    bound: int = 1 << BITS
    whole: bool = True

    @classmethod
    def of(cls, inputs: Iterable[str]) -> SeenInputs:
        """Of all these, without a bound."""
        return cls(frozenset(map(digest_of, inputs)))

    def tells_of(self, text: str) -> bool:
        """Whether it is known if ``text`` was seen."""
        return digest_of(text) < self.bound

    def __contains__(self, text: str) -> bool:
        return digest_of(text) in self.digests

    def with_start(self, start: SeenInputs | None) -> SeenInputs:
        """These and those of the version that training started from. None is a version without a list."""
        if start is None:
            return replace(self, whole=False)
        bound = min(self.bound, start.bound)
        both = frozenset(digest for digest in self.digests | start.digests if digest < bound)
        return SeenInputs(both, bound, self.whole and start.whole)

    def as_dict(self) -> dict[str, Any]:
        """JSON values of bounded size, for an artifact's origin; ``seen_by`` reads them back."""
        listed = sorted(self.digests)
        bound = listed[KEPT] if len(listed) > KEPT else self.bound
        packed = np.asarray(listed[:KEPT], ">u4").tobytes()
        return {"bound": bound, "whole": self.whole, "digests": base64.b64encode(packed).decode()}


def seen_by(origin: Mapping[str, Any]) -> SeenInputs | None:
    """What the version with this origin has seen; None where that cannot be read: an older release's, or a foreign one.
    """
    try:
        kept = origin[ENTRY]
        digests = np.frombuffer(base64.b64decode(kept["digests"], validate=True), ">u4")
        return SeenInputs(frozenset(digests.tolist()), int(kept["bound"]), bool(kept["whole"]))
    except (KeyError, TypeError, ValueError):
        return None


def digest_of(text: str) -> int:
    """The first ``BITS`` bits of the input's SHA-256, whatever the order of its fields."""
    return int.from_bytes(hashlib.sha256((SALT + canonical(text)).encode()).digest()[: BITS // 8], "big")


def in_gate(text: str, percent: int) -> bool:
    """Whether the gate holds the input out: those with the least digests, so that a larger share has the smaller's."""
    return digest_of(text) < (percent << BITS) // 100
