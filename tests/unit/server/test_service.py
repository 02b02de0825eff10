"""Admission up to the engine's door: resolving, merging, tokenising, cutting."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, cast

import pytest

from prefixes.artifact import write_prefix
from prefixes.backbone import Backbone, load_backbone
from prefixes.errors import InputTooLong, InvalidParameter
from prefixes.limiter.memory import MemoryLimiter
from prefixes.registry import open_registry
from prefixes.tenancy.keyring import Keyring
from server.engine.async_engine import AsyncEngine
from server.engine.memory.prompt_reuse import chain_root
from server.engine.types import PrefixKey
from server.parameters import ParameterLimits
from server.registry.catalog import Catalog
from server.registry.link import RegistryLink
from server.reservations import Reservations
from server.service import GenerationService, Prepared
from server.tiers.tiers import PrefixTiers
from server.tokenizing import LONG_TEXT, Tokenizing
from server.web.auth import Caller
from tests.support.prefixes import make_prefix, save_tiny_gpt2

WINDOW = 64
LENGTH = 5
TEMPLATE = "<|endoftext|> in: {input} out:"


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    folder = tmp_path_factory.mktemp("backbone")
    save_tiny_gpt2(folder, n_positions=WINDOW)
    return load_backbone(str(folder))


def prepare(
    backbone: Backbone,
    tmp_path: Path,
    text: str,
    *,
    task: str | None = "e2e",
    template: str = TEMPLATE,
    positions: Any = "shifted",
    caller: str = "default",
    **parameters: Any,
) -> Prepared:
    registry = open_registry(str(tmp_path / "registry"))
    prefix = make_prefix(
        backbone.spec, length=LENGTH, template=template, positions=positions, defaults={"repetition_penalty": 1.5}
    )
    registry.publish("default", "e2e", write_prefix(prefix), record={})
    limits = ParameterLimits(128, 1000, 8, 8)

    async def run() -> Prepared:
        no_engine = cast(AsyncEngine, None)  # preparing does not ask it
        link, tiers = RegistryLink(registry), PrefixTiers(registry.fetch, ())
        catalog = Catalog(link, backbone.spec, tiers, alias_ttl_s=0.5, max_stale_s=300)
        reservations = Reservations(MemoryLimiter(), Keyring(registry.tenancy, 60))
        service = GenerationService(backbone, catalog, no_engine, limits, Tokenizing(1, 1 << 20, 8), reservations)
        return await service.prepare(Caller(caller), task, text, parameters, "id")

    return asyncio.run(run())


def test_a_prepared_request_names_its_version_and_merges_the_artifacts_defaults(
    backbone: Backbone, tmp_path: Path
) -> None:
    prepared = prepare(backbone, tmp_path, "x", max_new_tokens=3)
    request, identity = prepared.request, prepared.identity
    assert identity.version is not None
    assert request.prefix == PrefixKey("default", identity.version)
    assert (identity.id, identity.task, request.task, identity.truncated) == ("id", "default/e2e", "default/e2e", False)
    assert (request.params.max_new_tokens, request.params.repetition_penalty) == (3, 1.5)


def test_a_request_carries_its_caller_and_the_tasks_owner(backbone: Backbone, tmp_path: Path) -> None:
    """The owner of the task stood for the caller: callers of one task would have shared their prompts' blocks."""
    mine = prepare(backbone, tmp_path, "x").request
    theirs = prepare(backbone, tmp_path, "x", task="default/e2e", caller="guest").request
    bare = prepare(backbone, tmp_path, "x", task=None, caller="guest").request
    assert [(request.caller, request.owner) for request in (mine, theirs, bare)] == [
        ("default", "default"), ("guest", "default"), ("guest", None),
    ]  # fmt: skip
    assert mine.prefix == theirs.prefix
    assert chain_root(mine) != chain_root(theirs)


def test_the_bare_backbone_has_no_prefix_and_no_template(backbone: Backbone, tmp_path: Path) -> None:
    prepared = prepare(backbone, tmp_path, "x", task=None)
    assert (prepared.request.prefix, prepared.request.prefix_spec, prepared.identity.task) == (None, None, None)
    assert prepared.request.token_ids == tuple(backbone.prompt_encoder.encode_text("x"))


def test_a_special_token_in_the_input_is_text(backbone: Backbone, tmp_path: Path) -> None:
    end = backbone.eos_token_ids[0]
    token_ids = prepare(backbone, tmp_path, "<|endoftext|>").request.token_ids
    assert token_ids.count(end) == 1  # the template's own
    assert token_ids[0] == end


@pytest.mark.parametrize(("positions", "offset"), [("shifted", LENGTH), ("unshifted", 0)])
def test_the_longest_input_that_leaves_room_for_one_token_is_taken_whole(
    backbone: Backbone, tmp_path: Path, positions: str, offset: int
) -> None:
    room = WINDOW - offset - 1
    around = len(backbone.prompt_encoder.encode(TEMPLATE, ""))
    fits = prepare(backbone, tmp_path, "\x01" * (room - around), positions=positions, truncate=True)
    assert (len(fits.request.token_ids), fits.identity.truncated) == (room, False)
    with pytest.raises(InputTooLong) as caught:
        prepare(backbone, tmp_path, "\x01" * (room - around + 1), positions=positions)
    assert (caught.value.detail["expected"], caught.value.detail["got"]) == (room, room + 1)


@pytest.mark.parametrize("length", [100, LONG_TEXT + 100])
def test_truncating_cuts_the_inputs_end_and_keeps_the_template_whole(
    backbone: Backbone, tmp_path: Path, length: int
) -> None:
    text = "".join(chr(1 + index % 8) for index in range(length))
    prepared = prepare(backbone, tmp_path, text, truncate=True)
    before, after = (backbone.prompt_encoder.encode_literal(part) for part in TEMPLATE.split("{input}"))
    room = WINDOW - LENGTH - 1
    kept = backbone.prompt_encoder.encode_text(text)[: room - len(before) - len(after)]
    assert list(prepared.request.token_ids) == before + kept + after
    assert len(prepared.request.token_ids) == room
    assert prepared.identity.truncated


def test_a_template_that_leaves_no_room_for_any_input_is_refused_even_with_truncate(
    backbone: Backbone, tmp_path: Path
) -> None:
    with pytest.raises(InputTooLong):
        prepare(backbone, tmp_path, "xyz", template="\x02" * WINDOW + "{input}", truncate=True)


def test_an_input_without_tokens_is_refused(backbone: Backbone, tmp_path: Path) -> None:
    with pytest.raises(InvalidParameter, match="input: expected at least one token"):
        prepare(backbone, tmp_path, "", task=None)
    with pytest.raises(InvalidParameter, match="Unicode"):
        prepare(backbone, tmp_path, "\ud800", task=None)
