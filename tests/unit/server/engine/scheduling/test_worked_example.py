"""The worked example of docs/reading.md: the real scheduler does what its table says, and an engine loses nothing."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from server.engine.row import Row
from server.engine.scheduling.plan import StepPlan
from server.engine.types import Event, Finished, TokenEvent
from tests.support.engine import Counts, Library, make_engine, run, tiny_backbone
from tests.support.paths import ROOT
from tests.support.scheduling import Machine

PAGE = (ROOT / "docs" / "reading.md").read_text()
CHAPTER = PAGE.partition("\n## Three samples, preempted\n")[2].partition("\n## ")[0]


def cells(line: str) -> list[str]:
    """The cells of a table's line."""
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def table(first: str) -> list[list[str]]:
    """The lines of the chapter's table whose first heading is ``first``, without its two heading lines."""
    (found,) = re.findall(rf"^\| {first} \|.*\n\|[-|: ]+\|\n((?:\|.*\n)+)", CHAPTER, re.M)
    return [cells(line) for line in found.splitlines()]


def pool() -> tuple[int, int]:
    """Blocks, and positions in each."""
    found = re.search(r"pool has (\d+) blocks of (\d+) positions", CHAPTER)
    assert found is not None
    return int(found[1]), int(found[2])


def requests() -> dict[str, tuple[int, dict[str, Any]]]:
    """Length of the prompt and parameters by the request's name."""
    return {
        name: (
            int(prompt),
            {
                "max_new_tokens": int(new),
                "min_new_tokens": int(new),
                "num_return_sequences": int(samples),
                "do_sample": int(samples) > 1,
                "seed": 1,
            },
        )
        for name, prompt, samples, new in table("request")
    }


def prompt_of(order: int, length: int) -> range:
    """Tokens of the request number ``order``; no two requests have one in common."""
    return range(20 * order + 5, 20 * order + 5 + length)


class Recorder(Machine):
    """Writes the page's table: what is held and computed when the model is called, and what has come of it."""

    def __init__(self, blocks: int, size: int) -> None:
        super().__init__(blocks, size=size, max_rows=8, early_end=0.0)
        self.groups = {
            name: self.add(self.request(name, prompt_of(order, prompt), **params), float(order))
            for order, (name, (prompt, params)) in enumerate(requests().items())
        }
        self.lines: list[list[str]] = []

    def _compute(self, plan: StepPlan) -> None:
        super()._compute(plan)
        alone, samples = self.groups.values()
        line = [str(self.steps), samples.state.name, _computed(plan, samples.rows)]
        line += [_blocks(row) for row in samples.rows]
        line += [", ".join(f"{source} to {target}" for source, target in plan.copies) or "–"]
        line += [_computed(plan, alone.rows), _blocks(alone.rows[0])]
        free = self.ledger.capacity - self.ledger.held
        self.lines.append([*line, str(free)])

    def finish(self) -> list[list[str]]:
        """Run to the end; all lines, each with the tokens that the rows have after the step."""
        while self.scheduler.waiting or self.scheduler.running:
            self.step()
            lengths = [len(row.token_ids) for group in reversed(self.groups.values()) for row in group.rows]
            self.lines[-1] += [", ".join(map(str, lengths[:-1])), str(lengths[-1])]
        self.close()
        return self.lines


def _computed(plan: StepPlan, rows: Iterable[Row]) -> str:
    """The positions that each of ``rows`` computes."""
    mine = [planned for row in rows for planned in plan.rows if planned.row is row]
    found = [f"{row.start}" + (f"–{row.start + row.count - 1}" if row.count > 1 else "") for row in mine]
    return f"{found[0]} each" if len(found) > 1 and len(set(found)) == 1 else ", ".join(found) or "–"


def _blocks(row: Row) -> str:
    return " ".join(map(str, row.blocks)) or "–"


def test_the_scheduler_does_what_the_table_says() -> None:
    assert table("step") == Recorder(*pool()).finish()


def test_preempted_samples_end_as_undisturbed_ones_and_no_token_is_told_twice(tmp_path: Path) -> None:
    blocks, size = pool()
    backbone = tiny_backbone(tmp_path, torch.float64)
    outputs = []
    for capacity, preemptions in ((blocks, 1), (100, 0)):
        counts, events, library = Counts(), list[Event](), Library(backbone, lengths=(0,))
        engine = make_engine(backbone, library, blocks=capacity + 1, block_size=size, observer=counts)
        asked = [
            library.request(name, 0, prompt_of(order, prompt), **params)
            for order, (name, (prompt, params)) in enumerate(requests().items())
        ]
        ended = run(engine, asked, events=events)
        engine.close()
        assert counts.preemptions == preemptions
        for request_id, (_, params) in requests().items():
            end = ended[request_id]
            assert isinstance(end, Finished)
            for index, output in enumerate(end.outputs):
                tokens = [event for event in events if isinstance(event, TokenEvent)]
                told = [event for event in tokens if (event.request_id, event.index) == (request_id, index)]
                assert tuple(token for event in told for token in event.token_ids) == output.token_ids
                assert "".join(event.text for event in told) == output.text
                assert len(output.token_ids) == params["max_new_tokens"]
        outputs.append({request_id: getattr(end, "outputs", None) for request_id, end in ended.items()})
    assert outputs[0] == outputs[1]
