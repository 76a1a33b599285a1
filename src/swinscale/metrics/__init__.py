"""Measures that torchmetrics does not have, and how tables of articles count."""

from swinscale.metrics.coco import CocoMetric
from swinscale.metrics.segmentation import SegmentationMetric

__all__ = ["CocoMetric", "SegmentationMetric"]
