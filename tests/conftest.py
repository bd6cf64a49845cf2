"""Puts ``tests/`` on the import path, so that tests of all folders share the helpers that lie here.

Properties are tested with the same examples in every run, so that a red one can be repeated and a green one
means something about the change. ``HYPOTHESIS_PROFILE=explore`` draws new ones.
"""

from __future__ import annotations

import os

from hypothesis import settings

settings.register_profile("repeatable", derandomize=True)
settings.register_profile("explore", derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))
