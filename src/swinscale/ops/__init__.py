"""Operations with several back ends."""

from swinscale.ops.attention import BACKENDS, Backend, choose_backend, window_attention

__all__ = ["BACKENDS", "Backend", "choose_backend", "window_attention"]
