"""The learner process: packs a step's segments, takes one optimiser step, publishes, checkpoints."""
