"""What a loss recipe does to one token: its pull on the token's log-prob by how far the policies have parted.

The pull of a token is dJ/dl: what its log-prob l adds to the objective, in multiples of its advantage and of
its weight in the step. Here it is asked of the learner's own code: probes are laid out as a step's tokens,
:func:`make_objective` and the fused loss do what they do in training, and autograd gives the slope. Nothing
of a recipe is written down a second time.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import matplotlib
import numpy as np
import numpy.typing as npt
import torch

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from cod_async.config.presets import PRESETS
from cod_async.config.schema import LossConfig
from cod_async.learner.objective import make_objective, needs_start, needs_survey
from cod_async.learner.packing import FlatRows
from cod_kernels import segment_loss

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Floats = npt.NDArray[np.float64]

LOW, HIGH = 1 / 8, 8.0
"""Range of the ratios drawn."""
NUM_RATIOS = 385
TYPICAL = math.exp(-4)
"""Probability of a probe under the behaviour policy where it does not matter: every ratio drawn fits."""
NUM_OTHERS = 2000
"""Tokens beside the probe in a step whose spread counts."""
_COLORS = ("#000000", "#0072b2", "#d55e00", "#009e73")
_STYLES = ("-", "--", "-.", ":")
_NEUTRAL_COLOR = "#808080"
DPI = 110


class Case(NamedTuple):
    """A line of a picture: where the probes stand.

    Attributes:
        label: in the legend.
        lag: of the probes, in optimizer steps.
        probability: of the probes under the behaviour policy.
        companions: log-ratios of the other tokens in each probe's segment.
        spread: standard deviation of the log-ratios of the other tokens of the step, in nats; 0: no others.
        is_later: a mini-batch after the first of a step on data of lag 0: the proximal policy is the
            behaviour policy.
        teacher: probability of the probes under the teacher, in multiples of that under the behaviour policy.
    """

    label: str
    lag: int = 1
    probability: float = TYPICAL
    companions: tuple[float, ...] = ()
    spread: float = 0.0
    is_later: bool = False
    teacher: float = 1.0


class Picture(NamedTuple):
    """What is drawn of a preset.

    Attributes:
        cases: its lines.
        axis: what the horizontal axis is.
    """

    cases: tuple[Case, ...]
    axis: str = "ratio current / behaviour of the token"


_OF_TOKEN = Picture((Case("the preset"),))
_OF_SEGMENT = "ratio of the segment, geometric mean"
_MINI_BATCHES = (
    Case("one update per step"),
    Case("later mini-batch, fresh data", is_later=True),
)


def _around(ratio: float) -> tuple[float, ...]:
    """Return companions that hold a segment's geometric mean at a ratio, to 3 % wherever its probe stands."""
    return (math.log(ratio),) * 99


PICTURES = dict.fromkeys(PRESETS, _OF_TOKEN) | {
    "decoupled": Picture(_MINI_BATCHES),
    "a3po": Picture(
        (
            Case("lag 0 and 1"),
            Case("lag 2", lag=2),
            Case("lag 4", lag=4),
            Case("lag 8", lag=8),
        )
    ),
    "tis_token": Picture(_MINI_BATCHES),
    "tis_segment": Picture(_MINI_BATCHES, _OF_SEGMENT),
    "icepop": Picture(_MINI_BATCHES),
    "geo_mask": Picture(
        (
            Case("segment around 1", companions=_around(1.0)),
            Case("segment around 1.5", companions=_around(1.5)),
            Case("segment around 1, later mini-batch", companions=_around(1.0), is_later=True),
        )
    ),
    "gspo": Picture((Case("the preset"),), _OF_SEGMENT),
    "dppo_tv": Picture(
        (
            Case("behaviour probability .02", probability=0.02),
            Case("behaviour probability .2", probability=0.2),
            Case("behaviour probability .6", probability=0.6),
        )
    ),
    "m2po": Picture(
        (
            Case("step's spread .15 nats", spread=0.15),
            Case("step's spread .202 nats", spread=0.202),
            Case("step's spread .6 nats", spread=0.6),
        )
    ),
    "opsm": Picture(
        (
            Case("segment 5 % likelier", companions=_around(1.05)),
            Case("segment 5 % less likely", companions=_around(0.95)),
        )
    ),
    "opd": Picture(
        (
            Case("teacher / behaviour = 1/4", teacher=0.25),
            Case("teacher / behaviour = 1", teacher=1.0),
            Case("teacher / behaviour = 4", teacher=4.0),
        )
    ),
}
"""Preset -> what is drawn of it."""


def pulls(loss: LossConfig, ratios: Sequence[float] | Floats, advantage: float, case: Case) -> Floats:
    """Return dJ/dl of one token at each ratio, in multiples of its weight in the step.

    Args:
        loss: the recipe.
        ratios: current / behaviour, above 0; probability times ratio at most 1.
        advantage: of the probes' segments.
        case: where they stand.
    """
    if case.spread:  # the others make one step with each probe, as in training
        return np.array([_pulls(loss, np.array([ratio]), advantage, case)[0] for ratio in ratios])
    return _pulls(loss, np.asarray(ratios, dtype=np.float64), advantage, case)


