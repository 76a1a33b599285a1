"""Pictures of how a segmenter does, at each evaluation of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from swinscale.diagnose.colours import class_colours
from swinscale.diagnose.instrument import Instrument, Reading, View, inspection, spread
from swinscale.diagnose.pictures import keep_picture, to_picture
from swinscale.diagnose.segmentation import Example, segmentation_grid
from swinscale.parallel import is_sharded
from swinscale.tasks.segment import Segment

SHOWN = 4


class SegmentationExamples(Instrument):
    """Writes ``examples/step-….png`` in the run's directory: the same few evaluation pictures, their classes, the truth and the errors.

    Args:
        directory: of the run.
        images: the evaluation images, a data set with items ``[0, index]``: dictionaries of ``image`` (C, H, W), ``target`` (H, W) and
            ``name``; without ``image`` where it cannot be read.
    """

    name = "examples"

    def __init__(self, directory: Path, images: Any):
        self.directory, self.images = directory, images

    def after_evaluation(self, view: View, measures: Mapping[str, Any]) -> Reading | None:
        """Draws the pictures."""
        task = view.task
        assert isinstance(task, Segment)
        if not (is_sharded(task) or view.world.is_main):
            return None
        how = task.preprocessing
        examples: list[Example] = []
        with inspection(view):
            for index in spread(len(self.images), SHOWN):
                sample = self.images[0, index]
                if "image" not in sample:
                    continue
                image, truth = sample["image"], sample["target"]
                batch = {"image": image[None].to(view.device), "size": torch.tensor([image.shape[-2:]])}
                [found] = task.segment(batch)
                picture = torch.from_numpy(to_picture(image, how["mean"], how["std"])).movedim(-1, 0)
                examples.append(Example(picture, found.cpu(), truth, sample["name"]))
        if not examples or not view.world.is_main:
            return None
        given = how.get("colours")
        colours = class_colours(len(task.classes), given and [tuple(colour) for colour in given])
        grid = segmentation_grid(examples, task.classes, colours=colours)
        return Reading(warnings=keep_picture(grid, self.directory / "examples", view.step))
