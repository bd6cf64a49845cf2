"""Evaluation with frozen weights: reward by position in the lifecycle, and the controls that say why it
rises.

``deploy`` plays lifecycles and counts, ``report`` holds what comes out, ``jobs`` spreads several evaluations
over processes. Import from these modules directly.
"""
