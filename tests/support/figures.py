"""What a campaign of faults counts: cases, answers compared, wrong and lost ones, by part.

Owns the counts and how they are shown behind a run. They travel with the tests' reports, so that it does not matter
which process ran a test. Knows no test.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Final

PROPERTY: Final = "campaign"
"""The property of a test's report that holds its figures."""


@dataclass
class Figures:
    """One test's. A case is one input, fault or request; ``lost`` are accepted requests that were never answered."""

    part: str
    cases: int = 0
    compared: int = 0
    wrong: int = 0
    lost: int = 0
    notes: list[str] = field(default_factory=list)

    def compare(self, got: object, expected: object) -> bool:
        """Count an answer; whether it is the expected one."""
        self.compared += 1
        self.wrong += got != expected
        return got == expected

    def as_property(self) -> tuple[str, dict[str, Any]]:
        """As a report carries it."""
        return PROPERTY, asdict(self)


def shown(reports: Iterable[Any]) -> Iterator[str]:
    """The lines of the table; none if no test of the campaign ran."""
    found = [
        Figures(**value)
        for report in reports
        if getattr(report, "when", None) == "teardown"
        for name, value in report.user_properties
        if name == PROPERTY
    ]
    if not found:
        return
    parts: dict[str, Figures] = {}
    for figures in found:
        part = parts.setdefault(figures.part, Figures(figures.part))
        part.notes += figures.notes
        for name in ("cases", "compared", "wrong", "lost"):
            setattr(part, name, getattr(part, name) + getattr(figures, name))
    yield f"{'part':<28}{'cases':>8}{'compared':>10}{'wrong':>7}{'lost':>6}"
    total = Figures("all")
    for part in parts.values():
        for name in ("cases", "compared", "wrong", "lost"):
            setattr(total, name, getattr(total, name) + getattr(part, name))
    for part in (*parts.values(), total):
        yield f"{part.part:<28}{part.cases:>8}{part.compared:>10}{part.wrong:>7}{part.lost:>6}"
    for part in parts.values():
        for note in part.notes:
            yield f"{part.part}: {note}"
