"""Tasks: a model with its objective and its measures."""

from swinscale.heads.config import DetectConfig, SegmentConfig
from swinscale.tasks.base import Batch, Task
from swinscale.tasks.classify import Classify, ClassifyConfig
from swinscale.tasks.detect import Detect
from swinscale.tasks.segment import Segment
from swinscale.tasks.simmim import Reconstruction, SimMIM, SimMIMConfig, normalise_locally
from swinscale.tasks.video import ClassifyVideo, VideoConfig

__all__ = [
    "Batch",
    "Classify",
    "ClassifyConfig",
    "ClassifyVideo",
    "Detect",
    "DetectConfig",
    "Reconstruction",
    "Segment",
    "SegmentConfig",
    "SimMIM",
    "SimMIMConfig",
    "Task",
    "VideoConfig",
    "normalise_locally",
]
