"""Produces prefixes. Imports ``prefixes``, and of the server only ``engine``, ``web`` and ``parameters``."""
