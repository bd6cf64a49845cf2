"""What a ``[loss]`` section may not say: options that contradict each other or that nothing reads.

Presets contradict nothing; an override can. Every sentence names the field, what was found and what to do.
"""

from __future__ import annotations

from collections.abc import Iterator

from cod_async.config.presets import preset_values
from cod_async.config.schema import Config, LossConfig

_RATIO_CLIPS = ("ppo", "cispo", "dppo_tv", "m2po", "topr")
"""Clips that weigh tokens by the ratio."""
_SEGMENT_CLIPS = ("one_side", "ppo", "cispo", "topr")
"""Clips that may take one ratio per segment."""
_RANGE_CLIPS = ("one_side", "ppo", "cispo")
"""Clips that read the range of ``eps_low`` and ``eps_high``."""


def loss_problems(config: Config) -> Iterator[str]:
    """Yield every problem of the section ``[loss]`` and of its parts in ``[learner]``."""
    loss = config.loss
    yield from _clip(loss)
    yield from _ratio(loss)
    yield from _weights(loss)
    yield from _unread(loss)
    yield from _aggregation(loss)
    yield from _passes(config)


def _clip(loss: LossConfig) -> Iterator[str]:
    if loss.clip in ("ppo", "one_side") and loss.eps_low >= 1:
        yield f"loss.eps_low: {loss.eps_low:g} clips nothing, ratios are above 0; use a value under 1"
    if loss.dual_clip and loss.clip not in ("ppo", "m2po"):
        yield (
            f'loss.dual_clip: {loss.dual_clip:g} has no meaning with clip "{loss.clip}"; only "ppo" and '
            '"m2po" have a dual clip, set it to 0'
        )
    elif loss.dual_clip and loss.dual_clip <= 1:
        yield f"loss.dual_clip: {loss.dual_clip:g} would end every pull; use a value above 1, or 0 for none"
    if loss.clip == "m2po" and loss.proximal != "none":
        yield (
            f'loss.proximal: "{loss.proximal}" contradicts clip "m2po", whose bound is that of current '
            'against behaviour; use "none"'
        )


def _ratio(loss: LossConfig) -> Iterator[str]:
    if loss.ratio == "token":
        return
    if loss.clip not in _SEGMENT_CLIPS:
        yield (
            f'loss.ratio: "segment" has no meaning with clip "{loss.clip}"; use it with one of '
            + ", ".join(f'"{clip}"' for clip in _SEGMENT_CLIPS)
        )
    if loss.behavior_weight != "none" and loss.weight_level == "token":
        yield (
            f'loss.behavior_weight: "{loss.behavior_weight}" weighs tokens, which contradicts loss.ratio = '
            '"segment": the ratio is that of the segment; use loss.weight_level = "segment", or "none"'
        )


def _weights(loss: LossConfig) -> Iterator[str]:
    is_weighted = loss.behavior_weight != "none"
    if loss.segment_weight == "lifecycle_product":
        yield (
            'loss.segment_weight: "lifecycle_product" is refused: the logarithm of a product over a whole '
            "lifecycle varies in proportion to its number of tokens (at 0.01 nats per token, 10,000 tokens "
            "have left every useful range), so that a few of them would decide every step; use "
            '"geometric_mean"'
        )
    if is_weighted and loss.clip in _RATIO_CLIPS and loss.proximal == "none":
        yield (
            f'loss.behavior_weight: "{loss.behavior_weight}" with clip "{loss.clip}" counts the ratio twice; '
            'set loss.proximal to "start" or "interpolated", or the weight to "none"'
        )
    if is_weighted and loss.weight_cap <= loss.weight_floor:
        yield (
            f"loss.weight_cap: {loss.weight_cap:g} is not above loss.weight_floor = {loss.weight_floor:g}; "
            "raise it"
        )
    if loss.segment_mask == "geometric_mean" and not loss.mask_floor < loss.mask_cap:
        yield (
            f"loss.mask_cap: {loss.mask_cap:g} is not above loss.mask_floor = {loss.mask_floor:g}; raise it"
        )


