"""Environments: the interface (:mod:`.base`), the registry, the commands that show and play them.

One folder per environment, each with its README, prompts, data and scripted policies.
"""
