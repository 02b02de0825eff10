"""``prefixd train --promote-if``: which version the alias is moved to, and what the command says of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import prefixd
from prefixes.registry import open_registry
from prefixes.registry.base import Store
from tests.support.prefixes import save_tiny_gpt2
from tests.support.trainer import TEMPLATE, write_jsonl
from trainer.cli.jobs.watch import _result
from trainer.evaluation.gate import Gate

GOOD, BAD = ("--lr", "0.05", "--epochs", "30"), ("--lr", "1e-9", "--epochs", "1")
RULE = ("--promote-if", "chrf", "--margin", "0.5")


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    save_tiny_gpt2(tmp_path / "backbone")
    write_jsonl(tmp_path / "data.jsonl", [{"input": f"item {n}", "target": "Blue Spice"} for n in range(60)])
    write_jsonl(tmp_path / "gate.jsonl", [{"input": f"gate {n}", "target": "Blue Spice"} for n in range(60)])
    return tmp_path


@pytest.fixture
def registry(workplace: Path) -> Iterator[Store]:
    with closing(open_registry(str(workplace / "registry"))) as made:
        yield made


def train(folder: Path, name: str, *more: str, registry: bool = True) -> Result:
    paths = ["--data", str(folder / "data.jsonl"), "--backbone", str(folder / "backbone"), "--template", TEMPLATE]
    how = ["--method", "direct", "--batch-size", "8", "--prefix-length", "4", "--threads", "1"]
    decoding = ["--default", "num_beams=1", "--default", "max_new_tokens=8"]
    place = ["--registry", str(folder / "registry")] if registry else []
    options = [*paths, "--output", str(folder / name), *how, *decoding, *place, *more]
    return CliRunner().invoke(prefixd.app, ["train", "--task", "toy", *options])


def test_a_good_version_is_promoted_and_a_bad_one_is_published_without_the_alias(
    workplace: Path, registry: Store
) -> None:
    gate = ("--gate", str(workplace / "gate.jsonl"))
    versions = []
    for name, how, verdict in (("first", BAD, "promoted"), ("good", GOOD, "promoted"), ("bad", BAD, "rejected")):
        result = train(workplace, name, *how, *RULE, *gate, "--seed", str(len(name)))
        assert result.exit_code == 0, result.output
        assert f"gate: {verdict}" in result.stderr, result.stderr
        versions.append(result.stdout.splitlines()[-1])
        outcome = json.loads((workplace / name / "gate.json").read_text())
        [info] = [info for info in registry.inspect("default", "toy").versions if info.version == versions[-1]]
        assert info.record["gate"] == outcome and outcome["verdict"] == verdict
        assert (f"published default/toy@{versions[-1]}" in result.stderr.replace("\n", "")) == (verdict == "rejected")
    assert registry.inspect("default", "toy").aliases == {"production": versions[1]}
    notes = [(entry.note or "").partition(":")[0] for entry in registry.audit("default")]
    assert notes == ["gate rejected", "gate promoted", "gate promoted"]


def test_an_alias_that_moves_while_versions_are_scored_is_never_moved_back(
    workplace: Path, registry: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = ("--gate", str(workplace / "gate.jsonl"))
    others = [train(workplace, f"other-{n}", *BAD, "--seed", str(n)).stdout.splitlines()[-1] for n in range(3)]
    judge, judged = Gate.judge, []

    def judge_slowly(*arguments: Any, **options: Any) -> Any:
        outcome = judge(*arguments, **options)
        judged.append(outcome.current)
        registry.promote("default", "toy", others[len(judged) - 1])
        return outcome

    monkeypatch.setattr(Gate, "judge", judge_slowly)
    result = train(workplace, "mine", *GOOD, *RULE, *gate)
    assert result.exit_code == 0, result.output
    assert judged == [others[2], others[0]], "once more, against where the alias points then"
    task = registry.inspect("default", "toy")
    assert task.aliases == {"production": others[1]}
    assert result.stdout.splitlines()[-1] in {info.version for info in task.versions}
    assert "gate: undecided: the alias moved 2 times" in result.stderr


def test_a_share_held_out_alone_needs_no_rule_and_few_inputs_decide_nothing(workplace: Path, registry: Store) -> None:
    share = ("--gate-hold-out", "30")
    assert train(workplace, "first", *BAD, *share).exit_code == 0
    before = registry.inspect("default", "toy").aliases
    result = train(workplace, "second", *GOOD, *share, *RULE)
    assert "gate: undecided" in result.stderr and "50 are needed" in result.stderr.replace("\n", " ")
    assert registry.inspect("default", "toy").aliases == before


@pytest.mark.parametrize(
    ("options", "registry", "message"),
    [
        (RULE, True, "got neither"),
        ((*RULE, "--gate-hold-out", "5"), False, "expected an alias and one of --registry and --server"),
        ((*RULE, "--gate-hold-out", "5", "--alias", ""), True, "expected an alias and one of"),
        (("--margin", "1"), True, "expected --promote-if beside it"),
        (("--promote-if", "cider", "--gate-hold-out", "5"), True, "expected one of bleu"),
        ((*RULE, "--gate", "nowhere.jsonl"), True, "expected a UTF-8 JSONL file"),
    ],
)
def test_a_gate_that_cannot_decide_is_refused_before_training(
    workplace: Path, options: tuple[str, ...], registry: bool, message: str
) -> None:
    result = train(workplace, "out", *options, registry=registry)
    assert (result.exit_code, message in " ".join(result.output.split())) == (1, True), result.output
    assert not (workplace / "out").exists()


def test_whoever_watches_a_job_reads_its_verdict() -> None:
    gate = {"verdict": "rejected", "reason": "bleu 3.00 against 40.00"}
    told = _result({"task": "acme/e2e", "version": "sha256:1", "alias": None, "scores": {}, "gate": gate})
    assert "gate: rejected: bleu 3.00 against 40.00" in told
    assert "is this version now" not in told
