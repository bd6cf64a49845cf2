from __future__ import annotations

from cod_async.lifecycle.segment import Version
from cod_async.store.lineage import Birth, Branch, LineageTree


def digests(**lineages: str) -> dict[Version, str]:
    """``l0="abc"``: lineage 0 published "a" at step 0, "b" at step 1, …; a dot is not published."""
    return {
        Version(int(name[1:]), step): letter
        for name, letters in lineages.items()
        for step, letter in enumerate(letters)
        if letter != "."
    }


def test_current_lineage_counts_by_plain_subtraction() -> None:
    tree = LineageTree({}, 0, digests(l0="abcd"))
    assert tree.birth(Version(0, 3)) == Birth(3, True)
    assert tree.newest_published() == Version(0, 3)
    assert tree.at(2) == Version(0, 2)


def test_shared_history_counts_as_surviving() -> None:
    tree = LineageTree({1: Branch(0, 2)}, 1, digests(l0="abcde", l1="..cxy"))
    assert tree.birth(Version(0, 1)) == Birth(1, True)
    assert tree.is_surviving(Version(0, 2)) and not tree.is_surviving(Version(0, 3))
    assert [tree.at(step) for step in (1, 2, 3)] == [Version(0, 1), Version(1, 2), Version(1, 3)]


def test_abandoned_tokens_count_from_the_branch() -> None:
    tree = LineageTree({1: Branch(0, 2)}, 1, digests(l0="abcde", l1="..cx"))
    assert tree.birth(Version(0, 4)) == Birth(2, True)
    assert tree.birth(Version(0, 3)) == Birth(2, True)


def test_equal_digests_make_one_history() -> None:
    tree = LineageTree({1: Branch(0, 2)}, 1, digests(l0="abcdef", l1="..cd"))
    assert tree.birth(Version(0, 3)) == Birth(3, True)
    assert tree.birth(Version(0, 5)) == Birth(3, False)  # steps 4 and 5 are still to come
    tree.publish(Version(1, 4), "e")
    assert tree.birth(Version(0, 5)) == Birth(4, False)
    tree.publish(Version(1, 5), "other")
    assert tree.birth(Version(0, 5)) == Birth(4, True)


def test_equal_again_after_diverging_does_not_count() -> None:
    tree = LineageTree({1: Branch(0, 1)}, 1, digests(l0="abcd", l1=".bxd"))
    assert tree.birth(Version(0, 3)) == Birth(1, True)


def test_branches_of_branches() -> None:
    # 0: steps 0..5; 1 leaves 0 at 2; 2 leaves 0 at 4: what 1 did is abandoned and counts from 2
    tree = LineageTree({1: Branch(0, 2), 2: Branch(0, 4)}, 2, digests(l0="abcdef", l1="..cXY", l2="....eZ"))
    assert tree.birth(Version(1, 4)) == Birth(2, True)
    assert tree.birth(Version(0, 4)) == Birth(4, True)
    assert tree.birth(Version(0, 5)) == Birth(4, True)
    # 2 leaves 1 at 3: 1's step 3 survives, 0's step 3 does not
    tree = LineageTree({1: Branch(0, 2), 2: Branch(1, 3)}, 2, digests(l0="abcd", l1="..cX", l2="...X"))
    assert tree.birth(Version(1, 3)) == Birth(3, True)
    assert tree.birth(Version(0, 3)) == Birth(2, True)
    assert [tree.at(step).lineage for step in (1, 2, 3, 4)] == [0, 1, 2, 2]


def test_steps_that_are_never_published_settle_nothing_and_delay_nothing() -> None:
    tree = LineageTree({1: Branch(0, 4)}, 1, digests(l0="a...e...i", l1="....e"), publish_every_steps=4)
    assert tree.birth(Version(0, 8)) == Birth(4, False)
    tree.publish(Version(1, 8), "i")
    assert tree.birth(Version(0, 8)) == Birth(8, True)
    # the old lineage published at an odd step (it had branched there); the new one never will
    tree = LineageTree({1: Branch(0, 4)}, 1, digests(l0="a...e.g", l1="....e"), publish_every_steps=4)
    assert tree.birth(Version(0, 6)) == Birth(4, True)


def test_unknown_versions_count_from_the_branch() -> None:
    tree = LineageTree({1: Branch(0, 2)}, 1, digests(l0="abc", l1="..c"))
    assert tree.birth(Version(0, 9)) == Birth(2, True)
    assert not tree.is_published(Version(0, 9))
