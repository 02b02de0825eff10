"""Produces prefixes: data, training loop, export. Imports ``prefixes`` and ``server.engine``."""
