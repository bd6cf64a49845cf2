"""What every engine has to keep to, as checks that can be run against any of them.

The contract is :mod:`cod_async.engines.base`; here it is put to the test. :mod:`.findings` is what a check
is, :mod:`.reference` what engines are compared with, :mod:`.asking` how they are asked; the checks are in
:mod:`.sampling` (single completions) and :mod:`.traffic` (many at once, sessions, cancelled requests,
updates).
What is special to SGLang servers is in :mod:`cod_async.engines.sglang.conformance`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cod_async.engines.conformance.findings import Check, Finding, Status, find, find_all

if TYPE_CHECKING:
    from cod_async.engines.conformance.asking import Subject

__all__ = ["ENGINE_CHECKS", "Check", "Finding", "Status", "engine_checks", "find", "find_all"]

ENGINE_CHECKS = (
    "answers_are_whole",
    "logprob_parity",
    "logprobs_before_top_p",
    "samples_follow_logprobs",
    "stop_ids",
    "own_eos_does_not_stop",
    "length_limit",
    "context_limit",
    "foreign_ids",
    "batch_equals_one_by_one",
    "session_turns",
    "abort",
    "versions_are_true",
    "live_update",
)
"""Names of the checks of any engine, in order."""


def engine_checks(subject: Subject, deadline_s: float = 300.0) -> list[Check]:
    """Return the checks of any engine, in order.

    Args:
        subject: what is examined.
        deadline_s: longest time of each check, in seconds.
    """
    from functools import partial

    from cod_async.engines.conformance import sampling, traffic

    functions = {name: getattr(sampling, name, None) or getattr(traffic, name) for name in ENGINE_CHECKS}
    return [Check(name, partial(function, subject), deadline_s) for name, function in functions.items()]
