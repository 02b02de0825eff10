"""Tenants and keys: who callers are, and what belongs to whom. Torch-free; knows no HTTP.

``model`` says what there is, ``changes`` how it changes, ``directory`` makes changes in a registry, and ``keyring`` is
what a running service knows of it.
"""
