"""A checkpoint's safetensors files, and a backbone's fingerprint, over what its checkpoint stores, before any cast.

Owns which files are read and which parts are hashed. Does not know how a model computes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import cached_file

from prefixes.digest import digest_of, tensor_parts
from prefixes.errors import BackboneError
from prefixes.prompt import AddedTokens
from prefixes.spec_json import canonical_json

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def checkpoint_files(folder: str) -> dict[str, Path]:
    """Checkpoint tensor name -> the safetensors file that holds it. Downloads a hub id once.

    Raises BackboneError if there is no safetensors checkpoint. Pickled ones are never opened.
    """
    try:
        single = locate(folder, _SINGLE)
        if single is not None:
            with safe_open(single, framework="pt") as file:
                return dict.fromkeys(file.keys(), single)
        index = locate(folder, _INDEX)
        if index is None:
            raise BackboneError(
                f"backbone {folder!r}: expected {_SINGLE} or {_INDEX}, found neither; pickled checkpoints are not read"
            )
        shards: dict[str, str] = json.loads(index.read_text())["weight_map"]
        paths = {shard: _shard(folder, shard) for shard in set(shards.values())}
        return {tensor: paths[shard] for tensor, shard in shards.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise BackboneError(f"backbone {folder!r}: cannot read its checkpoint: {str(error)[:300]}") from error


def locate(folder: str, filename: str) -> Path | None:
    """The file in a folder, or of a hub id by download or cache. None if there is none."""
    try:
        found = cached_file(folder, filename)
    except OSError:
        return None
    return Path(found) if found else None


def _shard(folder: str, filename: str) -> Path:
    if Path(filename).name != filename:  # the index comes with the checkpoint and must not name files elsewhere
        raise BackboneError(f"backbone {folder!r}: expected shards beside {_INDEX}, got {filename[:80]!r}")
    path = locate(folder, filename)
    if path is None:
        raise BackboneError(f"backbone {folder!r}: expected the shard {filename[:80]!r}, found none")
    return path


def added_tokens(tokenizer: Any, *, behind: bool) -> AddedTokens:
    """The tokens that ``tokenizer`` puts around every text. Raises BackboneError if it adds others elsewhere.

    ``behind``: whether some may stand behind a text. They may not where a decoder goes on from it.
    """
    backend = tokenizer.backend_tokenizer
    bare, whole = (backend.encode("a", add_special_tokens=added).ids for added in (False, True))
    starts = range(len(whole) - len(bare) + 1) if behind else [len(whole) - len(bare)]
    for start in starts:
        end = start + len(bare)
        if whole[start:end] == bare:
            return AddedTokens(tuple(whole[:start]), tuple(whole[end:]))
    raise BackboneError(
        f"tokenizer: expected one that adds tokens before a text {'or behind it ' if behind else ''}and nowhere else, "
        f"got one that makes {tokenizer.convert_ids_to_tokens(whole)} of the text 'a'"
    )


def fingerprint(identity: Mapping[str, Any], stored: Iterable[bytes | memoryview]) -> str:
    """``sha256:<hex>`` over what says how a backbone computes, and the parts of its checkpoint as stored."""
    return digest_of(chain([canonical_json(identity).encode()], stored))


def stored_parts(model: Any, files: Mapping[str, Path]) -> Iterator[bytes | memoryview]:
    """Every parameter of ``model`` as its safetensors files store it.

    Parameters have the model's own names, and tied ones count once. So the fingerprint does not depend on whether the
    checkpoint was saved with the base model's name prefix, the tied head, or mask buffers.
    """
    for name, tensor in _stored_parameters(model, files):
        yield from tensor_parts(name, tensor)


def canonical_tokenizer(tokenizer: Any) -> Any:
    """What decides token ids and text, as JSON, without truncation, padding, format version and post-processor.

    The post-processor only adds special tokens, see ``added_tokens``. Switches that are off are left out, so that a
    later release that writes one more of them gives the same value.
    """
    raw: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return _without_off({key: raw[key] for key in raw.keys() - {"truncation", "padding", "version", "post_processor"}})


def _without_off(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_off(item) for key, item in value.items() if item not in (None, "") and item is not False}
    return [_without_off(item) for item in value] if isinstance(value, list) else value


def _stored_parameters(model: Any, files: Mapping[str, Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """The model's parameters by name, sorted, each as its file stores it; shared ones once.

    Buffers saved with them (the bias of BART's head) count unless they are all zero: a checkpoint without such a buffer
    means zeros.
    """
    aliases: dict[str, list[str]] = {}
    for target, source in model.all_tied_weights_keys.items():
        aliases.setdefault(source, []).append(target)
    parameters = {name for name, _ in model.named_parameters()}
    buffers = {name for name, _ in model.named_buffers()} & model.state_dict().keys()
    base = f"{model.base_model_prefix}."
    with ExitStack() as stack:
        opened = {path: stack.enter_context(safe_open(path, framework="pt")) for path in sorted(set(files.values()))}
        for name in sorted(parameters | buffers):
            names = [name, *aliases.get(name, [])]
            names += [candidate.removeprefix(base) for candidate in names]
            stored = next((candidate for candidate in names if candidate in files), None)
            if name in buffers:
                tensor = opened[files[stored]].get_tensor(stored) if stored else None
                if tensor is not None and bool(tensor.any()):
                    yield name, tensor
                continue
            if stored is None:
                raise BackboneError(f"checkpoint tensor {name!r}: expected in the checkpoint, found none", tensor=name)
            yield name, opened[files[stored]].get_tensor(stored)
