"""Engines: the protocol (:mod:`cod_async.engines.base`) and those who speak it.

Nothing is imported here; the embedded engine loads torch only when it is asked for.
"""
