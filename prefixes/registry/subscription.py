"""Subscription: how a store tells of its changes. Owns the contract; knows no store."""

from __future__ import annotations

from typing import Protocol


class Subscription(Protocol):
    """Changes as they happen. A ``live`` subscription has lost none since ``generation`` last went up."""

    generation: int  # goes up with every connection: older reads may be outdated
    heard_at: float  # time.monotonic() seconds: no change was missed between the start of the generation and then

    def live(self) -> bool:
        """Whether the store was heard within the last half second."""

    def close(self) -> None:
        """Stop listening."""
