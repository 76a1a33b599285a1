"""COCO's average precision and recall of boxes and masks, added up over batches and processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from swinscale.errors import UsageError
from swinscale.heads.detections import Detections

AREAS = {"small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, 1e10)}
"""Sizes of objects: areas in pixels, of the annotation's segmentation."""
_PASTED_AT_ONCE = 2**26
"""Pixels of full masks that are in memory at a time, one byte each."""
_Rle = dict[str, Any]
Array = NDArray[np.float64]


@dataclass(frozen=True)
class _Seen:
    """An image with what was found and what is there, on the CPU."""

    size: tuple[int, int]
    boxes: Array  # (n, 4): x, y, width, height
    scores: Array
    labels: NDArray[np.int64]
    masks: list[_Rle] | None
    truths: list[dict[str, Any]]  # label, bbox, area, iscrowd, and segmentation as RLE


class CocoMetric:
    """Average precision (AP) and average recall (AR) as COCO defines them.

    AP is the mean over the IoU thresholds 0.5, 0.55 … 0.95, 101 recalls, and the classes that occur. Crowds are neither
    found nor missed, and so are objects outside the range of areas that a number is about.

    Args:
        classes: their names, in the order of the labels.
        masks: also measure masks; every detection and annotation needs one then.
        max_detections: how many detections per image and class count, best first; COCO: 100.

    Raises:
        UsageError: where the package that evaluates is not installed.
    """

    def __init__(self, classes: Sequence[str], masks: bool = True, max_detections: int = 100):
        if max_detections < 1 or not classes:
            raise UsageError(f"{len(classes)} classes, max_detections={max_detections}: both must be at least 1.")
        _evaluator()
        self.classes, self.masks, self.max_detections = list(classes), masks, max_detections
        self._seen: dict[int, _Seen] = {}

    def to(self, device: Any) -> CocoMetric:
        """Itself: everything is kept on the CPU."""
        return self

    @torch.no_grad()
    def update(
        self,
        detections: Sequence[Detections],
        image_ids: Sequence[int],
        sizes: Sequence[tuple[int, int]],
        annotations: Sequence[Sequence[Mapping[str, Any]]],
    ) -> None:
        """Adds images. One that was added before is passed over.

        Args:
            detections: of each image, in pixels of the original image.
            sizes: height and width of the original images.
            annotations: of each image, as in COCO's files (``bbox`` x, y, width, height; ``segmentation``, ``area`` and
                ``iscrowd`` where they are known) with a ``label``, 0 … classes - 1.

        Raises:
            UsageError: for a detection or annotation without a mask if masks are measured, and for an unknown label.
        """
        for found, image_id, size, truths in zip(detections, image_ids, sizes, annotations, strict=True):
            if int(image_id) not in self._seen:
                height, width = (int(side) for side in size)
                self._seen[int(image_id)] = self._image(found, int(image_id), (height, width), truths)

    def _image(
        self, found: Detections, image_id: int, size: tuple[int, int], truths: Sequence[Mapping[str, Any]]
    ) -> _Seen:
        corners = found.boxes.detach().double().cpu().numpy()
        # The overlap with a box that is not a number would be no number either, which passes every threshold.
        boxes = np.nan_to_num(np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1), posinf=0, neginf=0)
        return _Seen(
            size,
            boxes,
            np.nan_to_num(found.scores.detach().double().cpu().numpy()),
            found.labels.detach().cpu().numpy(),
            _encoded(found, size) if self.masks else None,
            [self._truth(truth, image_id, size) for truth in truths],
        )

    def _truth(self, truth: Mapping[str, Any], image_id: int, size: tuple[int, int]) -> dict[str, Any]:
        label = truth["label"]
        if not 0 <= label < len(self.classes):
            raise UsageError(
                f"Image {image_id}: label {label} of an annotation is none of 0 … {len(self.classes) - 1}."
            )
        segmentation = truth.get("segmentation")
        if self.masks and not segmentation:
            raise UsageError(
                f"Image {image_id}: annotation {truth.get('id', '')} has no segmentation: add it, or measure boxes alone."
            )
        kept: dict[str, Any] = {
            "label": int(label),
            "iscrowd": int(truth.get("iscrowd", 0)),
            "bbox": [float(v) for v in truth["bbox"]],
        }
        rle = _rle(segmentation, size) if segmentation and (self.masks or "area" not in truth) else None
        if "area" in truth:
            kept["area"] = float(truth["area"])
        else:
            kept["area"] = float(_coder().area(rle)) if rle else kept["bbox"][2] * kept["bbox"][3]
        return {**kept, "segmentation": rle} if self.masks else kept

    def compute(self) -> dict[str, Any]:
        """The measures over the images of all processes; each image counts once. Every process must take part.

        Returns:
            For ``box`` and, with masks, ``mask``: floats ``box_ap``, ``box_ap50``, ``box_ap75``; ``box_ap_small``,
            ``box_ap_medium``, ``box_ap_large``; ``box_ar1``, ``box_ar10``, ``box_ar100``, the recall with so many
            detections (the largest is ``max_detections``). None where there is no object to find.
            ``per_class``: for each class ``name``, ``instances`` (without crowds), ``box_ap``, ``box_ap50``, ``mask_ap``.
            ``curves``: ``recall`` (101,), and under ``box`` and ``mask`` the mean precision over classes at each recall,
            at the IoU thresholds "0.5" and "0.75".
        """
        seen: dict[int, _Seen] = {}
        for part in _gather(self._seen):
            for image_id, image in part.items():
                seen.setdefault(image_id, image)
        images = [seen[image_id] for image_id in sorted(seen)]  # so that ties are broken alike in any order
        counts = np.bincount(
            [t["label"] for image in images for t in image.truths if not t["iscrowd"]], minlength=len(self.classes)
        )
        per_class: list[dict[str, Any]] = [
            {"name": name, "instances": int(count)} for name, count in zip(self.classes, counts, strict=True)
        ]
        curves: dict[str, Any] = {"recall": np.linspace(0, 1, 101).tolist()}
        result: dict[str, Any] = {
            f"{kind}_ap": None for kind in (("box", "mask") if self.masks else ("box",))
        }  # come first
        for kind in ("box", "mask") if self.masks else ("box",):
            precision, recall = self._evaluated(images, masks=kind == "mask", nothing=not counts.any())
            result.update({f"{kind}_{name}": value for name, value in self._summary(precision, recall).items()})
            for index, row in enumerate(per_class):
                row[f"{kind}_ap"] = _mean(precision[:, :, index, 0, -1])
                if kind == "box":
                    row["box_ap50"] = _mean(precision[0, :, index, 0, -1])
            present = precision[:, :, counts > 0, 0, -1]
            curves[kind] = {name: [_mean(at) for at in present[t]] for name, t in (("0.5", 0), ("0.75", 5))}
        return {**result, "per_class": per_class, "curves": curves}

    def _limits(self) -> list[int]:
        return [n for n in (1, 10) if n < self.max_detections] + [self.max_detections]

    def _summary(self, precision: Array, recall: Array) -> dict[str, float | None]:
        return {
            "ap": _mean(precision[:, :, :, 0, -1]),
            "ap50": _mean(precision[0, :, :, 0, -1]),
            "ap75": _mean(precision[5, :, :, 0, -1]),
            **{f"ap_{name}": _mean(precision[:, :, :, 1 + i, -1]) for i, name in enumerate(AREAS)},
            **{f"ar{limit}": _mean(recall[:, :, 0, i]) for i, limit in enumerate(self._limits())},
        }

    def _evaluated(self, images: Sequence[_Seen], masks: bool, nothing: bool) -> tuple[Array, Array]:
        """Precision (thresholds, recalls, classes, areas, limits) and recall (thresholds, classes, areas, limits).

        -1 where there is nothing to find, as it is everywhere for ``nothing``.
        """
        limits = self._limits()
        if nothing:
            shape = (10, 101, len(self.classes), 1 + len(AREAS), len(limits))
            return np.full(shape, -1.0), np.full(shape[:1] + shape[2:], -1.0)
        coco, evaluation = _evaluator()
        truths, found, sizes = list[dict[str, Any]](), list[dict[str, Any]](), list[dict[str, Any]]()
        for number, image in enumerate(images, start=1):
            sizes.append({"id": number, "height": image.size[0], "width": image.size[1]})
            for truth in image.truths:  # a number of 0 would say "not matched"
                place = {"id": len(truths) + 1, "image_id": number, "category_id": truth["label"] + 1}
                truths.append({**truth, **place})
            forms: list[dict[str, Any]] = [{"bbox": box} for box in image.boxes.tolist()]
            if masks and image.masks is not None:  # without a box, which would decide the size
                forms = [{"segmentation": mask} for mask in image.masks]
            for form, score, label in zip(forms, image.scores.tolist(), image.labels.tolist(), strict=True):
                found.append({"image_id": number, "category_id": label + 1, "score": score, **form})
        there = coco()
        there.dataset = {
            "images": sizes,
            "annotations": truths,
            "categories": [{"id": index + 1, "name": name} for index, name in enumerate(self.classes)],
        }
        there.createIndex()
        run = evaluation(there, there.loadRes(found), "segm" if masks else "bbox", print_function=lambda *_: None)
        run.params.maxDets = limits
        run.params.areaRng = [[0.0, 1e10], *map(list, AREAS.values())]
        run.params.areaRngLbl = ["all", *AREAS]
        run.evaluate()
        run.accumulate()
        return np.asarray(run.eval["precision"]), np.asarray(run.eval["recall"])


