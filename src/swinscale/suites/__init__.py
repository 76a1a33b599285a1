"""Evaluation against published tables: the published protocol on the published images, and both numbers side by side.

A suite is an entry of ``SUITES``: an object with a name and a ``measure`` (``base.Suite``). Whatever differs from what
was published is said, and then nothing is compared.
"""

from __future__ import annotations

from pathlib import Path

from swinscale.config import suggest
from swinscale.errors import UsageError
from swinscale.suites.base import Measure, Options, Outcome, Suite, print_outcome, write_outcome
from swinscale.suites.classification import IMAGENET, IMAGENET_V2, ClassificationSuite, ImageProtocol
from swinscale.suites.detection import COCO, DetectionSuite
from swinscale.suites.segmentation import ADE20K, SegmentationSuite

SUITES: dict[str, Suite] = {suite.name: suite for suite in (IMAGENET, IMAGENET_V2, COCO, ADE20K)}
WITHOUT_TASK = {"kinetics400": "video classification"}
"""Suites whose task this version does not have."""


def get_suite(name: str) -> Suite:
    """The suite of that name.

    Raises:
        UsageError: if there is none, or its task does not exist yet.
    """
    if name in WITHOUT_TASK:
        raise UsageError(
            f"--suite {name} needs the task of {WITHOUT_TASK[name]}, which this version does not have. Suites that "
            f"exist: {', '.join(SUITES)}."
        )
    if name not in SUITES:
        raise UsageError(f"Unknown suite '{name}'.{suggest(name, SUITES)} Suites that exist: {', '.join(SUITES)}.")
    return SUITES[name]


def evaluate_suite(
    name: str, weights: str | Path, data: str, options: Options | None = None, out: Path | None = None
) -> Outcome:
    """Measures weights by a suite's published protocol and prints the result beside the published one.

    Args:
        weights: a file or directory in any layout, or a repository of the Hub.
        data: the suite's images (``swinscale.data.open_source``, for COCO ``swinscale.data.coco.open_coco``,
            for ADE20K ``swinscale.data.segments.open_segments``).
        out: file for the result as JSON.

    Raises:
        UsageError: for an unknown suite, images that are not laid out as the suite's, or another kind of model.
    """
    outcome = get_suite(name).measure(weights, data, options or Options())
    if outcome.main:
        print_outcome(outcome)
        if out is not None:
            write_outcome(outcome, out)
    return outcome


__all__ = [
    "ADE20K",
    "COCO",
    "IMAGENET",
    "IMAGENET_V2",
    "SUITES",
    "ClassificationSuite",
    "DetectionSuite",
    "ImageProtocol",
    "Measure",
    "Options",
    "Outcome",
    "SegmentationSuite",
    "Suite",
    "evaluate_suite",
    "get_suite",
]
