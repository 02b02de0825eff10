"""Imports and exports prefixes in other tools' formats: one module per format."""
