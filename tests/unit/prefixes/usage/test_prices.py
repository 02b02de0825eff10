"""Prices are exact, and a table that is not one is refused by the name of what is wrong."""

from __future__ import annotations

import json
import random
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from prefixes.errors import InvalidParameter
from prefixes.usage.model import Counts, Kind, Outcome, Row
from prefixes.usage.prices import prices_from, read_prices
from prefixes.usage.table import BY, parse_by, priced, summed
from tests.support.usage import random_counts, subject

TOML = """
currency = "EUR"
[default]
per_1000_input_tokens = "0.10"
per_1000_prefix_tokens = 0.01
per_1000_output_tokens = "0.40"
per_training_step = "0.002"
[tasks."acme/e2e"]
per_1000_output_tokens = "0.80"
[tenants.globex]
per_1000_output_tokens = 1
"""


def test_a_file_says_what_each_thing_costs(tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_text(TOML)
    table = read_prices(tmp_path / "p.toml")
    counts = Counts(1, 3, 2000, 7, 1, 5, 0, 0)
    assert table.cost(subject("acme", None), counts) == Decimal("0.0331")
    assert table.cost(subject("acme", "acme/e2e"), counts) == Decimal("0.0359")
    assert table.cost(subject("globex", "acme/e2e"), counts) == Decimal("0.0373")
    assert table.cost(subject("acme", kind=Kind.SHARED), counts) == 0, "others pay it"


def test_json_is_read_as_toml_is(tmp_path: Path) -> None:
    raw = {"currency": "EUR", "default": {"per_1000_input_tokens": 0.1, "per_training_step": "3"}}
    (tmp_path / "p.json").write_text(json.dumps(raw))
    table = read_prices(tmp_path / "p.json")
    assert table.default == {"per_1000_input_tokens": Decimal("0.1"), "per_training_step": Decimal(3)}


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        ({}, "currency"), ({"currency": ""}, "currency"), ({"currency": "EUR", "prices": {}}, "'prices'"),
        ({"currency": "EUR", "default": {"input": 1}}, "default.*'input'"), ([], "expected a table"),
        ({"currency": "EUR", "default": {"per_training_step": -1}}, "per_training_step.*'-1'"),
        ({"currency": "EUR", "default": {"per_training_step": "NaN"}}, "'NaN'"),
        ({"currency": "EUR", "default": {"per_training_step": "1e-13"}}, "'1e-13'"),
        ({"currency": "EUR", "default": {"per_training_step": True}}, "'True'"),
        ({"currency": "EUR", "tasks": {"a/b": {"per_training_step": "x"}}}, "tasks.a/b: per_training_step.*'x'"),
        ({"currency": "EUR", "tenants": {"a": 3}}, "tenants.a: expected a table"),
    ],
)  # fmt: skip
def test_what_is_no_table_is_refused(raw: Any, named: str) -> None:
    with pytest.raises(InvalidParameter, match=named):
        prices_from(raw, "prices")


@pytest.mark.parametrize("name", ["p.toml", "p.json", "absent.toml"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    for file in ("p.toml", "p.json"):
        (tmp_path / file).write_text("{")
    with pytest.raises(InvalidParameter, match=name):
        read_prices(tmp_path / name)


@pytest.mark.parametrize("seed", range(3))
def test_costs_add_up_exactly_however_rows_are_summed(seed: int) -> None:
    """Against fractions: no float and no rounding comes between a row and the total."""
    noise = random.Random(seed)
    table = prices_from({
        "currency": "EUR",
        "default": {name: str(Decimal(noise.randrange(10**13)).scaleb(-12)) for name in (
            "per_1000_input_tokens", "per_1000_prefix_tokens", "per_1000_output_tokens", "per_training_step")},
    }, "prices")  # fmt: skip
    rows = [
        Row(f"2026-01-0{noise.randrange(1, 9)}", subject(noise.choice("abc"), noise.choice(["a/x", "b/y", None]),
            key=noise.choice(["k", "l"]), outcome=noise.choice(list(Outcome))), random_counts(noise))
        for _ in range(200)
    ]  # fmt: skip
    expected = sum(
        Fraction(table.default["per_1000_input_tokens"]) * row.counts.input_tokens / 1000
        + Fraction(table.default["per_1000_prefix_tokens"]) * row.counts.prefix_tokens / 1000
        + Fraction(table.default["per_1000_output_tokens"]) * row.counts.output_tokens / 1000
        + Fraction(table.default["per_training_step"]) * row.counts.training_steps
        for row in rows
    )
    for by in (("task",), ("day", "tenant"), BY):
        answer = summed(rows, "2026-01-01", "2026-01-09", by=by, prices=table)
        assert Fraction(answer["total"]["cost"]) == expected
        assert sum(Fraction(row["cost"]) for row in answer["rows"]) == expected
        assert sum(row["output_tokens"] for row in answer["rows"]) == sum(row.counts.output_tokens for row in rows)
    wide = summed(rows, "2026-01-01", "2026-01-09", by=("key", "tenant", "task"))
    assert priced(wide, ("key",), table) == summed(rows, "2026-01-01", "2026-01-09", by=("key",), prices=table)


def test_by_takes_known_names_once() -> None:
    assert parse_by("task, day") == ("task", "day")
    for text in ("", "task,task", "owner"):
        with pytest.raises(InvalidParameter, match="by"):
            parse_by(text)


def test_an_answer_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prefixes.usage.table.MAX_ANSWER", 3)
    rows = [Row("2026-01-01", subject(key=f"k{number}"), Counts(1)) for number in range(4)]
    with pytest.raises(InvalidParameter, match="at most 3 rows"):
        summed(rows, "2026-01-01", "2026-01-01", by=("key",))
    assert summed(rows, "2026-01-01", "2026-01-01")["total"]["requests"] == 4