def _mean(values: Array) -> float | None:
    known = values[values > -1]
    return float(known.mean()) if known.size else None


def _encoded(found: Detections, size: tuple[int, int]) -> list[_Rle]:
    """The masks of an image, run-length encoded."""
    if found.masks is None and len(found):
        raise UsageError("The detections have no masks: use a detector with a mask head, or measure boxes alone.")
    together = max(1, _PASTED_AT_ONCE // max(1, size[0] * size[1]))
    encoded = list[_Rle]()
    for start in range(0, len(found), together):
        full = found.take(slice(start, start + together)).full_masks(*size)
        columns = full.transpose(1, 2).contiguous().cpu().numpy()  # the encoder goes down the columns
        encoded += _coder().encode(columns.view(np.uint8).T)
    return encoded


def _rle(segmentation: Any, size: tuple[int, int]) -> _Rle:
    """Polygons, or run lengths as numbers or text, as run lengths in bytes."""
    coder = _coder()
    if isinstance(segmentation, list):
        return coder.merge(coder.frPyObjects(segmentation, *size))
    counts = segmentation["counts"]
    if isinstance(counts, list):
        return coder.frPyObjects(segmentation, *size)
    return {"size": list(segmentation["size"]), "counts": counts.encode() if isinstance(counts, str) else counts}


def _evaluator() -> tuple[Any, Any]:
    try:
        from faster_coco_eval import COCO, COCOeval_faster
    except ImportError as error:
        raise UsageError(
            "COCO's measures need the package faster_coco_eval: install it with pip install 'swinscale[detect]'."
        ) from error
    return COCO, COCOeval_faster


def _coder() -> Any:
    from faster_coco_eval.core import mask

    return mask


def _gather(seen: dict[int, _Seen]) -> list[dict[int, _Seen]]:
    """What each process has seen, in all of them."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [seen]
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, seen)
    return parts
