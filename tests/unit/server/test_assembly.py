"""Assembly over a tiny backbone: what it makes ready, and how each wrong setting is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType
from prometheus_client import generate_latest

from prefixes.artifact import write_prefix
from prefixes.backbone import load_backbone
from prefixes.errors import (
    BackboneError,
    IncompatiblePrefix,
    InputTooLong,
    PrefixdError,
    RegistryMissing,
    RegistryUnavailable,
    WrongRegistry,
)
from prefixes.registry import open_registry
from server.assembly import assemble
from server.engine.types import GenerationRequest, PrefixKey, SamplingParams
from server.settings import Settings
from server.web.settings_sources import InvalidSettings, load_settings
from tests.support.gguf import save_tiny_gguf
from tests.support.prefixes import make_prefix, save_tiny_gpt2
from tests.support.redis_server import RedisServer


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("backbone")
    save_tiny_gpt2(folder)
    return folder


def settings(backbone: Path, tmp_path: Path, **given: Any) -> Settings:
    base = {"backbone": str(backbone), "registry": str(tmp_path / "registry"), "kernels": "torch", "threads": 1}
    return load_settings(Settings, {**base, "kv_cache_bytes": "1MiB", "device": "cpu", "max_rows": 4, **given})


def test_an_assembled_server_is_warm_and_counts_from_zero(backbone: Path, tmp_path: Path) -> None:
    assembled = assemble(settings(backbone, tmp_path))
    assert assembled.engine.forwards["decoder"] > 0
    assert assembled.engine.requests == 0
    assembled.engine.check_integrity()
    text = generate_latest(assembled.metrics_registry).decode()
    assert "prefixd_step_rows_count 0.0" in text
    assert "process_resident_memory_bytes" in text
    assembled.engine.close()


def test_pins_are_the_versions_behind_their_tasks_at_start_and_count_before_they_are_loaded(
    backbone: Path, tmp_path: Path
) -> None:
    registry, spec = open_registry(str(tmp_path / "registry")), load_backbone(str(backbone)).spec
    version = registry.publish("default", "e2e", write_prefix(make_prefix(spec, length=17)), record={}).version
    assembled = assemble(settings(backbone, tmp_path, pin=["e2e", "e2e@production"], kv_cache_bytes="40KiB"))
    assert list(assembled.pinned) == [PrefixKey("default", version)]
    assert assembled.engine.residents() == frozenset()
    with pytest.raises(InputTooLong, match="may need 3 blocks of 16 tokens, there are 2"):
        assembled.engine.check(GenerationRequest("r", "default", (1,) * 30, SamplingParams(max_new_tokens=10)))
    assembled.engine.close()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kv_cache_bytes": "40KiB"}, "of at most 3 blocks together .*, got 4 with task 'second'"),
        ({"max_prefix_bytes": "24KiB"}, "of at most 3 blocks together .*, got 4 with task 'second'"),
        ({"max_prefix_bytes": "8KiB"}, "of at most 1 blocks together .*, got 2 with task 'first'"),
    ],
)
def test_pins_that_do_not_fit_together_end_the_start_by_name(
    backbone: Path, tmp_path: Path, given: dict[str, Any], message: str
) -> None:
    registry, spec = open_registry(str(tmp_path / "registry")), load_backbone(str(backbone)).spec
    for seed, task in enumerate(("first", "second")):
        registry.publish("default", task, write_prefix(make_prefix(spec, length=17, seed=seed)), record={})
    with pytest.raises(InvalidSettings, match=message):
        assemble(settings(backbone, tmp_path, pin=["first", "second"], **given))


def test_a_pin_made_for_another_backbone_ends_the_start(backbone: Path, tmp_path: Path) -> None:
    open_registry(str(tmp_path / "registry")).publish("default", "foreign", write_prefix(make_prefix()), record={})
    with pytest.raises(IncompatiblePrefix, match="geometry at site"):
        assemble(settings(backbone, tmp_path, pin=["foreign"]))


def test_the_dtype_is_the_engines(backbone: Path, tmp_path: Path) -> None:
    assembled = assemble(settings(backbone, tmp_path, dtype="float64"))
    assert next(assembled.backbone.model.parameters()).dtype is torch.float64
    assembled.engine.close()


def test_a_served_models_weights_are_in_memory_once(backbone: Path, tmp_path: Path) -> None:
    assembled = assemble(settings(backbone, tmp_path, kernels="numba"))
    assert {parameter.device.type for parameter in assembled.backbone.model.parameters()} == {"meta"}
    model: Any = assembled.engine._runner._model
    assert model._embedding.__self__ is model._head, "a tied embedding is read from the head's panels"
    assembled.engine.close()


@pytest.mark.parametrize("asked, kept", [("auto", "Int8Linear"), ("none", "NumbaLinear")])
def test_a_file_of_8_bits_is_served_with_them_unless_floats_are_asked_for(
    tmp_path: Path, asked: str, kept: str
) -> None:
    save_tiny_gguf(tmp_path / "tiny.gguf", kind=GGMLQuantizationType.Q8_0)
    assembled = assemble(settings(tmp_path / "tiny.gguf", tmp_path, kernels="numba", quantize=asked))
    model: Any = assembled.engine._runner._model
    assert type(model._head).__name__ == kept
    assembled.engine.close()


def test_nothing_is_measured_at_a_deterministic_start(backbone: Path, tmp_path: Path) -> None:
    for deterministic in (True, False):
        assembled = assemble(settings(backbone, tmp_path, kernels="numba", deterministic=deterministic))
        assert assembled.engine._scheduler._prefill._rate._measured is not deterministic
        assembled.engine.close()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"device": "cuda:99"}, "device: expected one that is here, got 'cuda:99'"),
        ({"dtype": "float16"}, "dtype: expected float32 or float64 on cpu, got 'float16'"),
        ({"kv_cache_bytes": "10"}, "kv_cache_bytes: expected at least .*got 10"),
        ({"threads": 4096}, "threads: expected 1 to .*got 4096"),
        ({"deterministic": True}, r"deterministic: expected numba kernels .*, got torch for torch.float32 on cpu"),
        ({"quantize": "int8"}, r"quantize int8: expected numba kernels .*, got torch for torch.float32 on cpu"),
        ({"kernels": "magic"}, "kernels: expected one of .*got 'magic'"),
        ({"pin": ["nobody"]}, "default/nobody"),
        ({"registry": "ftp://somewhere"}, "registry URL: expected"),
    ],
)
def test_a_setting_that_cannot_work_is_a_named_error(
    backbone: Path, tmp_path: Path, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(PrefixdError, match=message):
        assemble(settings(backbone, tmp_path, **given))


def test_a_generation_config_with_which_every_plain_request_would_fail_is_a_named_error(
    backbone: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(backbone, tmp_path / "copy")
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": True, "temperature": 0.0, "num_beams": 1}))
    with pytest.raises(BackboneError, match=r"generation config: temperature: expected above 0.*got 0\.0"):
        assemble(settings(folder, tmp_path))
    assembled = assemble(settings(folder, tmp_path, ignore_generation_config="temperature"))
    assert assembled.backbone.generation_defaults == {"do_sample": True, "num_beams": 1}


def test_a_folder_that_is_no_backbone_is_a_named_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(BackboneError, match="empty"):
        assemble(settings(tmp_path / "empty", tmp_path))


def test_a_server_that_knows_its_registrys_id_makes_no_new_one(backbone: Path, tmp_path: Path) -> None:
    """One of the same id in place of an emptied one would turn an outage into the deletion of everything."""
    registry = open_registry(str(tmp_path / "registry"))
    assembled = assemble(settings(backbone, tmp_path, registry_id=registry.id))
    assembled.engine.close()
    with pytest.raises(WrongRegistry, match=f"expected another, got {registry.id}"):
        assemble(settings(backbone, tmp_path, registry_id="another"))
    with RedisServer() as server:
        with pytest.raises(RegistryMissing):
            assemble(settings(backbone, tmp_path, registry=server.url, registry_id=registry.id))
        with server.client() as client:
            assert client.dbsize() == 0


def test_a_redis_that_would_lose_prefixes_is_refused_and_a_doubtful_one_warned_of(
    backbone: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    evicting = {"maxmemory-policy": "allkeys-lru", "maxmemory": "100mb"}
    with RedisServer(config=evicting) as server, pytest.raises(RegistryUnavailable, match="-policy noeviction"):
        assemble(settings(backbone, tmp_path, registry=server.url))
    with RedisServer(append_only=False) as server:
        assemble(settings(backbone, tmp_path, registry=server.url)).engine.close()
        assert "set `appendonly yes`" in caplog.text
