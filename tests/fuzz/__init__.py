"""Hostile responses for everything that reads a policy's text; ``python -m tests.fuzz.responses``."""
