"""Operations with several back ends."""

from swinscale.ops.attention import BACKENDS, Backend, choose_backend, window_attention
from swinscale.ops.position import PositionBias

__all__ = ["BACKENDS", "Backend", "PositionBias", "choose_backend", "window_attention"]
