"""Evaluation with frozen weights: reward by position in the lifecycle, and the controls that say why it
rises.

``suite`` says what is played, ``targets`` with whose weights, ``plan`` in which packs. ``agenda`` hands the
lifecycles out, ``playing`` plays one, ``workers`` spreads them over processes, ``results`` keeps what is
finished, and ``report`` makes curves of it; ``run`` is all of that together. Import from these modules
directly.
"""
