"""What tenants were served, counted from their groups and not from the counters that fairness goes by."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from server.engine.row import Group
from tests.support.scheduling import Machine


def output_tokens(group: Group, finished: bool) -> int:
    """Tokens chosen for the group, each row's and each beam's."""
    if group.beams is None:
        return sum(row.decoding.output_length for row in group.rows)
    return group.request.params.num_beams * (group.rows[0].decoding.output_length + finished)


def served(machine: Machine, groups: Iterable[Group]) -> Counter[str]:
    """By caller: inputs of the groups that were admitted, once each, and twice their outputs. Prefixes do not count."""
    tokens = Counter[str]()
    for group in groups:
        if group.admitted:
            finished = machine.ended.get(group.request.request_id) == "finished"
            tokens[group.request.caller] += len(group.request.token_ids) + 2 * output_tokens(group, finished)
    return tokens


@dataclass
class Service:
    """Two tenants' service over time, each over its weight, while both have something waiting."""

    weights: dict[str, float]
    ahead: list[float] = field(default_factory=list)  # of the first tenant, after each step

    def note(self, machine: Machine, groups: Sequence[Group]) -> None:
        tokens = served(machine, groups)
        first, second = (tokens[tenant] / weight for tenant, weight in self.weights.items())
        self.ahead.append(first - second)

    @property
    def spread(self) -> float:
        """The most that one was served more than the other between any two steps."""
        return max(self.ahead) - min(self.ahead)
