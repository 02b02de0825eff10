"""``prefixd train``: what a user sees and finds on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner, Result

import prefixd
from prefixes.artifact import read_prefix
from prefixes.backbone import load_backbone
from prefixes.client import RemoteRegistry
from prefixes.registry import open_registry
from prefixes.spec import SITES
from tests.support.prefixes import make_prefix, save_tiny_gpt2
from tests.support.trainer import BART_TEMPLATE, FAMILIES, TEMPLATE, toy_pairs, write_jsonl
from trainer.training import budget, publish, search

FAST = ["--epochs", "2", "--batch-size", "6", "--lr", "0.01", "--method", "direct", "--threads", "1"]


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    FAMILIES["gpt2"](tmp_path / "backbone")
    write_jsonl(tmp_path / "data.jsonl", toy_pairs(30))
    return tmp_path


@pytest.fixture
def bart_workplace(tmp_path: Path) -> Path:
    """As ``workplace``, with one input past the window."""
    FAMILIES["bart"](tmp_path / "backbone")
    write_jsonl(tmp_path / "data.jsonl", [*toy_pairs(30), {"input": "\x01" * 90, "target": "yes"}])
    return tmp_path


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(prefixd.app, arguments)


def train(folder: Path, *more: str, template: str | None = TEMPLATE) -> Result:
    paths = ["--data", str(folder / "data.jsonl"), "--backbone", str(folder / "backbone")]
    options = ["--output", str(folder / "out"), *(["--template", template] if template else []), "--hold-out", "20"]
    return invoke("train", "--task", "toy", *paths, *options, *FAST, *more)


def test_a_run_leaves_a_valid_artifact_a_report_a_curve_and_no_checkpoint(workplace: Path) -> None:
    result = train(workplace, "--default", "num_beams=1")
    assert result.exit_code == 0, result.output
    out = workplace / "out"
    assert sorted(entry.name for entry in out.iterdir()) == [
        "config.json", "loss.png", "metrics.jsonl", "prefix.safetensors", "report.json",
    ]  # fmt: skip
    report = json.loads((out / "report.json").read_text())
    assert result.stdout.splitlines()[-1] == report["version"]
    spec = read_prefix((out / "prefix.safetensors").read_bytes(), expected_version=report["version"]).spec
    assert (spec.template, spec.defaults) == (TEMPLATE, {"num_beams": 1, "max_new_tokens": 100})
    assert spec.origin["data"]["train"]["digest"].startswith("sha256:")
    assert spec.origin["backbone"] == "backbone", "the name only, not the folder's path"
    assert spec.origin["hyperparameters"]["learning_rate"] == 0.01
    assert str(workplace) not in json.dumps(dict(spec.origin))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines if "validation_loss" in line] == [0, 1]
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_an_encoder_decoder_is_trained_on_all_its_sites_with_the_template_of_its_pretraining(
    bart_workplace: Path,
) -> None:
    refused = train(bart_workplace, template=None)
    assert (refused.exit_code, "line 31: expected at most 64 tokens of input" in refused.output) == (1, True)
    result = train(bart_workplace, "--truncate", "--hold-out", "0", "--default", "num_beams=1", template=None)
    assert result.exit_code == 0, result.output
    report = json.loads((bart_workplace / "out" / "report.json").read_text())
    assert report["cut"]["train"] == 1 and report["dropped"]["train"] == 0
    spec = read_prefix((bart_workplace / "out" / "prefix.safetensors").read_bytes()).spec
    assert spec.origin["data"]["train"]["inputs_cut"] == 1
    assert (set(spec.sites), spec.template) == (set(SITES), BART_TEMPLATE)
    assert {sited.positions for sited in spec.sites.values()} == {"unshifted"}


def test_sites_and_positions_are_the_callers_choice(bart_workplace: Path) -> None:
    result = train(
        bart_workplace, "--drop-long", "--sites", "cross, encoder", "--positions", "shifted", template=BART_TEMPLATE
    )
    assert result.exit_code == 0, result.output
    spec = read_prefix((bart_workplace / "out" / "prefix.safetensors").read_bytes()).spec
    assert {site: sited.positions for site, sited in spec.sites.items()} == {
        "encoder": "shifted",
        "cross": "unshifted",
    }
    assert spec.origin["hyperparameters"]["sites"] == ["encoder", "cross"]
    again = train(bart_workplace, "--resume", "--drop-long", "--sites", "encoder", template=BART_TEMPLATE)
    assert (again.exit_code, "cannot resume with other options: config" in again.output) == (1, True)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["num_beams=1", "do_sample=true", "temperature=-1"], "temperature: expected above 0"),
        (["num_beams=1", f"stop={json.dumps(['a'] * 17)}"], "stop: expected at most 16 strings"),
        ([f"seed={10**30}"], "seed"),
        ([f"temperature={10**600}"], "temperature: expected number"),
        (["num_beams=100"], "num_beams: expected 1 to 64"),
    ],
    ids=lambda given: str(given)[:30],
)
def test_defaults_that_the_server_refuses_are_refused_before_training(
    workplace: Path, given: list[str], said: str
) -> None:
    """They were trained and published, and failed every plain request, or failed behind the last step."""
    result = train(workplace, *(word for pair in given for word in ("--default", pair)))
    assert (result.exit_code, said in " ".join(result.output.split())) == (1, True), result.output
    assert not (workplace / "out").exists()


@pytest.mark.parametrize(
    "options",
    [["--seed", str(10**30)], ["--warmup-steps", str(10**30)], ["--weight-decay", "inf"], ["--lr", "nan"]],
    ids=lambda options: str(options[0]),
)
def test_what_no_artifact_can_hold_is_refused_before_training(workplace: Path, options: list[str]) -> None:
    result = train(workplace, *options)
    assert (result.exit_code, "invalid_parameter" in result.output) == (1, True), result.output
    assert not (workplace / "out").exists()


def test_a_template_that_no_artifact_can_hold_is_refused_before_training(workplace: Path) -> None:
    result = train(workplace, template="\udcff{input}")
    assert (result.exit_code, "invalid_artifact" in result.output) == (1, True), result.output
    assert not (workplace / "out").exists()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the server at http://server answers to ``/ready``; anything else is an error."""
    ready: dict[str, Any] = {"status": "ready", "backbone": "other"}

    def answer(request: httpx.Request) -> httpx.Response:
        assert (request.method, request.url.path) == ("GET", "/ready"), "nothing is sent that the server cannot take"
        return httpx.Response(200, json=ready)

    client = httpx.Client(base_url="http://server", transport=httpx.MockTransport(answer))
    monkeypatch.setattr(publish, "RemoteRegistry", lambda url, api_key: RemoteRegistry(url, client=client))
    return ready


