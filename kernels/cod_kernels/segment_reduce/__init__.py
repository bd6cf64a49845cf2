"""Deterministic sums over the tokens of each segment; see README.md."""
