"""Whole segmenters written as OpenMMLab, transformers, the published Swin segmentation code or this library reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from swinscale.convert_dense import LAYOUTS, Dense, convert_dense
from swinscale.errors import UsageError
from swinscale.heads.config import SegmentConfig
from swinscale.heads.upernet import Segmenter
from swinscale.models import SwinConfig, SwinTransformer
from swinscale.segmentation import segmentation_config
from swinscale.weights.files import State
from swinscale.weights.peer_records import check_peer, transformers_record
from swinscale.weights.segmenters import (
    describe_segmenter_parts,
    load_segmenter,
    open_segmenter,
    segmenter_parts,
    segmenter_to_mm,
    segmenter_to_transformers,
)
from swinscale.weights.upernet_records import AUXILIARY_STAGE, upernet_preprocessor, upernet_record

IN_USE = (
    *("pool_scales", "test_short", "test_long", "test_ratios", "test_flip", "test_crop", "test_stride"),
    "test_antialias",
)
"""Fields of ``SegmentConfig`` that decide what a trained segmenter finds and no tensor tells."""


def convert_segmenter(
    source: Path, out: Path, to: str, *, img_size: int | None = None, window_size: int | None = None
) -> list[str]:
    """Writes the segmenter in ``source`` as ``out``, and checks what was written; see ``convert.convert``.

    Raises:
        UsageError: for a target that has no segmenters or no place for this one, and weights that are not a whole segmenter.
    """
    return convert_dense(SEGMENTERS, source, out, to, img_size=img_size, window_size=window_size)


def _without_memory(config: SwinConfig, task: SegmentConfig, classes: int) -> Segmenter:
    with torch.device("meta"):
        return Segmenter(SwinTransformer(config), classes, task)


def _renamed(state: State, to: str) -> State:
    if to == "hf":
        return segmenter_to_transformers(state)
    layout: Any = LAYOUTS[to]
    return segmenter_to_mm(state, layout)


def _transformers_files(config: SwinConfig, task: SegmentConfig, preprocessing: dict[str, Any]) -> dict[str, Any]:
    """``config.json`` and ``preprocessor_config.json``.

    Raises:
        UsageError: for a model that transformers cannot hold.
    """
    check_peer("transformers", config)
    if task.aux_weight and task.aux_stage != AUXILIARY_STAGE:
        raise UsageError(
            f"transformers cannot hold this model: its auxiliary head reads stage {AUXILIARY_STAGE}, counted from 0, and this one "
            f"stage {task.aux_stage}."
        )
    labels = preprocessing.get("labels") or {}
    record = upernet_record(
        transformers_record(config, {}),
        preprocessing["classes"],
        channels=task.channels,
        pool_scales=task.pool_scales,
        aux_channels=task.aux_channels,
        aux_weight=task.aux_weight,
        ignore_index=labels.get("ignore_index", 255),
    )
    preprocessor = upernet_preprocessor(config, preprocessing["mean"], preprocessing["std"], labels)
    return {"config.json": record, "preprocessor_config.json": preprocessor}


SEGMENTERS = Dense(
    what="segmenter",
    task="segment",
    targets=("mm", "official", "hf"),
    example="upernet_swinv2_tiny_window16.pth",
    in_use=IN_USE,
    open=open_segmenter,
    settings=segmentation_config,
    build=_without_memory,
    load=load_segmenter,
    describe=lambda state: describe_segmenter_parts(segmenter_parts(state)),
    rename=_renamed,
    directory=_transformers_files,
)
