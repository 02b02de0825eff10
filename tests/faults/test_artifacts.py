"""Damaged and forged artifacts: each is the original or refused by name, and a server that gets them serves on."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Final

import torch

from prefixes.artifact import Prefix, read_prefix, version_of, write_prefix
from prefixes.errors import InvalidArtifact, PrefixdError
from tests.support.checkup import SERVER, Checkup
from tests.support.figures import Figures
from tests.support.memory import MIB, address_space_bounded
from tests.support.mutations import MUTATIONS, mutants
from tests.support.prefixes import make_prefix
from tests.support.server import ServerProcess, TinyWorld
from tests.support.traffic import ask, generate, publish

IN_PROCESS: Final = 2000
OVER_HTTP: Final = 200
MOST: Final = 64 * MIB
"""Beyond what is mapped before; the artifact has some kilobytes."""
ROUNDS: Final = 4


def test_a_mutant_is_the_original_or_refused_by_name(figures: Figures) -> None:
    original = make_prefix(length=7, seed=5, defaults={"num_beams": 2, "stop": ["x"]}, origin={"by": ["a", {"b": 1}]})
    data, version = write_prefix(original), version_of(original)
    assert torch.isfinite(torch.ones(1)).all()  # what a reader needs is loaded before memory is bounded
    read_prefix(data, expected_version=version)
    outcomes = {"refused": 0, "the original": 0, "another prefix": 0}
    kinds = set()
    with address_space_bounded(MOST):
        for kind, mutant in islice(mutants(data, seed=1), IN_PROCESS):
            figures.cases += 1
            kinds.add(kind)
            try:
                read_prefix(mutant, expected_version=version)
                outcome = "the original"
            except PrefixdError as error:
                assert error.code == "invalid_artifact", (kind, error)
                assert len(str(error)) < 2000, (kind, len(str(error)))
                outcome = "refused"
            except BaseException as error:
                figures.wrong += 1
                raise AssertionError(f"{kind}, case {figures.cases}: {mutant[:3000]!r}") from error
            if outcome == "refused" and (read := read_or_none(mutant)) is not None:
                assert version_of(read_prefix(write_prefix(read))) == version_of(read) != version, kind
                outcome = "another prefix"
            outcomes[outcome] += 1
    figures.notes.append(f"in process: {outcomes}")
    assert kinds == {mutation.__name__ for mutation in MUTATIONS}
    assert outcomes["refused"] > IN_PROCESS / 2


def read_or_none(data: bytes) -> Prefix | None:
    """The prefix in ``data``, as one who expects no version reads it."""
    try:
        return read_prefix(data)
    except InvalidArtifact:
        return None


def test_a_server_refuses_mutants_and_serves_on(figures: Figures, world: TinyWorld, tmp_path: Path) -> None:
    registry = tmp_path / "registry"
    arguments = ("--backbone", str(world.folder), "--registry", str(registry))
    with ServerProcess(tmp_path, *arguments, *SERVER) as server:
        checkup = Checkup(server.wait_ready(), world, figures)
        data = world.prefix(seed=5, defaults={"num_beams": 2, "stop": []}, origin={"by": "us"})
        assert publish(server, "e2e", data).status == 201
        said, known = generate(server, "e2e").said, published(server)
        refused = (mutant for _, mutant in mutants(data, seed=2) if read_or_none(mutant) is None)
        for _ in range(ROUNDS):
            for mutant in islice(refused, OVER_HTTP // ROUNDS):
                figures.cases += 1
                answer = publish(server, "e2e", mutant)
                assert 400 <= answer.status < 500, (answer, mutant[:3000])
                assert answer.body["error"].keys() >= {"code", "message"}, answer
            assert figures.compare(generate(server, "e2e").said, said)
            checkup.round_over()
        assert published(server) == known
        assert len(list(registry.rglob("*.safetensors"))) == 2
        checkup.end()


def published(server: ServerProcess) -> object:
    """All that a caller sees of the registry, but for what is resident."""
    listed = ask(server, "GET", "/prefixes").body["prefixes"]
    details = [ask(server, "GET", f"/prefixes/{item['task'].rpartition('/')[2]}").body for item in listed]
    return sorted(item["task"] for item in listed), details
