"""The door to credit assignment: the two stages, both at once, and the answer of ``cod credit``."""

from __future__ import annotations

from cod_async.algo.command import credit_file
from cod_async.algo.stages import (
    BATCH_SET,
    EpisodeCredit,
    GroupCredit,
    MemberRewards,
    SelectedEpisode,
    SelectionCredit,
    assign_credit,
    credit_group,
    credit_member,
    weigh_selection,
)

__all__ = [
    "BATCH_SET",
    "EpisodeCredit",
    "GroupCredit",
    "MemberRewards",
    "SelectedEpisode",
    "SelectionCredit",
    "assign_credit",
    "credit_file",
    "credit_group",
    "credit_member",
    "weigh_selection",
]
