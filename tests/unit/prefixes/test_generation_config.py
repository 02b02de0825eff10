"""A model's own generation config: each of its fields is followed, refused by name, or cannot change tokens."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from prefixes.backbone import Backbone, load_backbone
from prefixes.errors import BackboneError
from prefixes.generation_config import OPTION
from prefixes.generation_fields import HARMLESS, READ, REFUSED, SILENT, WHOLE_LENGTHS
from tests.support.bart import save_tiny_bart
from tests.support.prefixes import save_tiny_gpt2

# A value of each refused field that transformers itself loads and that changes tokens.
CHANGING: dict[str, Any] = {
    "max_time": 1.5,
    "stop_strings": ["."],
    "min_p": 0.1,
    "top_h": 0.5,
    "typical_p": 0.9,
    "epsilon_cutoff": 0.001,
    "eta_cutoff": 0.001,
    "encoder_repetition_penalty": 1.2,
    "encoder_no_repeat_ngram_size": 3,
    "bad_words_ids": [[5]],
    "sequence_bias": [[[5, 6], 2.0]],
    "renormalize_logits": True,
    "remove_invalid_values": True,
    "exponential_decay_length_penalty": [5, 1.2],
    "token_healing": True,
    "guidance_scale": 1.5,
    "watermarking_config": {"bias": 2.0},
    "is_assistant": True,
    "assistant_ensemble_weight": 0.5,
    "penalty_alpha": 0.6,
    "dola_layers": "low",
    "num_beam_groups": 2,
    "diversity_penalty": 0.5,
    "constraints": [1],
    "force_words_ids": [[5]],
}
OWN = {"max_length": 80, "min_length": 5}  # with an encoder these are followed


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {name: tmp_path_factory.mktemp(name) for name in ("gpt2", "bart")}
    save_tiny_gpt2(folders["gpt2"])
    save_tiny_bart(folders["bart"])
    return folders


@pytest.fixture
def load(saved: dict[str, Path], tmp_path: Path) -> Callable[..., Backbone]:
    """Loads a copy of a backbone whose generation config has more fields."""

    def loaded(family: str, ignored: Collection[str] | None = (), **fields: Any) -> Backbone:
        folder = shutil.copytree(saved[family], tmp_path / "copy", dirs_exist_ok=True)
        path = folder / "generation_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
        return load_backbone(str(folder), ignore_generation_config=ignored)

    return loaded


def test_every_field_of_transformers_has_its_place_and_only_one() -> None:
    """A field that is new in transformers shows here: say what it does to tokens, in ``generation_fields``."""
    places = [READ, REFUSED, HARMLESS, SILENT]
    named = [field for place in places for field in place]
    assert len(named) == len(set(named))
    assert set(GenerationConfig().to_dict()) <= set(named)
    assert set(WHOLE_LENGTHS) <= set(READ)
    assert set(CHANGING) == set(REFUSED)
    assert all(rule.reason for rule in (*REFUSED.values(), *WHOLE_LENGTHS.values()))


@pytest.mark.parametrize("field", CHANGING)
def test_a_field_that_changes_tokens_is_refused_by_name_and_can_be_ignored(
    load: Callable[..., Backbone], caplog: pytest.LogCaptureFixture, field: str
) -> None:
    with pytest.raises(BackboneError, match=rf"{field}: expected none.*, got .*{OPTION} {field}") as caught:
        load("gpt2", **{field: CHANGING[field]})
    assert caught.value.detail["fields"] == [field]
    caplog.clear()
    with caplog.at_level(logging.WARNING, "prefixes"):
        assert not load("gpt2", [field], **{field: CHANGING[field]}).generation_defaults
    assert [field in message and "ignored" in message for message in caplog.messages] == [True]


@pytest.mark.parametrize("field", [*REFUSED, *WHOLE_LENGTHS])
def test_a_value_that_changes_nothing_starts_in_silence(
    load: Callable[..., Backbone], caplog: pytest.LogCaptureFixture, field: str
) -> None:
    rule = REFUSED.get(field) or WHOLE_LENGTHS[field]
    with caplog.at_level(logging.WARNING, "prefixes"):
        for value in (None, *rule.neutral):
            load("gpt2", **{field: value})
    assert not caplog.messages


@pytest.mark.parametrize(("field", "value"), OWN.items())
def test_lengths_that_count_a_prompt_are_refused_without_an_encoder(
    load: Callable[..., Backbone], field: str, value: int
) -> None:
    with pytest.raises(BackboneError, match=f"{field}: expected none.*, got {value}.*counts the prompt"):
        load("gpt2", **{field: value})
    assert not load("gpt2", [field], **{field: value}).generation_defaults
    assert load("bart", **{field: value}).generation_defaults


def test_all_refused_fields_are_named_at_once(load: Callable[..., Backbone]) -> None:
    fields = {"min_p": 0.1, "sequence_bias": [[[5], -1.0]], "num_beams": 2}
    with pytest.raises(BackboneError) as caught:
        load("gpt2", **fields)
    assert sorted(caught.value.detail["fields"]) == ["min_p", "sequence_bias"]
    with pytest.raises(BackboneError, match="sequence_bias"):
        load("gpt2", ["min_p"], **fields)
    assert load("gpt2", ["min_p", "sequence_bias"], **fields).generation_defaults == {"num_beams": 2}


def test_beams_that_sample_are_refused_and_either_can_be_ignored(load: Callable[..., Backbone]) -> None:
    fields = {"num_beams": 4, "do_sample": True}
    with pytest.raises(BackboneError, match="do_sample: expected false with num_beams 4, got True"):
        load("gpt2", **fields)
    assert load("gpt2", ["do_sample"], **fields).generation_defaults == {"num_beams": 4}
    assert load("gpt2", ["num_beams"], **fields).generation_defaults == {"do_sample": True}


def test_a_quantized_cache_is_refused_and_another_warned_of(
    load: Callable[..., Backbone], caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(BackboneError, match="cache_implementation: expected another, got quantized"):
        load("gpt2", cache_implementation="quantized")
    with caplog.at_level(logging.WARNING, "prefixes"):
        load("gpt2", cache_implementation="static")
    assert len(caplog.messages) == 1 and "cache_implementation static" in caplog.messages[0]


def test_what_cannot_change_tokens_is_warned_of_once_and_what_everybody_sets_is_not(
    load: Callable[..., Backbone], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "prefixes"):
        load("gpt2", use_cache=False, output_scores=True, return_dict_in_generate=True, pad_token_id=0, bos_token_id=0)
        assert not caplog.messages
        load("gpt2", prompt_lookup_num_tokens=3, disable_compile=False, seed=4, something_of_ours={"a": 1})
    assert [message.split("generation config: ")[1].split(" ")[0] for message in sorted(caplog.messages)] == [
        "prompt_lookup_num_tokens", "seed", "something_of_ours",
    ]  # fmt: skip


def test_a_key_that_transformers_does_not_read_is_no_default(load: Callable[..., Backbone]) -> None:
    assert not load("gpt2", seed=4, stop=["."], truncate=True, logprobs=2).generation_defaults


def test_a_field_that_only_a_later_transformers_has_is_refused(
    load: Callable[..., Backbone], monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = GenerationConfig.__init__

    def later(self: GenerationConfig, **fields: Any) -> None:
        begin(self, **{"top_q": None, **fields})

    monkeypatch.setattr(GenerationConfig, "__init__", later)
    load("gpt2")
    with pytest.raises(BackboneError, match=f"top_q: expected none, got 0.5.*{OPTION} top_q"):
        load("gpt2", top_q=0.5)
    load("gpt2", ["top_q"], top_q=0.5)


@pytest.mark.parametrize(("given", "hint"), [("sequence_bais", "did you mean sequence_bias"), ("", "got ''")])
def test_an_ignored_name_that_is_no_field_is_an_error(load: Callable[..., Backbone], given: str, hint: str) -> None:
    with pytest.raises(BackboneError, match=f"{OPTION}: expected a field of transformers' GenerationConfig.*{hint}"):
        load("gpt2", [given])


def test_an_ignored_field_that_is_followed_otherwise_counts_no_more(load: Callable[..., Backbone]) -> None:
    fields = {"suppress_tokens": [5, 6], "forced_bos_token_id": 7, "eos_token_id": [0, 9], "top_k": 4}
    backbone = load("gpt2", **fields)
    assert (set(backbone.suppressed), backbone.forced_first, backbone.eos_token_ids) == ({5, 6}, 7, (0, 9))
    backbone = load("gpt2", list(fields), **fields)
    assert (set(backbone.suppressed), backbone.forced_first, backbone.eos_token_ids) == (set(), None, (0,))
    assert not backbone.generation_defaults


def test_who_generates_nothing_is_not_refused(load: Callable[..., Backbone], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "prefixes"):
        assert load("gpt2", None, sequence_bias=[[[5], 2.0]]).spec == load("gpt2").spec
    assert not caplog.messages


def test_suppressed_tokens_are_the_folders(load: Callable[..., Backbone]) -> None:
    backbone = load("bart", suppress_tokens=[5, 6, 5], begin_suppress_tokens=[])
    assert (set(backbone.suppressed), set(backbone.suppressed_first)) == ({5, 6}, set())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"suppress_tokens": [5, 304]}, "suppress_tokens: expected ids from 0 to 303, got"),
        ({"suppress_tokens": [True]}, "suppress_tokens: expected ids from 0 to 303, got"),
        ({"begin_suppress_tokens": [-1]}, "begin_suppress_tokens: expected ids from 0 to 303, got"),
        ({"begin_suppress_tokens": 5}, "begin_suppress_tokens: expected a list of ids, got 5"),
        ({"suppress_tokens": list(range(304))}, "suppress_tokens: expected a list that leaves a token"),
        ({"suppress_tokens": [5], "forced_eos_token_id": 5}, "forced_eos_token_id"),
        ({"forced_bos_token_id": True}, "forced_bos_token_id: expected one id from 0 to 303, got True"),
    ],
    ids=str,
)
def test_token_ids_that_are_none_are_refused(
    load: Callable[..., Backbone], fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(BackboneError, match=message):
        load("gpt2", **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_length": 1}, "max_length: expected an integer of at least 2, got 1"),
        ({"max_length": True}, "max_length: expected an integer of at least 2, got True"),
        ({"min_length": 2.5}, "min_length: expected an integer of at least 0, got 2.5"),
    ],
    ids=str,
)
def test_lengths_that_are_none_are_refused(load: Callable[..., Backbone], fields: dict[str, Any], message: str) -> None:
    with pytest.raises(BackboneError, match=message):
        load("bart", **fields)


@pytest.mark.parametrize("content", ["{", "", "\ufeff{}", "[]", '{"num_beams": 4,}'])
def test_a_file_that_is_no_json_is_refused_and_not_passed_over(
    saved: dict[str, Path], tmp_path: Path, content: str
) -> None:
    folder = shutil.copytree(saved["bart"], tmp_path / "copy")
    (folder / "generation_config.json").write_text(content, "utf-8")
    with pytest.raises(BackboneError, match=r"generation_config\.json: expected (a )?JSON"):
        load_backbone(str(folder))


def test_a_configuration_of_old_is_held_to_the_same_rule(saved: dict[str, Path], tmp_path: Path) -> None:
    """Without a generation config transformers takes these fields from ``config.json``."""
    folder = shutil.copytree(saved["bart"], tmp_path / "copy")
    (folder / "generation_config.json").unlink()
    path = folder / "config.json"
    whole = {"diversity_penalty": 0.0, "num_beam_groups": 1, "typical_p": 1.0, "remove_invalid_values": False}
    path.write_text(json.dumps({**json.loads(path.read_text()), **whole, "suppress_tokens": [5]}))
    assert load_backbone(str(folder)).suppressed == {5}
    path.write_text(json.dumps({**json.loads(path.read_text()), "encoder_no_repeat_ngram_size": 3}))
    with pytest.raises(BackboneError, match="encoder_no_repeat_ngram_size: expected none or 0, got 3"):
        load_backbone(str(folder))
