"""Whole detectors written as OpenMMLab, the published Swin detection code or this library reads them, and read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from swinscale.convert_dense import LAYOUTS, Dense, convert_dense
from swinscale.detection import detection_config
from swinscale.heads.config import DetectConfig
from swinscale.heads.detector import Detector
from swinscale.models import SwinConfig, SwinTransformer
from swinscale.weights.detector_parts import describe_parts, open_detector, parts_of
from swinscale.weights.detectors import detector_to_mm, load_detector
from swinscale.weights.files import State

IN_USE = (
    *("anchor_scale", "anchor_ratios", "proposals", "proposals_per_level", "mask_size", "score", "limit", "nms_iou"),
    *("soft_nms", "test_short", "test_long", "test_ranges", "test_flip"),
)
"""Fields of ``DetectConfig`` that decide what a trained detector finds and no tensor tells."""


def convert_detector(
    source: Path, out: Path, to: str, *, img_size: int | None = None, window_size: int | None = None
) -> list[str]:
    """Writes the detector in ``source`` as ``out``, and checks what was written; see ``convert.convert``.

    Raises:
        UsageError: for a target that has no detectors or no place for this one, and weights that are not a whole detector.
    """
    return convert_dense(DETECTORS, source, out, to, img_size=img_size, window_size=window_size)


def _without_memory(config: SwinConfig, task: DetectConfig, classes: int) -> Detector:
    with torch.device("meta"):
        return Detector(SwinTransformer(config), classes, task)


def _renamed(state: State, to: str) -> State:
    layout: Any = LAYOUTS[to]
    return detector_to_mm(state, layout)


DETECTORS = Dense(
    what="detector",
    task="detect",
    targets=("mm", "official"),
    example="mask_rcnn_swinv2_tiny_window16.pth",
    in_use=IN_USE,
    open=open_detector,
    settings=detection_config,
    build=_without_memory,
    load=load_detector,
    describe=lambda state: describe_parts(parts_of(state)),
    rename=_renamed,
)
