"""Fine-tuning at another image size or window, with other channels or classes, or on clips instead of images.

**V2** computes the position bias from coordinates, so it exists for any window. What must stay is the *scale* of the
coordinates: the window that the weights were first trained with, ``pretrained_window_sizes``. It is set at the first
transfer and kept in every later one (8 → 16 → 24 keeps 8), because the network that reads the coordinates has always
read them on that scale. Every offset then keeps its bias, and new offsets are extrapolated on a logarithmic axis.
(microsoft/Swin-Transformer#259 asks what to set when a fine-tuned model is fine-tuned again: still the first window.)

**V1** has a table with one entry per offset, which is resized bicubically to the new window, as in the published code.

The other ways are in ``resize.bias_methods``. ``transfer_config`` says what the new model is, ``load_weights`` fits the
weights into it, ``transfer`` does both.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from swinscale.config import suggest
from swinscale.errors import UsageError
from swinscale.models.config import SwinConfig
from swinscale.models.lrnet import LRNet
from swinscale.models.swin import SwinTransformer
from swinscale.models.variants import build_model
from swinscale.weights.hub import resolve
from swinscale.weights.load import load_weights
from swinscale.weights.records import read_config, read_metadata
from swinscale.weights.report import LoadReport
from swinscale.weights.resize import BiasMethod, ChannelInit, Inflate, bias_methods

Classes = Sequence[int | str] | str | os.PathLike[str]
"""Classes to keep: indices or names in a list, or a file with one of them per line."""

TIME_WINDOW = 8
"""Tokens along time in the windows of a video model made from an image model (Video Swin)."""


def transfer_config(
    config: SwinConfig,
    *,
    img_size: Any = None,
    window_size: Any = None,
    in_chans: int | None = None,
    num_classes: int | None = None,
    cpb: BiasMethod | None = None,
    patch_time: int | None = None,
) -> SwinConfig:
    """The configuration for continuing with the weights of ``config`` at another size; None leaves a field as it is.

    In V2, ``pretrained_window_sizes`` becomes the window that each stage was trained with: the one already recorded, or
    the window fitted to the map at the old ``img_size`` (6, not 12, in the last stage at 192 pixels). Where windows
    change, the old ones are added to ``past_windows``.

    Args:
        img_size: with three numbers (time, height, width), an image model becomes a video model. One number is height and
            width: the time of a video model stays.
        window_size: without a number for time, that of a video model stays, and in one made from an image model it is 8.
        cpb: how the position bias gets to another window, one of ``bias_methods(config)``; None: the first of them.
            "bicubic" and "geometric" make a table of a continuous bias, also where no window changes.
        patch_time: frames per token of a video model made from an image model (default 2).

    Raises:
        UsageError: for a method that this position bias does not have, or values that are not allowed.
    """
    _check_method(config, cpb)
    axes = len(img_size) if isinstance(img_size, Sequence) else config.rank
    if config.rank == 3:
        img_size = (config.img_size[0], img_size, img_size) if isinstance(img_size, int) else img_size
        window_size = None if window_size is None else _with_time(window_size, config.window_size[0][0])
    given = {"img_size": img_size, "window_size": window_size, "in_chans": in_chans, "num_classes": num_classes}
    if (config.rank, axes) == (2, 3):
        window_size = config.window_size if window_size is None else window_size
        given["window_size"] = _with_time(window_size, TIME_WINDOW)
        given["patch_size"] = (2 if patch_time is None else patch_time, *config.patch_size)
        given["pretrained_window_sizes"] = tuple((0, *window) for window in config.pretrained_window_sizes)
    elif patch_time is not None:
        raise UsageError(
            f"patch_time={patch_time} is for making a video model: give img_size as (time, height, width)."
        )
    if cpb in ("bicubic", "geometric") and config.position_bias != "table":
        given |= {"position_bias": "table", "pretrained_window_sizes": 0}
    new = dataclasses.replace(config, **{name: value for name, value in given.items() if value is not None})
    if new.stage_windows == config.stage_windows:
        return new
    past = config.past_windows
    if not past and config.position_bias != "table" and config.trained_windows != config.stage_windows:
        past = (config.trained_windows,)  # published fine-tuned models record their first windows as the scale alone
    new = dataclasses.replace(new, past_windows=(*past, config.stage_windows))
    if new.position_bias == "table":
        return new
    time = (0,) * (new.rank - config.rank)  # the scale of a coordinate without weight is open
    scale = 0 if cpb == "stretch" else tuple(time + window for window in config.trained_windows)
    return dataclasses.replace(new, pretrained_window_sizes=scale)


def _check_method(config: SwinConfig, cpb: str | None) -> None:
    allowed = bias_methods(config)
    if cpb is None or cpb in allowed:
        return
    if cpb not in get_args(BiasMethod):
        raise UsageError(f"cpb='{cpb}' is not a method.{suggest(cpb, allowed)} Choose one of {', '.join(allowed)}.")
    reasons = {
        "table": "it has a table with an entry per offset and no network that could be read elsewhere",
        "log": "its coordinates are logarithmic",
        "linear": "its coordinates are linear",
        "paper": "its coordinates are logarithms of the offsets themselves and have no scale",
    }
    bias = str(config.position_bias)
    raise UsageError(
        f"cpb='{cpb}' is not possible for position_bias='{bias}': {reasons[bias]}. Choose one of {', '.join(allowed)}."
    )


def _with_time(window: Any, time: int) -> Any:
    """A window, or one per stage, with ``time`` in front where it lacks that axis."""
    if isinstance(window, int):
        return time, window, window
    if all(isinstance(w, int) for w in window):
        return (time, *window) if len(window) == 2 else tuple(window)
    return tuple(_with_time(w, time) for w in window)


def transfer(
    source: SwinTransformer | str | os.PathLike[str],
    *,
    img_size: Any = None,
    window_size: Any = None,
    in_chans: int | None = None,
    num_classes: int | None = None,
    classes: Classes | None = None,
    cpb: BiasMethod | None = None,
    inflate: Inflate = "repeat",
    patch_time: int | None = None,
    in_chans_init: ChannelInit = "repeat",
) -> tuple[SwinTransformer, LoadReport]:
    """A new model with the weights of ``source``, for another image size, window, channel or class count, or for clips.

    Args:
        source: a model, or what ``from_pretrained`` reads.
        img_size, window_size, cpb, patch_time: see ``transfer_config``.
        classes: keep these classes of the classifier, in this order: their indices, or their names where the source
            records names; in a list, or in a file with one per line (the published map from ImageNet-22K to 1K is one).
        inflate: how an image model gets to clips. "repeat": a clip of equal frames gives the image's result. "centre":
            one frame carries the patch filter, and attention begins within a frame (tables only).
        in_chans_init: what the first layer does with another number of channels, or which old channel each new one
            takes; see ``resize.adapt_channels``.

    Returns: the model, on the same device and with the same dtype, and what became of the weights.

    Raises:
        UsageError: for what is not possible, by name.
    """
    if isinstance(source, SwinTransformer):
        model, names = source, None
    elif isinstance(source, LRNet):
        raise UsageError(
            "An LR-Net has no windows to transfer: load it with from_pretrained(…, num_classes=…, in_chans=…)."
        )
    else:
        from swinscale.weights.pretrained import from_pretrained  # it builds on this module

        place = resolve(source)
        read_config(place)  # refuses what is no Swin Transformer
        model = from_pretrained(place)
        names = recorded_classes(read_metadata(place), model.num_classes)
    rows = None if classes is None else class_rows(classes, model.num_classes, names)
    if rows is not None:
        if num_classes not in (None, len(rows)):
            raise UsageError(f"num_classes={num_classes}, but {len(rows)} classes are chosen: leave num_classes out.")
        num_classes = len(rows)
    if in_chans is None and not isinstance(in_chans_init, str):
        in_chans = len(in_chans_init)
    config = transfer_config(
        model.config,
        img_size=img_size,
        window_size=window_size,
        in_chans=in_chans,
        num_classes=num_classes,
        cpb=cpb,
        patch_time=patch_time,
    )
    new = build_model(config).to(model.norm.weight).train(model.training)
    report = load_weights(
        new,
        model.state_dict(),
        config=model.config,
        transfer=cpb or True,
        classes=rows,
        in_chans_init=in_chans_init,
        inflate=inflate,
    )
    if model is not source:
        report.source = str(source)
    return new, report


def recorded_classes(metadata: dict[str, Any], count: int) -> list[str] | None:
    """The names of ``count`` classes, where they are recorded with the weights."""
    names = metadata.get("preprocessing", {}).get("classes")
    return list(names) if names and len(names) == count else None


def class_rows(classes: Classes, count: int, names: Sequence[str] | None) -> list[int]:
    """Rows of a classifier of ``count`` classes called ``names``, in the order in which ``classes`` lists them.

    Lines of a file that are all whole numbers are indices, otherwise they are names. Empty lines do not count.

    Raises:
        UsageError: for a class that does not exist, with the line of the file.
    """
    if not count:
        raise UsageError("classes chooses from a classifier, and this model has none: leave classes out.")
    entries: list[tuple[str, int | str]]
    if isinstance(classes, (str, os.PathLike)):
        try:
            lines = Path(classes).read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(
                f"classes={os.fspath(classes)!r} cannot be read as a text file with one class per line: {_reason(error)}."
            ) from error
        entries = [(f"{os.fspath(classes)}, line {n}", line.strip()) for n, line in enumerate(lines, 1) if line.strip()]
        if all(text.lstrip("-").isdecimal() for _, text in entries if isinstance(text, str)):
            entries = [(place, int(text)) for place, text in entries]
    else:
        entries = [(f"classes, entry {n}", entry) for n, entry in enumerate(classes, 1)]
    if not entries:
        raise UsageError("classes is empty: list at least one index or name.")
    return [_class_row(entry, place, count, names) for place, entry in entries]


def _class_row(entry: int | str, place: str, count: int, names: Sequence[str] | None) -> int:
    if not isinstance(entry, str):
        if not 0 <= entry < count:
            raise UsageError(f"{place}: there is no class {entry}; the classifier has {count}, 0 to {count - 1}.")
        return entry
    if names is None:
        raise UsageError(
            f"{place}: '{entry}' is a name, but no class names are recorded with the weights. Use indices."
        )
    if entry not in names:
        raise UsageError(f"{place}: there is no class '{entry}'.{suggest(entry, names)}")
    return list(names).index(entry)


def _reason(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else "it is not text"
