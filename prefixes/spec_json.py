"""The JSON form of a PrefixSpec. The artifact's header, the registry's index and HTTP share it. Torch-free.

Owns the form and its validation: a spec that passes is well-formed. Knows no tensors, and not whether a spec fits a
backbone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, Final, get_args

from prefixes.errors import InvalidArtifact, InvalidName, InvalidParameter
from prefixes.parameters import check_decoding_parameters
from prefixes.spec import SITES, Positions, PrefixSpec, Site, SiteGeometry, SitePrefix, check_version, split_template
from prefixes.strict_json import strict_json

DTYPES: Final = ("float32", "float16", "bfloat16", "float64")
MAX_SIZE: Final = 1 << 24  # of each dimension; far above every model and far below an overflow
MAX_DEPTH: Final = 32  # of nested lists and objects in `defaults` and `origin`

_SPEC_KEYS: Final = frozenset({"fingerprint", "sites", "template", "defaults", "origin"})
_SITE_KEYS: Final = frozenset({"length", "positions", "layers", "kv_heads", "head_dim", "dtype"})


def spec_to_dict(spec: PrefixSpec) -> dict[str, Any]:
    """``spec`` as plain JSON values. Raises InvalidArtifact if it is not well-formed."""
    raw = {
        "fingerprint": spec.fingerprint,
        "sites": {
            site: {
                "length": sited.length,
                "positions": sited.positions,
                **sited.geometry.as_dict(),
                "dtype": sited.dtype,
            }
            for site, sited in spec.sites.items()
        },
        "template": spec.template,
        "defaults": dict(spec.defaults),
        "origin": dict(spec.origin),
    }
    spec_from_dict(raw)
    plain: dict[str, Any] = json.loads(canonical_json(raw))  # tuples become lists, keys stand sorted
    return plain


def spec_from_dict(raw: Any) -> PrefixSpec:
    """The spec in ``raw`` (parsed JSON). Raises InvalidArtifact for anything missing, unknown or wrong."""
    fields = _object("metadata", raw, _SPEC_KEYS)
    fingerprint, template = fields["fingerprint"], fields["template"]
    try:
        check_version(fingerprint)
    except (InvalidName, TypeError):
        raise _wrong("fingerprint", "sha256:<64 hex digits>", fingerprint) from None
    if not isinstance(template, str):
        raise _wrong("template", "a string", template)
    check_json("template", template)
    split_template(template)
    sites = _any_object("sites", fields["sites"])
    if not sites:
        raise InvalidArtifact("sites: expected at least one, got none", expected=list(SITES), got=[])
    defaults = _any_object("defaults", fields["defaults"])
    check_json("defaults", defaults)
    try:
        check_decoding_parameters(defaults)
    except InvalidParameter as error:
        raise InvalidArtifact(f"defaults: {error.message}", **error.detail) from None
    origin = _any_object("origin", fields["origin"])
    check_json("origin", origin)
    return PrefixSpec(
        fingerprint=fingerprint,
        sites={_site(name): _site_prefix(name, value) for name, value in sites.items()},
        template=template,
        defaults=defaults,
        origin=origin,
    )


def canonical_json(value: Any) -> str:
    """One text per value: sorted keys, no spaces, ASCII. Digests are taken over it."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def parse_json(what: str, text: str | bytes) -> Any:
    """Parse strict JSON: no NaN, no duplicate keys. Raises InvalidArtifact, which names ``what``."""
    try:
        return strict_json(text)
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError too
        raise InvalidArtifact(f"{what}: expected JSON, got {str(error)[:200]}", what=what) from None


def check_json(what: str, value: Any, depth: int = MAX_DEPTH) -> None:
    """Raise InvalidArtifact unless ``value`` is JSON: finite numbers of at most 64 bits, string keys, valid Unicode."""
    if depth < 0:
        raise InvalidArtifact(f"{what}: expected at most {MAX_DEPTH} levels, got more", expected=MAX_DEPTH)
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise InvalidArtifact(f"{what}: expected valid Unicode, got a lone surrogate", what=what) from None
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise _wrong(f"{what}: key", "a string", key)
            check_json(what, key, depth - 1)
            check_json(f"{what}.{key[:40]}", item, depth - 1)
    elif isinstance(value, (list, tuple)):
        for item in value:
            check_json(what, item, depth - 1)
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise _wrong(what, "a finite number", value)
    elif isinstance(value, int):  # bool too
        if abs(value) >= 1 << 64:
            raise InvalidArtifact(f"{what}: expected an integer of at most 64 bits, got a larger one", what=what)
    elif value is not None:
        raise _wrong(what, "a JSON value", value)


def _site(name: str) -> Site:
    for site in SITES:
        if name == site:
            return site
    raise _wrong("site", " or ".join(SITES), name)


def _site_prefix(name: str, raw: Any) -> SitePrefix:
    fields = _object(f"site {name!r}", raw, _SITE_KEYS)
    if fields["positions"] not in get_args(Positions):
        raise _wrong(f"site {name!r}: positions", " or ".join(get_args(Positions)), fields["positions"])
    if name == "cross" and fields["positions"] != "unshifted":  # cross-attention has no positions
        raise _wrong("site 'cross': positions", "unshifted", fields["positions"])
    if fields["dtype"] not in DTYPES:
        raise _wrong(f"site {name!r}: dtype", " or ".join(DTYPES), fields["dtype"])
    sizes = ("length", "layers", "kv_heads", "head_dim")
    size = {key: _positive(f"site {name!r}: {key}", fields[key]) for key in sizes}
    return SitePrefix(
        length=size["length"],
        positions=fields["positions"],
        geometry=SiteGeometry(size["layers"], size["kv_heads"], size["head_dim"]),
        dtype=fields["dtype"],
    )


def _positive(what: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_SIZE:
        raise _wrong(what, f"an integer from 1 to {MAX_SIZE}", value)
    return value


def _any_object(what: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise _wrong(what, "an object", value)
    for key in value:
        if not isinstance(key, str):
            raise _wrong(f"{what}: key", "a string", key)
    return dict(value)


def _object(what: str, value: Any, keys: frozenset[str]) -> dict[str, Any]:
    fields = _any_object(what, value)
    if fields.keys() != keys:
        missing, unknown = sorted(keys - fields.keys()), sorted(key[:80] for key in fields.keys() - keys)
        raise InvalidArtifact(
            f"{what}: expected exactly the keys {', '.join(sorted(keys))}; missing {missing}, unknown {unknown[:8]}",
            expected=sorted(keys),
            missing=missing,
            unknown=unknown[:8],
        )
    return fields


def _wrong(what: str, expected: str, got: Any) -> InvalidArtifact:
    shown = repr(got)[:80] if isinstance(got, (str, bool, float, type(None))) else type(got).__name__
    if isinstance(got, int) and not isinstance(got, bool):
        shown = str(got) if abs(got) < 1 << 64 else "a larger integer"
    return InvalidArtifact(f"{what}: expected {expected}, got {shown}", expected=expected, got=shown)
