"""Off-policy corrections as pure functions of log-probs, lags and advantages, on whatever device they lie.

Each module is one idea with its formula and its source. What depends on a token alone is a row of the fused
loss's table (kernels/cod_kernels/segment_loss/README.md) and not here. Loads torch; only the learner does.
"""
