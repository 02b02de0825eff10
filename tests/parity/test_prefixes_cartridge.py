"""Import of cartridges: what was the model's own keys and values over a text continues as behind that text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save_file

from prefixes.artifact import read_prefix, version_of, write_prefix
from prefixes.backbone import Backbone
from prefixes.errors import IncompatiblePrefix, InvalidArtifact, PrefixdError
from prefixes.formats.cartridge import import_cartridge
from server.engine.types import Finished, PrefixKey
from tests.support.engine import KERNELS, Library, kernels, make_engine, run
from tests.support.llama import tiny_llama
from tests.support.prefixes import make_encoder_decoder_spec

TEXT = torch.tensor([[17, 4, 250, 9, 33, 8, 101]])
PROMPT = [5, 60, 7]
DTYPE = torch.float64


def name_of(layer: int, part: str) -> str:
    return f"layers.{layer}.attention.prefix.{part}"


def cartridge(backbone: Backbone) -> dict[str, torch.Tensor]:
    """The tensors of a cartridge that holds the keys and values of ``TEXT``."""
    cache = backbone.model(TEXT, use_cache=True).past_key_values
    return {
        name_of(layer, part): tensor.transpose(1, 2).contiguous()  # (1, P, kv_heads, head_dim)
        for layer, kept in enumerate(cache.layers)
        for part, tensor in (("keys", kept.keys), ("values", kept.values))
    }


def interleaved_keys(backbone: Backbone) -> dict[str, torch.Tensor]:
    """Keys of ``TEXT`` as a model makes them that rotates neighbours: its projection has its rows in that order, and
    each pair of a head's components is a complex number that is turned by its position.
    """
    bare: dict[int, torch.Tensor] = {}
    projections = [layer.self_attn.k_proj for layer in backbone.model.model.layers]
    hooks = [
        projection.register_forward_hook(lambda _, __, out, layer=layer: bare.__setitem__(layer, out))
        for layer, projection in enumerate(projections)
    ]
    backbone.model(TEXT)
    for hook in hooks:
        hook.remove()
    geometry, rotary = backbone.spec.sites["decoder"], backbone.model.model.rotary_emb
    angles = torch.arange(TEXT.shape[1])[:, None].float() * rotary.inv_freq.float()
    turn = torch.polar(torch.full_like(angles, rotary.attention_scaling), angles)[None, :, None]  # (1, P, 1, dim / 2)
    made = {}
    for layer, keys in bare.items():
        halves = keys.view(1, TEXT.shape[1], geometry.kv_heads, 2, geometry.head_dim // 2)
        pairs = torch.view_as_complex(halves.transpose(-1, -2).contiguous())
        made[name_of(layer, "keys")] = torch.view_as_real(pairs * turn).flatten(-2)
    return made


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("kind", ["llama3", "yarn", "mistral", "qwen3", "smollm3"])
def test_a_cartridge_of_a_text_gives_the_tokens_behind_that_text(tmp_path: Path, kind: str, name: str) -> None:
    backbone = tiny_llama(tmp_path, kind, DTYPE)
    save_file(cartridge(backbone), tmp_path / "x.safetensors")
    prefix = read_prefix(write_prefix(import_cartridge(tmp_path / "x.safetensors", backbone.spec)))
    library = Library(backbone, lengths=[0])
    key = PrefixKey("default", version_of(prefix))
    library.prefixes[key] = prefix
    library.keys.append(key)
    request = library.request("r", 1, PROMPT, max_new_tokens=12, min_new_tokens=12)
    done = run(make_engine(backbone, library, kernels=kernels(name, DTYPE)), [request])["r"]
    assert isinstance(done, Finished)
    whole = torch.cat([TEXT, torch.tensor([PROMPT])], dim=1)
    expected = backbone.model.generate(
        whole, attention_mask=torch.ones_like(whole), max_new_tokens=12, min_new_tokens=12, do_sample=False,
        pad_token_id=0,
    )  # fmt: skip
    assert list(done.outputs[0].token_ids) == expected[0, whole.shape[1] :].tolist()


@pytest.mark.parametrize("kind", ["llama3", "yarn", "mistral"])
def test_keys_that_rotate_neighbours_are_put_in_order(tmp_path: Path, kind: str) -> None:
    backbone = tiny_llama(tmp_path, kind, DTYPE)
    plain = cartridge(backbone)
    save_file(plain, tmp_path / "plain.safetensors")
    save_file(plain | interleaved_keys(backbone), tmp_path / "interleaved.safetensors")
    expected = import_cartridge(tmp_path / "plain.safetensors", backbone.spec).tensors
    got = import_cartridge(tmp_path / "interleaved.safetensors", backbone.spec, interleaved=True).tensors
    for tensor, wanted in expected.items():
        torch.testing.assert_close(got[tensor], wanted, atol=1e-5, rtol=1e-5)
    unsaid = import_cartridge(tmp_path / "interleaved.safetensors", backbone.spec).tensors
    assert (unsaid["decoder.key"] - expected["decoder.key"]).abs().max() > 0.1


def test_template_and_defaults_come_from_the_importer(good: Path, backbone: Backbone) -> None:
    spec = import_cartridge(good, backbone.spec, template="{input} =>", defaults={"num_beams": 5}).spec
    assert (spec.template, spec.defaults) == ("{input} =>", {"num_beams": 5})
    assert (spec.origin["method"], spec.fingerprint) == ("cartridge", backbone.spec.fingerprint)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return tiny_llama(tmp_path_factory.mktemp("backbone"), "mistral", torch.float32)


@pytest.fixture
def good(backbone: Backbone, tmp_path: Path) -> Path:
    save_file(cartridge(backbone), tmp_path / "good.safetensors")
    return tmp_path / "good.safetensors"


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    """In memory of their own: the file may then be written over."""
    named: dict[str, torch.Tensor] = load(path.read_bytes())
    return named


def pickle_it(path: Path) -> None:
    torch.save(tensors_of(path), path)


def change(path: Path, **changes: Any) -> None:
    """Save it again: each layer-0 part of ``changes`` through its function."""
    named = tensors_of(path)
    for part, changed in changes.items():
        named[name_of(0, part)] = changed(named[name_of(0, part)]).contiguous()
    save_file(named, path)


def rename(path: Path, old: str, new: str | None) -> None:
    named = tensors_of(path)
    tensor = named.pop(old)
    save_file(named | ({new: tensor} if new else {}), path)


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda p: p.unlink(), InvalidArtifact, "expected a cartridge, a safetensors file: No such file"),
        (pickle_it, InvalidArtifact, "got: a pickled one, which is never opened; .*save_file"),
        (lambda p: p.write_bytes(p.read_bytes()[:-3]), InvalidArtifact, "expected a safetensors file"),
        (lambda p: save_file({}, p), InvalidArtifact, "and no other tensor, got none"),
        (lambda p: rename(p, name_of(0, "keys"), "layers.0.attention.wq.weight"), InvalidArtifact, "got layers.0.*wq"),
        (lambda p: rename(p, name_of(1, "values"), None), IncompatiblePrefix, "2 layers; missing layers.1.*values"),
        (lambda p: rename(p, name_of(1, "keys"), name_of(2, "keys")), IncompatiblePrefix, "further layers.2.*keys"),
        (lambda p: change(p, keys=lambda x: x[0]), IncompatiblePrefix, r"float32 \(1, P, 2, 12\)"),
        (lambda p: change(p, values=lambda x: x[:, :4]), IncompatiblePrefix, r"\(1, 7, 2, 12\), got .*\(1, 4, 2, 12\)"),
        (lambda p: change(p, keys=lambda x: x.transpose(1, 2)), IncompatiblePrefix, r"got float32 \(1, 2, 7, 12\)"),
        (lambda p: change(p, values=lambda x: x.half()), IncompatiblePrefix, "expected float32 .* got float16"),
        (lambda p: change(p, values=lambda x: x / 0), InvalidArtifact, "expected finite values"),
    ],
)
def test_files_that_hold_something_else_are_refused(
    good: Path, backbone: Backbone, damage: Callable[[Path], object], error: type[PrefixdError], message: str
) -> None:
    damage(good)
    with pytest.raises(error, match=message):
        import_cartridge(good, backbone.spec)


def test_an_encoder_decoder_takes_no_cartridge(good: Path) -> None:
    with pytest.raises(IncompatiblePrefix, match="a decoder alone, got a bart backbone"):
        import_cartridge(good, make_encoder_decoder_spec())
