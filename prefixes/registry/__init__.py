"""Where prefixes live: one Protocol (``base``), one implementation per store."""
