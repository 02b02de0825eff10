"""What a backbone and a prefix look like, and whether the two fit. Torch-free.

Owns geometry, names and compatibility; knows neither tensors nor files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from prefixes.errors import IncompatiblePrefix, InvalidArtifact, InvalidName

Site = Literal["decoder", "encoder", "cross"]
Family = Literal["gpt2", "bart", "llama", "t5"]
SITES: tuple[Site, ...] = ("decoder", "encoder", "cross")

Positions = Literal["shifted", "unshifted"]
"""How positions count behind a prefix: ``shifted`` tokens start at ``prefix_len``, ``unshifted`` at 0.

A prefix's keys are kept as attention sees them, behind norms of keys, rotation and YaRN's factor. Nothing moves them:
where positions rotate keys, those of an unshifted prefix that stands before the tokens are rotated by ``-prefix_len``
to -1.
"""

DEFAULT_TENANT = "default"
DEFAULT_ALIAS = "production"
INPUT_SLOT = "{input}"

PART = r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?"
DIGEST = r"sha256:[0-9a-f]{64}"
NO_TWO_DOTS = r"(?!.*\.\.)"
NAME_PATTERN = f"^{NO_TWO_DOTS}{PART}$"
"""Of tenants, tasks, aliases and publish keys, for documents; ``check_name`` keeps it."""
VERSION_PATTERN = f"^{DIGEST}$"
TASK_PATTERN = f"^{NO_TWO_DOTS}(?:{PART}/)?{PART}$"
REFERENCE_PATTERN = f"^{NO_TWO_DOTS}(?:{PART}/)?{PART}(?:@(?:{PART}|{DIGEST}))?$"
"""What ``TaskRef.parse`` takes."""
_NAME = re.compile(f"{NO_TWO_DOTS}{PART}")
_VERSION = re.compile(DIGEST)


def check_name(kind: str, name: str) -> str:
    """Return ``name`` if it is a valid tenant, task or alias name, else raise InvalidName.

    Valid: 1 to 64 of ``a-z 0-9 . _ -``, first and last alphanumeric, no two dots in a row. Such a name is safe as a
    file name, a URL part and a Redis key.
    """
    if not _NAME.fullmatch(name):
        raise InvalidName(
            f"{kind} name: expected 1 to 64 of a-z 0-9 . _ -, beginning and ending with a letter or digit; "
            f"got {name[:80]!r}",
            kind=kind,
            got=name[:80],
        )
    return name


def check_version(version: str) -> str:
    """Return ``version`` if it is ``sha256:<64 hex digits>``, else raise InvalidName."""
    if not _VERSION.fullmatch(version):
        raise InvalidName(f"version: expected sha256:<64 hex digits>, got {version[:80]!r}", got=version[:80])
    return version


@dataclass(frozen=True)
class TaskRef:
    """What a request names: ``[tenant/]name[@alias]`` or ``[tenant/]name@sha256:…``.

    Exactly one of ``alias`` and ``version`` is set.
    """

    tenant: str
    name: str
    alias: str | None = DEFAULT_ALIAS
    version: str | None = None

    @classmethod
    def parse(cls, text: str, tenant: str = DEFAULT_TENANT) -> TaskRef:
        """Parse a reference. ``tenant`` is the caller's own, for a text that names none. Raises InvalidName."""
        path, at, selector = text.partition("@")
        head, slash, name = path.rpartition("/")
        owner = check_name("tenant", head if slash else tenant)
        check_name("task", name)
        if not at:
            return cls(owner, name)
        if selector.startswith("sha256:"):
            return cls(owner, name, None, check_version(selector))
        return cls(owner, name, check_name("alias", selector))

    @property
    def task(self) -> str:
        """``tenant/name``, as answers and metrics show it."""
        return f"{self.tenant}/{self.name}"

    def __str__(self) -> str:
        return f"{self.task}@{self.version or self.alias}"


@dataclass(frozen=True)
class SiteGeometry:
    """The key/value geometry of one site: what a prefix there must match."""

    layers: int
    kv_heads: int
    head_dim: int

    def as_dict(self) -> dict[str, int]:
        return {"layers": self.layers, "kv_heads": self.kv_heads, "head_dim": self.head_dim}


