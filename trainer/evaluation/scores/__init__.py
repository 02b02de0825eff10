"""Scores of texts against references: what a metric takes and gives (``base``), one module per family of metrics, and
the settings that each corpus is scored with (``presets``).

Knows texts only: no model, no prefix, no file.
"""
