"""What the name of a weight file says about the model in it. Tensors win over names; a disagreement is reported."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from swinscale.models.config import SwinConfig, format_size
from swinscale.models.variants import BASE, GIANT, HUGE, LARGE, SMALL, TINY

SIZES: dict[str, dict[str, Any]] = {
    "tiny": TINY,
    "small": SMALL,
    "base": BASE,
    "large": LARGE,
    "huge": HUGE,
    "giant": GIANT,
}
GENERIC = ("model", "pytorch_model", "checkpoint", "ckpt", "latest", "last", "best", "weights")
"""Names of files that say nothing: the directory's name counts then."""


@dataclass(frozen=True)
class NameHints:
    """What a file name says; None where it says nothing.

    Args:
        size: "tiny" … "giant".
        trained_window, trained_size: window and image size before the weights were transferred (``12to16``).
        rank: 3 for video.
    """

    version: int | None = None
    size: str | None = None
    window: int | None = None
    img_size: int | None = None
    trained_window: int | None = None
    trained_size: int | None = None
    num_classes: int | None = None
    rank: int | None = None

    def __bool__(self) -> bool:
        return any(getattr(self, field.name) is not None for field in fields(self))


def telling_name(path: str | os.PathLike[str]) -> str:
    """The part of a path that names the model: the file's name, or its directory's where that one is generic."""
    path = Path(path)
    stem = (
        path.name
        if path.is_dir()
        else re.sub(r"\.(pth|pt|bin|pkl|ckpt|safetensors|index\.json)(\.tar)?$", "", path.name)
    )
    generic = stem.lower() in GENERIC or re.fullmatch(r"(model|pytorch_model)-\d+-of-\d+", stem)
    return path.parent.name if generic and not path.is_dir() else stem


def read_name(path: str | os.PathLike[str]) -> NameHints:
    """What the name of a file or directory says, in the habits of the projects that publish Swin weights."""
    name = re.sub(r"[-.]", "_", telling_name(path).lower())
    if "swin" not in name or "_cr_" in name:
        return NameHints()
    video = re.search(r"swin_?3d|video_?swin|(?:patch|_p)\d44(?:_|$)", name)
    letters = re.search(r"swin(?:v2|_v2|3d)?_([tsblhg])(?:_|$)", name)
    words = [size for size in SIZES if re.search(rf"(?:^|_|swin|v2){size}(?:_|$)", name)]
    by_letter = {size[0]: size for size in SIZES}
    window = re.search(r"(?:window|_w)(\d{1,2})(?:to(\d{1,2}))?(?!\d)", name)
    image = re.search(r"(?:^|_|img)(\d{3,4})(?:to(\d{3,4}))?(?:px)?(?=_|$)", name)
    sizes = [int(n) for n in image.groups() if n] if image else []
    sizes = sizes if sizes and all(n % 32 == 0 and 96 <= n <= 2048 for n in sizes) else []
    windows = [int(n) for n in window.groups() if n] if window and not video else []
    return NameHints(
        version=2 if re.search(r"swin(?:_?3d)?_?v2|swin_?transformer_?v2", name) else 1,
        size=words[0] if len(words) == 1 else by_letter[letters[1]] if letters else None,
        window=windows[-1] if windows else None,
        img_size=sizes[-1] if sizes else None,
        trained_window=windows[0] if len(windows) == 2 else None,
        trained_size=sizes[0] if len(sizes) == 2 else None,
        num_classes=_classes_of_films(name) if video else _classes(name),
        rank=3 if video else None,
    )


def _classes(name: str) -> int | None:
    if re.search(r"k400|kinetics|sthv2|ade|coco|cub|simmim_pretrain", name):
        return None
    if re.search(r"22kto1k|(?:^|_)(?:in)?2[12]k_(?:ft_)?in1k|_in1k(?:_|$)|imagenet1k|_1k(?:_|$)", name):
        return 1000
    return 21841 if re.search(r"_(?:ms_)?(?:in)?22k(?:_|$)", name) else None


def _classes_of_films(name: str) -> int | None:
    if re.search(r"sthv2|ssv2", name):
        return 174
    kinetics = re.search(r"(?:kinetics|k)_?([467]00)(?!\d)", name)
    return int(kinetics[1]) if kinetics else None


def fields_of(hints: NameHints, stages: int) -> dict[str, Any]:
    """Fields of ``SwinConfig`` for V2 weights that store no window: as the name says them, else none."""
    if hints.window is None:
        return {}
    found: dict[str, Any] = {"window_size": hints.window}
    if hints.img_size is not None:
        found["img_size"] = hints.img_size
    if hints.trained_window is not None:
        windows: Any = hints.trained_window
        if hints.trained_size is not None:  # the window fitted to the map: 6, not 12, in the last stage at 192 pixels
            shape = SwinConfig(
                img_size=hints.trained_size,
                window_size=hints.trained_window,
                depths=(1,) * stages,
                num_heads=(1,) * stages,
            )
            windows = shape.stage_windows
        found["pretrained_window_sizes"] = windows
    return found


def disagreements(hints: NameHints, config: SwinConfig, windows_known: bool = True) -> list[str]:
    """Lines about what a name says and the tensors deny; empty if they agree.

    Args:
        config: the configuration that the tensors have.
        windows_known: whether the tensors say the windows; otherwise nothing denies the name.
    """
    said = []

    def compare(what: str, name: Any, tensors: Any) -> None:
        if name is not None and name != tensors:
            said.append(f"the name says {what} {name}, the tensors say {tensors}")

    compare("Swin V", hints.version, config.version)
    if hints.size is not None:
        like = SIZES[hints.size]
        if (like["embed_dim"], like["depths"]) != (config.embed_dim, config.depths):
            said.append(
                f"the name says '{hints.size}' (embed_dim {like['embed_dim']}, depths {like['depths']}), the tensors say "
                f"embed_dim {config.embed_dim}, depths {config.depths}"
            )
    if hints.rank is not None:
        compare("axes", hints.rank, config.rank)
    if windows_known and hints.window is not None and config.rank == 2:
        if config.stage_windows[0] != (hints.window,) * 2:
            windows = " ".join(map(format_size, config.stage_windows))
            said.append(f"the name says window {hints.window}, the tensors say {windows}")
        if hints.trained_window is not None and config.position_bias != "table":
            compare("trained window", hints.trained_window, config.trained_windows[0][0])
    if windows_known and hints.img_size is not None and config.rank == 2 and hints.window is None:
        window, rest = config.stage_windows[0][0], hints.img_size // config.patch_size[0]
        if hints.version == 1 and rest % window:
            said.append(
                f"the name says {hints.img_size} pixels, whose first map of {rest} tokens is not whole windows of {window}"
            )
    if config.num_classes and hints.num_classes is not None:
        compare("classes", hints.num_classes, config.num_classes)
    return said
