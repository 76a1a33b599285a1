"""Measures that torchmetrics does not have."""

from swinscale.metrics.coco import CocoMetric

__all__ = ["CocoMetric"]
