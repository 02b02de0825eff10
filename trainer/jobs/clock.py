"""Times in the records of jobs: UTC in ISO 8601, so that every machine reads them alike."""

from __future__ import annotations

from datetime import UTC, datetime


def now() -> str:
    """The current time."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def seconds_since(text: str | None) -> float:
    """Seconds from a time of ``now`` to this moment; 0 for none, and for one that another machine's clock has ahead."""
    if text is None:
        return 0.0
    return max(0.0, (datetime.now(UTC) - datetime.fromisoformat(text)).total_seconds())
