"""Tasks for a tiny BART or T5: each with prefixes on another subset of the sites. Knows no test."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from typing import Any

from prefixes.backbone import Backbone
from prefixes.spec import Positions, Site
from server.engine.types import Finished, GenerationRequest
from tests.support.bart import random_bart_prefix
from tests.support.engine import Library, make_engine, run

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


def check_sampling_depends_on_nothing_else(
    backbone: Backbone, library: Library, requests: Sequence[GenerationRequest]
) -> None:
    """Assert that each of sampled ``requests`` has its outputs in a mix, with preemption, as alone; more than one."""
    engine = make_engine(backbone, library, blocks=200)
    mixed = run(engine, requests, random.Random(0), preempt=0.1)
    engine.close()
    for request in requests:
        engine = make_engine(backbone, library, blocks=400)
        alone = run(engine, [request])[request.request_id]
        engine.close()
        together = mixed[request.request_id]
        assert isinstance(alone, Finished) and isinstance(together, Finished)
        assert [o.token_ids for o in alone.outputs] == [o.token_ids for o in together.outputs]
        assert len({o.token_ids for o in alone.outputs}) > 1
