"""The server reads the version's folder by itself: nothing to set up, but it must see the same path.

SGLang takes much on trust here. A file that breaks off ends the whole server, since it goes back to the
"old" weights by reading the new file again; tensors of other shapes may be taken up in part without a word.
So only versions that were checked on this host are offered, and checksums are compared afterwards.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from cod_async.engines.sglang.pushes.base import making_label
from cod_async.errors import EngineError, EngineRefusedError
from cod_async.weights.source import PublishedWeights

if TYPE_CHECKING:
    from cod_async.engines.sglang.client import ServerClient

_UNTOUCHED_MESSAGES = ("Failed to get weights iterator", "Failed to get model loader")
"""Refusals before the first tensor was touched."""
_APPLIED_MESSAGE = "Weights were updated"


class DiskPush:
    """Files: ``/update_weights_from_disk``."""

    is_bracketed = False

    async def prepare(self, client: ServerClient) -> None:
        """Nothing to prepare."""

    async def push(self, client: ServerClient, source: PublishedWeights, *, is_flushing: bool) -> None:
        """See :class:`~.base.Push`."""
        try:
            await client.update_from_disk(source.folder, source.label, is_flushing=is_flushing)
        except EngineRefusedError as error:
            if not any(text in str(error) for text in (*_UNTOUCHED_MESSAGES, _APPLIED_MESSAGE)):
                # It may have loaded a part, and would go on under the old name.
                with suppress(EngineError):
                    await client.set_label(making_label(source.label))
            raise

    async def aclose(self) -> None:
        """Nothing to let go of."""