@dataclass(frozen=True)
class BackboneSpec:
    """The identity of a frozen model: family, geometry per site, window, and the fingerprint of its weights."""

    family: Family
    sites: Mapping[Site, SiteGeometry]
    hidden_size: int
    vocab_size: int
    max_positions: int
    fingerprint: str  # "sha256:<hex>", over architecture, checkpoint tensors before any cast, and tokenizer

    @property
    def input_site(self) -> Site:
        """The site that reads the input: ``encoder`` if the backbone has one, else ``decoder``."""
        return "encoder" if "encoder" in self.sites else "decoder"

    def input_room(self, prefix: PrefixSpec | None) -> int:
        """How many input tokens fit the window, behind a shifted prefix and, in a decoder, before one output token."""
        offset = prefix.position_offset(self.input_site) if prefix else 0
        return self.max_positions - offset - (1 if self.input_site == "decoder" else 0)

    def input_limit(self, prefix: PrefixSpec | None) -> str:
        """How ``input_room`` comes about, for error messages."""
        offset = prefix.position_offset(self.input_site) if prefix else 0
        less = [f"{offset} of the prefix"] if offset else []
        less += ["one to generate"] if self.input_site == "decoder" else []
        return f"a window of {self.max_positions}" + (f", less {' and '.join(less)}" if less else "")


@dataclass(frozen=True)
class SitePrefix:
    """One site's prefix: its length in virtual positions, how positions count behind it, its geometry and dtype."""

    length: int
    positions: Positions
    geometry: SiteGeometry
    dtype: str  # "float32", "float16", "bfloat16" or "float64"


@dataclass(frozen=True)
class PrefixSpec:
    """A prefix's metadata without its tensors, as in the artifact's header."""

    fingerprint: str
    sites: Mapping[Site, SitePrefix]
    template: str = INPUT_SLOT
    defaults: Mapping[str, Any] = field(default_factory=dict)  # default decoding parameters, names as in /generate
    origin: Mapping[str, Any] = field(default_factory=dict)  # data digest, method, hyperparameters

    def length(self, site: Site) -> int:
        """Virtual positions at ``site``; 0 without a prefix there."""
        prefix = self.sites.get(site)
        return prefix.length if prefix else 0

    def position_offset(self, site: Site) -> int:
        """Position of the first real token at ``site``."""
        prefix = self.sites.get(site)
        return prefix.length if prefix and prefix.positions == "shifted" else 0


def split_template(template: str) -> tuple[str, str]:
    """The literal text before and after the one ``{input}``; other braces are text. Raises InvalidArtifact."""
    if template.count(INPUT_SLOT) != 1:
        raise InvalidArtifact(
            f"template: expected exactly one {INPUT_SLOT}, got {template.count(INPUT_SLOT)}",
            got=template.count(INPUT_SLOT),
        )
    before, _, after = template.partition(INPUT_SLOT)
    return before, after


def check_compatible(prefix: PrefixSpec, backbone: BackboneSpec) -> None:
    """Raise IncompatiblePrefix, saying expected and got, unless ``prefix`` was made for ``backbone``."""
    for site, sited in prefix.sites.items():
        expected = backbone.sites.get(site)
        if expected is None:
            raise IncompatiblePrefix(
                f"site {site!r}: a {backbone.family} backbone has only {', '.join(backbone.sites)}",
                expected=list(backbone.sites),
                got=site,
            )
        if expected != sited.geometry:
            raise IncompatiblePrefix(
                f"geometry at site {site!r}: backbone has {expected.as_dict()}, prefix has {sited.geometry.as_dict()}",
                expected=expected.as_dict(),
                got=sited.geometry.as_dict(),
                site=site,
            )
        if site == "cross" and sited.positions == "shifted":
            raise IncompatiblePrefix(
                "positions at site 'cross': expected 'unshifted' (its keys are the encoder's, which have no positions "
                "of their own there), got 'shifted'",
                expected="unshifted",
                got="shifted",
            )
        if sited.positions == "shifted" and sited.length >= backbone.max_positions:
            raise IncompatiblePrefix(
                f"prefix length at site {site!r}: expected less than the window of {backbone.max_positions}, "
                f"got {sited.length}",
                expected=backbone.max_positions - 1,
                got=sited.length,
                site=site,
            )
    if prefix.fingerprint != backbone.fingerprint:
        raise IncompatiblePrefix(
            f"backbone fingerprint: this backbone is {backbone.fingerprint}, the prefix was made for "
            f"{prefix.fingerprint}; a model's GGUF file and its safetensors are two backbones",
            expected=backbone.fingerprint,
            got=prefix.fingerprint,
        )
