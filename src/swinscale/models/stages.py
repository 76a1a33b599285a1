"""What the backbones check alike: their input, and which of their stages are asked for."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from swinscale.errors import UsageError


def check_input(x: Tensor, rank: int, channels: int) -> None:
    """Raises UsageError unless ``x`` is (B, channels, *size) with ``rank`` axes of at least one entry."""
    if x.ndim != rank + 2 or x.shape[1] != channels or min(x.shape[2:]) < 1:
        axes = "height, width" if rank == 2 else "time, height, width"
        raise UsageError(
            f"The input has shape {tuple(x.shape)}, but this model reads (batch, {channels} channels, {axes}), none "
            f"of them empty. Add the missing axis, or build the model with in_chans set to the channels of your data."
        )


def chosen_stages(indices: int | Sequence[int] | None, output_fmt: str, count: int) -> list[int]:
    """Numbers of stages, from 0, as ``forward_intermediates`` is asked for them in a model of ``count`` stages.

    Args:
        indices: negative ones count from the end; the last n for an integer, None for all.

    Raises:
        UsageError: for stages or an ``output_fmt`` that do not exist.
    """
    wanted = list(range(count))[-indices:] if isinstance(indices, int) else list(indices or range(count))
    if indices == 0 or not all(-count <= i < count for i in wanted):
        raise UsageError(f"indices={indices} is not allowed: this model has stages 0 to {count - 1}.")
    if output_fmt not in ("NCHW", "NHWC"):
        raise UsageError(f"output_fmt={output_fmt!r} is not allowed: choose 'NCHW' or 'NHWC'.")
    return [i % count for i in wanted]
