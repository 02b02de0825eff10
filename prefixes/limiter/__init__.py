"""Limiter: counts what tenants and keys take, and refuses what would be too much. Knows neither HTTP nor torch."""
