"""What a prefix starts from: a text, or another version; what is refused, and what the artifact says of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner, Result

from prefixes.artifact import read_prefix, version_of, write_prefix
from prefixes.backbone import Backbone
from prefixes.errors import IncompatiblePrefix, InvalidParameter
from prefixes.registry import open_registry
from prefixes.spec import Site
from tests.support.llama import tiny_llama
from tests.support.trainer import (
    FAMILIES,
    TEMPLATE,
    forward_logits,
    tiny_backbone,
    tiny_model,
    toy_examples,
    toy_plan,
    toy_trainer,
    write_jsonl,
)
from tests.support.trainer import toy_pairs as pairs
from trainer.cli import train as cli
from trainer.cli.options import MAX_TEXT_BYTES, initial_text
from trainer.data.sequences import TokenExample, collate
from trainer.training.config import TrainConfig
from trainer.training.export import fold
from trainer.training.initial import InitialText, InitialVersion
from trainer.training.loop import Trainer
from trainer.training.reparam import PrefixKV
from trainer.training.words import word_activations

TEXT = "Blue Spice is a coffee shop in the city centre. It is cheap and family-friendly."
START = TrainConfig(prefix_length=6, method="direct", epochs=1, learning_rate=1e-12, batch_size=6)


@pytest.fixture(params=FAMILIES)
def backbone(request: pytest.FixtureRequest, tmp_path: Path) -> Backbone:
    return tiny_backbone(tmp_path / "backbone", torch.float64, request.param)


def started(backbone: Backbone, config: TrainConfig, initial: InitialText | InitialVersion) -> PrefixKV:
    """The prefix before its first step."""
    trainer = toy_trainer(backbone, config)
    trainer.initial = initial
    trainer._initialise()
    return trainer._folded()


def test_a_prefix_from_a_text_is_the_text_itself_in_front_of_every_input(tmp_path: Path) -> None:
    """Exactly: GPT-2 gives the logits that it gives behind the text."""
    backbone = tiny_backbone(tmp_path, torch.float64)
    made, plan, model = started(backbone, START, InitialText(TEXT)), toy_plan(backbone, START), tiny_model(backbone)
    examples = toy_examples(backbone)[:4]
    got = forward_logits(model, collate(examples), made, plan)
    text = backbone.prompt_encoder.encode_text(TEXT)[:6]
    behind = [TokenExample((*text, *example.ids), example.start + 6) for example in examples]
    expected = forward_logits(model, collate(behind), {}, None)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


@torch.no_grad()
def test_where_a_text_begins_with_a_token_so_does_the_prefix_from_it(tmp_path: Path) -> None:
    """As transformers' cache of the text, and so PEFT's start from one, does. From words too."""
    backbone = tiny_llama(tmp_path, "llama", begins=True)
    ids = backbone.tokenizer(TEXT).input_ids[:6]
    assert ids[0] == backbone.tokenizer.bos_token_id
    layers = backbone.model(torch.tensor([ids]), use_cache=True).past_key_values.layers
    text = started(backbone, START, InitialText(TEXT))["decoder"]
    words = word_activations(tiny_model(backbone), backbone, TEXT, 6, toy_plan(backbone, START).sites)["decoder"]
    for part, name in enumerate(("keys", "values")):
        expected = torch.stack([getattr(layer, name)[0].transpose(0, 1) for layer in layers])
        for got in (text[part], words[part]):
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)  # transformers' rotations are float32


def test_the_first_position_of_a_prefix_from_a_text_stays_frozen(backbone: Backbone) -> None:
    config = TrainConfig.of("e2e", {"prefix_length": 6, "epochs": 1, "learning_rate": 0.1}, from_text=True)
    assert (config.method, config.frozen_positions) == ("direct", 1)
    before = started(backbone, config, InitialText(TEXT))
    trainer = toy_trainer(backbone, config)
    trainer.initial = InitialText(TEXT)
    after = trainer.run()
    for site, pair in before.items():
        for old, new in zip(pair, after[site], strict=True):
            assert torch.equal(old[:, :1], new[:, :1])
            assert not torch.equal(old[:, 1:], new[:, 1:])


@pytest.mark.parametrize(
    ("options", "expected"),
    [({"method": "mlp"}, ("mlp", 0)), ({"frozen_positions": 0}, ("direct", 0)), ({}, ("direct", 1))],
)
def test_options_come_before_the_settings_of_a_text(options: dict[str, Any], expected: tuple[str, int]) -> None:
    config = TrainConfig.of("e2e", options, from_text=True)
    assert (config.method, config.frozen_positions) == expected


def test_a_text_that_is_too_short_or_no_text_is_refused(backbone: Backbone, tmp_path: Path) -> None:
    with pytest.raises(InvalidParameter, match="expected at least the prefix's 6 tokens, got 2"):
        started(backbone, START, InitialText("\x01\x02"))
    (tmp_path / "latin1").write_bytes(b"caf\xe9")
    (tmp_path / "large").write_bytes(b"x" * (MAX_TEXT_BYTES + 1))
    (tmp_path / "marked").write_text("\ufeffa style")
    (tmp_path / "unseen").write_text("\u200b\u2060\n" * 20)
    refused = {
        "latin1": "UTF-8", "large": "at most", "nowhere": "expected a UTF-8 file", "marked": "a byte order mark",
        "unseen": "expected a text, got an empty one",
    }  # fmt: skip
    for name, said in refused.items():
        with pytest.raises(InvalidParameter, match=said):
            initial_text(tmp_path / name)


def version(backbone: Backbone, config: TrainConfig = START) -> InitialVersion:
    """A trained prefix, written and read back."""
    trained = toy_trainer(backbone, TrainConfig(**{**config.as_dict(), "learning_rate": 0.05})).run()
    return InitialVersion.read(write_prefix(fold(trained, toy_plan(backbone, config), {"method": "test"})))


def test_a_warm_start_goes_on_from_the_versions_very_numbers(backbone: Backbone) -> None:
    initial = version(backbone)
    assert initial.version == version_of(initial.prefix)
    made = started(backbone, START, initial)
    for site, (key, value) in made.items():
        assert torch.equal(key, initial.prefix.tensors[f"{site}.key"])
        assert torch.equal(value, initial.prefix.tensors[f"{site}.value"])


def test_a_warm_start_of_the_mlp_is_a_regression_whose_error_is_told(backbone: Backbone) -> None:
    initial = version(backbone)
    config = TrainConfig(**{**START.as_dict(), "method": "mlp", "middle": 64})
    trainer: Trainer = toy_trainer(backbone, config)
    trainer.initial = initial
    trainer._initialise()
    assert trainer.state.initial_error is not None and trainer.state.initial_error < 1e-3
    for site, (key, _) in trainer._folded().items():
        torch.testing.assert_close(key, initial.prefix.tensors[f"{site}.key"], atol=0.1, rtol=0)


def test_a_version_of_another_length_site_position_or_backbone_is_refused(tmp_path: Path) -> None:
    backbone = tiny_backbone(tmp_path / "bart", torch.float64, "bart")
    sites: tuple[Site, ...] = ("encoder", "decoder")
    initial = version(backbone, TrainConfig(**{**START.as_dict(), "sites": sites}))
    for options, expected in (
        ({"sites": sites, "prefix_length": 5}, "expected decoder of length 5.*got decoder of length 6"),
        ({}, "expected decoder.*cross of length 6.*got decoder"),
        ({"sites": sites, "positions": "shifted"}, r"\(shifted\).*got decoder of length 6 \(unshifted\)"),
    ):
        with pytest.raises(InvalidParameter, match=expected):
            started(backbone, TrainConfig(**{**START.as_dict(), **options}), initial)
    other = tiny_backbone(tmp_path / "gpt2", torch.float64)
    with pytest.raises(IncompatiblePrefix, match="geometry at site 'decoder': backbone has"):
        started(other, START, initial)


# --- the command line ---


def train(folder: Path, *more: str) -> Result:
    app = typer.Typer()
    app.command()(cli.train)
    return CliRunner().invoke(
        app,
        [
            "--task", "toy", "--data", str(folder / "data.jsonl"), "--backbone", str(folder / "backbone"),
            "--template", TEMPLATE, "--output", str(folder / "out"), "--hold-out", "20", "--epochs", "1",
            "--batch-size", "6", "--lr", "0.01", "--prefix-length", "6", "--threads", "1", *more,
        ],
    )  # fmt: skip


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    FAMILIES["gpt2"](tmp_path / "backbone")
    write_jsonl(tmp_path / "data.jsonl", pairs(30))
    (tmp_path / "style.txt").write_text(TEXT)
    return tmp_path


def finished(folder: Path) -> tuple[str, dict[str, Any]]:
    """The version of a finished run, and where its artifact says it came from."""
    content = (folder / "out" / "prefix.safetensors").read_bytes()
    prefix = read_prefix(content)
    return version_of(prefix), dict(prefix.spec.origin)


def test_a_run_from_a_text_file_names_it_by_its_digest_and_resumes_with_the_same_text_alone(workplace: Path) -> None:
    assert train(workplace, "--init-file", str(workplace / "style.txt")).exit_code == 0
    _, origin = finished(workplace)
    assert origin["initial"] == {"kind": "text", "digest": InitialText(TEXT).digest}
    assert (origin["method"], origin["hyperparameters"]["frozen_positions"]) == ("prefix-tuning/direct", 1)
    assert TEXT[:20] not in (workplace / "out" / "config.json").read_text()
    report = json.loads((workplace / "out" / "report.json").read_text())
    assert InitialText(TEXT).digest in report["identity"]["initial"]
    assert train(workplace, "--resume", "--init-file", str(workplace / "style.txt")).exit_code == 0
    (workplace / "style.txt").write_text(TEXT + " And children are welcome.")
    other = train(workplace, "--resume", "--init-file", str(workplace / "style.txt"))
    assert (other.exit_code, "cannot resume with other options: initial was" in other.output) == (1, True)


def test_a_run_goes_on_from_a_file_or_from_a_task_of_the_registry(workplace: Path) -> None:
    registry = str(workplace / "registry")
    assert train(workplace, "--method", "direct", "--registry", registry).exit_code == 0
    first, _ = finished(workplace)
    (workplace / "out").rename(workplace / "first")
    made = []
    for source in ("toy@production", str(workplace / "first" / "prefix.safetensors")):
        result = train(
            workplace, "--method", "direct", "--init-from", source, "--registry", registry, "--alias", "next"
        )
        assert result.exit_code == 0, result.output
        made.append(finished(workplace))
        (workplace / "out").rename(workplace / f"run{len(made)}")
    assert made[0] == made[1]
    assert made[0][0] != first and made[0][1]["initial"] == {"kind": "version", "version": first}
    assert open_registry(registry).inspect("default", "toy").aliases == {"production": first, "next": made[0][0]}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--init-from", "toy"], "expected a registry or a server"),
        (["--init-from", "nowhere.safetensors"], "expected a file"),
        (["--init-from", "STYLE.safetensors"], "invalid_artifact"),
        (["--init-from", "x.safetensors", "--init-file", "y"], "got both"),
        (["--init-file", "STYLE", "--init", "some words"], "got both"),
        (["--init-file", "STYLE", "--prefix-length", "20"], "expected at least the prefix's 20 tokens"),
    ],
)
def test_what_a_prefix_cannot_start_from_ends_with_a_named_error(
    workplace: Path, arguments: list[str], said: str
) -> None:
    (workplace / "style.txt").write_text("a short text")
    (workplace / "style.txt.safetensors").write_text(TEXT)
    result = train(workplace, *(part.replace("STYLE", str(workplace / "style.txt")) for part in arguments))
    assert result.exit_code == 1, result.output
    assert said in result.output and "Traceback" not in result.output
    assert not (workplace / "out").exists()
