"""Placeholder until the paged cache of the branch ``step`` is merged."""

BLOCK = 16
