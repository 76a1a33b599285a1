"""Fine-tuning at another image size or window, with another number of channels or classes.

**V2** computes the position bias from coordinates, so it exists for any window. What must stay is the *scale* of the
coordinates: the window that the weights were first trained with, ``pretrained_window_sizes``. It is set at the first
transfer and kept in every later one (8 → 16 → 24 keeps 8), because the network that reads the coordinates has always
read them on that scale. Every offset then keeps its bias, and new offsets are extrapolated on a logarithmic axis.
(microsoft/Swin-Transformer#259 asks what to set when a fine-tuned model is fine-tuned again: still the first window.)

**V1** has a table with one entry per offset, which is resized bicubically to the new window, as in the published code.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from swinscale.models.config import SwinConfig
from swinscale.models.swin import SwinTransformer
from swinscale.weights.load import load_weights
from swinscale.weights.report import LoadReport
from swinscale.weights.resize import ChannelInit


def transfer_config(
    config: SwinConfig,
    *,
    img_size: Any = None,
    window_size: Any = None,
    in_chans: int | None = None,
    num_classes: int | None = None,
) -> SwinConfig:
    """The configuration for continuing with the weights of ``config`` at another size; None leaves a field as it is.

    In V2, ``pretrained_window_sizes`` becomes the window that each stage was trained with: the one already recorded, or
    the window fitted to the map at the old ``img_size`` (6, not 12, in the last stage at 192 pixels).
    """
    given = {"img_size": img_size, "window_size": window_size, "in_chans": in_chans, "num_classes": num_classes}
    new = dataclasses.replace(config, **{name: value for name, value in given.items() if value is not None})
    if config.position_bias == "table" or new.stage_windows == config.stage_windows:
        return new
    return dataclasses.replace(new, pretrained_window_sizes=config.trained_windows)


def transfer(
    model: SwinTransformer,
    *,
    img_size: Any = None,
    window_size: Any = None,
    in_chans: int | None = None,
    num_classes: int | None = None,
    in_chans_init: ChannelInit = "repeat",
) -> tuple[SwinTransformer, LoadReport]:
    """A new model with the weights of ``model``, for another image size, window, channel or class count.

    Returns: the model, on the same device and with the same dtype, and what became of the weights.
    """
    config = transfer_config(
        model.config, img_size=img_size, window_size=window_size, in_chans=in_chans, num_classes=num_classes
    )
    new = SwinTransformer(config).to(model.norm.weight).train(model.training)
    report = load_weights(new, model.state_dict(), config=model.config, in_chans_init=in_chans_init)
    return new, report
