"""Images with boxes and masks by (epoch, index), and batches of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from swinscale.data.coco import Annotation, CocoSource, instance_mask
from swinscale.data.dataset import EpochDataset, Sample
from swinscale.data.images import CorruptImage, decode_as_annotated
from swinscale.errors import UsageError
from swinscale.torchvision_cpu import ensure_torchvision

ensure_torchvision()
from torchvision import tv_tensors  # noqa: E402

MULTIPLE = 32
"""Images of a batch are padded to multiples of it: the coarsest stride of a pyramid."""


class DetectionDataset(EpochDataset):
    """Decoded and transformed images with what is to be found in them.

    Args:
        transform: maps a dict of tv_tensors ``image``, ``boxes``, ``labels`` and, where there are any, ``masks`` and
            ``semantic`` to one whose image is float32, see ``detection_transforms``; torchvision's v2 transforms will do.
        masks: samples hold masks; without it no segmentation is needed.
        replace_corrupt: see ``EpochDataset``.
        semantic: also a map of classes: "instances": made from the instances, smaller ones on top, K where there is none
            (K classes); or a folder of PNG files named as the images are, whose pixels are classes (255: ignored).

    An item holds ``image`` (C, H, W) float32, ``boxes`` (n, 4) float32 x1, y1, x2, y2 in its pixels, ``labels`` (n,) int64,
    ``masks`` (n, H, W) bool, ``semantic`` (H, W) int64, ``image_id``, ``original_size`` (2,) int64 height, width, ``annotations``
    (those of the file, crowds included, in original pixels), ``index`` and ``skipped``. Crowds are no targets.

    An image whose EXIF orientation turns it is taken the way up that its annotations were made for.
    """

    def __init__(
        self,
        source: CocoSource,
        transform: Any,
        channels: int = 3,
        seed: int = 0,
        masks: bool = True,
        replace_corrupt: bool = True,
        semantic: Literal["instances"] | Path | None = None,
    ):
        super().__init__(source, transform, channels, seed, replace_corrupt)
        self.masks, self.semantic = masks, semantic
        if isinstance(semantic, Path):
            _check_maps(semantic, source)
        elif semantic not in (None, "instances"):
            raise UsageError(f"semantic={semantic!r} is not allowed: give 'instances', a folder (a Path) or None.")

    def sample(self, chosen: int, epoch: int, index: int) -> Sample:
        after = self.transformed(self._load(chosen), epoch, index)
        found = {name: value.as_subclass(Tensor) for name, value in after.items()}
        if not self.masks:
            found.pop("masks", None)
        record = self.source.images[chosen]
        size = torch.tensor([record.height, record.width])
        more = {"image_id": record.id, "original_size": size, "annotations": self.source.annotations[chosen]}
        return {**found, **more}

    def decode(self, index: int) -> Tensor:
        """The pixels (C, H, W) of one image, untransformed, the way up that its annotations were made for.

        Raises:
            CorruptImage: if it cannot be read, or has another size than its annotations say.
        """
        record = self.source.images[index]
        return decode_as_annotated(*self.read(index), self.channels, (record.height, record.width))

    def _load(self, index: int) -> Sample:
        """The sample before the transform."""
        name, record = self.source.names[index], self.source.images[index]
        size = (record.height, record.width)
        pixels = self.decode(index)
        annotations = self.source.annotations[index]
        things = [annotation for annotation in annotations if not annotation["iscrowd"]]
        corners = torch.tensor([annotation["bbox"] for annotation in things], dtype=torch.float64).reshape(-1, 4)
        corners[:, 2:] += corners[:, :2]
        corners = torch.minimum(corners.clamp(min=0), torch.tensor(size[::-1] * 2))
        sample: Sample = {
            "image": tv_tensors.Image(pixels),
            "boxes": tv_tensors.BoundingBoxes(corners.float(), format="XYXY", canvas_size=size),
            "labels": torch.tensor([annotation["label"] for annotation in things], dtype=torch.int64),
        }
        needs_masks = self.masks or getattr(self.transform, "needs_masks", False)
        used = annotations if self.semantic == "instances" else things if needs_masks else []
        try:
            masks = [instance_mask(annotation, *size) for annotation in used]
        except UsageError as error:  # a code that fails only when it is decoded
            raise CorruptImage(name, str(error)) from error
        if needs_masks:
            mine = [mask for mask, annotation in zip(masks, used, strict=True) if not annotation["iscrowd"]]
            sample["masks"] = tv_tensors.Mask(torch.stack(mine) if mine else torch.zeros(0, *size, dtype=torch.bool))
        if self.semantic == "instances":
            classes = semantic_from_instances(annotations, masks, size, len(self.source.classes))
            sample["semantic"] = tv_tensors.Mask(classes)
        if isinstance(self.semantic, Path):
            sample["semantic"] = tv_tensors.Mask(_read_map(self.semantic, name, size))
        return sample

    @staticmethod
    def collate(samples: list[Sample]) -> dict[str, Any]:
        """Stacks samples into a batch; ones without an image (unreadable) only add to ``skipped``.

        Returns:
            ``image`` (B, C, H, W), padded with zeros at the right and bottom to the largest of the batch, in multiples of
            32; ``size`` and ``original_size`` (B, 2) int64 height, width without padding, before and after the transform
            respectively; ``targets``: B dicts of boxes, labels and, where there are any, masks and semantic, not padded;
            ``image_id`` and ``annotations``: lists of B; ``index`` (B,) int64; ``skipped``.
        """
        read = [sample for sample in samples if "image" in sample]
        sizes = torch.tensor([sample["image"].shape[-2:] for sample in read], dtype=torch.int64).reshape(-1, 2)
        batch: dict[str, Any] = {"image": torch.empty(0), "size": sizes}
        if read:
            height, width = (-(-int(side) // MULTIPLE) * MULTIPLE for side in sizes.amax(0))
            borders = [(0, width - int(w), 0, height - int(h)) for h, w in sizes]
            batch["image"] = torch.stack([F.pad(s["image"], b) for s, b in zip(read, borders, strict=True)])
        originals = [sample["original_size"] for sample in read]
        batch["original_size"] = torch.stack(originals) if read else sizes
        wanted = ("boxes", "labels", "masks", "semantic")
        batch["targets"] = [{name: sample[name] for name in wanted if name in sample} for sample in read]
        batch["image_id"] = [sample["image_id"] for sample in read]
        batch["annotations"] = [sample["annotations"] for sample in read]
        batch["index"] = torch.tensor([sample["index"] for sample in read], dtype=torch.int64)
        batch["skipped"] = [entry for sample in samples for entry in sample["skipped"]]
        return batch


def semantic_from_instances(
    annotations: list[Annotation], masks: list[Tensor], size: tuple[int, int], background: int
) -> Tensor:
    """A map (height, width) int64 of labels: crowds below, then instances, smaller ones on top; ``background`` elsewhere."""
    classes = torch.full(size, background)
    pairs = list(zip(annotations, masks, strict=True))
    for annotation, mask in sorted(pairs, key=lambda pair: (not pair[0]["iscrowd"], -int(pair[1].sum()))):
        classes[mask] = annotation["label"]
    return classes


def _map_file(folder: Path, name: str) -> Path:
    return folder / f"{Path(name).stem}.png"


def _check_maps(folder: Path, source: CocoSource) -> None:
    if not folder.is_dir():
        raise UsageError(f"semantic: no such folder: {folder}. It needs a PNG file per image.")
    there = {path.name for path in folder.iterdir()}
    if missing := [name for name in source.names if _map_file(folder, name).name not in there]:
        raise UsageError(
            f"semantic: {len(missing)} of {len(source)} images have no map in {folder}; the first: "
            f"{_map_file(folder, missing[0]).name} for {missing[0]}."
        )


def _read_map(folder: Path, name: str, size: tuple[int, int]) -> Tensor:
    """Classes (height, width) int64 of a PNG file, whose pixels are grey values or indices of a palette."""
    path = _map_file(folder, name)
    try:
        with Image.open(path) as picture:
            classes = np.array(picture).astype(np.int64)
    except Exception as error:  # Pillow's decoders raise nearly anything on broken files
        raise CorruptImage(name, f"its map {path} cannot be read: {' '.join(str(error).split())[:120]}") from error
    if classes.shape != size:
        shape = "×".join(map(str, classes.shape))
        raise CorruptImage(name, f"its map {path} is {shape}, not one class for each of {size[0]}×{size[1]} pixels")
    return torch.from_numpy(classes)
