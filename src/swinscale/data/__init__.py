"""Images: sources, decoding, transforms, masks and the loader."""

from swinscale.data.coco import CocoSource, instance_mask, open_coco
from swinscale.data.dataset import ImageDataset, channel_statistics, collate
from swinscale.data.detection import DetectionDataset
from swinscale.data.detection_transforms import detection_eval_transform, detection_train_transform
from swinscale.data.images import CorruptImage, decode_image
from swinscale.data.loader import EpochLoader
from swinscale.data.masking import MaskConfig, mask_for_sample
from swinscale.data.sources import Source, open_source, split_source, subset_per_class
from swinscale.data.transforms import eval_transform, normalisation, simmim_transform, train_transform

__all__ = [
    "CocoSource",
    "CorruptImage",
    "DetectionDataset",
    "EpochLoader",
    "ImageDataset",
    "MaskConfig",
    "Source",
    "channel_statistics",
    "collate",
    "decode_image",
    "detection_eval_transform",
    "detection_train_transform",
    "eval_transform",
    "instance_mask",
    "mask_for_sample",
    "normalisation",
    "open_coco",
    "open_source",
    "simmim_transform",
    "split_source",
    "subset_per_class",
    "train_transform",
]
