"""How the files of a published version reach the host that an actor runs on.

On a shared disk they are there. Otherwise the actor pulls them into a folder of its own, which is laid out
like a run folder, so that whoever loads weights is given another root and nothing else.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from cod_async.config.schema import Config
from cod_async.weights.manifest import Manifest

if TYPE_CHECKING:
    from cod_async.weights.pull.client import Puller

PULLED_FOLDER = "pulled"


class WeightsSource(Protocol):
    """Brings versions to this host. All methods are called from one asyncio loop.

    Attributes:
        root: what the shard names in manifests are relative to, once :meth:`fetch` has returned.
    """

    root: Path

    def announce(self, manifest: Manifest) -> None:
        """A version is wanted from now on; a fetch of an older one may be given up for it."""
        ...

    async def fetch(self, manifest: Manifest) -> None:
        """Return when the version's files are whole and below ``root``.

        Raises:
            WeightsError: they cannot be had, with the cause; or a newer version is wanted.
        """
        ...

    def counters(self) -> dict[str, float]:
        """Return counters for the heartbeat."""
        ...

    async def aclose(self) -> None:
        """Stop what is going on."""
        ...


class FolderWeights:
    """The run folder itself, on a disk that actor and learner share."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def announce(self, manifest: Manifest) -> None:
        """Nothing to give up."""

    async def fetch(self, manifest: Manifest) -> None:
        """Nothing to do: a version is announced when it is in the folder."""

    def counters(self) -> dict[str, float]:
        """Nothing is counted."""
        return {}

    async def aclose(self) -> None:
        """Nothing to stop."""


class PulledWeights:
    """Pulled over the network, in a thread, so that the actor's loop goes on meanwhile.

    Args:
        root: the cache; processes of one host may share it.
        make_puller: makes what pulls into the cache.
    """

    def __init__(self, root: Path, make_puller: Callable[[], Puller]) -> None:
        self.root = root
        self._puller = make_puller()
        self._pulling = asyncio.Lock()

    def announce(self, manifest: Manifest) -> None:
        """See :meth:`WeightsSource.announce`."""
        self._puller.supersede(manifest.version)

    async def fetch(self, manifest: Manifest) -> None:
        """See :meth:`WeightsSource.fetch`."""
        async with self._pulling:
            pulling = asyncio.create_task(asyncio.to_thread(self._puller.pull, manifest))
            try:
                await asyncio.shield(pulling)
            except (
                asyncio.CancelledError
            ):  # the thread must have let go of the puller before anybody else has it
                self._puller.stop()
                await asyncio.gather(pulling, return_exceptions=True)
                raise

    def counters(self) -> dict[str, float]:
        """Return what pulling has cost: ``weights_pulled_bytes`` and so on."""
        return self._puller.counters.named()

    async def aclose(self) -> None:
        """End a pull that is going on, within a second, and give up the connection."""
        self._puller.stop()
        async with self._pulling:
            self._puller.close()


def open_weights_source(config: Config, run_dir: Path, name: str) -> WeightsSource:
    """Return where the actor ``name`` gets weights from, as ``weights.source`` says.

    Raises:
        InputError: ``weights.pull_from`` is no address, or needs keys.
    """
    weights = config.weights
    if weights.source == "folder":
        return FolderWeights(run_dir)
    from cod_async.weights.pull.cache import PullCache
    from cod_async.weights.pull.client import Puller
    from cod_async.weights.pull.keys import check_address
    from cod_async.weights.pull.server import read_server_address

    address = weights.pull_from
    if address:
        check_address(address, "weights.pull_from", has_keys=False)
    root = Path(weights.cache_dir) if weights.cache_dir else run_dir / PULLED_FOLDER / name
    return PulledWeights(
        root,
        lambda: Puller(
            PullCache(root, weights.keep_versions), lambda: address or read_server_address(run_dir)
        ),
    )
