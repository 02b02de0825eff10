"""The paths of the checkout and of the shared data beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
SHARED: Final = ROOT.parent / "shared" / "data"
"""Corpora and real tokenizers, where this is not a user's clone."""
