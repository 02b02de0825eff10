"""``prefixd evaluate``: what a user sees, finds on disk and in the registry."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import prefixd
from prefixes.artifact import write_prefix
from prefixes.backbone import load_backbone
from prefixes.registry import open_registry
from tests.support.prefixes import make_prefix
from tests.support.trainer import FAMILIES, toy_pairs, write_jsonl

FAST = ["--parameter", "max_new_tokens=4", "--resamples", "20", "--threads", "1"]


@pytest.fixture(params=FAMILIES)
def workplace(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A backbone, two versions of a task of which the second is production's, and a test set with a long input."""
    FAMILIES[request.param](tmp_path / "backbone")
    backbone = load_backbone(str(tmp_path / "backbone"))
    again = {"input": toy_pairs(6)[0]["input"], "target": "of course"}
    write_jsonl(tmp_path / "test.jsonl", [*toy_pairs(6), again, {"input": "\x01" * 100, "target": "yes"}])
    registry = open_registry(str(tmp_path / "registry"))
    for seed, alias in ((1, "first"), (2, "production")):
        prefix = make_prefix(
            backbone.spec, seed=seed, sites=tuple(backbone.spec.sites), template=backbone.input_template
        )
        (tmp_path / f"{alias}.safetensors").write_bytes(write_prefix(prefix))
        registry.publish(
            "default", "toy", write_prefix(prefix), alias=alias, record={"scores": {"final_loss": 1.5}, "seconds": 2}
        )
    registry.close()
    return tmp_path


def evaluate(folder: Path, *more: str) -> Result:
    options = ["--data", str(folder / "test.jsonl"), "--backbone", str(folder / "backbone"), *FAST]
    return CliRunner().invoke(prefixd.app, ["evaluate", *options, *more])


def of_task(folder: Path, *more: str, task: str = "toy") -> Result:
    return evaluate(folder, "--task", task, "--registry", str(folder / "registry"), *more)


def test_a_task_of_the_registry_is_scored_by_alias_and_its_record_keeps_the_scores(workplace: Path) -> None:
    result = of_task(workplace, "--truncate", "--metric", "chrf", "--metric", "ter", "--record", task="toy@first")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert (told["inputs"], told["references"], list(told["scores"])) == (len(toy_pairs(6)) + 1, 8, ["chrf", "ter"])
    assert "outputs" not in told and told["scores"]["chrf"].keys() == {"value", "low", "high"}
    assert "95 % interval" in result.stderr and "chrf" in result.stderr
    registry = open_registry(str(workplace / "registry"), create=False)
    task = registry.inspect("default", "toy")
    registry.close()
    first, production = (
        next(info for info in task.versions if info.version == task.aliases[alias]) for alias in ("first", "production")
    )
    assert told["version"] == first.version != production.version
    assert first.record["seconds"] == 2 and first.record["scores"]["final_loss"] == 1.5, "what was known stays"
    assert first.record["scores"]["chrf"] == told["scores"]["chrf"]["value"]
    assert first.record["evaluation"] == told
    assert "evaluation" not in production.record
    assert [len(moves) for moves in task.history.values()] == [1, 1], "no alias moved"


def test_an_artifact_is_scored_and_leaves_its_outputs_and_a_report(workplace: Path) -> None:
    artifact, out = str(workplace / "production.safetensors"), workplace / "deep" / "out"
    result = evaluate(workplace, "--artifact", artifact, "--truncate", "--limit", "3", "--output", str(out))
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["inputs"] == 3 and told["preset"] == "plain"
    assert sorted(path.name for path in out.iterdir()) == [
        "evaluation.json", "outputs.jsonl", "report.html", "report.json",
    ]  # fmt: skip
    rows = [json.loads(line) for line in (out / "outputs.jsonl").read_text().splitlines()]
    assert rows[0]["references"] == [toy_pairs(6)[0]["target"], "of course"]
    whole = json.loads((out / "evaluation.json").read_text())
    assert {key: whole[key] for key in told} == told and whole["outputs"] == rows
    assert told["version"] in (out / "report.html").read_text()


def test_an_input_past_the_window_is_refused_by_its_number_unless_it_may_be_cut(workplace: Path) -> None:
    result = of_task(workplace)
    assert result.exit_code == 1
    assert "input_too_long" in result.output and "--truncate cuts it" in result.output


@pytest.mark.parametrize("family", ["gpt2"])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--preset", "e3e"], "preset: expected one of plain, e2e"),
        (["--metric", "blue"], "metric: expected one of bleu, ter"),
        (["--parameter", "temperature=0.5"], "parameter: expected some of max_new_tokens"),
        (["--parameter", "num_beams"], "expected name=JSON value"),
        (["--kv-cache-bytes", "some"], "expected a size such as 512MiB"),
        (["--kv-cache-bytes", "1KiB"], "kv_cache_bytes: expected at least"),
        (["--device", "abacus"], "--device: expected one that torch has here"),
        (["--dtype", "float8"], "--dtype: expected one of float32"),
    ],
)
def test_wrong_options_end_in_one_line_that_says_what_was_expected(
    tmp_path: Path, family: str, options: list[str], said: str
) -> None:
    FAMILIES[family](tmp_path / "backbone")
    write_jsonl(tmp_path / "test.jsonl", toy_pairs(2))
    prefix = make_prefix(load_backbone(str(tmp_path / "backbone")).spec)
    (tmp_path / "p.safetensors").write_bytes(write_prefix(prefix))
    result = evaluate(tmp_path, "--artifact", str(tmp_path / "p.safetensors"), *options)
    assert (result.exit_code, said in result.output) == (1, True), result.output
    assert isinstance(result.exception, SystemExit), "no traceback"


def test_what_to_score_is_a_task_or_an_artifact_that_is_there(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "test.jsonl", toy_pairs(2))
    assert evaluate(tmp_path).exit_code == 2
    assert evaluate(tmp_path, "--task", "a", "--artifact", "b").exit_code == 2
    assert evaluate(tmp_path, "--artifact", "b", "--record").exit_code == 2
    missing = evaluate(tmp_path, "--artifact", str(tmp_path / "none.safetensors"))
    assert (missing.exit_code, "--artifact: expected a file" in missing.output) == (1, True)
    open_registry(str(tmp_path / "registry")).close()
    unknown = of_task(tmp_path, task="nobody")
    assert (unknown.exit_code, "task_not_found" in unknown.output) == (1, True)


def test_the_help_teaches_with_examples() -> None:
    result = CliRunner().invoke(prefixd.app, ["evaluate", "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert "prefixd evaluate --task e2e --data e2e-test.jsonl" in result.output
    assert "multi-bleu" in result.output and "need Java" in result.output


def test_a_backbone_that_a_server_refuses_is_scored_only_where_told_so(workplace: Path) -> None:
    path = workplace / "backbone" / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "sequence_bias": [[[5], 2.0]]}))
    refused = of_task(workplace, "--truncate", "--metric", "chrf")
    assert (refused.exit_code, "--ignore-generation-config sequence_bias" in refused.output) == (1, True)
    told = of_task(workplace, "--truncate", "--metric", "chrf", "--ignore-generation-config", "sequence_bias")
    assert told.exit_code == 0, told.output
