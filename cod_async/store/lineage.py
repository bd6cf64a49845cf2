"""How far a token lags behind the learner, across resumes.

Resuming from a checkpoint opens a new lineage that branches off the old one. A token of the surviving history
lags by plain subtraction. A token of an abandoned lineage was sampled from weights that, on the surviving
history, never existed; the last ancestor they share with it is the branch point, so its lag counts from
there. One case is different: a deterministic resume walks the same way again, and publishes weights with the
*same digest* at the same step. Up to that step both histories are one, and tokens count as if nothing had
happened, which is what makes such a resume bit-exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import msgspec

from cod_async.lifecycle.segment import Version


class Branch(msgspec.Struct, frozen=True):
    """Where a lineage left its parent: it shares the parent's history up to version ``step``."""

    parent: int
    step: int


class Birth(NamedTuple):
    """The step of the surviving history that a version counts as.

    ``is_settled`` is False while it is not known yet whether the surviving history will walk the same way to
    the end; ``step`` is then the last step that is known to be shared, the pessimistic answer.
    """

    step: int
    is_settled: bool


class LineageTree:
    """All lineages, seen from the newest one.

    Args:
        branches: lineage -> where it left its parent; the first lineage has none.
        current: the lineage that the learner works on.
        digests: digest of the weights of every published version.
        publish_every_steps: which steps of the current lineage will be published.
    """

    def __init__(
        self,
        branches: Mapping[int, Branch],
        current: int,
        digests: Mapping[Version, str],
        publish_every_steps: int = 1,
    ) -> None:
        self._branches = dict(branches)
        self.current = current
        self._digests = dict(digests)
        self._publish_every = publish_every_steps
        own = (version for version in self._digests if version.lineage == current)
        self._newest: Version | None = max(own, default=None)
        self._births: dict[Version, Birth] = {}

    def publish(self, version: Version, digest: str) -> None:
        """Note a newly published version."""
        self._digests[version] = digest
        if version.lineage == self.current and (self._newest is None or version > self._newest):
            self._newest = version
        self._births.clear()

    def is_published(self, version: Version) -> bool:
        """Say whether the version was ever published."""
        return version in self._digests

    def digest(self, version: Version) -> str | None:
        """Return the digest a version was published with, or None."""
        return self._digests.get(version)

    def newest_published(self) -> Version | None:
        """Return the newest version published on the current lineage itself."""
        return self._newest

    def at(self, step: int) -> Version:
        """Return the version that the surviving history has at ``step``."""
        return self._on(self.current, step)

    def _on(self, lineage: int, step: int) -> Version:
        """Return the version that the history of a lineage has at ``step``."""
        while lineage in self._branches and step < self._branches[lineage].step:
            lineage = self._branches[lineage].parent
        return Version(lineage, step)

    def is_surviving(self, version: Version) -> bool:
        """Say whether a version lies on the surviving history."""
        last = self._last_shared_step(version.lineage)
        return last is None or version.step <= last

    def birth(self, version: Version) -> Birth:
        """Return the step of the surviving history that a token of ``version`` counts from."""
        if version not in self._births:
            self._births[version] = self._find_birth(version)
        return self._births[version]

    def _find_birth(self, version: Version) -> Birth:
        last = self._last_shared_step(version.lineage)
        if last is None or version.step <= last:
            return Birth(version.step, True)
        birth, is_settled = last, True
        for step in range(last + 1, version.step + 1):
            own = self._digests.get(self._on(version.lineage, step))
            here = self._digests.get(self.at(step))
            if own is not None and here is None:
                is_settled = is_settled and not self._will_be_published(step)
            elif own is not None and own == here:
                birth = step
            elif own is not None:
                return Birth(birth, True)
        return Birth(birth, is_settled or birth == version.step)

    def _will_be_published(self, step: int) -> bool:
        return step % self._publish_every == 0 and (self._newest is None or step > self._newest.step)

    def _ancestry(self, lineage: int) -> dict[int, int | None]:
        """Return the lineages on the way to the root with the last step each contributes (None: no end)."""
        last: int | None = None
        found: dict[int, int | None] = {lineage: None}
        while lineage in self._branches:
            branch = self._branches[lineage]
            last = branch.step if last is None else min(last, branch.step)
            lineage = branch.parent
            found[lineage] = last
        return found

    def _last_shared_step(self, lineage: int) -> int | None:
        """Return the last step that a lineage shares with the surviving history; None: it is current."""
        if lineage == self.current:
            return None
        ours, theirs = self._ancestry(self.current), self._ancestry(lineage)
        shared = next((ancestor for ancestor in theirs if ancestor in ours), None)
        if shared is None:
            return 0
        ends = [end for end in (ours[shared], theirs[shared]) if end is not None]
        return min(ends) if ends else None
