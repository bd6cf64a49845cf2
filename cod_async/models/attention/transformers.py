"""The same attention for every decoder of transformers, under the name ``cod``.

    register()
    model = AutoModel.from_config(config, attn_implementation=ATTENTION_NAME)
    model(input_ids, position_ids=layout.position_ids, use_cache=False, cod_layout=layout)

A decoder hands the keyword arguments of its ``forward`` down to the attention of each layer, so the layout is
explicit all the way. transformers builds no mask for an implementation that it does not know by name, and
none is needed. What this attention does not compute (windows, capped scores, sinks, dropout, caches, masks)
is refused by name in each call, never ignored; :mod:`cod_async.models.supported` refuses the same before the
start.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from cod_async.errors import InputError
from cod_async.models.attention.attending import attend
from cod_async.models.layout import Layout

ATTENTION_NAME = "cod"
"""What ``config._attn_implementation`` has to be."""
LAYOUT = "cod_layout"
"""The keyword argument of a model's ``forward`` that holds the layout."""

_UNSUPPORTED_ARGUMENTS = {
    "sliding_window": "sliding-window attention",
    "softcap": "attention with capped scores",
    "s_aux": "attention with sinks",
    "position_bias": "attention with position biases",
    "head_mask": "masked heads",
    "indices": "sparse attention",
    "cache": "a paged cache",
}


def register() -> None:
    """Make transformers know the attention ``cod``; calling it again changes nothing."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION_NAME, cod_attention)


def cod_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend in the form that transformers asks for.

    Args:
        module: the layer's attention.
        query: [B, Hq, T, D].
        key: [B, Hkv, T, D].
        value: [B, Hkv, T, D].
        attention_mask: has to be None.
        scaling: factor of the scores; ``D ** -0.5`` if None.
        dropout: has to be 0.
        is_causal: has to be true, here or in the module.
        kwargs: ``cod_layout``, and what else the layer hands down; what would change the result is refused.

    Returns:
        [B, T, Hq, D], and None for the weights, which nobody has.

    Raises:
        InputError: something is asked for that this attention does not do, or the layout did not arrive.
    """
    name = type(module).__name__
    layout = kwargs.get(LAYOUT)
    if not isinstance(layout, Layout):
        raise InputError(
            f"{name} got no {LAYOUT}: this model does not hand keyword arguments down to its attention, "
            "and cannot be trained here"
        )
    for argument, what in _UNSUPPORTED_ARGUMENTS.items():
        if kwargs.get(argument) is not None:
            raise InputError(f"{name} asks for {argument}: {what} cannot be trained here")
    if attention_mask is not None:
        raise InputError(f"{name} got an attention mask: rows are described by {LAYOUT} alone")
    if dropout:
        raise InputError(f"{name} asks for dropout = {dropout}: log-probs would be random; set it to 0")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise InputError(f"{name} is not causal: only causal language models can be trained here")
    if key.shape[2] != query.shape[2]:
        raise InputError(f"{name} has {key.shape[2]} keys for {query.shape[2]} queries: pass use_cache=False")
    if value.shape[-1] != query.shape[-1]:
        raise InputError(
            f"{name} has values of width {value.shape[-1]} and queries of width {query.shape[-1]}: such "
            "attention cannot be trained here"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    return attend(query, key, value, layout, scale=scale), None
