"""What a COCO detection file says, checked entry by entry, and the masks of its annotations."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from swinscale.errors import UsageError

Annotation = dict[str, Any]


class ImageRecord(NamedTuple):
    """What the file says about an image; sides in pixels."""

    id: int
    height: int
    width: int


def mask_api() -> Any:
    """The functions for run-length encoded masks, of the package faster-coco-eval."""
    try:
        from faster_coco_eval.core import mask
    except ImportError:
        raise UsageError(
            "Masks of COCO files need the package faster-coco-eval: pip install 'swinscale[detect]'."
        ) from None
    return mask


def instance_mask(annotation: Annotation, height: int, width: int) -> Tensor:
    """The pixels of an annotation: polygons, or a run-length code (compressed or not), as bool (height, width).

    Raises:
        UsageError: if it has no segmentation, or one that cannot be decoded.
    """
    api, segmentation = mask_api(), annotation.get("segmentation")
    what = f"The segmentation of annotation {annotation.get('id')}"
    if not segmentation:
        raise UsageError(f"Annotation {annotation.get('id')} has no segmentation. Train with task.masks=false.")
    try:
        if isinstance(segmentation, dict):
            code = dict(segmentation, size=[height, width])
            if list(segmentation["size"]) != [height, width]:
                raise UsageError(f"{what} has size {segmentation['size']}, its image {[height, width]}.")
            code = api.frPyObjects(code, height, width) if isinstance(code["counts"], list) else code
        else:
            far = 4.0 * max(height, width)  # the rasteriser walks along every edge, pixel by pixel
            polygons = [np.clip(np.asarray(p, dtype=np.float64), -far, far) for p in _polygons(segmentation)]
            polygons = [p for p in polygons if len(p) >= 6]
            if not all(np.isfinite(p).all() and len(p) % 2 == 0 for p in polygons) or not polygons:
                raise ValueError("a polygon needs 3 points x, y or more")
            code = api.merge(api.frPyObjects([p.tolist() for p in polygons], height, width))
        pixels = np.ascontiguousarray(api.decode(code))
    except UsageError:
        raise
    except Exception as error:  # the decoder raises several kinds, for nearly anything
        raise UsageError(f"{what} cannot be decoded: {' '.join(str(error).split())}.") from error
    return torch.from_numpy(pixels).bool()


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _unique(entries: Sequence[Any], kind: str, file: Path) -> None:
    """Every entry is a dict with an id of its own."""
    for position, entry in enumerate(entries):
        if not isinstance(entry, dict) or not _is_id(entry.get("id")):
            raise UsageError(f"{file}: {kind} number {position + 1} of {len(entries)} has no 'id' (a whole number).")
    (value, count), *_ = Counter(entry["id"] for entry in entries).most_common(1) or [(0, 0)]
    if count > 1:
        raise UsageError(f"{file}: {count} {kind} entries have the id {value}. Give each its own.")


def read_categories(entries: list[Any], file: Path) -> tuple[list[int], list[str]]:
    """Ids and names, in the order of the ids."""
    if not entries:
        raise UsageError(f"{file} lists no categories.")
    _unique(entries, "category", file)
    entries = sorted(entries, key=lambda entry: entry["id"])
    if nameless := [entry["id"] for entry in entries if not isinstance(entry.get("name"), str)]:
        raise UsageError(f"{file}: category {nameless[0]} has no 'name'.")
    return [entry["id"] for entry in entries], [entry["name"] for entry in entries]


def read_images(entries: list[Any], file: Path) -> tuple[list[str], list[ImageRecord]]:
    """File names, and ids with sizes."""
    if not entries:
        raise UsageError(f"{file} lists no images.")
    _unique(entries, "image", file)
    for entry in entries:
        sides = [entry.get("height"), entry.get("width")]
        if not isinstance(entry.get("file_name"), str) or not all(_is_id(side) and side > 0 for side in sides):
            raise UsageError(f"{file}: image {entry['id']} needs a 'file_name', and 'height' and 'width' in pixels.")
    names = [entry["file_name"] for entry in entries]
    return names, [ImageRecord(entry["id"], entry["height"], entry["width"]) for entry in entries]


def read_annotations(
    entries: list[Any],
    names: list[str],
    images: list[ImageRecord],
    category_ids: list[int],
    masks: bool,
    file: Path,
) -> tuple[list[list[Annotation]], list[tuple[str, str]]]:
    """The annotations of each image, and what was left out or changed."""
    _unique(entries, "annotation", file)
    position = {image.id: i for i, image in enumerate(images)}
    label = {category: i for i, category in enumerate(category_ids)}
    lists: list[list[Annotation]] = [[] for _ in images]
    notes: dict[str, list[str]] = defaultdict(list)
    for entry in entries:
        where = f"{file}: annotation {entry['id']}"
        image_id, category_id = entry.get("image_id"), entry.get("category_id")
        if not _is_id(image_id) or image_id not in position:
            raise UsageError(f"{where} is of image_id {image_id!r}, which the file does not list.")
        index = position[image_id]
        where += f" of {names[index]}"
        if not _is_id(category_id) or category_id not in label:
            raise UsageError(f"{where} is of category_id {category_id!r}, which the file does not list.")
        first = f"annotation {entry['id']} of {names[index]}"
        box = _read_box(entry, images[index], where, first, notes)
        polygons = _read_segmentation(entry, images[index], where, first, notes) if masks else None
        if box is None or polygons == []:
            continue
        made = dict(entry, bbox=box, iscrowd=int(bool(entry.get("iscrowd", 0))), label=label[category_id])
        if polygons is not None:
            made["segmentation"] = polygons
        if not isinstance(made.get("area"), (int, float)):
            sides = images[index].height, images[index].width
            made["area"] = float(instance_mask(made, *sides).sum()) if masks else box[2] * box[3]
        lists[index].append(made)
    return lists, [(f"{len(found)} annotations", f"{why}; the first: {found[0]}") for why, found in notes.items()]


def _read_box(
    entry: Annotation, image: ImageRecord, where: str, first: str, notes: dict[str, list[str]]
) -> list[float] | None:
    """The box, clipped if it reaches beyond the image; None if nothing is left of it."""
    box = entry.get("bbox")
    try:
        x, y, width, height = (float(number) for number in box)  # type: ignore[union-attr]
        good = math.isfinite(x + y + width + height)
    except (TypeError, ValueError):
        good = False
    if not good:
        raise UsageError(f"{where} has no 'bbox' of 4 numbers x, y, width, height, but {box!r}.")
    left, top, right, bottom = max(x, 0), max(y, 0), min(x + width, image.width), min(y + height, image.height)
    if right <= left or bottom <= top:
        notes["have a box without area in the image and are left out"].append(first)
        return None
    # Within a pixel it is rounding, and published evaluations count with the numbers as they are.
    if max(-x, -y, x + width - image.width, y + height - image.height) > 1:
        notes["have a box that reaches beyond the image and was clipped"].append(first)
        return [left, top, right - left, bottom - top]
    return [x, y, width, height]


def _polygons(segmentation: list[Any]) -> list[Any]:
    """Some files hold one polygon without the list around it."""
    return segmentation if not segmentation or isinstance(segmentation[0], list) else [segmentation]


def _read_segmentation(
    entry: Annotation, image: ImageRecord, where: str, first: str, notes: dict[str, list[str]]
) -> Any:
    """The run-length code or the polygons with 3 points and more; [] if no polygon has as many."""
    segmentation = entry.get("segmentation")
    if not segmentation:
        raise UsageError(f"{where} has no segmentation. Add one, or train on boxes alone with task.masks=false.")
    if isinstance(segmentation, dict):
        size, counts = segmentation.get("size"), segmentation.get("counts")
        if size != [image.height, image.width]:
            raise UsageError(f"{where} has a mask of size {size}, its image is {[image.height, image.width]}.")
        try:
            good = sum(counts) == image.height * image.width if isinstance(counts, list) else isinstance(counts, str)
            if good and isinstance(counts, str):
                mask_api().area(segmentation)
        except UsageError:
            raise
        except Exception:  # the decoder raises several kinds
            good = False
        if not good:
            raise UsageError(f"{where} has run-length 'counts' that do not fit its size {size}.")
        return segmentation
    try:
        polygons = _polygons(segmentation)
        good = all(math.isfinite(sum(polygon)) and len(polygon) % 2 == 0 for polygon in polygons)
    except (TypeError, IndexError, KeyError):
        good = False
    if not good:
        raise UsageError(f"{where} has a segmentation that is neither polygons [[x, y, x, y, …], …] nor a code.")
    kept = [polygon for polygon in polygons if len(polygon) >= 6]
    if len(kept) < len(polygons):
        notes["have polygons of fewer than 3 points, which are left out"].append(first)
    return kept
