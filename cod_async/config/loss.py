"""The section ``[loss]``: a preset, and fields that override what it says."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from cod_async.config.fields import Count, Fraction, NonNegative, PositiveFloat
from cod_async.config.presets import preset_values

BY_PRESET: Any = None
"""Default of a field that the preset fills in."""


class LossConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The token loss: a preset, and whatever is said beside it. Formulas, costs, reasons: docs/losses/."""

    preset: Literal[
        "paper", "ppo", "decoupled", "a3po", "tis_token", "tis_segment", "icepop", "geo_mask", "gspo",
        "cispo", "dppo_tv", "m2po", "topr", "opsm", "opd",
    ] = "paper"  # fmt: skip
    """The recipe: gives every field below the value that it has there; a field that is written down overrides
    it. Another preset in a later file or ``--set`` takes the place of the first, and keeps such overrides."""
    clip: Literal["one_side", "none", "ppo", "cispo", "dppo_tv", "m2po", "topr"] = BY_PRESET
    """What a token's ratio does to it. ``one_side``: a mask without importance weight (the paper's); ``ppo``:
    clipped ratio; ``cispo``: clipped weight, no token loses its gradient; ``dppo_tv``: mask on the change of
    probability; ``m2po``: bound from the second moment; ``topr``: weight min(ratio, 1) for negative
    advantages alone; ``none``: policy gradient."""
    ratio: Literal["token", "segment"] = BY_PRESET
    """``segment``: one ratio for all tokens of a segment, e to the mean of their log-ratios (GSPO); costs one
    more forward pass."""
    proximal: Literal["none", "start", "interpolated"] = BY_PRESET
    """What the clip's ratio is taken against. ``none``: the behaviour policy; ``start``: the weights that the
    step starts with (decoupled PPO; one more forward pass if ``learner.minibatches_per_step`` is above 1,
    none otherwise, since they are then the current ones); ``interpolated``: A-3PO, proximal = behaviour +
    (lag - 1) / lag * (current - behaviour) in log-probs, no pass."""
    eps_low: NonNegative = BY_PRESET
    """The ratio's range begins at ``1 - eps_low``; below it a negative advantage pulls no more."""
    eps_high: NonNegative = BY_PRESET
    """The ratio's range ends at ``1 + eps_high``; above it a positive advantage pulls no more."""
    dual_clip: NonNegative = BY_PRESET
    """Ceiling (above 1) of the ratio of negative advantages, with clip ``ppo`` or ``m2po``; 0: none."""
    tv_bound: Fraction = BY_PRESET
    """Clip ``dppo_tv``: how far a token's probability may move in the advantage's direction."""
    second_moment: PositiveFloat = BY_PRESET
    """Clip ``m2po``: largest mean squared log-ratio of the tokens that a clip can touch, in nats squared."""
    narrowest_low: Fraction = BY_PRESET
    """Clip ``m2po``: the range always reaches down to this ratio."""
    narrowest_high: Annotated[float, Meta(ge=1, le=1e6)] = BY_PRESET
    """Clip ``m2po``: the range always reaches up to this ratio."""
    log_ratio_coef: NonNegative = BY_PRESET
    """Weight of (log current - log behaviour) squared, a price on every token."""
    behavior_weight: Literal["none", "truncated", "masked"] = BY_PRESET
    """Multiply by w = proximal / behaviour (current / behaviour without a proximal), without gradient:
    ``truncated``: min(w, ``weight_cap``); ``masked``: w inside [``weight_floor``, ``weight_cap``], else 0."""
    weight_level: Literal["token", "segment"] = BY_PRESET
    """``segment``: one weight for all tokens of a segment; costs one more forward pass."""
    segment_weight: Literal["geometric_mean", "product", "lifecycle_product"] = BY_PRESET
    """A segment's w: e to the mean of its tokens' log-ratios, or to their sum. A product over the whole
    lifecycle is refused: the variance of its logarithm grows with the number of tokens."""
    weight_floor: NonNegative = BY_PRESET
    """See ``behavior_weight``."""
    weight_cap: PositiveFloat = BY_PRESET
    """See ``behavior_weight``."""
    segment_mask: Literal["none", "geometric_mean", "negative_drift"] = BY_PRESET
    """``geometric_mean``: leave out segments whose geometric mean w lies outside [``mask_floor``,
    ``mask_cap``]; ``negative_drift``: leave out segments with a negative advantage whose tokens have become
    less likely by more than ``mask_drift`` nats in the mean (OPSM). Both cost one more forward pass."""
    mask_floor: NonNegative = BY_PRESET
    """See ``segment_mask``."""
    mask_cap: PositiveFloat = BY_PRESET
    """See ``segment_mask``."""
    mask_drift: NonNegative = BY_PRESET
    """See ``segment_mask``."""
    ess_lr_power: Fraction = BY_PRESET
    """Multiply the learning rate by (effective sample fraction of current / behaviour over the tokens) to
    this power; 0.5: VCPO's square root; 0: off."""
    aggregation: Literal["token_mean", "segment_mean", "sequence_mean", "fixed_length"] = BY_PRESET
    """``token_mean``: mean over the step's action tokens; ``segment_mean``: mean over segments of their token
    means; ``sequence_mean``: mean over segments of their token sums; ``fixed_length``: that divided by
    ``fixed_length_tokens``."""
    fixed_length_tokens: Count = BY_PRESET
    """See ``aggregation``."""
    kl_coef: NonNegative = BY_PRESET
    """Weight of the sampled divergence to the starting model; 0 skips the reference pass. In preset ``opd``
    it is that to the teachers, 1, and no starting model is loaded."""
    kl: Literal["k1", "k2", "k3"] = BY_PRESET
    """Its estimator, with r = log reference - log current: ``k1`` -r; ``k2`` r^2 / 2; ``k3`` e^r - r - 1."""

    @property
    def is_distilled(self) -> bool:
        """Whether a step pulls towards teachers (``distillation.teachers``) instead of using advantages."""
        return self.preset == "opd"

    def __post_init__(self) -> None:
        for name, value in preset_values(self.preset).items():
            if getattr(self, name) is BY_PRESET:
                msgspec.structs.force_setattr(self, name, value)
