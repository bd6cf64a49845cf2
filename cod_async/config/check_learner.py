"""What a ``[learner]`` section may not say: options that contradict each other or that nothing reads."""

from __future__ import annotations

from collections.abc import Iterator

from cod_async.config.schema import Config


def learner_problems(config: Config) -> Iterator[str]:
    """Yield every problem of the section ``[learner]``, its losses apart."""
    learner = config.learner
    if learner.tokens_per_micro_batch < config.model.max_context_tokens:
        yield (
            f"learner.tokens_per_micro_batch: {learner.tokens_per_micro_batch} cannot hold one row of "
            f"model.max_context_tokens = {config.model.max_context_tokens}; raise it"
        )
    for index, beta in enumerate(learner.betas):
        if beta >= 1:
            yield f"learner.betas.{index}: {beta:g} never forgets; use a value under 1"
    if learner.on_nonfinite == "skip" and learner.minibatches_per_step > 1:
        yield (
            'learner.on_nonfinite: "skip" drops whole steps, but with learner.minibatches_per_step = '
            f'{learner.minibatches_per_step} a part of one may have been applied; use "stop" or 1'
        )
    yield from _rows(config)
    yield from _sequences(config)
    if learner.has_optimizer_offload and learner.device == "cpu":
        yield (
            'learner.has_optimizer_offload: true has no meaning with learner.device = "cpu", where '
            "everything is in host memory; remove it"
        )


def _rows(config: Config) -> Iterator[str]:
    learner = config.learner
    if learner.has_prefix_tree and learner.layout == "rectangles":
        yield (
            'learner.has_prefix_tree: true needs rows end to end, but learner.layout is "rectangles"; use '
            '"auto" or "packed"'
        )
    if learner.has_prefix_tree and learner.sequence_parallel > 1:
        yield (
            "learner.has_prefix_tree: true cannot be combined with learner.sequence_parallel = "
            f"{learner.sequence_parallel}: a shared beginning lies on one rank; use one of them"
        )


def _sequences(config: Config) -> Iterator[str]:
    learner = config.learner
    if learner.sequence_parallel == 1:
        if learner.sequence_mode != "auto":
            yield (
                f'learner.sequence_mode: "{learner.sequence_mode}" has no meaning with '
                "learner.sequence_parallel = 1; remove it"
            )
        return
    if learner.layout == "rectangles":
        yield (
            f"learner.sequence_parallel: {learner.sequence_parallel} ranks share rows that lie end to end, "
            'but learner.layout is "rectangles"; use "auto" or "packed"'
        )
