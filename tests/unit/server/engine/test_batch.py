"""The tensors of a call say what its rows compute: tokens, positions, blocks, and whose logits are wanted."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from prefixes.spec import Site
from server.engine.batch import BatchBuilder
from server.engine.decoding.state import DecodingState
from server.engine.prefixes.entry import SiteBlocks
from server.engine.row import EncodedInput, Group, Prompt, Row
from server.engine.scheduling.encoding import EncoderWork
from server.engine.scheduling.plan import ScheduledRow
from server.engine.types import GenerationRequest, PrefixKey, SamplingParams
from tests.support.prefixes import make_encoder_decoder_spec, make_prefix

SIZE = 4
BUILD = BatchBuilder(SIZE, torch.device("cpu"))


def row(token_ids: list[int], blocks: list[int]) -> Row:
    return Row(DecodingState(0, token_ids, 1), blocks=blocks)


def make_group(rows: Sequence[Row], prefix_blocks: SiteBlocks | None = None, length: int = 0) -> Group:
    """A group that runs, behind a shifted prefix of ``length`` at each site of ``prefix_blocks``."""
    sites: tuple[Site, ...] = tuple(prefix_blocks or ())
    spec = make_prefix(make_encoder_decoder_spec(), length=length, sites=sites).spec if prefix_blocks else None
    key = PrefixKey("default", "p") if spec else None
    request = GenerationRequest("r", "default", (1,), SamplingParams(), key, spec)
    return Group(request, Prompt((), (1,)), 8, 0, 0.0, b"", list(rows), prefix_blocks=prefix_blocks or {})


def test_a_call_holds_its_rows_tokens_positions_and_tables_one_after_the_other() -> None:
    decode = row([11, 12, 13, 14, 15], [7, 3])
    chunk = row([21, 22, 23, 24, 25, 26, 27, 28, 29], [5, 9, 2])
    prefixed, bare = make_group([decode], {"decoder": (8, 1)}, 6), make_group([chunk])
    call = BUILD.decoder([ScheduledRow(prefixed, decode, 4, 1), ScheduledRow(bare, chunk, 3, 3)])
    assert call.tokens.tolist() == [15, 24, 25, 26]
    assert call.positions.tolist() == [10, 3, 4, 5], "a shifted prefix comes before its row's tokens"
    assert list(call.batches) == ["decoder"]
    batch = call.batches["decoder"]
    assert batch.tables.tolist() == [[[8, 1, 0], [7, 3, 0]], [[0, 0, 0], [5, 9, 2]]]
    assert batch.lengths.tolist() == [[6, 5], [0, 6]]
    assert batch.slots.tolist() == [3 * SIZE, 5 * SIZE + 3, 9 * SIZE, 9 * SIZE + 1]
    assert (batch.counts, batch.longest, batch.causal) == ((1, 3), (6, 6), True)


def test_only_rows_that_reach_their_last_token_want_logits() -> None:
    first, second = row([1, 2, 3], [0]), row([4, 5, 6, 7], [1])
    group = make_group([first, second])

    def wanted(*rows: tuple[Row, int, int]) -> list[int] | None:
        chosen = BUILD.decoder([ScheduledRow(group, *one) for one in rows]).wanted
        return None if chosen is None else chosen.tolist()

    assert wanted((first, 2, 1), (second, 3, 1)) is None, "all of them"
    assert wanted((first, 0, 3), (second, 0, 4)) == [2, 6]
    assert wanted((first, 0, 2), (second, 3, 1)) == [2]
    assert wanted((first, 0, 2), (second, 0, 3)) == []


def test_rows_of_one_group_attend_to_their_input_as_one_row_of_several_tokens() -> None:
    rows, other = [row([1, 2], [index]) for index in range(3)], row([1, 2], [3])
    beams, alone = make_group(rows, {"cross": (9,), "decoder": (8,)}, 4), make_group([other])
    beams.input = EncodedInput((31, 32, 33, 34, 35), 1, [12, 11], done=1)
    alone.input = EncodedInput((41,), 1, [10], done=1)
    call = BUILD.decoder([*(ScheduledRow(beams, one, 1, 1) for one in rows), ScheduledRow(alone, other, 1, 1)])
    assert call.batches["decoder"].counts == (1, 1, 1, 1)
    cross = call.batches["cross"]
    assert (cross.counts, cross.longest, cross.causal) == ((3, 1), (4, 5), False)
    assert cross.tables.tolist() == [[[9, 0], [12, 11]], [[0, 0], [10, 0]]]
    assert cross.lengths.tolist() == [[4, 5], [0, 1]]
    assert cross.slots.numel() == 0, "its keys and values are there already"


def test_an_encoder_call_takes_whole_inputs_and_writes_where_they_are_kept() -> None:
    groups = (make_group([], {"encoder": (9,)}, 3), make_group([]))
    inputs = (EncodedInput((31, 32, 33, 34, 35), 2, [12, 11]), EncodedInput((41,), 2, [10]))
    work = EncoderWork(groups, inputs, range(1))
    tokens, positions = BUILD.encoder_tokens(work)
    assert tokens.tolist() == [31, 32, 33, 34, 35, 41]
    assert positions.tolist() == [3, 4, 5, 6, 7, 0]
    batch = BUILD.encoder(work)
    assert batch.slots.tolist() == [48, 49, 50, 51, 44, 40]
    assert batch.lengths.tolist() == [[3, 5], [0, 1]]
    assert (batch.counts, batch.longest, batch.causal) == ((5, 1), (3, 5), False)
