"""Attention for every way in which rows can lie in a micro-batch.

:func:`attend` is the one entry. A rectangle goes to torch's causal attention. Everything else is put together
from *blocks* (:mod:`~cod_async.models.attention.blocks`): some queries look at some keys, causally or fully,
and what several blocks say about one query is merged by their log-sum-exps. Rows that lie end to end are one
causal block each; a tree adds full blocks from descendants to ancestors; a ring adds full blocks from other
ranks' keys. No mask of tokens by tokens exists anywhere, so memory grows with the number of tokens.
"""

from cod_async.models.attention.attending import attend, attention_backend

__all__ = ["attend", "attention_backend"]
