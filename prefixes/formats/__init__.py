"""Prefixes made elsewhere, in and out: one module per format."""
