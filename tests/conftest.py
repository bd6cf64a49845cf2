"""Puts ``tests/`` on the import path, so that tests of all folders share the helpers that lie here."""
