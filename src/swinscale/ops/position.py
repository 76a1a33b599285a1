"""Position bias of a window, kept as one value per head and offset until a back end wants it per pair of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

SMALL = 1 << 20
"""Entries of a bias that is kept from call to call; a larger one is made again for each call, to save memory."""

KEPT = 1 << 21
"""Entries, with all masks, that one bias keeps at most: 8 MiB in single precision. The oldest mask goes first."""


class PositionBias:
    """Relative position bias: a value per head and offset, the same in every window.

    Args:
        values: (A, O), one value per head and offset between two tokens.
        code: (N,) integers; the offset of query i from key j has the index ``code[i] - code[j] + (O - 1) // 2``. One
            number per token is enough for windows of any rank, because a row-major index is linear in the offset.
    """

    def __init__(self, values: Tensor, code: Tensor):
        self.values, self.code = values, code
        self._made: dict[tuple[torch.dtype, int], tuple[Tensor, Tensor | None]] = {}

    @property
    def small(self) -> bool:
        """Whether the bias per pair of tokens is cheap to keep."""
        return self.values.shape[0] * self.code.numel() ** 2 <= SMALL

    @property
    def rows_shape(self) -> tuple[int, int, int]:
        """(A, N, N)"""
        return self.values.shape[0], self.code.numel(), self.code.numel()

    def rows(self, queries: slice | None = None) -> Tensor:
        """(A, queries, N): the bias of some query tokens (default: all) with all keys, in at least single precision."""
        code = self.code if queries is None else self.code[queries]
        index = code[:, None] - self.code + (self.values.shape[1] - 1) // 2
        # On a CPU wider numbers are gathered four times as fast as narrow ones.
        values = self.values.to(torch.promote_types(self.values.dtype, torch.float32))
        return values.index_select(1, index.flatten()).unflatten(1, index.shape)

    def dense(self, dtype: torch.dtype | None = None, regions: Tensor | None = None) -> Tensor:
        """(1, A, N, N) in ``dtype``, or (W, A, N, N) with -inf between tokens of different ``regions`` (W, N).

        Made once for each dtype and tensor of regions, unless gradients flow into it.
        """
        dtype = dtype or self.values.dtype
        lasting = not (torch.compiler.is_compiling() or self.values.requires_grad)
        made = self._made.get((dtype, id(regions))) if lasting else None
        if made is not None:
            return made[0]
        if regions is None:
            bias = self.rows().to(dtype)[None]
        else:
            apart = (regions[:, :, None] != regions[:, None, :])[:, None]
            shape = (
                regions.shape[0],
                *self.rows_shape,
            )  # spelled out: broadcasting would tell compilers of one window apart
            bias = self.dense(dtype).expand(shape).masked_fill(apart.expand(shape), -torch.inf)
        if lasting:
            self._made[dtype, id(regions)] = bias, regions  # holding the regions keeps their id theirs
            masks = [key for key, (_, held) in self._made.items() if held is not None]
            while len(masks) > 1 and sum(made.numel() for made, _ in self._made.values()) > KEPT:
                del self._made[masks.pop(0)]
        return bias
