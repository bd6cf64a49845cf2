"""Keys and values of all slots, one tensor each per layer, grown on demand.

Layout ``[slots, kv_heads, positions, head_dim]``: the positions of one head are contiguous, so attention is a
batched matrix product over a plain view, and one token is written as ``kv_heads`` short rows. Memory is
allocated for the longest row seen so far and doubled when it gets longer, up to the context length. Fresh
memory is zeroed because a masked position has attention weight 0, and 0 times an uninitialised NaN would
still be NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Key and value tensors of every layer.

    Args:
        num_layers, num_slots, num_kv_heads, head_dim: shape.
        max_positions: longest row, in tokens; the cache never grows beyond it.
        initial_positions: positions to allocate at once.
        dtype: type of keys and values.
    """

    def __init__(
        self,
        num_layers: int,
        num_slots: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        max_positions: int,
        initial_positions: int,
        dtype: torch.dtype,
    ) -> None:
        self.num_slots = num_slots
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.max_positions = max_positions
        self.num_positions = min(initial_positions, max_positions)
        shape = (num_slots, num_kv_heads, self.num_positions, head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype) for _ in range(num_layers)]
        self.values = [torch.zeros(shape, dtype=dtype) for _ in range(num_layers)]
        self._heads = torch.arange(num_kv_heads)

    @property
    def num_bytes(self) -> int:
        """Memory held by keys and values."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (*self.keys, *self.values))

    def reserve(self, num_positions: int) -> None:
        """Make room for rows of ``num_positions`` tokens; contents are kept.

        Raises:
            ValueError: more than ``max_positions``.
        """
        if num_positions <= self.num_positions:
            return
        if num_positions > self.max_positions:
            raise ValueError(f"{num_positions} positions exceed the cache's maximum of {self.max_positions}")
        size = min(self.max_positions, max(num_positions, 2 * self.num_positions))
        for tensors in (self.keys, self.values):
            for index, old in enumerate(tensors):
                new = old.new_zeros((self.num_slots, self.num_kv_heads, size, self.head_dim))
                new[:, :, : self.num_positions] = old
                tensors[index] = new
        self.num_positions = size

    def write_index(self, slots: Tensor, positions: Tensor) -> Tensor:
        """Return where :meth:`write` puts N tokens.

        Args:
            slots: int64 [N].
            positions: int64 [N], below ``num_positions``.

        Returns:
            int64 [N * num_kv_heads], indices into the flattened rows of one layer.
        """
        heads = slots[:, None] * self.num_kv_heads + self._heads
        return (heads * self.num_positions + positions[:, None]).reshape(-1)

    def write(self, layer: int, index: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store keys and values [N, num_kv_heads, head_dim] at :meth:`write_index`."""
        self.keys[layer].view(-1, self.head_dim).index_copy_(0, index, keys.reshape(-1, self.head_dim))
        self.values[layer].view(-1, self.head_dim).index_copy_(0, index, values.reshape(-1, self.head_dim))

    def read(self, layer: int, slots: Tensor | int, length: int) -> tuple[Tensor, Tensor]:
        """Return keys and values [n * num_kv_heads, length, head_dim] of some slots.

        Args:
            layer: which layer.
            slots: int64 [n] to gather (copies), or the number n of leading slots (a view).
            length: positions from 0 to return.
        """
        keys, values = self.keys[layer], self.values[layer]
        if isinstance(slots, int):
            rows, shape = slots * self.num_kv_heads, (-1, self.num_positions, self.head_dim)
            return keys.view(shape)[:rows, :length], values.view(shape)[:rows, :length]
        keys = keys[:, :, :length].index_select(0, slots)
        values = values[:, :, :length].index_select(0, slots)
        return keys.view(-1, length, self.head_dim), values.view(-1, length, self.head_dim)

    def clear(self, slot: int) -> None:
        """Zero one slot, in case something not finite was stored there."""
        for tensor in (*self.keys, *self.values):
            tensor[slot].zero_()