def test_a_server_of_another_backbone_is_found_out_before_training(workplace: Path, server: dict[str, Any]) -> None:
    server["fingerprint"] = f"sha256:{'0' * 64}"
    result = train(workplace, "--server", "http://server")
    assert (result.exit_code, "incompatible_prefix" in result.output) == (1, True), result.output
    assert server["fingerprint"] in result.output.replace("\n", "")
    assert not (workplace / "out").exists()


def test_a_server_of_the_same_backbone_is_accepted(workplace: Path, server: dict[str, Any]) -> None:
    backbone = load_backbone(str(workplace / "backbone")).spec
    server["fingerprint"] = backbone.fingerprint
    with publish.Targets(None, "http://server") as targets:
        targets.check(make_prefix(backbone).spec)


@pytest.mark.parametrize("fingerprint", [None, 5])
def test_a_server_that_does_not_tell_its_backbone_is_found_out_before_training(
    workplace: Path, server: dict[str, Any], fingerprint: Any
) -> None:
    server["fingerprint"] = fingerprint
    result = train(workplace, "--server", "http://server")
    assert (result.exit_code, "expected its backbone's fingerprint" in result.output) == (1, True), result.output
    assert not (workplace / "out").exists()


def test_the_same_run_gives_the_same_version(workplace: Path) -> None:
    assert train(workplace).exit_code == 0
    (workplace / "out").rename(workplace / "first")
    assert train(workplace).exit_code == 0
    versions = {json.loads((workplace / n / "report.json").read_text())["version"] for n in ("first", "out")}
    assert len(versions) == 1


def test_an_existing_run_is_not_overwritten_and_resume_refuses_other_options(workplace: Path) -> None:
    assert train(workplace).exit_code == 0
    again = train(workplace)
    assert (again.exit_code, "holds a run already" in again.output) == (1, True)
    other = train(workplace, "--resume", "--seed", "9")
    assert (other.exit_code, "config was" in other.output) == (1, True)
    assert train(workplace, "--resume").exit_code == 0


