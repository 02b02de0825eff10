"""Implementations of the linear and attention interface of ``base``."""
