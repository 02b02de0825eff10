"""Reads a model's generation config: what of it the engine follows. What it cannot follow it refuses by name.

Owns the rule that no field that changes tokens is ignored in silence. ``generation_fields`` has the fields. Knows no
engine and no request.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Final

from transformers import GenerationConfig

from prefixes.checkpoint import locate
from prefixes.errors import BackboneError, InvalidParameter
from prefixes.generation_fields import HARMLESS, QUANTIZED_CACHE, READ, REFUSED, SILENT, WHOLE_LENGTHS, Refused
from prefixes.parameters import DECODING_PARAMETERS, check_decoding_parameters

OPTION: Final = "--ignore-generation-config"
UNKNOWN: Final = Refused("a field of transformers' that prefixd does not know")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Generation:
    """What a model says about its outputs; ``Backbone`` has the meanings."""

    defaults: Mapping[str, Any]
    eos_token_ids: tuple[int, ...]
    decoder_prompt: tuple[int, ...]
    forced_first: int | None
    forced_last: int | None
    suppressed: frozenset[int]
    suppressed_first: frozenset[int]


def read_file(name: str, folder: str) -> Mapping[str, Any]:
    """Read generation_config.json; empty if there is none. Raises BackboneError for what is no JSON object.

    transformers would silently take the model's configuration in its place.
    """
    path = locate(folder, "generation_config.json")
    if path is None:
        return {}
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise BackboneError(f"backbone {name!r}: generation_config.json: expected JSON, got {error}") from None
    if not isinstance(found, dict):
        raise BackboneError(
            f"backbone {name!r}: generation_config.json: expected a JSON object, got {type(found).__name__}"
        )
    return found


def read_generation(
    name: str, model: Any, tokenizer: Any, file: Mapping[str, Any], ignored: Collection[str] | None
) -> Generation:
    """Read what holds for the model's outputs, as if nobody had set the fields in ``ignored``.

    ``file`` also has the keys that transformers leaves out. ``ignored`` None leaves out all that is unsupported, for
    those who generate nothing. Raises BackboneError for a field that changes tokens and is not supported, a wrong
    value, and an ignored name that is no field.
    """
    loaded = {**file, **model.generation_config.to_dict()}
    configured = {key: value for key, value in loaded.items() if value is not None}
    _check_ignored(configured, ignored or ())
    fields = {key: value for key, value in configured.items() if key not in (ignored or ())}
    reader = _Reader(name, fields, model.config)
    defaults = reader.defaults()
    if ignored is not None:
        _refuse(name, fields, model.config.is_encoder_decoder)
        _warn(name, configured, ignored)
    suppressed = reader.ids("suppress_tokens")
    first, last = reader.token("forced_bos_token_id"), reader.token("forced_eos_token_id")
    for key, token in (("forced_bos_token_id", first), ("forced_eos_token_id", last)):
        if token in suppressed:
            raise BackboneError(
                f"backbone {name!r}: {key}: expected a token that is not in suppress_tokens, got {token}", got=token
            )
    return Generation(
        defaults=defaults,
        eos_token_ids=reader.eos_token_ids(tokenizer),
        decoder_prompt=reader.decoder_prompt(),
        forced_first=first,
        forced_last=last,
        suppressed=suppressed,
        suppressed_first=reader.ids("begin_suppress_tokens"),
    )


class _Reader:
    """Reads the fields that are followed; ``fields`` holds those that are set."""

    def __init__(self, name: str, fields: Mapping[str, Any], config: Any) -> None:
        self._name, self._fields, self._config = name, fields, config

    def defaults(self) -> Mapping[str, Any]:
        """The fields that are decoding parameters of ours."""
        defaults = {key: self._fields[key] for key in DECODING_PARAMETERS if key in READ and key in self._fields}
        if self._config.is_encoder_decoder:  # its lengths count the decoder's start token and not the input
            for ours, theirs, least in (("max_new_tokens", "max_length", 2), ("min_new_tokens", "min_length", 0)):
                length = self._fields.get(theirs)
                if ours in defaults or length is None:
                    continue
                if not _is_integer(length) or length < least:
                    raise self._error(theirs, f"an integer of at least {least}", length)
                if length > 1:
                    defaults[ours] = length - 1
        try:
            check_decoding_parameters(defaults)
        except InvalidParameter as error:
            raise BackboneError(
                f"backbone {self._name!r}: generation config: {error.message}", **error.detail
            ) from None
        return defaults

    def eos_token_ids(self, tokenizer: Any) -> tuple[int, ...]:
        for found in (self._fields.get("eos_token_id"), self._config.eos_token_id, tokenizer.eos_token_id):
            if found is not None:
                ids = tuple(found) if isinstance(found, (list, tuple)) else (found,)
                return self._in_vocabulary("eos_token_id", ids)
        return ()

    def decoder_prompt(self) -> tuple[int, ...]:
        if not self._config.is_encoder_decoder:
            return ()
        token = self.token("decoder_start_token_id", getattr(self._config, "decoder_start_token_id", None))
        if token is None:
            raise BackboneError(
                f"backbone {self._name!r}: expected a decoder_start_token_id, got none; set it in "
                "generation_config.json"
            )
        return (token,)

    def token(self, key: str, default: int | None = None) -> int | None:
        token: int | None = self._fields.get(key, default)
        if token is not None and not self._is_token(token):
            raise self._error(key, f"one id from 0 to {self._config.vocab_size - 1}", token)
        return token

    def ids(self, key: str) -> frozenset[int]:
        found = self._fields.get(key, ())
        if not isinstance(found, (list, tuple)):
            raise self._error(key, "a list of ids", found)
        ids = frozenset(self._in_vocabulary(key, tuple(found)))
        if len(ids) == self._config.vocab_size:
            raise self._error(key, "a list that leaves a token", found)
        return ids

    def _in_vocabulary(self, key: str, ids: tuple[Any, ...]) -> tuple[int, ...]:
        if not all(self._is_token(token) for token in ids):
            raise self._error(key, f"ids from 0 to {self._config.vocab_size - 1}", list(ids))
        return ids

    def _is_token(self, token: Any) -> bool:
        return _is_integer(token) and 0 <= token < self._config.vocab_size

    def _error(self, key: str, expected: str, got: Any) -> BackboneError:
        return BackboneError(
            f"backbone {self._name!r}: {key}: expected {expected}, got {_shown(got)}", field=key, got=_shown(got)
        )


def _check_ignored(configured: Mapping[str, Any], ignored: Collection[str]) -> None:
    known = {*READ, *REFUSED, *HARMLESS, *SILENT, *GenerationConfig().to_dict(), *configured}
    for field in ignored:
        if field not in known:
            close = get_close_matches(field, known, 1)
            raise BackboneError(
                f"{OPTION}: expected a field of transformers' GenerationConfig, got {field[:80]!r}"
                + (f"; did you mean {close[0]}?" if close else ""),
                got=field[:80],
            )


def _refuse(name: str, fields: Mapping[str, Any], encoder_decoder: bool) -> None:
    found = {field: (f"{field}: expected {expected}, got {_shown(fields[field])} ({reason})")
             for field, expected, reason in _unsupported(fields, encoder_decoder)}  # fmt: skip
    if found:
        raise BackboneError(
            f"backbone {name!r}: its generation config changes tokens in ways that are not supported: "
            f"{'; '.join(found.values())}. Without them: {' '.join(f'{OPTION} {field}' for field in found)}",
            fields=list(found),
        )


def _unsupported(fields: Mapping[str, Any], encoder_decoder: bool) -> Iterator[tuple[str, str, str]]:
    """Each field that changes tokens and is not supported, with what was expected, and the reason."""
    theirs = GenerationConfig().to_dict()
    refused = REFUSED if encoder_decoder else {**REFUSED, **WHOLE_LENGTHS}
    for field, value in fields.items():
        rule = refused.get(field)
        if rule is None and field in theirs and value != theirs[field]:
            rule = None if field in {*READ, *HARMLESS, *SILENT} else UNKNOWN
        if field == "cache_implementation" and value == "quantized":
            yield field, "another", QUANTIZED_CACHE.reason
        elif rule is not None and value not in rule.neutral:
            yield field, " or ".join(["none", *map(str, rule.neutral)]), rule.reason
    if fields.get("do_sample") and fields.get("num_beams", 1) > 1:
        yield "do_sample", f"false with num_beams {fields['num_beams']}", "beams do not sample"


def _warn(name: str, configured: Mapping[str, Any], ignored: Collection[str]) -> None:
    theirs = GenerationConfig().to_dict()
    for field, value in configured.items():
        if field in ignored:
            reason = f"ignored, as {OPTION} says; outputs differ from transformers'"
        elif field in HARMLESS and value is not False:
            reason = f"not followed: it cannot change tokens ({HARMLESS[field]})"
        elif field not in {*READ, *REFUSED, *SILENT, *HARMLESS, *theirs}:
            reason = "not followed: transformers has no such field"
        else:
            continue
        log.warning("backbone %r: generation config: %s %s: %s", name, field, _shown(value), reason)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