def _pulls(loss: LossConfig, ratios: Floats, advantage: float, case: Case) -> Floats:
    size, count = 1 + len(case.companions), ratios.size
    drift = np.empty((count, size))
    drift[:, 0], drift[:, 1:] = np.log(ratios), case.companions
    ids = np.repeat(np.arange(count), size)
    others = _spread(case.spread)
    behavior = np.full(count * size + 2 * others.size, math.log(case.probability))
    flat = _laid_out(
        np.concatenate([ids, np.full(others.size, count), np.full(others.size, count + 1)]),
        behavior,
        np.array([advantage] * count + [1.0, -1.0] * bool(others.size)),
        lag=case.lag,
        teacher=behavior + math.log(case.teacher) if loss.is_distilled else None,
    )
    current = torch.from_numpy(behavior + np.concatenate([drift.ravel(), others, others]))
    current.requires_grad_()
    objective = make_objective(
        loss,
        flat,
        torch.device("cpu"),
        survey=current.detach() if needs_survey(loss) else None,
        proximal=torch.from_numpy(behavior) if case.is_later and needs_start(loss, 2) else None,
    )
    total, _ = segment_loss(
        current,
        objective.behavior,
        objective.segment_ids,
        objective.advantages,
        objective.weights,
        proximal_logprobs=objective.proximal,
        proximal_mix=objective.proximal_mix,
        segment_log_ratios=objective.segment_log_ratios,
        m2po_bound=objective.m2po_bound,
        reference_logprobs=objective.teacher,
        **vars(objective.options),
    )
    total.backward()  # type: ignore[no-untyped-call]
    assert current.grad is not None
    slope = -current.grad / objective.weights[objective.segment_ids]
    found: Floats = slope.numpy()[: count * size : size]
    return found


def _spread(deviation: float) -> Floats:
    """Return log-ratios at the quantiles of a normal distribution around 0, none without a deviation."""
    if not deviation:
        return np.empty(0)
    normal = statistics.NormalDist(0, deviation)
    half = NUM_OTHERS // 2
    return np.array([normal.inv_cdf((index + 0.5) / half) for index in range(half)])


def _laid_out(
    items: npt.NDArray[np.int64], behavior: Floats, advantages: Floats, *, lag: int, teacher: Floats | None
) -> FlatRows:
    """Return a step of one row whose action tokens are those given."""
    nothing = np.zeros(items.size, dtype=np.int64)
    return FlatRows(
        tokens=nothing,
        starts=nothing[:1],
        lengths=nothing[:1] + items.size,
        action_items=items,
        action_rows=nothing,
        action_offsets=nothing + 1,
        action_lags=nothing + lag,
        behavior_logprobs=behavior,  # type: ignore[arg-type]
        advantages=advantages,
        row_lifecycles=nothing[:1],
        teacher_logprobs=teacher,  # type: ignore[arg-type]
    )


def draw(preset: str, path: Path) -> None:
    """Draw the pull on a token by its ratio, for a positive and a negative advantage.

    Distillation has no advantages, and one panel.
    """
    loss, picture = LossConfig(preset=preset), PICTURES[preset]  # type: ignore[arg-type]
    signs = (1.0,) if loss.is_distilled else (1.0, -1.0)
    figure, axes = plt.subplots(1, len(signs), figsize=(7.6, 3.1), squeeze=False, layout="constrained")
    for panel, sign in zip(axes.flat, signs, strict=True):
        _draw_panel(panel, loss, picture.cases, sign)
        panel.set_title("whatever the advantage" if loss.is_distilled else f"A = {sign:+.0f}", fontsize=9)
        panel.set_xlabel(picture.axis, fontsize=9)
    axes.flat[0].set_ylabel("pull ∂J/∂ℓ on the token's log-prob", fontsize=9)  # noqa: RUF001 as in the pages
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper center", ncols=len(labels), fontsize=8, frameon=False,
        columnspacing=1.2, handlelength=2.4,
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part.png")
    figure.savefig(part, dpi=DPI)
    plt.close(figure)
    part.replace(path)


def _draw_panel(panel: Axes, loss: LossConfig, cases: Sequence[Case], sign: float) -> None:
    grid = np.geomspace(LOW, HIGH, NUM_RATIOS)
    if not loss.is_distilled:
        neutral = LossConfig(clip="none")
        panel.plot(
            grid, pulls(neutral, grid, sign, Case("")),
            color=_NEUTRAL_COLOR, linewidth=0.9, zorder=3, label="no correction",
        )  # fmt: skip
    for index, case in enumerate(cases):
        ratios = grid[grid * case.probability <= 1]
        panel.plot(
            ratios,
            pulls(loss, ratios, sign, case),
            color=_COLORS[index],
            linestyle=_STYLES[index],
            linewidth=2.2 - 0.3 * index,  # a line that lies under another stays visible
            label=case.label,
        )
    panel.axhline(0, color=_NEUTRAL_COLOR, linewidth=0.5, linestyle=":")
    panel.axvline(1, color=_NEUTRAL_COLOR, linewidth=0.5, linestyle=":")
    panel.set_xscale("log", base=2)
    panel.set_xticks([2.0**n for n in range(-3, 4)], ["1/8", "1/4", "1/2", "1", "2", "4", "8"], fontsize=8)
    panel.tick_params(axis="y", labelsize=8)
    panel.grid(alpha=0.25)
    panel.margins(x=0.01)