def test_resume_of_a_finished_run_refuses_data_and_backbone_that_changed_in_their_place(workplace: Path) -> None:
    assert train(workplace).exit_code == 0
    write_jsonl(workplace / "data.jsonl", toy_pairs(31))
    other = train(workplace, "--resume")
    assert (other.exit_code, "invalid_checkpoint" in other.output) == (1, True), other.output
    assert "data: expected 'sha256:" in other.output and "backbone: expected" not in other.output
    write_jsonl(workplace / "data.jsonl", toy_pairs(30))
    assert train(workplace, "--resume").exit_code == 0
    save_tiny_gpt2(workplace / "backbone", seed=7)
    other = train(workplace, "--resume")
    assert (other.exit_code, "backbone: expected 'sha256:" in other.output) == (1, True), other.output


def test_a_report_without_an_identity_is_refused(workplace: Path) -> None:
    assert train(workplace).exit_code == 0
    path = workplace / "out" / "report.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "identity"}))
    other = train(workplace, "--resume")
    assert (other.exit_code, "expected the identity of backbone and data, got none" in other.output) == (1, True)


def test_a_split_that_holds_nothing_out_is_refused_with_the_remedies(workplace: Path) -> None:
    write_jsonl(workplace / "data.jsonl", toy_pairs(2))
    refused = train(workplace, "--hold-out", "1")
    assert (refused.exit_code, (workplace / "out").exists()) == (1, False), refused.output
    assert "none to validate on with 1 percent" in refused.output and "--hold-out 0" in refused.output
    assert train(workplace, "--hold-out", "0").exit_code == 0


def test_a_run_is_published_with_its_record_and_moves_the_alias(workplace: Path) -> None:
    registry = workplace / "registry"
    result = train(workplace, "--registry", str(registry), "--alias", "canary")
    assert result.exit_code == 0, result.output
    task = open_registry(str(registry)).inspect("default", "toy")
    (version,) = task.versions
    assert task.aliases == {"canary": version.version} == {"canary": result.stdout.splitlines()[-1]}
    assert version.record["scores"]["validation_loss_per_token"] > 0
    assert {"finished_at", "seconds", "who"} <= version.record.keys()
    again = train(workplace, "--resume", "--registry", str(registry))
    assert again.exit_code == 0, "a finished run can be published once more"
    assert open_registry(str(registry)).inspect("default", "toy").aliases["production"] == version.version


def test_a_registry_that_cannot_be_used_is_found_before_the_training(workplace: Path) -> None:
    result = train(workplace, "--registry", str(workplace / "backbone"))
    assert (result.exit_code, (workplace / "out").exists()) == (1, False), result.output
    assert "registry_unavailable" in result.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--preset", "nope"], "preset: expected one of e2e, webnlg, dart, xsum"),
        (["--default", "tempo=3"], "decoding parameter"),
        (["--default", "temperature"], "name=JSON value"),
        (["--lr", "0"], "learning_rate: expected more than 0"),
        (["--template", "no slot"], "template: expected exactly one {input}"),
        (["--task", "Not/A/Name"], "name: expected"),
        (["--sites", "decoder,head"], "sites: expected some of decoder, encoder, cross, got 'head'"),
        (["--sites", "encoder"], "sites: this backbone has decoder, got 'encoder'"),
        (["--positions", "rotated"], "positions: expected shifted or unshifted"),
        (["--prefix-length", "64"], "expected less than the window of 64, got 64"),
        (["--data", "nowhere.jsonl"], "expected a UTF-8 JSONL file"),
        (["--backbone", "./nowhere"], "expected a folder"),
        (["--device", "warp"], "device"),
    ],
)
def test_bad_options_end_with_a_named_error_and_no_result_folder(
    workplace: Path, arguments: list[str], said: str
) -> None:
    result = train(workplace, *arguments)
    assert result.exit_code == 1, result.output
    assert said in result.output and "Traceback" not in result.output
    assert not (workplace / "out").exists()


