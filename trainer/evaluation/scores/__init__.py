"""Scores of texts against references: the types (``base``), one module per family of metrics, and the settings for each
corpus (``presets``).

Knows only texts: no model, no prefix, no file.
"""
