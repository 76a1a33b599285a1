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
from swinscale.suites.video import KINETICS400, VideoSuite

SUITES: dict[str, Suite] = {suite.name: suite for suite in (IMAGENET, IMAGENET_V2, COCO, ADE20K, KINETICS400)}


def get_suite(name: str) -> Suite:
    """The suite of that name.

    Raises:
        UsageError: if there is none.
    """
    if name not in SUITES:
        raise UsageError(f"Unknown suite '{name}'.{suggest(name, SUITES)} Suites that exist: {', '.join(SUITES)}.")
    return SUITES[name]


def evaluate_suite(
    name: str, weights: str | Path, data: str, options: Options | None = None, out: Path | None = None
) -> Outcome:
    """Measures weights by a suite's published protocol and prints the result beside the published one.

    Args:
        weights: a file or directory in any layout, or a repository of the Hub.
        data: the suite's images (``swinscale.data.open_source``, for COCO ``swinscale.data.coco.open_coco``, for ADE20K
            ``swinscale.data.segments.open_segments``), or its films (``swinscale.data.film_sources.open_films``).
        out: file for the result as JSON.

    Raises:
        UsageError: for an unknown suite, images that are not laid out as the suite's, or another kind of model.
    """
    suite, options = get_suite(name), options or Options()
    if (options.clips or options.crops) and not isinstance(suite, VideoSuite):
        raise UsageError(f"--clips and --crops are views of films, and --suite {name} has images: leave them out.")
    outcome = suite.measure(weights, data, options)
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
    "KINETICS400",
    "SUITES",
    "ClassificationSuite",
    "DetectionSuite",
    "ImageProtocol",
    "Measure",
    "Options",
    "Outcome",
    "SegmentationSuite",
    "Suite",
    "VideoSuite",
    "evaluate_suite",
    "get_suite",
]
