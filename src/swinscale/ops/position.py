"""Position bias of a window, kept as one value per head and offset until a back end wants it per pair of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

KEPT = 1 << 20
"""Entries, with all masks, that one bias keeps from call to call: 4 MiB in single precision."""


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
    def heads(self) -> int:
        return self.values.shape[0]

    def rows(self, queries: slice | None = None) -> Tensor:
        """(A, queries, N): the bias of some query tokens (default: all) with all keys, in at least single precision."""
        code = self.code if queries is None else self.code[queries]
        index = code[:, None] - self.code + (self.values.shape[1] - 1) // 2
        # On a CPU wider numbers are gathered four times as fast as narrow ones.
        values = self.values.to(torch.promote_types(self.values.dtype, torch.float32))
        return values.index_select(1, index.flatten()).unflatten(1, index.shape)

    def dense(self, dtype: torch.dtype | None = None, regions: Tensor | None = None) -> Tensor:
        """(1, A, N, N) in ``dtype``, or (W, A, N, N) with -inf between tokens of different ``regions`` (W, N).

        Made once for each dtype and tensor of regions, unless gradients flow into it, and kept until ``forget``.
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
            tokens = self.code.numel()
            # Spelled out: broadcasting would make a compiler tell maps of a single window apart.
            shape = (regions.shape[0], self.values.shape[0], tokens, tokens)
            bias = self.dense(dtype).expand(shape).masked_fill(apart.expand(shape), -torch.inf)
        if lasting:
            self._made[dtype, id(regions)] = bias, regions  # holding the regions keeps their id theirs
        return bias

    def forget(self) -> None:
        """Drops what was made, oldest masks first, until the rest is worth keeping."""
        masks_first = sorted(self._made, key=lambda key: self._made[key][1] is None)
        while sum(made.numel() for made, _ in self._made.values()) > KEPT:
            del self._made[masks_first.pop(0)]
