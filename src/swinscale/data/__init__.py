"""Images and films: sources, decoding, transforms, masks and the loader."""

from swinscale.data.class_lists import ClassList, class_list
from swinscale.data.clip_transforms import clip_eval_transform, clip_train_transform
from swinscale.data.clips import ClipDataset, Sampling
from swinscale.data.coco import CocoSource, instance_mask, open_coco
from swinscale.data.dataset import ImageDataset, channel_statistics, collate
from swinscale.data.detection import DetectionDataset
from swinscale.data.detection_transforms import detection_eval_transform, detection_train_transform
from swinscale.data.film_sources import open_films
from swinscale.data.frames import Timeline, read_frames
from swinscale.data.images import CorruptImage, decode_image
from swinscale.data.loader import EpochLoader
from swinscale.data.masking import MaskConfig, mask_for_sample
from swinscale.data.segment_transforms import segment_eval_transform, segment_train_transform
from swinscale.data.segments import LabelRule, SegmentDataset, SegmentSource, open_segments
from swinscale.data.sources import Source, open_source, split_source, subset_per_class
from swinscale.data.transforms import eval_transform, normalisation, simmim_transform, train_transform

__all__ = [
    "ClassList",
    "ClipDataset",
    "CocoSource",
    "CorruptImage",
    "DetectionDataset",
    "EpochLoader",
    "ImageDataset",
    "LabelRule",
    "MaskConfig",
    "Sampling",
    "SegmentDataset",
    "SegmentSource",
    "Source",
    "Timeline",
    "channel_statistics",
    "class_list",
    "clip_eval_transform",
    "clip_train_transform",
    "collate",
    "decode_image",
    "detection_eval_transform",
    "detection_train_transform",
    "eval_transform",
    "instance_mask",
    "mask_for_sample",
    "normalisation",
    "open_coco",
    "open_films",
    "open_segments",
    "open_source",
    "read_frames",
    "segment_eval_transform",
    "segment_train_transform",
    "simmim_transform",
    "split_source",
    "subset_per_class",
    "train_transform",
]
