"""What watches the runs of recipes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from swinscale.data import ImageDataset
from swinscale.data.clips import ClipDataset
from swinscale.diagnose.instrument import Instrument
from swinscale.diagnose.mim import MaskedImageModelling, ProbeData
from swinscale.diagnose.segmentation_examples import SegmentationExamples
from swinscale.diagnose.vitals import Vitals
from swinscale.tasks import Segment, SimMIM

if TYPE_CHECKING:
    from swinscale.recipes.base import Built


def instruments(built: Built, directory: Path) -> list[Instrument]:
    """The instruments of a run into ``directory``, by its settings."""
    found: list[Instrument] = [Vitals(built.recipe.train.diagnose_every)]
    if isinstance(built.task, SimMIM):
        options, probe = built.task.config, _probe_data(built)
        every = {"probe_every": options.probe_every, "evaluate_every": built.recipe.train.eval_every}
        found.append(
            MaskedImageModelling(directory, built.eval_data, probe=probe, **every, probe_stage=options.probe_stage)
        )
    if isinstance(built.task, Segment):
        found.append(SegmentationExamples(directory, built.eval_data))
    return found


def _probe_data(built: Built) -> ProbeData | None:
    """Training images as they are evaluated, and evaluation images, where both have labels of the same classes."""
    train, held = built.train_data, built.eval_data
    if train.source.labels is None or train.source.classes != held.source.classes:
        return None
    if isinstance(held, ClipDataset):
        how: dict[str, Any] = {"fit": held.fit, "channels": held.channels, "replace_corrupt": False}
        return ProbeData(ClipDataset(train.source, held.transform, held.sampling, **how), held)
    return ProbeData(ImageDataset(train.source, held.transform, train.channels, replace_corrupt=False), held)
