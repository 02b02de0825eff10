"""Serves prefix-tuned tasks over HTTP. Imports ``prefixes``; never the trainer."""
