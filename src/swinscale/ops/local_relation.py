"""Aggregation with weights that a pixel computes from its neighbours (Local Relation Networks), without k² copies of the map.

Shape letters: B batch, C channels, G groups of channels that share their weights, m channels of a group, K = k·k offsets; H, W the
map that is read, h, w the map of queries; N = B·G; L places of the map of queries, its rows padded.

The neighbour of all places at one offset is one slice: rows are laid out one after the other with a margin of zeros between them
(``_spread``), and a stride divides the map into s·s such layouts (``_Layout``). So a pass over the K slices reads the map where it
is. Logits, one per group and offset, are in memory for a part of the places at a time (``PLACES``), and the backward pass computes
them again: what a layer keeps is its inputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from swinscale.errors import UsageError

Similarity = Literal["product", "squared", "absolute"]
"""q·k, -(q - k)² or -|q - k|."""

PLACES = {"cpu": 1 << 14, "other": 1 << 20}
"""Places of a part, added up over images and groups: on a CPU what fits the cache, elsewhere what keeps a GPU busy."""


def local_relation(
    x: Tensor,
    query: Tensor,
    key: Tensor,
    prior: Tensor,
    kernel_size: int,
    shared: int,
    similarity: Similarity = "product",
    stride: int = 1,
) -> Tensor:
    """Each place becomes a mean of its neighbourhood, with weights softmax(similarity(query, key) + prior).

    Neighbours outside the map do not take part. Weights are computed in fp32 at least, and so is the sum.

    Args:
        x: (B, C, H, W).
        query: (B, G, h, w) with h = ceil(H / stride): the places 0, stride, 2·stride, … of the map.
        key: (B, G, H, W), one number per group.
        prior: (G, K), by offset, row by row from the upper left.
        kernel_size: k, odd.
        shared: m, channels of a group; the last of the G = ceil(C / m) groups may have fewer.

    Returns:
        (B, C, h, w), in the dtype of ``x``.

    Raises:
        UsageError: for shapes that do not belong together.
    """
    (B, C, *size), G = x.shape, math.ceil(x.shape[1] / shared)
    out = [(n + stride - 1) // stride for n in size]
    expected = ((B, G, *out), (B, G, *size), (G, kernel_size**2))
    given = tuple(tuple(t.shape) for t in (query, key, prior))
    if given != expected or kernel_size % 2 == 0:
        raise UsageError(
            f"query, key and prior have the shapes {given}, but x {tuple(x.shape)}, kernel_size={kernel_size} (odd), shared={shared} and "
            f"stride={stride} "
            f"belong to {expected}."
        )
    if G * shared > C:
        x = F.pad(x, (0, 0, 0, 0, 0, G * shared - C))
    how = (kernel_size, similarity, stride)
    return cast(Tensor, torch.ops.swinscale.local_relation(x, query, key, prior, *how))[:, :C]


class _Layout(NamedTuple):
    """Where the neighbours of the places of a map are, in the layout of ``_spread``."""

    stride: int
    margin: int  # rows above and below, columns before each row
    size: tuple[int, int]  # h, w
    width: int  # of a row with its margin
    starts: list[int]  # of the slice of each offset
    outside: Tensor  # (K, L) -inf where there is no neighbour, else 0

    @property
    def places(self) -> int:
        """L"""
        return self.size[0] * self.width


@lru_cache(maxsize=256)
def _layout(height: int, width: int, k: int, stride: int, device: torch.device, dtype: torch.dtype) -> _Layout:
    reach = k // 2
    margin = math.ceil(reach / stride)
    h, w = math.ceil(height / stride), math.ceil(width / stride)
    row = w + margin  # the margin before a row is also the one after the row above
    length = (h + 2 * margin) * row + 2 * margin
    steps = [divmod(step, stride) for step in range(-reach, reach + 1)]
    starts = [
        (i * stride + j) * length + (margin + dy) * row + margin + dx for dy, i in steps for dx, j in steps
    ]  # i, j: which of the stride² parts of the map
    with _disable_current_modes(), torch.inference_mode(False):
        step = torch.arange(-reach, reach + 1, device=device)
        column = torch.arange(row, device=device)
        y = torch.arange(h, device=device) * stride + step[:, None]  # (k, h)
        x = column * stride + step[:, None]  # (k, row)
        beyond = ((y < 0) | (y >= height))[:, None, :, None] | ((x < 0) | (x >= width))[:, None]
        beyond &= column < w  # what the margin would get is never read
        outside = torch.zeros(beyond.shape, device=device, dtype=dtype).masked_fill_(beyond, -torch.inf)
        return _Layout(stride, margin, (h, w), row, starts, outside.view(k * k, h * row))


def _parts_of(flat: Tensor, at: _Layout) -> Tensor:
    """(n, s·s·length) → (n, s, s, rows with margins, width of a row), a view."""
    h, s = at.size[0] + 2 * at.margin, at.stride
    return flat.unflatten(1, (s, s, -1))[..., : h * at.width].unflatten(-1, (h, at.width))


def _spread(maps: Tensor, at: _Layout, dtype: torch.dtype) -> Tensor:
    """(n, H, W) → (n, s·s·length): rows one after the other with zeros between them."""
    s, margin = at.stride, at.margin
    length = (at.size[0] + 2 * margin) * at.width + 2 * margin
    flat = torch.zeros(len(maps), s * s * length, dtype=dtype, device=maps.device)
    parts = _parts_of(flat, at)
    for i in range(s):
        for j in range(s):
            part = maps[:, i::s, j::s]
            parts[:, i, j, margin : margin + part.shape[1], margin : margin + part.shape[2]] = part
    return flat


def _collect(flat: Tensor, at: _Layout, maps: Tensor) -> None:
    """The reverse of ``_spread``: writes (n, s·s·length) into ``maps`` (n, H, W)."""
    s, margin, parts = at.stride, at.margin, _parts_of(flat, at)
    for i in range(s):
        for j in range(s):
            part = maps[:, i::s, j::s]
            part.copy_(parts[:, i, j, margin : margin + part.shape[1], margin : margin + part.shape[2]])


def _rows(maps: Tensor, at: _Layout, dtype: torch.dtype) -> Tensor:
    """(…, h, w) → (…, L): rows with their margin behind them."""
    return F.pad(maps.to(dtype), (0, at.margin)).flatten(-2)


def _logits(q: Tensor, keys: Tensor, similarity: Similarity) -> Tensor:
    """(n, 1, l), (n, K, l) → (n, K, l)"""
    if similarity == "product":
        return q * keys
    return (q - keys).square_().neg_() if similarity == "squared" else (q - keys).abs_().neg_()


def _slopes(q: Tensor, keys: Tensor, similarity: Similarity) -> tuple[Tensor, Tensor]:
    """Derivatives of ``_logits`` with respect to the query and to the keys."""
    if similarity == "product":
        return keys, q.expand_as(keys)
    slope = (keys - q).mul_(2) if similarity == "squared" else (keys - q).sign_()
    return slope, -slope


def _parts(count: int, at: _Layout, device: torch.device) -> Iterator[tuple[slice, list[slice]]]:
    """Which groups are taken at a time, and which of their places."""
    most, length = PLACES["cpu" if device.type == "cpu" else "other"], at.places
    groups, span = max(1, most // length), min(length, most)
    for start in range(0, count, groups):
        yield (
            slice(start, min(start + groups, count)),
            [slice(a, min(a + span, length)) for a in range(0, length, span)],
        )


def _weights(q: Tensor, keys: Tensor, prior: Tensor, outside: Tensor, similarity: Similarity) -> Tensor:
    """(n, 1, l), (n, K, l), (n, K), (K, l) → (n, K, l)"""
    logits = _logits(q, keys, similarity)
    return logits.add_(prior[..., None]).add_(outside).softmax(1)


def _forward(x: Tensor, q: Tensor, k: Tensor, prior: Tensor, size: int, similarity: Similarity, stride: int) -> Tensor:
    """``local_relation`` for C = G·m: x (B, C, H, W), q (B, G, h, w), k (B, G, H, W), prior (G, K)."""
    (B, C, H, W), G = x.shape, q.shape[1]
    dtype = torch.promote_types(torch.promote_types(x.dtype, q.dtype), torch.float32)
    at = _layout(H, W, size, stride, x.device, dtype)
    xs, qs, ks = x.reshape(B * G, C // G, H, W), q.reshape(B * G, *at.size), k.reshape(B * G, H, W)
    priors = prior.to(dtype).repeat(B, 1)
    out = x.new_empty(B * G, C // G, *at.size)
    for some, spans in _parts(B * G, at, x.device):
        x_, k_ = _spread(xs[some].flatten(0, 1), at, dtype).unflatten(0, (-1, C // G)), _spread(ks[some], at, dtype)
        q_, sums = _rows(qs[some], at, dtype)[:, None], x_.new_zeros(*x_.shape[:2], at.places)
        for span in spans:
            keys = torch.stack([k_[:, a + span.start : a + span.stop] for a in at.starts], 1)
            weights = _weights(q_[..., span], keys, priors[some], at.outside[:, span], similarity)
            for o, a in enumerate(at.starts):
                sums[..., span].addcmul_(x_[..., a + span.start : a + span.stop], weights[:, o, None])
        out[some] = sums.unflatten(-1, (-1, at.width))[..., : at.size[1]]
    return out.view(B, C, *at.size)


def _backward(
    gradient: Tensor, x: Tensor, q: Tensor, k: Tensor, prior: Tensor, size: int, similarity: Similarity, stride: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the four inputs of ``_forward``."""
    (B, C, H, W), G = x.shape, q.shape[1]
    m = C // G
    dtype = torch.promote_types(torch.promote_types(x.dtype, q.dtype), torch.float32)
    at = _layout(H, W, size, stride, x.device, dtype)
    xs, qs, ks = x.reshape(B * G, m, H, W), q.reshape(B * G, *at.size), k.reshape(B * G, H, W)
    gs, priors = gradient.reshape(B * G, m, *at.size), prior.to(dtype).repeat(B, 1)
    gx, gq, gk = x.new_empty(B * G * m, H, W), q.new_empty(B * G, *at.size), k.new_empty(B * G, H, W)
    gp = torch.zeros_like(priors)
    for some, spans in _parts(B * G, at, x.device):
        x_, k_ = _spread(xs[some].flatten(0, 1), at, dtype).unflatten(0, (-1, m)), _spread(ks[some], at, dtype)
        q_, g_ = _rows(qs[some], at, dtype)[:, None], _rows(gs[some], at, dtype)
        gx_, gk_, gq_ = torch.zeros_like(x_), torch.zeros_like(k_), torch.zeros_like(q_[:, 0])
        for span in spans:
            slices = [slice(a + span.start, a + span.stop) for a in at.starts]
            keys, here = torch.stack([k_[:, s] for s in slices], 1), g_[..., span]
            weights = _weights(q_[..., span], keys, priors[some], at.outside[:, span], similarity)
            slope, product = torch.empty_like(weights), torch.empty_like(here)
            for o, s in enumerate(slices):
                gx_[..., s].addcmul_(here, weights[:, o, None])
                torch.sum(torch.mul(here, x_[..., s], out=product), 1, out=slope[:, o])
            slope.mul_(weights)
            slope.addcmul_(weights, slope.sum(1, keepdim=True), value=-1)  # of the softmax
            gp[some] += slope.sum(-1)
            of_query, of_keys = _slopes(q_[..., span], keys, similarity)
            gq_[..., span] = torch.mul(slope, of_query).sum(1)
            slope.mul_(of_keys)
            for o, s in enumerate(slices):
                gk_[:, s] += slope[:, o]
        gq[some] = gq_.unflatten(-1, (-1, at.width))[..., : at.size[1]]
        _collect(gk_, at, gk[some])
        _collect(gx_.flatten(0, 1), at, gx[some.start * m : some.stop * m])
    of_prior = gp.view(B, G, -1).sum(0).to(prior.dtype)
    return gx.view_as(x), gq.view_as(q), gk.view_as(k), of_prior


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.how = inputs[4:]


def _differentiate(ctx: Any, gradient: Tensor) -> Any:
    found = torch.ops.swinscale.local_relation_backward(gradient, *ctx.saved_tensors, *ctx.how)
    return (*found, None, None, None)


def _fake_backward(gradient: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in inputs[:4])


# To compilers the loop over parts is one operation each way. What torch.library.custom_op does, without importing the compiler.
_LIBRARY = torch.library.Library("swinscale", "FRAGMENT")
_LIBRARY.define(
    "local_relation(Tensor x, Tensor q, Tensor k, Tensor prior, int size, str similarity, int stride) -> Tensor"
)
_LIBRARY.define(
    "local_relation_backward(Tensor gradient, Tensor x, Tensor q, Tensor k, Tensor prior, int size, str similarity, int stride) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.impl("local_relation", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("local_relation_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake(
    "swinscale::local_relation", lambda x, q, *_: x.new_empty(*x.shape[:2], *q.shape[2:]), lib=_LIBRARY
)
torch.library.register_fake("swinscale::local_relation_backward", _fake_backward, lib=_LIBRARY)
torch.library.register_autograd("swinscale::local_relation", _differentiate, setup_context=_keep, lib=_LIBRARY)
