"""A key's secret: ``pfx_<id><random><checksum>``, all in base62 and of fixed length.

Owns the form. The id is the key's, so that a look-up needs no secret. 256 random bits cannot be guessed, so a plain
SHA-256 is enough to keep. The checksum lets scanners find a leaked secret, and a mistyped one needs no look-up.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import string
import zlib
from dataclasses import dataclass, field
from typing import Final

ALPHABET: Final = string.digits + string.ascii_uppercase + string.ascii_lowercase
PREFIX: Final = "pfx_"
ID_LENGTH: Final = 12
RANDOM_LENGTH: Final = 43
"""62**43 is a little more than 2**256."""
CHECKSUM_LENGTH: Final = 6
"""Of a CRC-32."""
SECRET_PATTERN: Final = f"^{PREFIX}[0-9A-Za-z]{{{ID_LENGTH + RANDOM_LENGTH + CHECKSUM_LENGTH}}}$"
ID_PATTERN: Final = f"^[0-9A-Za-z]{{{ID_LENGTH}}}$"
_SECRET: Final = re.compile(SECRET_PATTERN[1:-1])
_LIKE_ONE: Final = re.compile(rf"({PREFIX}[0-9A-Za-z]{{{ID_LENGTH}}})[0-9A-Za-z]+")
"""Also one that was cut short, which may still say all that is random."""


@dataclass(frozen=True)
class Presented:
    """A well-formed secret as a caller sent it: the key that it names, and the digest that a registry keeps."""

    key_id: str
    digest: str = field(repr=False)


def new_id() -> str:
    """A random id for a key."""
    return "".join(secrets.choice(ALPHABET) for _ in range(ID_LENGTH))


def new_secret(key_id: str) -> str:
    """A new secret of the key. It is shown once and kept nowhere."""
    body = key_id + _base62(secrets.randbits(256), RANDOM_LENGTH)
    return f"{PREFIX}{body}{_checksum(body)}"


def parse_secret(text: str) -> Presented | None:
    """What ``text`` presents, None unless it is well-formed."""
    if not _SECRET.fullmatch(text):
        return None
    body, checksum = text[len(PREFIX) : -CHECKSUM_LENGTH], text[-CHECKSUM_LENGTH:]
    if not secrets.compare_digest(_checksum(body), checksum):
        return None
    return Presented(body[:ID_LENGTH], digest_of(text))


def without_secrets(text: str) -> str:
    """``text`` for logs, errors and audit: of what looks like a secret, such as one given for a name, the id alone."""
    return _LIKE_ONE.sub(r"\1…", text) if PREFIX in text else text


def hash_line(presented: Presented) -> str:
    """What stands in a file for services that shall know a key and not its secret: id and SHA-256, one line."""
    return f"{presented.key_id} {presented.digest}\n"


def digest_of(secret: str) -> str:
    """The SHA-256 of a secret, in hexadecimal digits."""
    return hashlib.sha256(secret.encode()).hexdigest()


def _checksum(body: str) -> str:
    return _base62(zlib.crc32(body.encode()), CHECKSUM_LENGTH)


def _base62(number: int, length: int) -> str:
    digits = []
    for _ in range(length):
        number, digit = divmod(number, len(ALPHABET))
        digits.append(ALPHABET[digit])
    return "".join(reversed(digits))
