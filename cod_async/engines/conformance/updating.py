"""How a check may change an engine's weights, and put them back."""

from __future__ import annotations

from typing import Literal, Protocol

from cod_async.engines.conformance.reference import Reference
from cod_async.lifecycle.segment import Version

SwitchMode = Literal["in_place", "retract", "wait", "at_segment_boundary"]


class Updater(Protocol):
    """Switches an engine to another version and back.

    Attributes:
        mode: what the engine does with running requests meanwhile.
        has_other_weights: False: the same weights under another version, which changes nothing.
        goes_back: whether the version of before is restored too, not only its weights; an engine that takes
            up newer versions only gets those under a newer one.
    """

    mode: SwitchMode
    has_other_weights: bool
    goes_back: bool

    async def prepare(self) -> None:
        """Make sure, before anything is running, that a switch can be undone.

        Raises:
            CheckSkippedError: it cannot.
        """
        ...

    async def switch(self) -> tuple[Version, Reference | None]:
        """Switch while requests are running; return the new version and its reference.

        Raises:
            EngineError, WeightsError: the engine could not.
        """
        ...

    async def restore(self) -> Version:
        """Go back to the weights of before; return the version that they have now."""
        ...
