"""The embedded engine: batched KV-cache generation in plain torch, inside the actor's event loop.

For CPUs and small models. State that changes per token lives in arrays indexed by slot, so one step costs a
fixed number of array operations whatever the number of sequences; Python objects are touched only when a
request starts or ends. The parts: :mod:`.forward` (fused weights, decode and prefill), :mod:`.cache` (keys
and values), :mod:`.slots` (per-slot arrays), :mod:`.sampler` (counter-based sampling), :mod:`.scheduler`
(sessions, queue, eviction) and :mod:`.engine` (the asyncio loop and weight switches).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cod_async.engines.embedded.engine import EmbeddedEngine, load_engine

__all__ = ["EmbeddedEngine", "load_engine"]


def __getattr__(name: str) -> Any:
    """Import the engine, and torch with it, on first use."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from cod_async.engines.embedded import engine

    return getattr(engine, name)
