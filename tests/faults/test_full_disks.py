"""A disk that becomes full, below each thing that a server writes: it says so, serves on, and writes again later."""

from __future__ import annotations

import json
import sys
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Final

import pytest

from prefixes.files.folder import TEMPORARY
from tests.support.checkup import SERVER, Checkup
from tests.support.figures import Figures
from tests.support.server import ServerProcess, TinyWorld, make_world
from tests.support.small_disk import fill, on_a_small_disk
from tests.support.traffic import ask, generate, publish

PLACES: Final = ("registry", "temporary", "cache")
ROUNDS: Final = 3
UPLOADS: Final = 6
LARGE: Final = 4000
"""A prefix of this length has 2 MiB, more than an upload holds in memory."""


@pytest.mark.parametrize("place", PLACES)
def test_a_full_disk_loses_nothing_and_ends(figures: Figures, tmp_path: Path, place: str) -> None:
    said = on_a_small_disk("tests.faults.test_full_disks", tmp_path / "disk", tmp_path, place, size="16m")
    for name, value in json.loads(said.splitlines()[-1]).items():
        setattr(figures, name, value)
    figures.notes = [f"{place}: {note}" for note in figures.notes]


def check(disk: Path, outside: Path, place: str) -> Figures:
    """Run in a namespace in which ``disk`` is small."""
    figures = Figures("full disks")
    world = make_world(outside / "backbone")
    at = {name: (disk if name == place else outside) / name for name in PLACES}
    for folder in at.values():
        folder.mkdir()
    arguments = ("--backbone", str(world.folder), "--registry", str(at["registry"]), "--disk-cache", str(at["cache"]))
    # Nothing is kept in host memory, so that whatever is loaded is written to the cache, or would be.
    with ServerProcess(
        outside, *arguments, *SERVER, "--host-cache-bytes", "0", env={"TMPDIR": str(at["temporary"])}
    ) as server:
        checkup = Checkup(server.wait_ready(), world, figures)
        assert publish(server, "known", world.prefix(seed=5)).status == 201
        said = generate(server, "known").said
        # Python chooses the folder for temporary files with the first of them, and passes over a full one.
        assert publish(server, "large", world.prefix(seed=4, length=LARGE)).status == 201
        for number in range(ROUNDS):
            ballast, before = fill(disk), cached(at["cache"])
            for upload in range(UPLOADS):
                figures.cases += 1
                one_more(server, world, f"task-{number}-{upload}", place, figures)
                assert figures.compare(generate(server, "known").said, said)
            assert list(disk.rglob(f"{TEMPORARY}*")) == []
            assert place != "cache" or cached(at["cache"]) <= before  # nothing went in: it was full
            ballast.unlink()
            assert publish(server, f"after-{number}", world.prefix(seed=6 + number)).status == 201
            assert generate(server, f"after-{number}").status == 200
            assert cached(at["cache"]) - before, "what was loaded on a disk with room is not in the cache"
            checkup.round_over()
        names = {item["task"] for item in ask(server, "GET", "/prefixes").body["prefixes"]}
        wanted = {f"default/task-{number}-{upload}" for number in range(ROUNDS) for upload in range(UPLOADS)}
        assert names & wanted == (wanted if place == "cache" else set())
        checkup.end()
    return figures


def cached(folder: Path) -> set[Path]:
    """The artifacts in the disk cache."""
    return set(folder.rglob("*.safetensors"))


def one_more(server: ServerProcess, world: TinyWorld, task: str, place: str, figures: Figures) -> None:
    """Upload while the disk is full: refused by that name, unless only the cache is full."""
    data = world.prefix(seed=zlib.crc32(task.encode()), length=LARGE if place == "temporary" else 40)
    answer = publish(server, task, data)
    if place == "cache":
        assert answer.status == 201, answer
        assert generate(server, task).status == 200
        return
    assert (answer.status, answer.body["error"]["code"]) == (507, "disk_full"), answer


if __name__ == "__main__":
    sys.stdout.write(json.dumps(asdict(check(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]))) + "\n")