def test_presets_are_the_papers_table() -> None:
    from trainer.training.config import PRESETS, TrainConfig

    table = {
        name: (config.learning_rate, config.epochs, config.batch_size, config.prefix_length)
        for name in PRESETS
        if (config := TrainConfig.of(name, {}))
    }
    assert table == {
        "e2e": (8e-5, 5, 10, 5),
        "webnlg": (5e-5, 5, 5, 5),
        "dart": (5e-5, 10, 5, 10),
        "xsum": (5e-5, 30, 14, 100),
        "xsum-news": (5e-5, 30, 36, 80),
        "xsum-news-to-sports": (5e-5, 15, 36, 40),
    }
    for name in PRESETS:
        config = TrainConfig.of(name, {})
        assert (config.method, config.warmup_steps, config.weight_decay, config.gradient_clip) == ("mlp", 0, 0.0, 1.0)
        summary = name.startswith("xsum")
        assert (config.middle, config.reduction) == ((800, "token") if summary else (512, "sequence"))


def test_the_xsum_preset_decodes_in_transformers_lengths_of_11_to_62(bart_workplace: Path) -> None:
    """Which count the decoder's start token: ours do not, as the lengths of a BART's own generation config show."""
    from prefixes.backbone import load_backbone
    from tests.support.bart import save_tiny_bart
    from trainer.training.config import PRESETS

    lengths = {"min_length": 11, "max_length": 62, "num_beams": 6, "length_penalty": 0.8}
    save_tiny_bart(bart_workplace / "large-xsum", generation=lengths)
    theirs = load_backbone(str(bart_workplace / "large-xsum")).generation_defaults
    assert PRESETS["xsum"].decoding == {name: theirs[name] for name in PRESETS["xsum"].decoding}


def test_help_teaches_by_examples() -> None:
    assert "prefixd train" in invoke("train", "--help").output


def test_a_backbone_that_a_server_refuses_is_refused_before_training_and_trained_where_told_so(
    workplace: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = workplace / "backbone" / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "sequence_bias": [[[5], 2.0]]}))
    refused = train(workplace)
    assert (refused.exit_code, "--ignore-generation-config sequence_bias" in refused.output) == (1, True)
    assert not (workplace / "out").exists()
    told = train(workplace, "--ignore-generation-config", "sequence_bias")
    assert told.exit_code == 0, told.output
    assert "sequence_bias" in caplog.text and "ignored" in caplog.text
    assert "ignore_generation_config" not in json.loads((workplace / "out" / "config.json").read_text())


def test_auto_shows_what_it_tried_and_resumes_as_it_began(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "STEPS_PER_MINUTE", 1)  # steps end it, long before its minutes
    monkeypatch.setattr(search, "LEAST_STEPS", 2)
    place = ["--task", "toy", "--backbone", str(workplace / "backbone"), "--template", TEMPLATE, "--hold-out", "20"]
    paths = ["--data", str(workplace / "data.jsonl"), "--output", str(workplace / "out"), "--threads", "1"]
    given = ["--prefix-length", "4", "--init", "examples", "--auto", "--budget-minutes", "60"]
    made = invoke("train", *place, *paths, *given)
    assert made.exit_code == 0, made.output
    told = json.loads((workplace / "out" / "report.json").read_text())["search"]
    assert {trial["choice"]["prefix_length"] for trial in told["trials"]} == {4}
    assert {trial["choice"]["init"] for trial in told["trials"]} == {"examples"}
    assert len({trial["choice"]["learning_rate"] for trial in told["trials"]}) > 1
    assert "(best)" in made.output and "With twice the examples" in made.output and "trial 2 of" in made.output
    assert invoke("train", *place, *paths, *given, "--resume").stdout == made.stdout
    other = invoke("train", *place, *paths, *given[:-1], "30", "--resume")
    assert (other.exit_code, "cannot resume with other options: auto" in " ".join(other.output.split())) == (1, True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--budget-minutes", "5"], "budget_minutes: expected auto beside it"),
        (["--auto"], "epochs: expected none beside auto"),
        (["--auto", "--budget-minutes", "0"], "budget_minutes: expected above 0"),
        (["--patience", "2", "--hold-out", "0"], "patience: expected held-out inputs"),
    ],
)
def test_what_goes_with_no_search_ends_with_a_named_error(workplace: Path, arguments: list[str], said: str) -> None:
    result = train(workplace, *arguments)
    assert result.exit_code == 1 and said in " ".join(result.output.split()), result.output
    assert not (workplace / "out").exists()
