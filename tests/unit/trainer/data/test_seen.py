"""What a version's list of seen inputs tells, and which inputs a gate holds out."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefixes.artifact import read_prefix
from tests.support.prefixes import save_tiny_gpt2
from tests.support.trainer import TEMPLATE, toy_pairs, write_jsonl
from trainer.data.dataset import read_dataset
from trainer.data.seen import BITS, ENTRY, KEPT, SeenInputs, digest_of, in_gate, seen_by
from trainer.training.config import TrainConfig
from trainer.training.initial import InitialVersion
from trainer.training.request import RunRequest, read_datasets
from trainer.training.run import run_training

TEXTS = st.lists(st.text(min_size=1, max_size=12), max_size=30)
CONFIG = TrainConfig(prefix_length=2, method="direct", epochs=1, batch_size=8)


def read_back(seen: SeenInputs) -> SeenInputs:
    found = seen_by(json.loads(json.dumps({ENTRY: seen.as_dict()})))
    assert found is not None
    return found


@given(TEXTS, TEXTS)
def test_it_tells_exactly_what_was_seen_also_by_the_version_it_started_from(mine: list[str], before: list[str]) -> None:
    made = read_back(SeenInputs.of(mine).with_start(read_back(SeenInputs.of(before))))
    assert made.whole and made.bound == 1 << BITS
    digests = set(map(digest_of, [*mine, *before]))
    for text in [*mine, *before, "another one", "input"]:
        assert made.tells_of(text)
        assert (text in made) == (digest_of(text) in digests)


def test_one_that_is_too_long_is_cut_and_says_where_it_ends() -> None:
    inputs = [f"input {number}" for number in range(3 * KEPT)]
    made = read_back(SeenInputs.of(inputs))
    assert len(json.dumps(made.as_dict())) < 12_000
    known = [text for text in inputs if made.tells_of(text)]
    assert len(known) == KEPT and all(text in made for text in known)
    assert not any(text in made for text in inputs if not made.tells_of(text))
    others = [f"other {number}" for number in range(3000)]
    told = [text for text in others if made.tells_of(text)]
    assert 700 < len(told) < 1300 and not any(text in made for text in told)
    more = read_back(SeenInputs.of(["fresh"]).with_start(made))
    assert more.bound == made.bound, "what a start does not tell is not told later"


def test_a_start_without_a_list_is_said() -> None:
    made = read_back(SeenInputs.of(["a"]).with_start(None))
    assert not made.whole and "a" in made
    assert not read_back(SeenInputs.of(["b"]).with_start(made)).whole


@pytest.mark.parametrize(
    "kept", [None, "x", [], {}, {"digests": "!", "bound": 1, "whole": True}, {"digests": "AAA=", "bound": 1}]
)
def test_a_foreign_origin_tells_nothing(kept: object) -> None:
    assert seen_by({}) is None
    assert seen_by({ENTRY: kept}) is None


@given(st.text(min_size=1, max_size=20), st.integers(0, 50), st.integers(0, 50))
def test_a_larger_share_holds_out_what_a_smaller_one_does(text: str, one: int, other: int) -> None:
    small, large = sorted((one, other))
    assert in_gate(text, small) <= in_gate(text, large)
    assert not in_gate(text, 0)


def test_the_order_of_fields_makes_no_other_input() -> None:
    assert "food : x | name : a" in SeenInputs.of(["name : a | food : x"])


def test_of_many_inputs_the_share_is_held_out_and_a_long_list_tells_of_all_of_it() -> None:
    inputs = [f"place {number}" for number in range(20_000)]
    gate = [text for text in inputs if in_gate(text, 10)]
    assert 1800 < len(gate) < 2200
    made = read_back(SeenInputs.of(text for text in inputs if not in_gate(text, 10)))
    assert all(made.tells_of(text) and text not in made for text in gate)


def test_a_run_trains_and_validates_on_nothing_of_the_gate_and_its_artifact_says_on_what(tmp_path: Path) -> None:
    save_tiny_gpt2(tmp_path / "backbone")
    pairs = toy_pairs(80)
    random.Random(1).shuffle(pairs)
    data = write_jsonl(tmp_path / "data.jsonl", pairs)
    place = str(tmp_path / "backbone")
    request = RunRequest(data, place, TEMPLATE, tmp_path / "a", CONFIG, hold_out=20, gate_hold_out=30)
    train, validation = ({example.input for example in part.examples} for part in read_datasets(request))
    gate = {example.input for example in read_dataset(data).split_gate(30)[1].examples}
    assert train and validation and gate
    assert not (train & validation or train & gate or validation & gate)
    assert len(train | validation | gate) == 80
    first = read_prefix(run_training(request).artifact)
    seen = seen_by(first.spec.origin)
    assert seen is not None and seen.digests == set(map(digest_of, train | validation))
    more = write_jsonl(tmp_path / "more.jsonl", [{"input": f"new {n}", "target": "yes"} for n in range(20)])
    start = InitialVersion("sha256:1", first)
    again = RunRequest(more, place, TEMPLATE, tmp_path / "b", CONFIG, hold_out=0, initial=start)
    later = seen_by(read_prefix(run_training(again).artifact).spec.origin)
    assert later is not None and later.whole and later.digests > seen.digests
