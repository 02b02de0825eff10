"""Tasks for a tiny BART: each with prefixes on another subset of the sites. Knows no test."""

from __future__ import annotations

import functools
from typing import Any

from prefixes.backbone import Backbone
from prefixes.spec import Positions, Site
from tests.support.bart import random_bart_prefix
from tests.support.engine import Library

SUBSETS: tuple[tuple[dict[Site, int], Positions], ...] = (
    ({}, "unshifted"),
    ({"decoder": 5}, "unshifted"),
    ({"encoder": 17}, "unshifted"),
    ({"cross": 16}, "unshifted"),
    ({"decoder": 2, "encoder": 33, "cross": 1}, "unshifted"),
    ({"decoder": 9, "cross": 40}, "shifted"),
    ({"encoder": 4, "cross": 4}, "shifted"),
    ({"decoder": 100, "encoder": 1}, "shifted"),
)
"""Tasks: each with another subset of sites and other lengths; the first is the bare backbone."""


class BartLibrary(Library):
    """Random prefixes on the sites of ``SUBSETS``, one task each."""

    def __init__(self, backbone: Backbone) -> None:
        some = [int(bool(sites)) for sites, _ in SUBSETS]
        super().__init__(backbone, some, make=functools.partial(self._make, backbone))

    @staticmethod
    def _make(backbone: Backbone, index: int, length: int) -> Any:
        lengths, positions = SUBSETS[index]
        return random_bart_prefix(backbone.spec, tuple(lengths), lengths, positions_of(lengths, positions), index)


def positions_of(lengths: dict[Site, int], positions: Positions) -> dict[Site, Positions]:
    return {site: "unshifted" if site == "cross" else positions for site in lengths}