def _unread(loss: LossConfig) -> Iterator[str]:
    """Options that are set beside the preset and that the rest of the section leaves without effect."""
    own = preset_values(loss.preset)
    has_range, reads_range = loss.clip in _RANGE_CLIPS, 'loss.clip = "one_side", "ppo" or "cispo"'
    is_weighted = loss.behavior_weight != "none"
    rules = (
        ("eps_low", has_range, reads_range),
        ("eps_high", has_range, reads_range),
        ("kl", loss.kl_coef > 0, "loss.kl_coef above 0"),
        ("weight_level", is_weighted, 'loss.behavior_weight other than "none"'),
        ("weight_cap", is_weighted, 'loss.behavior_weight other than "none"'),
        ("weight_floor", loss.behavior_weight == "masked", 'loss.behavior_weight = "masked"'),
        ("mask_floor", loss.segment_mask == "geometric_mean", 'loss.segment_mask = "geometric_mean"'),
        ("mask_cap", loss.segment_mask == "geometric_mean", 'loss.segment_mask = "geometric_mean"'),
        ("mask_drift", loss.segment_mask == "negative_drift", 'loss.segment_mask = "negative_drift"'),
        ("tv_bound", loss.clip == "dppo_tv", 'loss.clip = "dppo_tv"'),
        ("second_moment", loss.clip == "m2po", 'loss.clip = "m2po"'),
        ("narrowest_low", loss.clip == "m2po", 'loss.clip = "m2po"'),
        ("narrowest_high", loss.clip == "m2po", 'loss.clip = "m2po"'),
    )
    for name, is_read, reader in rules:
        value = getattr(loss, name)
        if value != own[name] and not is_read:
            yield (
                f"loss.{name}: {_shown(value)} has no effect, only {reader} reads it; set that, or drop it"
            )
    is_product = loss.segment_weight == "product"
    if is_product and not (is_weighted and loss.weight_level == "segment"):
        yield (
            'loss.segment_weight: "product" has no effect, only loss.weight_level = "segment" with a '
            "loss.behavior_weight reads it; set those, or remove this"
        )
    if loss.proximal != "none" and loss.clip == "none" and not is_weighted:
        yield (
            f'loss.proximal: "{loss.proximal}" has no use with clip "none" and no behavior_weight; set it to '
            '"none"'
        )


def _aggregation(loss: LossConfig) -> Iterator[str]:
    if loss.aggregation == "fixed_length" and not loss.fixed_length_tokens:
        yield (
            'loss.fixed_length_tokens: missing; aggregation "fixed_length" divides by it, write for example '
            "the longest segment in tokens"
        )
    if loss.aggregation != "fixed_length" and loss.fixed_length_tokens:
        yield (
            f"loss.fixed_length_tokens: {loss.fixed_length_tokens} has no effect with aggregation "
            f'"{loss.aggregation}"; set that to "fixed_length", or remove this'
        )


def _passes(config: Config) -> Iterator[str]:
    loss, learner = config.loss, config.learner
    num_lifecycles = learner.groups_per_step * config.lifecycle.group_size
    if learner.minibatches_per_step > num_lifecycles:
        yield (
            f"learner.minibatches_per_step: {learner.minibatches_per_step} parts cannot be made of a step's "
            f"{num_lifecycles} lifecycles; lower it"
        )
    is_start_idle = loss.proximal == "start" and learner.minibatches_per_step == 1
    if is_start_idle and loss.behavior_weight == "none" and loss.clip != "none":
        yield (
            'loss.proximal: "start" makes every ratio 1 as long as learner.minibatches_per_step = 1, so that '
            f'clip "{loss.clip}" does nothing and no weight corrects anything; set loss.behavior_weight, '
            'more mini-batches, or "none"'
        )


def _shown(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else f"{value:g}"
