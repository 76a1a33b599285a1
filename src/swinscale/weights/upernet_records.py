"""What transformers records beside a UPerNet, ``config.json`` and ``preprocessor_config.json``: reading and writing it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from swinscale.models.config import SwinConfig

UPERNET = "upernet"
"""transformers' name of the kind of model."""
AUXILIARY_STAGE = 2
"""transformers reads this map in the auxiliary head, whatever the backbone."""
_DEFAULTS: dict[str, Any] = {
    "hidden_size": 512,
    "pool_scales": (1, 2, 3, 6),
    "auxiliary_channels": 256,
    "auxiliary_loss_weight": 0.4,
}


def upernet_metadata(record: dict[str, Any], preprocessor: dict[str, Any]) -> dict[str, Any]:
    """ "task" and "preprocessing" as our own checkpoints of segmenters record them.

    Args:
        record: the content of ``config.json``.
        preprocessor: that of ``preprocessor_config.json``; empty where there is none.
    """
    known = {**_DEFAULTS, **record}
    labels = record.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}  # transformers leaves out its default
    task = {
        "name": "segment",
        "channels": known["hidden_size"],
        "pool_scales": list(known["pool_scales"]),
        "aux_channels": known["auxiliary_channels"],
        "aux_stage": AUXILIARY_STAGE,
        "aux_weight": known["auxiliary_loss_weight"] if record.get("use_auxiliary_head", True) else 0.0,
    }
    reduced = preprocessor.get("do_reduce_labels", preprocessor.get("reduce_labels", False))
    preprocessing = {
        "mean": preprocessor.get("image_mean"),
        "std": preprocessor.get("image_std"),
        "classes": [labels[key] for key in sorted(labels, key=int)],
        "colours": None,
        "labels": {"ignore_index": record.get("loss_ignore_index", 255), "reduce_zero_label": bool(reduced)},
    }
    return {"task": task, "preprocessing": preprocessing}


def upernet_record(
    backbone: dict[str, Any],
    classes: Sequence[str],
    *,
    channels: int,
    pool_scales: Sequence[int],
    aux_channels: int,
    aux_weight: float,
    ignore_index: int,
) -> dict[str, Any]:
    """``config.json`` of a UPerNet.

    Args:
        backbone: ``peer_records.transformers_record`` of the backbone.
        aux_weight: 0: there is no auxiliary head.
    """
    stages = backbone["stage_names"][1:]
    inside = {name: value for name, value in backbone.items() if name != "architectures"}
    return {
        "architectures": ["UperNetForSemanticSegmentation"],
        "model_type": UPERNET,
        "backbone_config": {**inside, "out_features": stages, "out_indices": list(range(1, len(stages) + 1))},
        "hidden_size": channels,
        "initializer_range": 0.02,
        "pool_scales": list(pool_scales),
        "use_auxiliary_head": aux_weight > 0,
        "auxiliary_loss_weight": aux_weight or _DEFAULTS["auxiliary_loss_weight"],
        "auxiliary_in_channels": None,
        "auxiliary_channels": aux_channels,
        "auxiliary_num_convs": 1,
        "auxiliary_concat_input": False,
        "loss_ignore_index": ignore_index,
        "id2label": {str(index): name for index, name in enumerate(classes)},
        "label2id": {name: index for index, name in enumerate(classes)},
    }


def upernet_preprocessor(
    config: SwinConfig, mean: Sequence[float], std: Sequence[float], labels: dict[str, Any]
) -> dict[str, Any]:
    """``preprocessor_config.json``: pictures become as large as those that the backbone was trained on, which is not how this
    library resizes them; transformers cannot keep their shape."""
    height, width = config.img_size
    return {
        "image_processor_type": "SegformerImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": 2,  # bilinear
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
        "do_reduce_labels": bool(labels.get("reduce_zero_label", False)),
    }
