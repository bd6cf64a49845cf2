"""What the coordinator makes news of from one step to the next."""

from __future__ import annotations

from cod_async.config.schema import Config, EnvironmentConfig
from cod_async.coordinator.health import Health


def test_a_checkpoint_that_failed_is_news_once() -> None:
    health = Health(Config(environments=(EnvironmentConfig(name="hidden_buttons", preset="door"),)))
    counts = [0, 1, 1, 3, 0, 1]  # the learner was started anew after the fourth step
    events = [
        health.judge({"step": step}, {"num_failed_checkpoints": float(count)})["events"]
        for step, count in enumerate(counts)
    ]
    assert events == [
        [],
        [{"name": "checkpoint_failed", "num_failed": 1}],
        [],
        [{"name": "checkpoint_failed", "num_failed": 3}],
        [],
        [{"name": "checkpoint_failed", "num_failed": 1}],
    ]
