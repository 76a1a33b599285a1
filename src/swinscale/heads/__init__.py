"""Detectors: proposals, heads over regions, and what is done with their detections."""

from swinscale.heads.config import DetectConfig
from swinscale.heads.detections import Detections
from swinscale.heads.detector import Detector

__all__ = ["DetectConfig", "Detections", "Detector"]
