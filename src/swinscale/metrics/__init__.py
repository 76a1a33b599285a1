"""Measures that are more than a mean over samples."""

from __future__ import annotations

from swinscale.metrics.coco import CocoMetric

__all__ = ["CocoMetric"]
