"""Credit assignment as pure functions: returns, baselines, advantages and RED re-weighting.

Everything here is arithmetic on rewards and token counts, in double precision and without torch, so that the
coordinator, the command line (``cod credit``) and the tests share one implementation. Stage one works on a
closed group (:func:`cod_async.algo.credit.credit_group`), stage two on the episodes selected for one
optimiser step (:func:`cod_async.algo.credit.weigh_selection`).
"""
