"""Benchmarks of staleness: what control does to the data, and what corrections do with it."""
